"""Can these adapters be combined? How much their updates point the same way, share directions and fight over signs.

For two updates D and E of one layer, from their factors where that is possible:

    cosine          <D, E> / (|D| |E|): 1 the same change, 0 unrelated ones, -1 opposite ones
    overlap         mean squared cosine of the angles between the spaces of directions they write (columns of B) or read
                    (rows of A): 0 none shared, 1 one lies in the other; of two random ones about rank / width
    sign conflict   share of the weight that both move which they move in opposite directions: sum of min(|D|, |E|) where
                    the signs differ, of all of it: about 0.5 for unrelated updates
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters.peft_format import Factors, read_adapter
from veneer.errors import VeneerError
from veneer.report.adapter import figure_of
from veneer.storage import atomic_file

OVERLAPS = ("overlap_written", "overlap_read", "random_written", "random_read")
ROWS = 256  # of a dense update at a time
NEAR, OPPOSED = 0.3, -0.1  # cosines: from where on adapters say much the same, or undo one another
SHARED = 4  # times the overlap of random spaces
FIGHT = 0.6  # of the weight both move


def analyze(sources: Sequence[str | Path], progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Every pair of adapter folders, by layer and over all layers.

    Returns:
        adapters, norms; pairs: a, b (places in the list), layers (how many both change), cosine, overlap_written,
        overlap_read, random_written and random_read (of random spaces), sign_conflict, verdict, by_layer with the same figures.

    Raises:
        VeneerError: fewer than two adapters, or what `read_adapter` finds; layers of different shapes.
    """
    if len(sources) < 2:
        raise VeneerError(f"found {len(sources)} adapter, expected two or more to compare")
    problems, files = [], []
    for path in sources:
        try:
            files.append(read_adapter(path).factors)
        except VeneerError as error:
            problems += error.problems
    if problems:
        raise VeneerError(problems)
    both = [(i, j, sorted(files[i].keys() & files[j].keys())) for i, j in itertools.combinations(range(len(files)), 2)]
    for i, j, layers in both:
        problems += [
            f"{sources[j]}: {layer}: found (out, in) {_shape(files[j][layer])}, expected {_shape(files[i][layer])} as in {sources[i]}"
            for layer in layers
            if _shape(files[i][layer]) != _shape(files[j][layer])
        ]
    if problems:
        raise VeneerError(problems, hint="they are of different base models")
    total, done, pairs = sum(len(layers) for _, _, layers in both), 0, []
    for i, j, layers in both:
        rows = []
        for layer in layers:
            rows.append({"layer": layer, **_compare(_matrices(files[i][layer]), _matrices(files[j][layer]))})
            done += 1
            if progress is not None:
                progress(done, total)
        pairs.append({"a": i, "b": j, **_over_all(rows)})
    norms = [math.sqrt(sum(_squared(*pair) for one in file.values() for pair in _matrices(one))) for file in files]
    return {"adapters": [str(path) for path in sources], "norms": norms, "pairs": pairs}


