"""A plan for people: `veneer plan`."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from veneer.config import EVALUATED, Recipe
from veneer.errors import RefusedError
from veneer.models.fuse import fuse
from veneer.models.load import load_tokenizer, skeleton, tokenizer_folder
from veneer.planning.memory import Run
from veneer.planning.plan import add_time, planned, run_of
from veneer.report.adapter import figure_of
from veneer.storage import atomic_file
from veneer.training.batches import largest_pass
from veneer.training.data import prepare_data
from veneer.training.packing import Order, computed, passes

WIDTH = 60  # characters of the bar
STEPS = 200  # that the run's tokens are counted in
LONG_RUN = 200  # steps from which on `train` spends some seconds to say how long they will take
FILLS = "█▓▒░▞▚▙▟▤▦▨"  # of the parts, one after the other


def plan_recipe(
    recipe: Recipe, *, force: bool = False, time: bool | int = False, budget: str | None = None
) -> dict[str, Any]:
    """The plan of a run on its own data, before its model is loaded.

    Args:
        force: a run that does not fit is planned all the same. time: also measure how long it takes, some seconds long; a number: if it
            has at least so many steps.

    Raises:
        RefusedError: it does not fit into what is free here.
        VeneerError: what the model's config, the adapter's settings or the data have wrong.
    """
    folder = tokenizer_folder(recipe.model, recipe.revision)
    tokenizer = load_tokenizer(folder)
    packs = "attention" in fuse(skeleton(str(folder)))
    run = run_of(recipe, *largest_pass(tokenizer, recipe.data, recipe.train, packs), budget)
    found = {**planned(str(folder), run, budget), "model": recipe.model}
    if not found["fits"] and not force:
        what, hint = too_large(found)
        raise RefusedError(what, hint=f"{hint}, or start it all the same with --force")
    if time is not False and not found["fits"]:
        found["notes"].append("time: not measured, as it does not fit")
    elif time is not False:
        _add_time(found, recipe, str(folder), run, tokenizer, packs, least=int(time))
    return found


def while_training(plan: dict[str, Any]) -> int:
    """The planned part of what `train` measures as its `peak_bytes`: this process, or tensors on the GPU."""
    peak = max(value for phase, value in plan["phases"].items() if phase not in ("load", "merge"))
    if plan["device"] == "cpu":
        return int(peak + plan["process_bytes"])
    return int(plan["phases"]["train"] - plan["parts"]["fragmentation"])


def too_large(plan: dict[str, Any]) -> tuple[str, str]:
    """What a run that does not fit lacks, and what to change."""
    ways = "; or ".join(f"{x['change']} ({x['cost']})" for x in plan["changes"][:3])
    where, on = plan, "on the GPU" if plan["device"] == "cuda" else "free"
    if plan["device"] == "cuda" and plan["peak_bytes"] + plan["process_bytes"] <= plan["budget_bytes"]:
        where, on = plan["host"], "free in main memory"
    what = (
        f"this run does not fit into memory: found {size(where['budget_bytes'])} {on}, expected "
        f"{size(where['peak_bytes'] + where['process_bytes'])}"
    )
    return what, f"change {ways}" if ways else "take a smaller model or a larger machine"


def _add_time(
    plan: dict[str, Any], recipe: Recipe, folder: str, run: Run, tokenizer: Any, packs: bool, least: int
) -> None:
    """How long the run takes: what its passes compute at the speed that is measured, and the evaluations."""
    config, packing = recipe.train, packs and recipe.data.packing
    train, held_out, _ = prepare_data(None, recipe.data, tokenizer, config.seed)
    samples = train.samples
    order = Order(len(samples), config.batch_size * config.grad_accumulation, config.seed)
    steps, _ = order.steps(config)
    if steps < least:
        return
    learned = sum(sample.supervised for sample in samples) / sum(len(sample.input_ids) for sample in samples)
    add_time(plan, folder, run, learned)
    if "tokens_per_second" not in plan:
        return
    tokens, looked_at = 0, min(STEPS, order.steps_per_epoch)
    for step in range(looked_at):
        rows = [samples[i] for i in order.step(step)]
        tokens += sum(
            computed(some, packing) for some in passes(rows, config.batch_size, packing, recipe.data.max_length)
        )
    seconds = steps * tokens / looked_at / plan["tokens_per_second"]
    if held_out is not None:
        times = math.ceil(steps / (config.eval_every or order.steps_per_epoch))
        groups = passes(held_out.samples, EVALUATED, packing, recipe.data.max_length)
        read = sum(computed(some, packing) for some in groups)
        seconds += times * read * plan["forward_seconds_per_token"]
    plan |= {"steps": steps, "seconds": seconds}


def describe(plan: dict[str, Any]) -> str:
    """What it takes by phase and by part, whether it fits, and what would make it fit."""
    adapter = "" if plan["rank"] is None else f", rank {plan['rank']} on {plan['targets']}"
    packed = " packed" if plan["packing"] else ""
    gpu = plan["device"] == "cuda"
    full = plan["method"] == "full"
    lines = [
        f"{plan['model']}: {plan['architecture']}, {plan['parameters']:,} parameters"
        + (", all trained" if full else f"; {plan['trainable_parameters']:,} trained"),
        f"{plan['method']}{adapter}, {plan['batch_size']} rows of {plan['seq_len']:,} tokens{packed}, "
        f"{plan['dtype']}, recompute {plan['recompute']}, on {'a GPU' if gpu else 'the CPU'}",
        *(f"note: {note}" for note in plan["notes"]),
        "",
        *_phases(plan),
        "",
        *_bar(plan),
        "",
        *_verdict(plan),
    ]
    lines += [
        f"the largest {what} that fits: {value:,}" + (" rows in one padded pass" if what == "batch" else "")
        for what, value in plan.get("largest", {}).items()
    ]
    if "seconds_per_step" in plan:
        whole = f"; {plan['steps']:,} steps: {duration(plan['seconds'])}" if "seconds" in plan else ""
        lines.append(
            f"time, measured here: {plan['seconds_per_step']:.2f} s a step, {plan['tokens_per_second']:,.0f} tokens/s{whole}"
        )
    return "\n".join(lines)


def _phases(plan: dict[str, Any]) -> list[str]:
    """A line a phase: of the GPU's memory, and of main memory."""
    columns = {"memory": plan["phases"]}
    if "host" in plan:
        columns = {"GPU": plan["phases"], "memory": plan["host"]["phases"]}
    lines = [f"{'phase':24}" + "".join(f" {name:>10}" for name in columns)]
    for phase in dict.fromkeys(phase for sizes in columns.values() for phase in sizes):
        told = "".join(f" {size(sizes[phase]) if phase in sizes else '':>10}" for sizes in columns.values())
        lines.append(f"{phase:24}{told}" + ("   afterwards, veneer merge" if phase == "merge" else ""))
    return lines


