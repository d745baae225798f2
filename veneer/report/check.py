"""`veneer check`: a recipe before it runs, and the short form of it that `veneer train` begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from veneer.adapters.attach import attach
from veneer.config import Recipe
from veneer.errors import VeneerError, printable
from veneer.models.load import load, load_tokenizer, resolve, skeleton, tokenizer_folder
from veneer.models.merging import REPORT_FILE
from veneer.planning.memory import CannotPlanError, Run, prepared
from veneer.report.plan import duration, plan_recipe, size, too_large
from veneer.training.advice import Finding, errors_first
from veneer.training.batches import LOOKED_AT, start_batches
from veneer.training.loop import require_new_run, require_trainable
from veneer.training.preflight import Preflight, preflight

WIDTH = 40  # characters of the longest bar
SHOWN = 240  # characters of a piece of a row
_COLOURS = {"error": "31", "warning": "33", "note": "2", "learned": "32", "not learned": "2"}


def check_recipe(recipe: Recipe) -> dict[str, Any]:
    """Everything that can be said of a run before step 1: findings (errors first), how many of each kind, facts, the plan.

    What `train` would refuse as bad input is a finding `bad-input` here; nothing that needs it is looked at then. Of a run that
    does not fit into memory neither the model is loaded nor a batch tried.
    """
    report, plan = Preflight(_output(recipe)), None
    try:
        try:
            plan = plan_recipe(recipe, force=True, time=True)
        except CannotPlanError as error:
            report.findings.append(Finding("warning", "not-planned", error.problems[0], str(error.hint)))
        fits = plan is None or plan["fits"]
        if plan is not None and not fits:
            report.findings.append(Finding("error", "memory", *too_large(plan)))
        model, tokenizer = load_for(recipe) if fits else _without_weights(recipe)
        found = preflight(
            model, tokenizer, None, recipe.train, method=recipe.method, data_config=recipe.data, reload=True, trial=fits,
        )  # fmt: skip
        report = Preflight([*report.findings, *found.findings, *_base(recipe)], found.facts)
        if fits and not report.errors:
            require_trainable(model, tokenizer, recipe, report.facts["rows"]["train"])
    except VeneerError as error:
        hint = error.hint or "mend it in the recipe"
        report.findings += [Finding("error", "bad-input", problem, hint) for problem in error.problems]
    except (torch.OutOfMemoryError, MemoryError):
        advice = "a smaller train.batch_size or data.max_length, or train.recompute: full"
        report.findings.append(Finding("error", "memory", "one batch did not fit into memory", advice))
    findings = errors_first(report.findings)
    return {
        "model": recipe.model,
        "method": recipe.method,
        "errors": len(report.errors),
        "warnings": len(report.warnings),
        "findings": [finding.to_dict() for finding in findings],
        "facts": report.facts,
        "plan": plan,
    }


def require_sound(recipe: Recipe, model: Any, tokenizer: Any, warn: Callable[[str], None]) -> None:
    """What `train` looks at by itself: the first rows, the settings, one batch. Warnings are handed to `warn`.

    Raises:
        VeneerError: there are errors; all of them.
    """
    found = preflight(
        model, tokenizer, None, recipe.train, method=recipe.method, data_config=recipe.data, looked_at=LOOKED_AT,
        reload=False,
    )  # fmt: skip
    for finding in [*found.warnings, *_base(recipe)]:
        warn(str(finding))
    if found.errors:
        raise VeneerError(
            [str(finding) for finding in found.errors],
            hint="veneer check shows the rows and more; --no-check starts it all the same",
        )


def load_for(recipe: Recipe) -> tuple[Any, Any]:
    """The recipe's model, with its adapter at the start, and tokenizer."""
    model, tokenizer = load(
        recipe.model, quantize=recipe.quantize, double_quant=recipe.double_quant, dtype=recipe.dtype,
        device=recipe.device, revision=recipe.revision,
    )  # fmt: skip
    if recipe.method == "lora":
        seed = recipe.train.seed
        rows = start_batches(model, tokenizer, recipe.data, seed) if recipe.lora.init == "eva" else None
        attach(model, recipe.lora, seed=seed, data=rows)
    return model, tokenizer


def _without_weights(recipe: Recipe) -> tuple[Any, Any]:
    """As `load_for`, of the config alone: enough to look at rows and settings."""
    folder = tokenizer_folder(recipe.model, recipe.revision)
    run = Run(recipe.method, recipe.quantize, recipe.double_quant, getattr(torch, recipe.dtype), recipe.lora)
    return prepared(skeleton(str(folder)), run), load_tokenizer(folder)


def _output(recipe: Recipe) -> list[Finding]:
    """Whether there is a place for the result."""
    if recipe.train.out is None:
        advice = "set it, or give --set train.out=runs/first to veneer train"
        return [Finding("note", "output", "train.out is missing: the result has no place yet", advice)]
    try:
        require_new_run(Path(recipe.train.out))
    except VeneerError as error:
        return [Finding("error", "output", problem, str(error.hint)) for problem in error.problems]
    return []


def _base(recipe: Recipe) -> list[Finding]:
    """Whether the base is a model that adapters were merged into: they are baked in, and what is learned is for it alone."""
    if not (Path(resolve(recipe.model, recipe.revision)) / REPORT_FILE).is_file():
        return []
    return [
        Finding(
            "warning",
            "merged-base",
            f"{recipe.model} is a model that adapters were merged into: what is learned now fits it alone",
            "to go on with an adapter keep it unmerged, with its checkpoints, and use train --resume",
        )
    ]


