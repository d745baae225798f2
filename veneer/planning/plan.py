"""Whether a fine-tune fits, and what to change if it does not: `veneer plan`, and what `veneer train` looks at first."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch

from veneer.config import Dtype, LoraConfig, Quantization, Recipe
from veneer.errors import VeneerError
from veneer.machine import available_bytes, current_bytes
from veneer.models.load import uses_gpu
from veneer.ops.blocks import Recompute
from veneer.planning.machines import MACHINES
from veneer.planning.memory import Run, estimate
from veneer.planning.shapes import shape_text, skeleton_maker, stored_as
from veneer.planning.speed import measure

Device = Literal["auto", "cpu", "cuda"]
CONTEXT = 720_000_000  # of a GPU's memory: its context and torch's kernels, as measured on an H100 and an H200
HOST_LIBRARIES = (
    300_000_000  # of main memory, which CUDA's libraries take in a process that uses a GPU: measured there, 268 MB
)
Kind = Literal["full", "lora", "qlora"]
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
LIMITS = {"batch_size": 1 << 20, "seq_len": 1 << 24, "rank": 1 << 16, "grad_accumulation": 1 << 20}
TOKENS = 1 << 31  # of a padded pass: batch_size times seq_len
WORTH_IT = 0.99  # of the memory before: a change that leaves more is none
LEAST_RANK, LEAST_LENGTH = 8, 256  # below these nothing smaller is proposed
LARGEST = {"batch": "batch_size", "length": "seq_len", "rank": "rank"}


def plan(
    model: str | Path | dict[str, int],
    *,
    method: Kind = "qlora",
    batch_size: int = 1,
    seq_len: int = 2048,
    rank: int = 16,
    targets: str | list[str] = "all-linear",
    lora: LoraConfig | None = None,
    quantize: Quantization = "nf4",
    double_quant: bool = True,
    dtype: Dtype = "bfloat16",
    grad_accumulation: int = 1,
    recompute: Recompute = "none",
    packing: bool = True,
    evaluate: bool = True,
    guard: bool = True,
    device: Device = "auto",
    budget: str | int | None = None,
    largest: str | None = None,
    time: bool = False,
) -> dict[str, Any]:
    """What a fine-tune of `model` takes of memory, and whether it fits. Only a config is read.

    Args:
        model: as `load` takes it, or sizes of a Llama as `planning.shapes.NAMES` has them: {"layers": 32, ...}. method: "full", "lora", or "qlora": on a base in `quantize`.
        seq_len: tokens of the longest row. lora: all of the adapter's settings, in place of rank and targets.
        evaluate: whether rows are held out and looked at between the steps. guard: whether a copy of the adapter and its
            optimizer is kept to go back to, as `train.guard` says.
        device: "cpu", "cuda", which need not be here, or "auto": what `budget` names has, else this machine.
        budget: bytes, a text as "24GB" (10^9) or "24GiB" (2^30), or one of `planning.machines`, as "rtx-4090"; left out: what
            is free on this machine now.
        largest: "batch", "length" or "rank": the largest that fits is looked for, the rest being as it is. A batch is one
            padded pass, as packed rows go through the model a few at a time, however many there are.
        time: also measure some layers of the model's shapes on this machine, some seconds long. Where that cannot be done a
            note says why.

    Returns:
        peak_bytes: the most in any phase of the run, over a process that has imported the library, on a GPU of its memory;
        phases, of which merge is no part of the run; parts of the peak in training; process_bytes, what such a process takes
        itself; budget_bytes, fits; notes, on what a guess was made; changes, what would make it fit, the cheapest first, each with its cost and its peak;
        largest; host: the same of main memory, for a GPU; seconds_per_step and tokens_per_second; and what was asked.

    Raises:
        VeneerError: no such model, or settings that cannot be; all at once.
        CannotPlanError: the model's code does not run without numbers.
    """
    if problems := _problems(locals()):
        raise VeneerError(problems)
    config = lora or LoraConfig(r=rank, alpha=2 * rank, targets=targets)
    run = Run(
        "full" if method == "full" else "lora", quantize if method == "qlora" else None, double_quant,
        getattr(torch, dtype), config, batch_size, seq_len, grad_accumulation, recompute, packing, evaluate,
        device=_device(device, budget), guard=guard,
    )  # fmt: skip
    named = str(model) if isinstance(model, Path) else model
    found = planned(named, run, budget, largest)
    if time:
        add_time(found, named, run)
    return found


def add_time(found: dict[str, Any], model: str | dict[str, int], run: Run, supervised: float = 1.0) -> None:
    """Put the seconds of a step into a plan, the tokens a second, and of a forward pass the seconds of a token, measured here;
    or a note on why they were not."""
    if run.device == "cuda" and not torch.cuda.is_available():
        found["notes"].append("time: it is measured, and this machine has no GPU")
        return
    try:
        speed = measure(skeleton_maker(model)[0](), run, found["trainable_parameters"], supervised)
    except VeneerError as error:
        found["notes"] += [f"time: not measured: {problem}" for problem in error.problems]
        return
    found |= {
        "seconds_per_step": speed.seconds, "tokens_per_second": speed.tokens / speed.seconds,
        "forward_seconds_per_token": speed.forward,
    }  # fmt: skip


def planned(
    model: str | dict[str, int], run: Run, budget: str | int | None = None, largest: str | None = None
) -> dict[str, Any]:
    """`plan` of a `Run`, without its time."""
    make, notes = skeleton_maker(model)
    run = _as_stored(model, run)
    own = current_bytes() if run.device == "cpu" else CONTEXT
    room, host = _room(run.device, budget)
    found = estimate(make(), run)
    fits = found.peak + own <= room
    result = {
        "model": model if isinstance(model, str) else shape_text(model),
        **found.about,
        **run.asked(),
        "peak_bytes": found.peak,
        "phases": found.phases,
        "parts": found.parts,
        "process_bytes": own,
        "budget_bytes": room,
        "fits": fits,
        "notes": notes,
        "changes": [] if fits else changes(make, run, room - own),
        **({} if largest is None else {"largest": {largest: find_largest(make, run, LARGEST[largest], room - own)}}),
    }
    if run.device == "cuda":
        process = current_bytes() + HOST_LIBRARIES
        enough = host is None or found.host_peak + process <= host
        result["host"] = {
            "peak_bytes": found.host_peak, "phases": found.host, "process_bytes": process, "budget_bytes": host, "fits": enough,
        }  # fmt: skip
        result["fits"] = fits and enough
    return result


def _as_stored(model: str | dict[str, int], run: Run) -> Run:
    """With what the model's files say of its weights."""
    if (found := stored_as(model)) is None:
        return run
    quantization, dtype = found
    if quantization is None:
        return run._replace(stored=getattr(torch, dtype))
    if run.method == "full":
        raise VeneerError(
            f"method full: {model} is stored in {quantization}, and such weights cannot be trained",
            hint="take the model in 16 bits, or method lora",
        )
    return run._replace(quantize=cast(Any, quantization))