def _shape(one: Factors) -> tuple[int, ...]:
    return (one.b.shape[0], *one.a.shape[1:], len(one.a) // one.r)


def _matrices(one: Factors) -> list[tuple[Tensor, Tensor]]:
    """(B scaled, A) in fp64, of each expert of a parameter."""
    experts = len(one.a) // one.r
    a, b = one.a.double().flatten(1), one.scaling * one.b.double().flatten(1)
    if b.shape[1] != one.r * experts:
        raise VeneerError("a convolution in groups has no factors of one matrix")
    if experts == 1:
        return [(b, a)]
    b = b.view(len(b), one.r, experts)
    return [(b[:, :, e], a.view(experts, one.r, -1)[e]) for e in range(experts)]


def _inner(b: Tensor, a: Tensor, b2: Tensor, a2: Tensor) -> float:
    """<B A, B2 A2> = sum of (B^T B2) * (A A2^T)."""
    return float(((b.T @ b2) * (a @ a2.T)).sum())


def _squared(b: Tensor, a: Tensor) -> float:
    return max(0.0, _inner(b, a, b, a))


def _compare(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    found: dict[str, float] = dict.fromkeys(("inner", "squared_a", "squared_b", "against", "moved"), 0.0)
    written: list[float] = []
    read: list[float] = []
    random: tuple[list[float], list[float]] = (
        [],
        [],
    )  # of spaces of these sizes that have nothing to do with each other
    for (b, a), (b2, a2) in zip(one, other, strict=True):
        found["inner"] += _inner(b, a, b2, a2)
        found["squared_a"] += _squared(b, a)
        found["squared_b"] += _squared(b2, a2)
        against, moved = _conflict(b.float(), a.float(), b2.float(), a2.float())
        found["against"] += against
        found["moved"] += moved
        spaces = [_space(x) for x in (b, b2, a.T, a2.T)]
        if all(space.shape[1] for space in spaces):
            written.append(_overlap(*spaces[:2]))
            read.append(_overlap(*spaces[2:]))
            random[0].append(max(spaces[0].shape[1], spaces[1].shape[1]) / len(b))
            random[1].append(max(spaces[2].shape[1], spaces[3].shape[1]) / a.shape[1])
    means = {
        key: sum(values) / len(values) if values else 0.0
        for key, values in zip(OVERLAPS, (written, read, *random), strict=True)
    }
    return {**means, **_ratios(found), **found}


def _ratios(sums: dict[str, float]) -> dict[str, float]:
    lengths = math.sqrt(sums["squared_a"] * sums["squared_b"])
    return {
        "cosine": sums["inner"] / lengths if lengths else 0.0,
        "sign_conflict": sums["against"] / sums["moved"] if sums["moved"] else 0.0,
    }


def _space(x: Tensor) -> Tensor:
    """An orthonormal basis of the columns of x."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return u[:, : int((s > 1e-9 * s[0]).sum()) if s.numel() and s[0] > 0 else 0]


def _overlap(u: Tensor, v: Tensor) -> float:
    return float((u.T @ v).square().sum()) / min(u.shape[1], v.shape[1])


def _conflict(b: Tensor, a: Tensor, b2: Tensor, a2: Tensor) -> tuple[float, float]:
    against = moved = 0.0
    for start in range(0, len(b), ROWS):
        d, e = b[start : start + ROWS] @ a, b2[start : start + ROWS] @ a2
        least = torch.minimum(d.abs(), e.abs())
        against += float(least[(d > 0) != (e > 0)].sum(dtype=torch.float64))
        moved += float(least.sum(dtype=torch.float64))
    return against, moved


def _over_all(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all layers together; overlaps are means."""
    keys = ("inner", "squared_a", "squared_b", "against", "moved")
    sums = {key: sum(row[key] for row in rows) for key in keys}
    means = {key: sum(row[key] for row in rows) / len(rows) if rows else 0.0 for key in OVERLAPS}
    found = {
        "layers": len(rows),
        **_ratios(sums),
        **means,
        "moved_any": not rows or bool(sums["squared_a"] * sums["squared_b"]),
    }
    kept = [{key: value for key, value in row.items() if key not in keys} for row in rows]
    verdict = _verdict(found)
    del found["moved_any"]
    return {**found, "verdict": verdict, "by_layer": kept}


def _verdict(pair: dict[str, Any]) -> str:
    if not pair["moved_any"]:
        return "one of them changes nothing"
    if not pair["layers"]:
        return "no layer in common: their sum is both, exactly"
    if pair["cosine"] >= NEAR:
        return "much the same change: an average keeps it, a sum makes it twice as large"
    if pair["cosine"] <= OPPOSED or pair["sign_conflict"] >= FIGHT:
        return "they undo one another: expect to lose from both; TIES keeps the stronger of the two at each weight"
    if any(pair[f"overlap_{side}"] > min(0.5, SHARED * pair[f"random_{side}"]) for side in ("written", "read")):
        return "different changes in shared directions: try a sum, and measure both tasks"
    return "unrelated changes: a sum keeps both, an average halves each"


def _letter(number: int) -> str:
    """A to Z, then A1, B1, ..."""
    return chr(65 + number % 26) + (str(number // 26) if number >= 26 else "")


def describe(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{_letter(n)}  {path}   norm {found['norms'][n]:.4g}" for n, path in enumerate(found["adapters"])]
    lines += [
        "",
        f"{'pair':6} {'layers':>6} {'cosine':>7} {'written':>8} {'(random)':>8} {'read':>6} {'(random)':>8} {'conflict':>8}",
    ]
    for pair in found["pairs"]:
        name = f"{_letter(pair['a'])}-{_letter(pair['b'])}"
        lines.append(
            f"{name:6} {pair['layers']:>6} {pair['cosine']:>7.3f} {pair['overlap_written']:>8.3f} {pair['random_written']:>8.3f} "
            f"{pair['overlap_read']:>6.3f} {pair['random_read']:>8.3f} {100 * pair['sign_conflict']:>7.1f}%   {pair['verdict']}"
        )
    lines += [
        "",
        "cosine: 1 the same change, 0 unrelated, -1 opposite; written, read: directions shared, beside that of random ones;",
        "conflict: of the weight both move, what they move in opposite directions (unrelated: 50%);",
        "only A and B are compared: no lengths of DoRA, nothing that is trained in full",
    ]
    return "\n".join(lines)


def plot(found: dict[str, Any], path: str | Path) -> Path:
    """Heat maps of cosine and sign conflict, layers down, pairs across, PNG or SVG by the file's name.

    Raises:
        VeneerError: matplotlib is not installed, or another kind of file.
    """
    path, figure = figure_of(path, (4 + 1.2 * len(found["pairs"]), 9))
    pairs = found["pairs"]
    layers = list(dict.fromkeys(row["layer"] for pair in pairs for row in pair["by_layer"]))
    names = [f"{_letter(pair['a'])}-{_letter(pair['b'])}" for pair in pairs]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, (low, high), colours in (
        (axes[0], "cosine", (-1, 1), "RdBu"),
        (axes[1], "sign_conflict", (0, 1), "RdBu_r"),
    ):
        grid = torch.full((len(layers), len(pairs)), float("nan"))
        for column, pair in enumerate(pairs):
            for row in pair["by_layer"]:
                grid[layers.index(row["layer"]), column] = row[key]
        image = axis.imshow(grid.numpy(), aspect="auto", vmin=low, vmax=high, cmap=colours, interpolation="nearest")
        axis.set_xticks(range(len(names)), names)
        axis.set_title(key.replace("_", " "))
        figure.colorbar(image, ax=axis, shrink=0.6)
    every = max(1, len(layers) // 40)
    axes[0].set_yticks(range(0, len(layers), every), layers[::every], fontsize=6)
    letters = ", ".join(f"{_letter(n)}: {Path(name).name}" for n, name in enumerate(found["adapters"]))
    figure.suptitle(f"do these adapters go together?   {letters}", fontsize=10)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    return path