# ---- for people -----------------------------------------------------------------------------------------------------


def describe(report: dict[str, Any], *, colours: bool = False) -> str:
    """Findings, errors first; the first rows with what is learned in green, or in [brackets]; lengths as bars; the rest."""
    paint = _painter(colours)
    lines = [
        f"{paint(finding['severity'], finding['severity']):>7}  {finding['code']}: {printable(finding['found'])}\n"
        f"         {printable(finding['advice'])}"
        for finding in report["findings"]
    ]
    facts = report["facts"]
    if facts:
        lines += ["", *_rows(facts), "", *_view(facts["view"], paint, colours), "", *_lengths(facts["lengths"]), ""]
        lines += [*_batch(facts["batch"], facts["batch_seconds"])]
    if (plan := report["plan"]) is not None:
        needed = plan["peak_bytes"] + plan["process_bytes"]
        time = (
            f"; time: {duration(plan['seconds'])}, {plan['seconds_per_step']:.2f} s a step" if "seconds" in plan else ""
        )
        lines.append(f"planned memory: {size(needed)}, of {size(plan['budget_bytes'])} free{time}")
    if facts:
        advised = facts["recommended"]
        said = [
            f"{key} {advised[key]:.2g}" if key == "learning_rate" else f"{key} {advised[key]}" for key in advised["why"]
        ]
        lines.append("for so much data we would take: " + ", ".join(said))
        lines += [f"  {key}: {why}" for key, why in advised["why"].items()]
    counted = [f"{report[kind]} {kind if report[kind] != 1 else kind[:-1]}" for kind in ("errors", "warnings")]
    return "\n".join([*lines, "", ", ".join(counted)])


def _painter(colours: bool) -> Callable[[str, str], str]:
    def paint(text: str, kind: str) -> str:
        return f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m" if colours else text

    return paint


def _rows(facts: dict[str, Any]) -> list[str]:
    rows, tokens, packing = facts["rows"], facts["tokens"], facts["packing"]
    held = "" if rows["held_out"] is None else f", {rows['held_out']:,} held out"
    learned = facts["learned_per_row"]
    counts = (
        f"bad {rows['bad']:,}, truncated {rows['truncated']:,}, dropped {rows['dropped']:,}, repeated "
        f"{facts['duplicates']['normalised']:,}"
    )
    if facts["overlap"] is not None:
        counts += f", held-out ones also trained on {facts['overlap']['normalised']:,}"
    return [
        f"rows: {rows['train']:,}{held}; {counts}",
        f"tokens: {tokens['all']:,}, of which {tokens['learned']:,} are learned; a row {learned['least']:,} to "
        f"{learned['most']:,} (median {learned['median']:,})",
        f"mask: {facts['mask']}",
        f"packing {'on' if packing['on'] else 'off'}: {100 * packing['efficiency']:.0f}% of what is computed are tokens of "
        f"rows (packed {100 * packing['packed']:.0f}%, padded {100 * packing['padded']:.0f}%)",
    ]


def _view(rows: list[list[dict[str, Any]]], paint: Callable[[str, str], str], colours: bool) -> list[str]:
    """The first rows, a line each."""
    lines = [f"the first rows; {'green' if colours else '[in brackets]'}: learned"]
    for row in rows:
        pieces = []
        for piece in row:
            text = printable(piece["text"].replace("\n", "\\n"))
            if len(text) > SHOWN:
                text = f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
            if colours:
                pieces.append(paint(text, "learned" if piece["learned"] else "not learned"))
            else:
                pieces.append(f"[{text}]" if piece["learned"] else text)
        lines.append("  " + "".join(pieces))
    return lines


def _lengths(lengths: dict[str, Any]) -> list[str]:
    bars = lengths["histogram"]
    most = max(bar["rows"] for bar in bars)
    lines = [f"tokens a row: {lengths['least']:,} to {lengths['most']:,}, median {lengths['median']:,}"]
    for bar in bars:
        shown = "█" * max(1, round(WIDTH * bar["rows"] / most)) if bar["rows"] else ""
        lines.append(f"{bar['from']:7,} to {bar['to']:<7,} {bar['rows']:7,}  {shown}")
    return lines


def _batch(batch: dict[str, Any], seconds: float) -> list[str]:
    if "gradients" not in batch:
        return ["no batch was tried"]
    gradients = batch["gradients"]
    lines = [
        f"one batch ({batch['rows']} rows, {batch['tokens']:,} tokens, {seconds:.1f} s): "
        + (f"loss {batch['loss']:.3f}; " if "loss" in batch else "")
        + f"{gradients['trained'] - gradients['none']} of {gradients['trained']} trained weights get a gradient, "
        f"{gradients['of_the_base']} of the base's do"
    ]
    for key, what in (("start", "at step 0, adapted and base"), ("reload", "saved and loaded again")):
        if (found := batch.get(key)) is not None:
            said = [found["note"]] if "note" in found else []
            if "equal" in found:
                apart = "bit for bit the same logits" if found["equal"] else f"logits {found['relative']:.2g} apart"
                said.insert(0, apart)
            lines.append(f"{what}: {'; '.join(said)}")
    return lines