def _device(device: Device, budget: str | int | None) -> Literal["cpu", "cuda"]:
    """Where a run is planned for.

    Raises:
        VeneerError: the budget is of a machine that has no such device.
    """
    named = MACHINES.get(str(budget).lower())
    if device == "auto":
        return "cuda" if (named.vram if named else uses_gpu("auto")) else "cpu"
    if named is not None and bool(named.vram) != (device == "cuda"):
        raise VeneerError(f"budget: found {budget}, which has no memory for device {device}")
    return device


def _room(device: str, budget: str | int | None) -> tuple[int, int | None]:
    """Bytes for a run on a device, and on a GPU those of main memory, where they are known."""
    named = MACHINES.get(str(budget).lower())
    if device == "cpu":
        return (available_bytes() + current_bytes() if budget is None else bytes_of(budget)), None
    if named is not None:
        return named.vram, None
    if budget is not None:
        return bytes_of(budget), None
    if not torch.cuda.is_available():
        raise VeneerError(
            "budget: this machine has no GPU whose memory could be looked at",
            hint=f"give a size, or one of {', '.join(name for name, machine in MACHINES.items() if machine.vram)}",
        )
    return torch.cuda.mem_get_info()[0] + CONTEXT, available_bytes() + current_bytes()


def run_of(recipe: Recipe, rows: tuple[int, ...], passes: int, held_out: int, budget: str | int | None = None) -> Run:
    """A recipe's, on data whose `training.batches.LargestPass` this is, on the device that a budget's machine has."""
    train = recipe.train
    device = _device(cast(Any, recipe.device), budget) if budget is not None else None
    return Run(
        recipe.method, recipe.quantize, recipe.double_quant, getattr(torch, recipe.dtype), recipe.lora,
        train.batch_size, max(rows), train.grad_accumulation, train.recompute, recipe.data.packing,
        recipe.data.eval is not None, rows, passes, held_out or None,
        device or ("cuda" if uses_gpu(recipe.device) else "cpu"), guard=train.guard,
    )  # fmt: skip


def changes(make: Callable[[], Any], run: Run, room: int) -> list[dict[str, Any]]:
    """Each change that alone makes a run fit into `room` bytes, the cheapest first; if none does, several together."""

    def peak(changed: Run) -> int | float:
        try:
            return estimate(make(), changed).peak
        except VeneerError:  # as NF4, of a model without linear layers
            return math.inf

    alone = [(change, peak(change.run)) for change in _smaller(run)]
    if fitting := [_told([change], int(size)) for change, size in alone if size <= room]:
        return fitting
    together: dict[str, Change] = {}  # of one setting the last
    now, least = run, peak(run)
    while least > room:
        for change in _smaller(now):
            if (size := peak(change.run)) < WORTH_IT * least:
                together[change.setting] = change
                now, least = change.run, size
                break
        else:
            return []
    return [_told(list(together.values()), int(least))]


class Change(NamedTuple):
    """A run that takes less: which setting is another, what it is now, and what that costs."""

    setting: str
    what: str
    cost: str
    run: Run


def _told(together: list[Change], peak: int) -> dict[str, Any]:
    what, cost = (", ".join(part) for part in zip(*((x.what, x.cost) for x in together), strict=True))
    return {"change": what, "cost": cost, "peak_bytes": peak}


