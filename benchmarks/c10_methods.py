"""C10: what a step of rsLoRA, LoRA+, DoRA and AdaLoRA costs over one of plain LoRA, beside PEFT's DoRA over PEFT's LoRA.

python -m benchmarks.run c10        the step of C1 and, on a 4-bit base, of C2; wanted: DoRA at most 1.10, the others 1.05

All methods of a contender are adapters of one model in one process and take turns step by step, so a slow phase of the
machine meets all of them. AdaLoRA starts with half as many ranks again as it ends with: a step while ranks move is the dear
kind, one after that (by default the last 30% of a run) is nearly plain LoRA's. A whole run costs the mean of both.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import set_factors
from benchmarks.measure import Memory
from benchmarks.plan import Agreement, Benchmark, Cell, Figure, Options, Record, Result, Results, Table, ratio
from benchmarks.training import adapted_model, blocks, imports
from veneer.config import AdaLoraConfig

PLAIN, DORA = "LoRA", "DoRA"
METHODS: dict[str, dict[str, Any]] = {  # `LoraConfig`'s arguments
    PLAIN: {},
    "rsLoRA": {"rslora": True},
    "LoRA+": {},
    DORA: {"dora": True},
    "AdaLoRA, ranks moving": {"adalora": {"steps": 1000, "warmup": 0}},  # shared out at every step
    "AdaLoRA, settled": {"adalora": {"steps": 2, "warmup": 0, "settle": 0.5}},  # from the second step on
}
ADALORA = "AdaLoRA"  # of a whole run
LORA_PLUS = 16.0
MORE = 4  # times `Options.steps`: a few per cent are asked about, and the first timed step of DoRA meets fresh memory
GOALS = {"rsLoRA": 1.05, "LoRA+": 1.05, DORA: 1.10, ADALORA: 1.05}
PEER = {"veneer bf16": "PEFT bf16", "veneer nf4": "PEFT + bitsandbytes nf4"}
EXACT = "PEFT fp32"  # DoRA's first steps without 16-bit rounding: they say how far apart bf16 runs may be


def _cell(name: str, by: str, base: str) -> Cell:
    needs = ("peft", "bitsandbytes")[: 1 + ("nf4" in base)] if by == "peft" else ()
    return Cell(name, "benchmarks.c10_methods:steps", {"by": by, "base": base}, needs)


CELLS = (
    *(_cell(ours, "veneer", ours.split()[1]) for ours in PEER),
    *(_cell(theirs, "peft", ours.split()[1]) for ours, theirs in PEER.items()),
    Cell(EXACT, "benchmarks.c10_methods:exact_steps", needs=("peft",), once=True),
)


def steps(options: Options, by: str, base: str) -> Record:
    """Steps as in C1 of every method by turns: the first warm up, one is for the peak of memory, the others are timed.

    Returns, for each method: step_seconds, losses and grad_norms of the first steps, peak_bytes of one step over what was
    held before it.
    """
    imports("veneer")
    imports(by, base)
    dora = dora_adapter(options)
    model, loss_of = adapted_model(options, by, base)
    methods = dict(_veneer_methods(model, options, dora) if by == "veneer" else _peft_methods(model, options, dora))
    return _taken(model, loss_of, methods, list(blocks(options, options.warmup + 1 + MORE * options.steps)), options)


def _taken(model: Any, loss_of: Any, methods: dict[str, Any], batches: list[Any], options: Options) -> Record:
    found: Record = {name: {"step_seconds": [], "losses": [], "grad_norms": [], "peak_bytes": 0} for name in methods}
    for number, ids in enumerate(batches):
        # another is first each time: what runs after the same one always would have its caches, warm or cold
        first = number % len(methods)
        for name, (switch_on, optimizer) in [*methods.items()][first:] + [*methods.items()][:first]:
            switch_on()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            memory = Memory() if number == options.warmup else None
            began = time.perf_counter()
            loss = loss_of(model, {"input_ids": ids, "labels": ids.clone()}, ids[:, 1:].numel())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - began
            if number <= options.warmup + options.steps:  # later ones are apart by rounding alone
                found[name]["losses"].append(float(loss.detach()))
                found[name]["grad_norms"].append(float(norm))
            if memory is not None:
                found[name]["peak_bytes"] = memory.over_import()
            elif number > options.warmup:
                found[name]["step_seconds"].append(seconds)
    return found


def exact_steps(options: Options) -> Record:
    """The first steps of PEFT's DoRA in fp32: losses and grad_norms as in `steps`, nothing timed."""
    imports("veneer")
    imports("peft", "fp32")
    model, loss_of = adapted_model(options, "peft", "fp32")
    methods = {name: method for name, method in _peft_methods(model, options, dora_adapter(options)) if name == DORA}
    return _taken(model, loss_of, methods, list(blocks(options, options.warmup + 1 + options.steps)), options)


