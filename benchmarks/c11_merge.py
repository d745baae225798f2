"""C11: merging an adapter and writing the model, changing between merged adapters, and combining four adapters; PEFT's too.

python -m benchmarks.run c11       r 16 on all linears of the model; wanted: merge and write 2x, TIES and DARE 5x, svd 20x

Ours goes from folders to a folder, with reading, hashing, syncing and the check against fp64; PEFT's starts with everything
in memory, and its `save_pretrained` does not sync. What comes out is compared in fp64 with what the method means, by the
definition below: `error` of the whole, which a rank of 16 mostly makes, and `above the best`, what it is more than that of
the truncated SVD in fp64.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Memory
from benchmarks.plan import Benchmark, Cell, Figure, Options, Record, Result, Results, Table, ratio
from benchmarks.training import imports, model_folder

COUNT, DENSITY = 4, 0.5
METHODS = {  # ours, PEFT's, and how many times as fast it is wanted
    "svd": ("svd", 20),
    "ties": ("ties_svd", 5),
    "dare_linear": ("dare_linear_svd", 5),
    "dare_ties": ("dare_ties_svd", 5),
}
MERGE_GOAL = 2
CHECKED = 15  # every so manyth layer is compared in fp64
MERGE, HOT = "merge and write", "change the merged adapter"


def _cells() -> list[Cell]:
    found = []
    for by in ("veneer", "peft"):
        needs = () if by == "veneer" else ("peft",)
        found.append(Cell(f"{by}: {MERGE}", "benchmarks.c11_merge:merging", {"by": by}, needs))
        found.append(Cell(f"{by}: {HOT}", "benchmarks.c11_merge:changing", {"by": by}, needs))
        found += [
            Cell(f"{by}: {method}", "benchmarks.c11_merge:combining", {"by": by, "method": method}, needs)
            for method in METHODS
        ]
    return found


CELLS = tuple(_cells())


def sources(options: Options) -> list[Path]:
    """Four adapters as training leaves them: A as it started, B small. Made once."""
    import veneer
    from veneer.adapters.attach import adapter_parameters

    folders = [Path(options.work) / f"combine{number}" for number in range(COUNT)]
    if not folders[-1].exists():
        model, _ = veneer.load(model_folder(options), fused=False)
        for number, folder in enumerate(folders):
            config = veneer.LoraConfig(r=options.rank, alpha=options.alpha, targets="all-linear")
            veneer.attach(model, config, name=f"n{number}", seed=number)
            g = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for key, value in adapter_parameters(model, f"n{number}").items():
                    if "lora_B" in key:
                        value.copy_(torch.randn(value.shape, generator=g) * 0.01)
            veneer.save_adapter(model, folder, f"n{number}", replace=True)
    return folders


def _peft(options: Options, count: int) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder(options), dtype=torch.bfloat16)
    paths = sources(options)[:count]
    model = PeftModel.from_pretrained(base, paths[0], adapter_name="n0")
    for number, path in enumerate(paths[1:], 1):
        model.load_adapter(path, adapter_name=f"n{number}")
    return model.eval()


def _once_warm(call: Any, clean: Any, times: int) -> list[float]:
    found = []
    for _ in range(times + 1):
        clean()
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found[1:]


def merging(options: Options, by: str) -> Record:
    """Seconds (median) and peak of merging one adapter and writing the model; the largest error of a sample against fp64."""
    import shutil

    imports("veneer")
    path, out = sources(options)[0], Path(options.work) / f"merged-{by}"
    clean = lambda: shutil.rmtree(out, ignore_errors=True)  # noqa: E731
    if by == "veneer":
        from veneer.models.merging import merge_files

        memory = Memory()
        times = _once_warm(lambda: merge_files(model_folder(options), [path], out), clean, 3)
        peak = memory.over_import()
    else:
        imports("peft")
        memory, times = Memory(), []
        for _ in range(2):  # a merged model is no adapter any more: each needs a new one, which is not timed
            clean()
            model = _peft(options, 1)
            began = time.perf_counter()
            model.merge_and_unload().save_pretrained(out)
            times.append(time.perf_counter() - began)
        peak = memory.over_import()
    return {"seconds": statistics.median(times), "peak_bytes": peak, **_merge_error(options, path, out)}


def _merge_error(options: Options, path: Path, out: Path) -> Record:
    """How far merged weights are from W + s B A in fp64, as a share of what rounding that to bf16 costs: mean of squares."""
    from safetensors.torch import load_file

    from veneer.adapters.peft_format import read_adapter

    base, merged = (load_file(Path(folder) / "model.safetensors") for folder in (model_folder(options), out))
    found = rounding = 0.0
    for name, one in list(read_adapter(path).factors.items())[::CHECKED]:
        exact = base[f"{name}.weight"].double() + one.scaling * one.b.double() @ one.a.double()
        found += float((merged[f"{name}.weight"].double() - exact).square().sum())
        rounding += float((exact.bfloat16().double() - exact).square().sum())
    return {"error_over_rounding": (found / rounding) ** 0.5}


def changing(options: Options, by: str) -> Record:
    """Seconds to change from one merged adapter to another, to take it out again, and whether the base is what it was."""
    imports("veneer")
    paths = sources(options)[:2]
    if by == "veneer":
        import veneer

        model, _ = veneer.load(model_folder(options))
        for number, path in enumerate(paths):
            veneer.load_adapter(model, path, f"n{number}")
        veneer.set_adapter(model, None)
        before = [p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n]
        merge: Any = lambda name: veneer.hot_merge(model, name)  # noqa: E731
        undo: Any = lambda: veneer.unmerge(model)  # noqa: E731
        merge("n0")
    else:
        imports("peft")
        model = _peft(options, 2)
        before = [p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n]
        undo = model.unmerge_adapter

        def merge(name: str) -> None:
            model.unmerge_adapter()
            model.merge_adapter([name])

        model.merge_adapter(["n0"])
    times = []
    for turn in range(6):
        began = time.perf_counter()
        merge(f"n{1 - turn % 2}")
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    undo()
    taken_out = time.perf_counter() - began
    if by == "veneer":
        veneer.set_adapter(model, None)
    after = [p.detach() for n, p in model.named_parameters() if "lora_" not in n]
    exact = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {"seconds": statistics.median(times), "undo_seconds": taken_out, "exact": exact}


def combining(options: Options, by: str, method: str) -> Record:
    """Seconds and the error of combining the four adapters to rank 16."""
    import shutil

    imports("veneer")
    paths, out = sources(options), Path(options.work) / f"combined-{by}-{method}"
    clean = lambda: shutil.rmtree(out, ignore_errors=True)  # noqa: E731
    density: dict[str, Any] = {} if method == "svd" else {"density": DENSITY}
    weights = [1.0] * COUNT
    if by == "veneer":
        import veneer

        call = lambda: veneer.combine(paths, out, method=method, weights=weights, rank=options.rank, **density)  # noqa: E731
        times = _once_warm(call, clean, 2)
    else:
        imports("peft")
        clean()
        model = _peft(options, COUNT)
        began = time.perf_counter()
        names = [f"n{number}" for number in range(COUNT)]
        model.add_weighted_adapter(
            names, weights, "mixed", combination_type=METHODS[method][0], svd_rank=options.rank, **density
        )
        times = [time.perf_counter() - began]
        model.save_pretrained(out, selected_adapters=["mixed"])
        out = out / "mixed"
    return {"seconds": statistics.median(times), **(_errors(paths, out, method) if "dare" not in method else {})}


def _errors(paths: list[Path], out: Path, method: str) -> Record:
    from veneer.adapters.peft_format import read_adapter

    files = [read_adapter(path).factors for path in paths]
    result = read_adapter(out).factors
    lost = best = whole = 0.0
    for name in list(result)[::CHECKED]:
        updates = [file[name].scaling * file[name].b.double() @ file[name].a.double() for file in files]
        exact = sum(updates) if method == "svd" else _ties(updates)
        assert isinstance(exact, Tensor)
        one = result[name]
        lost += float((exact - one.scaling * one.b.double() @ one.a.double()).square().sum())
        best += float(torch.linalg.svdvals(exact)[len(one.a) :].square().sum())
        whole += float(exact.square().sum())
    return {"error": (lost / whole) ** 0.5, "above_best": (lost / best) ** 0.5 - 1}


def _ties(updates: list[Tensor]) -> Tensor:
    """TIES with weights of 1, from the paper (Yadav et al. 2023, arXiv 2306.01708)."""
    trimmed = []
    for d in updates:
        limit = d.abs().flatten().kthvalue(d.numel() - int(DENSITY * d.numel()) + 1)[0]
        trimmed.append(torch.where(d.abs() >= limit, d, 0.0))
    stack = torch.stack(trimmed)
    agrees = torch.where(stack.sum(0) >= 0, stack > 0, stack < 0)
    return (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    return [_merge_table(results), _combine_table(results, options)]


def _times(table: Table, what: str, ours: Result, theirs: Result, goal: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "work": what,
        "veneer s": ours.problem or ours.figure("seconds"),
        "PEFT s": theirs.problem or theirs.figure("seconds"),
        "times as fast": None,
        "wanted": None if goal is None else Figure([goal]),
    }
    if ours.records and theirs.records:
        row["times as fast"] = times = ratio(theirs.figure("seconds"), ours.figure("seconds"))
        if goal is not None and times.median < goal:
            table.notes.append(f"NOT MET: {what}: {times} times PEFT's speed, wanted {goal}")
    table.rows.append(row)
    return row


def _merge_table(results: Results) -> Table:
    table = Table("C11 merging", [])
    ours, theirs = results[f"veneer: {MERGE}"], results[f"peft: {MERGE}"]
    row = _times(table, MERGE, ours, theirs, MERGE_GOAL)
    for name, result in (("veneer", ours), ("PEFT", theirs)):
        row[f"{name} peak GB"] = result.figure(lambda r: r["peak_bytes"] / 1e9) if result.records else None
        row[f"{name} error over rounding"] = result.figure("error_over_rounding") if result.records else None
    ours, theirs = results[f"veneer: {HOT}"], results[f"peft: {HOT}"]
    _times(table, HOT, ours, theirs, None).update(
        dict.fromkeys([key for key in row if key not in ("work", "veneer s", "PEFT s", "times as fast", "wanted")])
    )
    for name, result in (("veneer", ours), ("PEFT", theirs)):
        if result.records:
            exact = all(record["exact"] for record in result.records)
            table.notes.append(
                f"{name}: taken out again in {result.figure(lambda r: 1000 * r['undo_seconds'])} ms, the base is "
                + ("bit for bit what it was" if exact else "NOT what it was")
            )
    table.notes.append(
        "ours reads, checks, merges, hashes and syncs folders; PEFT's time is merge_and_unload and save_pretrained of a model in "
        "memory; error: of the merged weights against fp64, 1: what rounding to bf16 costs; peak: of the resident set over the "
        "imports, in which PEFT's model is"
    )
    return table


def _combine_table(results: Results, options: Options) -> Table:
    table = Table(f"C11 combining {COUNT} adapters of rank {options.rank} to rank {options.rank}", [])
    for method, (_, goal) in METHODS.items():
        ours, theirs = results[f"veneer: {method}"], results[f"peft: {method}"]
        row = _times(table, method, ours, theirs, goal)
        for name, result in (("veneer", ours), ("PEFT", theirs)):
            there = bool(result.records) and "error" in result.records[0]
            row[f"{name} error"] = result.figure("error") if there else None
            row[f"{name} above the best"] = result.figure("above_best") if there else None
        mine, peer = row["veneer above the best"], row["PEFT above the best"]
        if mine is not None and peer is not None and mine.median > max(peer.median, 1e-6):
            table.notes.append(f"NOT MET: {method}: error {mine} above the best, PEFT's {peer}")
    table.notes.append(
        "ours from folders to a folder; PEFT's in memory; error: of the whole update against fp64, which the rank of the result "
        "makes; above the best: as a share of the least error a matrix of that rank can have; DARE's masks differ, so no error"
    )
    return table


BENCHMARK = Benchmark("c11", "merging and combining", "merge", CELLS, report)