def _smaller(run: Run) -> Iterator[Change]:
    """One step less each, the cheapest first."""
    if not run.packing:  # takes no less where the model's attention does not take packed rows
        changed = run._replace(packing=True, rows=(), passes=None, seq_len=max(run.rows, default=run.seq_len))
        yield Change("packing", "packing", "the same rows, faster", changed)
    if run.batch_size > 1:
        half = next(size for size in range(run.batch_size // 2, 0, -1) if run.batch_size % size == 0)
        more = run.grad_accumulation * (run.batch_size // half)
        fewer = tuple(sorted(run.rows, reverse=True)[:half])  # of a packed pass that has no more rows all stay
        passes = None if run.passes is None else run.passes * (run.batch_size // half)
        changed = run._replace(batch_size=half, grad_accumulation=more, rows=fewer, passes=passes)
        yield Change(
            "batch", f"batch_size {half}, grad_accumulation {more}", "the same steps, a little slower", changed
        )
    levels = get_args(Recompute)
    slower: tuple[tuple[str, str], ...] = (("mlp", "about 5% slower"), ("full", "about 10% slower"))
    if run.device == "cuda":  # whole layers are made again there, whichever is asked for
        slower = (("full", "about a third slower"),)
    for how, cost in slower:
        if levels.index(how) > levels.index(run.recompute):
            yield Change("recompute", f"recompute {how}", cost, run._replace(recompute=how))  # type: ignore[arg-type]
    if run.method == "lora" and run.quantize is None:
        cost = "up to a fifth slower, and a little of the quality"
        yield Change("quantize", "quantize nf4", cost, run._replace(quantize="nf4"))
    if run.method == "lora" and run.lora.r > LEAST_RANK:
        half = run.lora.r // 2
        smaller = run.lora.model_copy(update={"r": half, "alpha": run.lora.alpha / 2})
        yield Change("rank", f"rank {half}", "the adapter can hold less", run._replace(lora=smaller))
    if run.seq_len > LEAST_LENGTH:
        half = run.seq_len // 2
        cost = "longer rows lose the start of their prompt"
        held_out = run.held_out and min(run.held_out, half)
        changed = run._replace(seq_len=half, rows=tuple(min(row, half) for row in run.rows), held_out=held_out)
        yield Change("length", f"max_length {half}", cost, changed)
    if run.method == "full":
        yield Change("method", "method lora", "an adapter in place of every weight", run._replace(method="lora"))


def find_largest(make: Callable[[], Any], run: Run, what: str, room: int) -> int:
    """The largest batch_size (rows in one padded pass, without an evaluation), seq_len or rank with which a run fits into
    `room` bytes; 0: none does."""
    most = min(LIMITS[what], TOKENS // run.seq_len if what == "batch_size" else LIMITS[what])

    def fits(value: int) -> bool:
        changed = {
            "batch_size": lambda: run._replace(batch_size=value, packing=False, evaluate=False),
            "seq_len": lambda: run._replace(seq_len=value),
            "rank": lambda: run._replace(lora=run.lora.model_copy(update={"r": value})),
        }[what]()
        try:
            return estimate(make(), changed).peak <= room
        except VeneerError:  # a rank above the width of a layer
            return False

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < most and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):  # within 2%
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def bytes_of(budget: str | int) -> int:
    """\"24GB\" is 24 x 10^9, \"24GiB\" 24 x 2^30; a number is bytes; a machine's name what its GPU has, or else the machine."""
    if (named := MACHINES.get(str(budget).lower())) is not None:
        return named.vram or named.ram
    found = _SIZE.fullmatch(str(budget))
    if isinstance(budget, bool) or found is None or not 0 < float(found[1]) < 1e30:
        raise VeneerError(
            f"budget: found {budget!r}, expected a size like 24GB, 24GiB or 24000000000, or a machine",
            hint=f"machines: {', '.join(MACHINES)}",
        )
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** _POWERS[found[2].lower()])


def _problems(given: dict[str, Any]) -> list[str]:
    problems = []
    for name, kinds in (
        ("method", get_args(Kind)), ("recompute", get_args(Recompute)), ("quantize", get_args(Quantization)),
        ("dtype", get_args(Dtype)), ("device", get_args(Device)),
    ):  # fmt: skip
        if given[name] not in kinds:
            problems.append(f"{name}: found {given[name]!r}, expected {', '.join(kinds)}")
    largest = given["largest"]
    if largest is not None and largest not in [*LARGEST]:
        problems.append(f"largest: found {largest!r}, expected {', '.join(LARGEST)}")
    elif largest == "rank" and given["method"] == "full":
        problems.append("largest: found rank, but full fine-tuning has none; expected batch or length")
    for name, most in LIMITS.items():
        value = given[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            problems.append(f"{name}: found {value!r}, expected a whole number from 1 to {most:,}")
    if not problems and given["batch_size"] * given["seq_len"] > TOKENS:
        problems.append(
            f"batch_size times seq_len: found {given['batch_size'] * given['seq_len']:,} tokens, expected at most {TOKENS:,}"
        )
    return problems