def dora_adapter(options: Options) -> Path:
    """The shared adapter as DoRA, m at the start the lengths of the rows of W; in PEFT's files, made once."""
    import veneer

    folder = Path(options.work) / "dora"
    if not folder.exists():
        model, _ = veneer.load(options.model, fused=False)
        veneer.attach(
            model, veneer.LoraConfig(r=options.rank, alpha=options.alpha, targets="all-linear", dora=True), seed=0
        )
        set_factors(model)
        veneer.save_adapter(model, folder)
    return folder


Method = tuple[str, tuple[Callable[[], Any], torch.optim.Optimizer]]  # name, what switches it on, its optimizer


def _adamw(options: Options, groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=0.0, fused=True)


def _veneer_methods(model: Any, options: Options, dora: Path) -> Iterable[Method]:
    import veneer
    from veneer.adapters.attach import adapter_parameters
    from veneer.optim.groups import parameter_groups

    for method, settings in METHODS.items():
        if not set(settings) <= set(veneer.LoraConfig.model_fields):  # an older version
            continue
        name = "default" if method == PLAIN else re.sub(r"[^a-z0-9]+", "-", method.lower().replace("+", "-plus"))
        if method == DORA:
            veneer.load_adapter(model, dora, name=name)
        elif method != PLAIN:
            config = veneer.LoraConfig(r=options.rank, alpha=options.alpha, targets="all-linear", **settings)
            veneer.attach(model, config, name=name, seed=0)
            if "adalora" not in settings:
                set_factors(model, name)
        own = adapter_parameters(model, name)
        groups = parameter_groups(own, LORA_PLUS if method == "LoRA+" else None)
        for group in groups:
            group["lr"] = options.learning_rate * group.pop("factor", 1.0)
        yield method, (lambda name=name: veneer.set_adapter(model, name), _adamw(options, groups))  # type: ignore[misc]


def _peft_methods(model: Any, options: Options, dora: Path) -> Iterable[Method]:
    model.load_adapter(str(dora), adapter_name="dora", is_trainable=True)
    for method, name in ((PLAIN, "default"), (DORA, "dora")):
        model.set_adapter(name)
        own = [p for p in model.parameters() if p.requires_grad]
        yield method, (lambda name=name: model.set_adapter(name), _adamw(options, own))  # type: ignore[misc]


def _method(result: Result, method: str) -> Result:
    """One method's part of a contender's result."""
    records = [record[method] for record in result.records if method in record]
    problem = result.problem or (None if records else "not in this version")
    return Result(Cell(f"{result.name}: {method}", result.cell.function), records, problem)


def seconds(record: Record) -> float:
    return statistics.median(record["step_seconds"])


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    table = Table("C10 what a step of each method costs over one of plain LoRA", [])
    for contender in (name for pair in PEER.items() for name in pair):
        result, ours = results[contender], contender in PEER
        plain = _method(result, PLAIN)
        whole: list[Figure] = []  # AdaLoRA in both states
        for method in (*METHODS, ADALORA) if ours else (PLAIN, DORA):
            found = _method(result, method)
            row: dict[str, Any] = dict.fromkeys(
                (
                    "contender",
                    "method",
                    "seconds a step",
                    "of plain LoRA's",
                    "wanted, at most",
                    "peak GB of a step",
                    "of plain LoRA's peak",
                )
            )
            row["contender"], row["method"], row["seconds a step"] = contender, method, found.problem
            table.rows.append(row)
            if method == ADALORA and len(whole) == 2:
                share = AdaLoraConfig().settle
                times = Figure((1 - share) * moving + share * settled for moving, settled in zip(*whole, strict=True))
                row["seconds a step"], row["of plain LoRA's"] = "a whole run", times
                _goal(table, row, times, options)
            if not found.records:
                continue
            row["seconds a step"] = found.figure(seconds)
            row["peak GB of a step"] = found.figure(lambda record: record["peak_bytes"] / 1e9)
            if method == PLAIN:
                continue
            times = ratio(found.figure(seconds), plain.figure(seconds))
            reason = None
            if ours and method == DORA:
                exact = _method(results[EXACT], DORA) if "bf16" in contender else None
                agreement = Agreement(_method(results[PEER[contender]], DORA), exact)
                reason = agreement.void(found)
                table.notes += [agreement.note(), *([reason] if reason else [])]
            row["of plain LoRA's"] = "VOID" if reason else times
            row["of plain LoRA's peak"] = ratio(found.figure("peak_bytes"), plain.figure("peak_bytes"))
            if "AdaLoRA" in method:
                whole.append(times)
            if ours:
                _goal(table, row, times, options)
    table.notes.append(
        f"{options.rows} x {options.length} tokens, all learned; the methods of a contender take turns in one process; medians of "
        f"{MORE * options.steps} steps in each; peak: of the resident set in one step, over what was held before it"
    )
    return [table]


def _goal(table: Table, row: dict[str, Any], times: Figure, options: Options) -> None:
    if row["method"] not in GOALS:
        return
    row["wanted, at most"] = goal = Figure([GOALS[row["method"]]])
    if times.median > goal.median and options.length >= Options.length:
        table.notes.append(f"NOT MET: {row['contender']}: {row['method']}: {times} of plain LoRA's time, wanted {goal}")


BENCHMARK = Benchmark("c10", "cost of the methods", "methods", CELLS, report)
