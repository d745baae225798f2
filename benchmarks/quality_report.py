"""The page of the quality benchmark: tables, what the texts this project started from claim, and plots.

A difference between two cells is taken row by row (both were asked the same rows; over seeds, a row counts as the share
that got it right) and printed with its standard error. A claim is confirmed or refuted where the difference is on one
side of the claimed bound by two standard errors, else it stays open. That error knows nothing of other seeds: the
spread over seeds stands in the tables where there are several.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plan import Record
from benchmarks.quality import BASE, CELLS, FULL, QLORA, SCALINGS, say

Results = dict[str, list[Record]]  # records of the seeds by the cell's name


@dataclass(frozen=True)
class Claim:
    """A claim and its source: `better` is at most `bound` points of exact match under `worse` (negative: at least above)."""

    text: str
    source: str
    better: str
    worse: str
    bound: float


CLAIMS = (
    Claim(
        "LoRA with r = 16 applied to all attention and FFN matrices achieves quality within a few percentage points of "
        "full fine-tuning", "seed 000", BASE, FULL, 3.0,
    ),
    Claim(
        "QLoRA [...] typically degrades quality by less than 1% on held-out evaluations compared to LoRA on a BF16 base",
        "seed 000", QLORA, BASE, 1.0,
    ),
    Claim("r = 1 to 4 performed competitively on many benchmarks", "seed 000, of the LoRA paper", "LoRA r1", BASE, 3.0),
    Claim("For narrow tasks with limited data, r = 4 or r = 8 routinely matches full fine-tuning", "seed 002", "LoRA r4", FULL, 1.0),
    Claim("r = 8: good starting point for most tasks. Surprisingly effective", "seed 003", "LoRA r8", BASE, 1.0),
    Claim("r = 32-64: approaching full fine-tuning quality", "seed 000", "LoRA r64", FULL, 1.0),
    Claim(
        "Adapting all four attention projections (Q, K, V, O) plus the two FFN weight matrices per block consistently "
        "outperforms Q+V only", "seed 000", BASE, "qv", 0.0,
    ),
    Claim(
        "Applying LoRA only to attention projections and ignoring MLP layers leaves a significant fraction of each layer's "
        "representational capacity unaddressed (here: with as many parameters)", "seed 002", BASE, "attention r42", 0.0,
    ),
    Claim(
        "Attention projections (Q, K, V, O): the default and highest-impact target. Start here", "seed 003",
        "attention", "mlp", 0.0,
    ),
    Claim(
        "Changing r without adjusting alpha changes the effective learning rate [...] very slow convergence",
        "seed 002", "LoRA r64", "LoRA r64, alpha 32", 0.0,
    ),
    Claim(
        "rsLoRA prevents the adapter's effective magnitude from shrinking as rank increases", "seed 002",
        "rsLoRA r64, alpha 32", "LoRA r64, alpha 32", 0.0,
    ),
)  # fmt: skip


def read_results(folder: Path) -> Results:
    found: Results = {}
    for file in sorted(folder.glob("*-s*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(record["settings"]["cell"]["name"], []).append(record)
    order = {cell.name: number for number, cell in enumerate(CELLS)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def exact_match(record: Record) -> float:
    """Percent of all rows asked."""
    correct = _correct(record)
    return 100 * correct.count("1") / len(correct)


def held_out_loss(record: Record) -> float:
    parts = record["asked"].values()
    return sum(part["loss"] * part["tokens"] for part in parts) / sum(part["tokens"] for part in parts)


def difference(a: Sequence[Record], b: Sequence[Record]) -> tuple[float, float]:
    """Exact match of a less that of b, in points, and its standard error over the rows asked."""
    shares = [[statistics.mean(map(int, row)) for row in zip(*map(_correct, side), strict=True)] for side in (a, b)]
    by_row = [100 * (x - y) for x, y in zip(*shares, strict=True)]
    error = statistics.stdev(by_row) / math.sqrt(len(by_row)) if len(by_row) > 1 else math.inf
    return statistics.mean(by_row), error


def verdict(apart: float, error: float, bound: float) -> str:
    """Whether `apart`, better less worse, is above -bound."""
    if apart - 2 * error >= -bound and (bound or apart > 2 * error):
        return "confirmed"
    return "refuted" if apart + 2 * error < -bound else "open"


def write_report(out: Path, where: Path) -> list[Path]:
    """methods.md and, where matplotlib is installed, methods-<task>.png in `where`."""
    where.mkdir(parents=True, exist_ok=True)
    lines, written = [*HEAD], []
    for file in sorted(out.glob("*/task.json"), key=lambda f: f.parent.name != "home"):
        name, task, results = file.parent.name, json.loads(file.read_text()), read_results(file.parent)
        usable = {cell: [r for r in records if "asked" in r] for cell, records in results.items()}
        usable = {cell: records for cell, records in usable.items() if records}
        if not results:
            continue
        lines += ["", f"## {task['title']}", "", *_how(task, results)]
        records = where / f"methods-{name}.json"
        records.write_text(json.dumps(results, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(records)
        picture = where / f"methods-{name}.png"
        if usable and _plot(usable, task["title"], picture):
            written.append(picture)
            lines += ["", f"![{task['title']}]({picture.name})"]
        lines += ["", *_table(results, usable), "", *_course_table(usable), "", *_claims(usable), "", *_costs(usable)]
    page = where / "methods.md"
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return [page, *written]


HEAD = [
    "# Quality: what full fine-tuning, LoRA and its kinds reach",
    "",
    "Made by `python -m benchmarks.quality --data FOLDER` (a folder of BANKING77: train.csv, test.csv) and then `--report docs` "
    "([benchmarks/quality.py](../benchmarks/quality.py)), from the records beside this page (methods-*.json); do not edit. Every cell is "
    "one fine-tune of SmolLM2-135M-Instruct by Veneer's own loop on the same rows in the same order (by seed), one epoch, "
    "AdamW, cosine, then greedy answers to rows it never saw. LoRA: r 16, alpha 2r, all linears but the head, unless the "
    "name says otherwise. Exact match: the whole answer. Peak memory: over import, while training. Seconds are of runs on a machine that was not always idle: they say nothing of one method beside another, for which [results](../benchmarks/results) has steps measured side by side (c1, c2, c10). Differences are in "
    "points of exact match, row by row, with their standard error.",
]


def _how(task: dict[str, Any], results: Results) -> list[str]:
    record = next(iter(results.values()))[0]
    options, quick = record["settings"]["options"], task["train"] < 100
    lines = [
        f"{task['train']:,} rows to learn from, batch {options['batch']}, learning rate {options['lora_rate']:g} (LoRA) and "
        f"{options['full_rate']:g} (full fine-tuning). {record['machine']}."
    ]
    return lines + (["", "**A quick run: the figures mean nothing.**"] if quick else [])


def _table(results: Results, usable: Results) -> list[str]:
    sets = list(next(iter(usable.values()))[0]["asked"]) if usable else []
    head = ["method", "trained", "exact match %", *([f"{s} %" for s in sets] if len(sets) > 1 else [])]
    head += [f"points over {BASE}", "held-out loss", "peak GB", "training s", "file MB"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, records in results.items():
        good = usable.get(name)
        if good is None:
            lines.append(f"| {name} | {records[0]['trainable']:,} | diverged |{' |' * (len(head) - 3)}")
            continue
        row = [name, f"{good[0]['trainable']:,}", _spread(good, exact_match)]
        if len(sets) > 1:
            row += [_spread(good, lambda r, s=s: 100 * r["asked"][s]["exact_match"]) for s in sets]  # type: ignore[misc]
        apart = difference(good, usable[BASE]) if BASE in usable and name != BASE else None
        row.append(f"{apart[0]:+.1f} ± {apart[1]:.1f}" if apart else "")
        row += [_spread(good, held_out_loss, 4), _spread(good, lambda r: r["peak_bytes"] / 1e9, 2)]
        row += [_spread(good, lambda r: r["seconds"], 0), f"{good[0]['bytes'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _course_table(usable: Results) -> list[str]:
    """Scaling from too low to too high: how the training itself went."""
    names = [BASE if scaling == 2 else f"scaling {scaling:g}" for scaling in sorted([*SCALINGS, 2])]
    there = [name for name in names if name in usable]
    if len(there) < 2:
        return []
    lines = ["Scaling (alpha / r), from too low to too high:", ""]
    lines += [
        "| | loss, last 10 steps | largest loss | largest gradient | exact match % | held-out loss |",
        f"|{'---|' * 6}",
    ]
    for name in there:
        records = usable[name]
        row = [_spread(records, lambda r, k=k: r[k], 3) for k in ("last_loss", "largest_loss", "largest_gradient")]  # type: ignore[misc]
        row += [_spread(records, exact_match), _spread(records, held_out_loss, 4)]
        lines.append(f"| {'scaling 2' if name == BASE else name} | {' | '.join(row)} |")
    best = min(there, key=lambda name: statistics.mean(map(held_out_loss, usable[name])))
    lines += ["", _too_high(best, there, usable)]
    return lines


def _too_high(best: str, there: list[str], usable: Results) -> str:
    """What a scaling too low and too high did here."""
    low, high = there[0], there[-1]
    loss, gradient = (
        {name: statistics.mean(r[key] for r in usable[name]) for name in (low, high)}
        for key in ("last_loss", "largest_gradient")
    )
    words = (
        f"Too low is slow: {low} ends at a training loss of {loss[low]:.3f}, {high} at {loss[high]:.3f}. Too high was "
        f"{'not reached' if best == high else 'reached'} in so short a run at this rate: "
        f"{'scaling 2' if best == BASE else best} has the lowest held-out loss; the largest gradient grew "
        f"{gradient[high] / gradient[low]:.0f} times from {low} to {high}, which clipping held."
    )
    if abs(usable[high][0]["first_loss"] - usable[low][0]["first_loss"]) < 1e-3:
        words += " (B is zero at the start, so no scaling changes the first loss.)"
    return words


def _best_rate(usable: Results) -> list[str]:
    """Full fine-tuning and LoRA, each at the best of the rates that were tried: a method is not to be judged by one rate."""
    tried = {
        method: [name for name in usable if name == method or name.startswith(f"{method}, rate")]
        for method in (FULL, BASE)
    }
    if any(len(names) < 2 for names in tried.values()):
        return []
    full, lora = (min(names, key=lambda n: statistics.mean(map(held_out_loss, usable[n]))) for names in tried.values())
    apart, error = difference(usable[lora], usable[full])
    return [
        f"- Each at the best of three rates (by held-out loss; {full} and {lora}): LoRA less full {apart:+.1f} ± {error:.1f} points. "
        "Where that is the largest rate, more might do better still: in one epoch of so few rows nothing is trained to its end."
    ]


def _claims(usable: Results) -> list[str]:
    lines = []
    for claim in CLAIMS:
        if claim.better in usable and claim.worse in usable:
            apart, error = difference(usable[claim.better], usable[claim.worse])
            loss = statistics.mean(map(held_out_loss, usable[claim.better])) / statistics.mean(
                map(held_out_loss, usable[claim.worse])
            )
            asked = f"at least -{claim.bound:g}" if claim.bound else "above 0"
            lines.append(
                f'- **{verdict(apart, error, claim.bound)}**: "{claim.text}" ({claim.source}). {claim.better} less '
                f"{claim.worse}: {apart:+.1f} ± {error:.1f} points (claimed: {asked}), held-out loss {loss - 1:+.1%}."
            )
    return ["What was claimed:", "", *lines, *_best_rate(usable)] if lines else []


def _costs(usable: Results) -> list[str]:
    """The claims about cost, which are ratios and need no test."""
    if not {FULL, BASE, QLORA} <= usable.keys():
        return []
    full, base, qlora = (
        {k: statistics.median(r[k] for r in usable[n]) for k in ("peak_bytes", "trainable")}
        for n in (FULL, BASE, QLORA)
    )
    return [
        f'- "reducing trainable parameters by around 99%" (seed 000): {1 - base["trainable"] / full["trainable"]:.1%} at r 16 on all '
        f"linears of this small model; larger models have a smaller share of adapters.",
        '- "Full fine-tune: slow; LoRA: fast; QLoRA: very fast" (seed 004): steps measured side by side are in results (c1, c2): a QLoRA '
        "step takes what a LoRA step takes, and saves memory, not time.",
        f'- "Save up to 96% of memory usage" (seed 004): LoRA {1 - base["peak_bytes"] / full["peak_bytes"]:.0%}, QLoRA '
        f"{1 - qlora['peak_bytes'] / full['peak_bytes']:.0%} less than full fine-tuning at its peak, activations included.",
    ]


def _correct(record: Record) -> str:
    return "".join(part["correct"] for part in record["asked"].values())


def _spread(records: Sequence[Record], of: Callable[[Record], float], digits: int = 1) -> str:
    """The mean, and the least and most over seeds where there are several."""
    values = [of(record) for record in records]
    mean = f"{statistics.mean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


def _plot(usable: Results, title: str, path: Path) -> bool:
    """Four panels: rank, scaling, targets, memory against exact match. False: matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plots: matplotlib is not installed (pip install '.[report]')")
        return False
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(title)
    (rank, scaling), (targets, memory) = figure.subplots(2, 2)
    mean = {name: statistics.mean(map(exact_match, records)) for name, records in usable.items()}
    level = {name: mean[name] for name in (FULL, QLORA) if name in mean}
    ranks: dict[float, str] = {r: f"LoRA r{r}" for r in (1, 4, 8, 16, 64)}
    scalings: dict[float, str] = {s: f"scaling {s:g}" for s in SCALINGS} | {2: BASE}
    for axes, label, points in ((rank, "rank", ranks), (scaling, "scaling alpha / r, at r 16", scalings)):
        there = sorted(x for x, name in points.items() if name in mean)
        axes.plot(there, [mean[points[x]] for x in there], "o-", label="LoRA")
        axes.set_xscale("log", base=2)
        axes.set_xticks(there, [f"{x:g}" for x in there])
        axes.set_xlabel(label)
        for (name, value), style in zip(level.items(), ("--", ":"), strict=False):
            axes.axhline(value, linestyle=style, color="gray", label=name)
        axes.legend()
    bars = [name for name in ("qv", "attention", "attention r42", "mlp", BASE) if name in mean]
    targets.bar(["all-linear" if name == BASE else name for name in bars], [mean[name] for name in bars])
    targets.set_xlabel("targets, r 16")
    for name, value in mean.items():
        gigabytes = statistics.median(r["peak_bytes"] for r in usable[name]) / 1e9
        memory.plot([gigabytes], [value], "o", color="C1" if name == FULL else "C2" if name == QLORA else "C0")
        if name in (FULL, BASE, QLORA):
            memory.annotate(name, (gigabytes, value), textcoords="offset points", xytext=(5, 5))
    memory.set_xlabel("peak memory over import, GB")
    for axes in (rank, scaling, targets, memory):
        axes.set_ylabel("exact match, %")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    return True
