"""How large adapters of a model would be: `veneer ranks MODEL`. From its config alone; no weight is read.

A matrix (out, in) adapted at rank r has A (r, in) and B (out, r): r * (in + out) trainable parameters.
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from veneer.adapters.targets import layer_at, resolve_all
from veneer.config import TARGET_PRESETS, LoraConfig, nearest
from veneer.errors import VeneerError
from veneer.models.known import MODELS
from veneer.models.load import skeleton, skeleton_of

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
MATRIX = re.compile(r"([1-9]\d{0,6})x([1-9]\d{0,6})")


def rank_table(name: str | None, preset: str | None = None, ranks: tuple[int, ...] = RANKS) -> dict[str, Any]:
    """Trainable parameters, their share of base and adapter together, and bytes of the adapter in fp32 and 16 bits, by rank and targets.

    Args:
        name: a model as `load` takes it, or one matrix as "4096x4096" (out x in). preset: one of MODELS instead.

    Raises:
        VeneerError: both or neither, no such model or preset, or a rank below 1.
    """
    if (name is None) == (preset is None):
        raise VeneerError("expected a MODEL or a --preset, one of them", hint=f"presets: {', '.join(MODELS)}")
    if not ranks or min(ranks) < 1:
        raise VeneerError(f"ranks: found {', '.join(map(str, ranks)) or 'none'}, expected whole numbers from 1")
    if name is not None and (matrix := MATRIX.fullmatch(name)):
        model: nn.Module = nn.Sequential(nn.Linear(int(matrix[2]), int(matrix[1]), bias=False, device="meta"))
        targets: tuple[str, ...] = ("all-linear",)
    else:
        targets = TARGET_PRESETS
        if preset is not None and preset not in MODELS:
            raise VeneerError(f"preset {preset!r} is not known; {nearest(preset, list(MODELS))}")
        model = skeleton_of(MODELS[preset][0], **MODELS[preset][1]) if preset is not None else skeleton(str(name))
    base = sum(parameter.numel() for parameter in model.parameters())
    rows, chosen, notes = [], {}, []
    for target in targets:
        try:
            names = resolve_all(model, LoraConfig(targets=target))
        except VeneerError as error:
            notes.append(error.problems[0].removeprefix("lora.targets: "))
            continue
        chosen[target] = names
        layers = [layer for path in names if (layer := layer_at(model, path)) is not None]
        for r in ranks:
            fits = all(r <= min(layer.sides) for layer in layers)
            parameters = sum(math.prod(s) for layer in layers for s in layer.shapes(r)) if fits else None
            rows.append({
                "targets": target,
                "r": r,
                "parameters": parameters,
                "share": None if parameters is None else parameters / (base + parameters),
                "bytes_fp32": None if parameters is None else 4 * parameters,
                "bytes_16bit": None if parameters is None else 2 * parameters,
            })  # fmt: skip
    return {
        "model": name if preset is None else preset,
        "architecture": type(model).__name__ if len(targets) > 1 else "one matrix",
        "parameters": base,
        "layers": {target: len(names) for target, names in chosen.items()},
        "rows": rows,
        "notes": notes,
    }


def describe(table: dict[str, Any]) -> str:
    """The table for people: a block a preset, a line a rank."""
    lines = [f"{table['model']}: {table['architecture']}, {table['parameters']:,} parameters"]
    header = f"{'rank':>6} {'trainable':>16} {'of the total':>13} {'MB in fp32':>13} {'in 16 bits':>13}"
    for target, layers in table["layers"].items():
        lines += ["", f"{target} ({layers} layers)" if layers > 1 else "this matrix", header]
        for row in table["rows"]:
            if row["targets"] != target:
                continue
            if row["parameters"] is None:
                lines.append(f"{row['r']:>6}  above the width of a layer")
                continue
            lines.append(
                f"{row['r']:>6} {row['parameters']:>16,} {100 * row['share']:>12.4f}% "
                f"{row['bytes_fp32'] / 1e6:>13,.2f} {row['bytes_16bit'] / 1e6:>13,.2f}"
            )
    lines += ["", "total: base and adapter together"]
    return "\n".join(lines + [f"note: {note}" for note in table["notes"]])
