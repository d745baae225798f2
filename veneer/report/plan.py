"""A plan for people: `veneer plan`."""

from __future__ import annotations

from typing import Any

from veneer.config import Recipe
from veneer.errors import RefusedError
from veneer.models.fuse import fuse
from veneer.models.load import load_tokenizer, resolve, skeleton, uses_gpu
from veneer.planning.memory import SECOND_BASE
from veneer.planning.plan import planned, run_of
from veneer.training.loop import largest_pass

WIDTH = 40  # characters of the longest bar


def plan_recipe(recipe: Recipe, *, force: bool = False) -> tuple[dict[str, Any] | None, str | None]:
    """The plan of a run on its own data, before its model is loaded; or None, and why there is none.

    Args:
        force: a run that does not fit is planned all the same.

    Raises:
        RefusedError: it does not fit into what is free here.
        VeneerError: what the model's config, the adapter's settings or the data have wrong.
    """
    if uses_gpu(recipe.device):
        return None, "memory on a GPU is not planned"
    if recipe.method == "lora" and recipe.lora.init in SECOND_BASE:
        return None, f"memory is not planned with init {recipe.lora.init}, which keeps a second base"
    folder = resolve(recipe.model, recipe.revision)
    tokenizer = load_tokenizer(folder)
    packs = "attention" in fuse(skeleton(str(folder)))
    rows, passes = largest_pass(tokenizer, recipe.data, recipe.train, packs)
    found = {**planned(str(folder), run_of(recipe, rows, passes)), "model": recipe.model}
    if not found["fits"] and not force:
        needed = found["peak_bytes"] + found["process_bytes"]
        ways = "; or ".join(f"{x['change']} ({x['cost']})" for x in found["changes"][:3])
        raise RefusedError(
            f"this run does not fit into memory: found {size(found['budget_bytes'])} free, expected {size(needed)}",
            hint=f"{'change ' + ways + ', or ' if ways else ''}start it all the same with --force",
        )
    return found, None


def describe(plan: dict[str, Any]) -> str:
    """What it takes by phase and by part, whether it fits, and what would make it fit."""
    adapter = "" if plan["rank"] is None else f", rank {plan['rank']} on {plan['targets']}"
    packed = " packed" if plan["packing"] else ""
    lines = [
        f"{plan['model']}: {plan['architecture']}, {plan['parameters']:,} parameters, of which "
        f"{plan['trainable_parameters']:,} are trained" if plan["method"] == "full" else
        f"{plan['model']}: {plan['architecture']}, {plan['parameters']:,} parameters; {plan['trainable_parameters']:,} trained",
        f"{plan['method']}{adapter}, {plan['batch_size']} rows of {plan['seq_len']:,} tokens{packed}, "
        f"{plan['dtype']}, recompute {plan['recompute']}",
        "",
        *_bars("phase", plan["phases"], plan["peak_bytes"]),
        "",
        *_bars("part of training", plan["parts"], sum(plan["parts"].values())),
        "",
    ]  # fmt: skip
    needed = plan["peak_bytes"] + plan["process_bytes"]
    verdict = "it fits" if plan["fits"] else "it does NOT fit"
    lines.append(
        f"{verdict}: {size(needed)} needed, {size(plan['process_bytes'])} of it by the program itself; "
        f"{size(plan['budget_bytes'])} there"
    )
    if not plan["fits"]:
        if plan["changes"]:
            lines.append("what would make it fit, the cheapest first:")
        else:
            lines.append("no smaller batch, length, rank or base makes it fit")
        lines += [
            f"  {change['change']:42} {size(change['peak_bytes'] + plan['process_bytes']):>9}  ({change['cost']})"
            for change in plan["changes"]
        ]
    lines += [f"the largest {what} that fits: {value:,}" for what, value in plan.get("largest", {}).items()]
    return "\n".join(lines)


def _bars(title: str, sizes: dict[str, int], whole: int) -> list[str]:
    lines = [f"{title:24} {'memory':>9}"]
    for name, value in sizes.items():
        if value:
            bar = "█" * max(1, round(WIDTH * value / whole)) if value > 0 else ""
            lines.append(f"{name:24} {size(value):>9}  {bar}")
    return lines


def size(count: float) -> str:
    """Bytes in GB or MB (10^9, 10^6)."""
    return f"{count / 1e9:,.2f} GB" if abs(count) >= 1e9 else f"{count / 1e6:,.0f} MB"