def _bar(plan: dict[str, Any]) -> list[str]:
    """All of training in one bar as long as what is needed or there, and a line a part."""
    parts = {"the program itself": plan["process_bytes"], **plan["parts"]}
    parts = {name: value for name, value in parts.items() if value > 0}
    needed, room = sum(parts.values()), plan["budget_bytes"]
    scale, bar, done = WIDTH / max(needed, room), "", 0
    lines = []
    for fill, (name, value) in zip(itertools.cycle(FILLS), parts.items(), strict=False):
        done += value
        bar += fill * (round(scale * done) - len(bar))
        lines.append(f"{fill} {name:22} {size(value):>10} {100 * value / needed:5.1f}%")
    end = round(scale * room)
    bar = f"{bar[:end]}|{bar[end:]}" if needed > room else f"{bar:·<{end}}|"
    return [f"{'training':24} {size(needed):>10}", f"{bar} {size(room)} there", *lines]


def _verdict(plan: dict[str, Any]) -> list[str]:
    needed = plan["peak_bytes"] + plan["process_bytes"]
    lines = [
        f"{'it fits' if plan['fits'] else 'it does NOT fit'}: {size(needed)} needed, {size(plan['process_bytes'])} of it by the "
        f"program itself; {size(plan['budget_bytes'])} there"
    ]
    if (host := plan.get("host")) is not None:
        there = "" if host["budget_bytes"] is None else f"; {size(host['budget_bytes'])} there"
        lines.append(f"main memory: {size(host['peak_bytes'] + host['process_bytes'])} needed{there}")
    if not plan["fits"]:
        if plan["changes"]:
            lines.append("what would make it fit, the cheapest first:")
        elif needed > plan["budget_bytes"]:
            lines.append("no smaller batch, length, rank or base makes it fit")
        lines += [
            f"  {change['change']:42} {size(change['peak_bytes'] + plan['process_bytes']):>9}  ({change['cost']})"
            for change in plan["changes"]
        ]
    return lines


def plot(plan: dict[str, Any], path: str | Path) -> Path:
    """Stacked bars, PNG or SVG by the file's name: training by part, the other phases beside it, and what is there.

    Raises:
        VeneerError: matplotlib is not installed, or another kind of file.
    """
    path, figure = figure_of(path, (9, 5))
    axis = figure.subplots()
    own = plan["process_bytes"]
    phases = {phase: value + own for phase, value in plan["phases"].items() if phase not in ("train", "merge")}
    axis.bar(list(phases), [value / 1e9 for value in phases.values()], color="lightgrey")
    bottom = 0.0
    for name, value in {"the program itself": own, **plan["parts"]}.items():
        if value > 0:
            axis.bar(["train"], [value / 1e9], bottom=bottom, label=f"{name}: {size(value)}")
            bottom += value / 1e9
    axis.axhline(
        plan["budget_bytes"] / 1e9, color="black", linestyle="--", label=f"there: {size(plan['budget_bytes'])}"
    )
    axis.set_ylabel("GB on the GPU" if plan["device"] == "cuda" else "GB of memory")
    axis.set_title(f"{plan['model']}: {plan['method']}, {plan['batch_size']} x {plan['seq_len']:,} tokens", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    return path


def duration(seconds: float) -> str:
    """90 -> 1 min 30 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes in GB or MB (10^9, 10^6)."""
    return f"{count / 1e9:,.2f} GB" if abs(count) >= 1e9 else f"{count / 1e6:,.0f} MB"
