"""What an adapter is, layer by layer: `veneer inspect ADAPTER`. Reads files only; no model is built.

The rank that would have been enough, by one rule: of each layer's update the smallest rank that keeps 95% (99%) of its squared
norm; of an adapter with one rank for all layers, the largest of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.adapters import algebra
from veneer.adapters.peft_format import Factors, read_adapter
from veneer.errors import VeneerError, printable
from veneer.models.load import resolve
from veneer.models.weights import BaseWeights
from veneer.storage import atomic_file

SHARES = {"rank_95": 0.95, "rank_99": 0.99}
RULE = "the smallest rank that keeps 95% (99%) of the squared norm of a layer's update (its truncated SVD)"
LISTED = 40  # layers; more are shown by kind unless every one is asked for


def inspect_adapter(path: str | Path, model: str | None = None) -> dict[str, Any]:
    """All there is to know of an adapter folder; `by_layer` has each layer's norms, singular values and ranks.

    Args:
        model: the base; left out, the one its config names is looked for on this machine (nothing is fetched or converted).

    Raises:
        VeneerError: `read_adapter` finds something, or the base that was named is another model than the adapter's.
    """
    file = read_adapter(path)
    raw, config, factors, replaced, tokens = file.raw, file.config, file.factors, file.replaced, file.tokens
    tensors = [tensor for parts in factors.values() for tensor in parts if isinstance(tensor, Tensor)]
    tensors += [*replaced.values(), *tokens.values()]
    layers = [_layer(name, parts) for name, parts in factors.items()]
    base, notes = _base(raw.get("base_model_name_or_path"), model)
    notes += _compare(layers, base, asked=model is not None) if base is not None else []
    if raw.get("use_dora"):
        notes.append("DoRA: the norms are of B A alone, not of the trained lengths")
    if any(row["experts"] for row in layers):
        notes.append(
            "experts: norms over all of a block's, mean effective ranks of one, the largest rank that one needs"
        )
    notes += [f"{len(rows)} tokens of {embedding} are trained in full" for embedding, rows in tokens.items()]
    if replaced:
        notes.append(f"trained in full: {', '.join(list(replaced)[:3])}{' and more' if len(replaced) > 3 else ''}")
    compared = bool(layers) and all(row["base_norm"] for row in layers)
    square = sum(row["norm"] ** 2 for row in layers)
    return {
        "kind": "adapter",
        "base_model": raw.get("base_model_name_or_path"),
        "trained_on": file.trained_on or "16-bit, or not known",
        "r": config.r,
        "alpha": raw.get("lora_alpha", 8),
        "scaling": config.scaling,
        "targets": config.targets,
        "layers": len(factors),
        "parameters": sum(t.numel() for t in tensors),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "ranks": sorted({row["r"] for row in layers}),
        "norm": square**0.5,
        "relative_norm": (square / sum(row["base_norm"] ** 2 for row in layers)) ** 0.5 if compared else None,
        "effective_rank": statistics.fmean(row["effective_rank"] for row in layers),
        "stable_rank": statistics.fmean(row["stable_rank"] for row in layers),
        "enough": {
            "rule": RULE,
            **{key: {"largest": max(r), "median": statistics.median_high(r)} for key, r in _enough(layers).items()},
        },
        "base": None if base is None else str(base.folder),
        "notes": notes,
        "by_layer": layers,
    }


def _layer(name: str, factors: Factors) -> dict[str, Any]:
    r, scaling, a, b = factors[:4]
    experts = int(a.shape[0]) // r  # one update each; of a layer there is one
    pairs = [(a.flatten(1), _without_groups(b.flatten(1), r))] if experts == 1 else []
    if experts > 1:
        pairs = list(zip(a.chunk(experts), b.view(b.shape[0], r, experts).unbind(2), strict=True))
    values = [algebra.singular_values(a_e, b_e, scaling) for a_e, b_e in pairs]
    trained = [s for s in values if s[0] > 0] or values[:1]
    s = torch.linalg.vector_norm(torch.stack(values), dim=0)
    return {
        "layer": name,
        "shape": [*([experts] if experts > 1 else []), int(b.shape[0]), *(int(size) for size in a.shape[1:])],
        "experts": experts if experts > 1 else None,
        "r": r,
        "scaling": scaling,
        "norm": algebra.frobenius_norm(s),
        "base_norm": None,
        "relative_norm": None,
        "effective_rank": statistics.fmean(algebra.effective_rank(one) for one in trained),
        "stable_rank": statistics.fmean(algebra.stable_rank(one) for one in trained),
        **{key: max(algebra.rank_keeping(one, share) for one in trained) for key, share in SHARES.items()},
        "singular_values": s.tolist(),
    }


def _without_groups(b: Any, r: int) -> Any:
    """B (out, r) of a convolution in groups, whose own B (out, r / groups) says for each row a group's columns only."""
    groups = r // b.shape[1]
    return b if groups == 1 else torch.block_diag(*b.chunk(groups))


def _enough(layers: list[dict[str, Any]]) -> dict[str, list[int]]:
    return {key: [row[key] for row in layers] for key in SHARES}


def _base(named: Any, model: str | None) -> tuple[BaseWeights | None, list[str]]:
    """The base's weights and what to say about them; only a base that was asked for may fail."""
    if model is not None:
        return BaseWeights(resolve(model, download=False)), []
    try:
        return BaseWeights(resolve(str(named), download=False, convert=False)) if named else None, []
    except VeneerError:
        return None, [f"the base {named!r} is not on this machine; --model M compares with the base's norms"]


def _compare(layers: list[dict[str, Any]], base: BaseWeights, *, asked: bool) -> list[str]:
    """Fill in the norms relative to the base; returns what did not fit, or raises it where the base was asked for."""
    norms = base.norms(row["layer"] for row in layers)
    wrong = []
    for row in layers:
        norm, shape = norms.get(row["layer"], (None, None))
        if norm is None or shape is None:
            wrong.append(f"{row['layer']}: not in {base.folder}")
        elif sorted(shape) != sorted(row["shape"]):
            wrong.append(f"{row['layer']}: found {shape} in {base.folder}, expected {tuple(row['shape'])}")
        else:
            row["base_norm"], row["relative_norm"] = norm, row["norm"] / norm if norm else None
    if wrong and asked:
        raise VeneerError(wrong, hint="the adapter was made for another model")
    return [f"{len(wrong)} layers do not fit the base found, for example {wrong[0]}"] if wrong else []


def describe(found: dict[str, Any], *, every_layer: bool = False) -> str:
    """The same for people: a summary in plain words and a table, by kind of layer where there are many layers."""
    layers, enough = found["by_layer"], found["enough"]
    ranks = ", ".join(map(str, found["ranks"]))
    targets = found["targets"] if isinstance(found["targets"], str) else ", ".join(found["targets"])
    relative = found["relative_norm"]
    lines = [
        f"adapter for            {found['base_model'] or 'an unnamed base'}, trained on it in {found['trained_on']}",
        f"targets                {targets} ({found['layers']:,} layers)",
        f"rank, alpha, scaling   {ranks}, {found['alpha']}, {found['scaling']:.4g}",
        f"size                   {found['parameters']:,} parameters, {found['bytes'] / 1e6:,.1f} MB",
        f"norm of the update     {found['norm']:.4g}"
        + (f", {100 * relative:.2f}% of the norm of the weights it changes" if relative is not None else ""),
        f"effective rank         {found['effective_rank']:.1f} on average (stable rank {found['stable_rank']:.1f})",
        f"rank that was enough   {enough['rank_95']['largest']} for 95% of every layer's update, "
        f"{enough['rank_99']['largest']} for 99%; half of the layers need {enough['rank_95']['median']} and "
        f"{enough['rank_99']['median']} or less; it has {max(found['ranks'])}",
    ]
    by_kind = len(layers) > LISTED and not every_layer
    lines += ["", *(_by_kind(layers) if by_kind else _by_layer(layers))]
    lines += ["", f"enough: {RULE}", *(f"note: {note}" for note in found["notes"])]
    if by_kind:
        lines.append(f"all {len(layers)} layers: --layers, or --json")
    return printable("\n".join(lines))


_HEADER = f"{'r':>5} {'norm':>9} {'of base':>8} {'eff. rank':>9} {'stable':>7} {'95%':>4} {'99%':>4}"


def _row(name: str, width: int, rows: list[dict[str, Any]]) -> str:
    """Means of several layers (of one: itself), and the largest rank that was enough."""
    mean: Callable[[str], float] = lambda key: statistics.fmean(row[key] for row in rows)  # noqa: E731
    relative = f"{100 * mean('relative_norm'):.2f}%" if all(row["relative_norm"] is not None for row in rows) else "-"
    most: Callable[[str], int] = lambda key: max(row[key] for row in rows)  # noqa: E731
    return (
        f"{name:{width}} {most('r'):>5} {mean('norm'):>9.4g} {relative:>8} {mean('effective_rank'):>9.1f} "
        f"{mean('stable_rank'):>7.1f} {most('rank_95'):>4} {most('rank_99'):>4}"
    )


def _by_layer(layers: list[dict[str, Any]]) -> list[str]:
    width = max(len(row["layer"]) for row in layers)
    return [f"{'layer':{width}} {_HEADER}", *(_row(row["layer"], width, [row]) for row in layers)]


def _by_kind(layers: list[dict[str, Any]]) -> list[str]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in layers:
        kinds.setdefault(row["layer"].rsplit(".", 1)[-1], []).append(row)
    width = max(len(f"{kind} x {len(rows)}") for kind, rows in kinds.items())
    title = f"{'kind of layer':{max(width, 13)}} {_HEADER}     (means; ranks: the largest)"
    return [title, *(_row(f"{kind} x {len(rows)}", max(width, 13), rows) for kind, rows in kinds.items())]


def plot(found: dict[str, Any], path: str | Path) -> Path:
    """Singular spectra and norms of all layers as one picture, PNG or SVG by the file's name.

    Raises:
        VeneerError: matplotlib is not installed, or another kind of file.
    """
    path, figure = figure_of(path, (13, 5))
    layers = found["by_layer"]
    kinds = list(dict.fromkeys(row["layer"].rsplit(".", 1)[-1] for row in layers))
    relative = found["relative_norm"] is not None
    left, right = figure.subplots(1, 2)
    for index, kind in enumerate(kinds):
        rows = [row for row in layers if row["layer"].rsplit(".", 1)[-1] == kind]
        for number, row in enumerate(rows):
            largest = row["singular_values"][0] or 1.0
            values = [value / largest for value in row["singular_values"]]
            name = kind if number == 0 else None
            left.plot(range(1, len(values) + 1), values, color=f"C{index % 10}", alpha=0.5, linewidth=0.8, label=name)
        heights = [100 * (row["relative_norm"] or 0.0) if relative else row["norm"] for row in rows]
        right.plot(range(len(rows)), heights, ".-", color=f"C{index % 10}", label=kind)
    left.set(
        title="singular values of each layer's update", xlabel="index", ylabel="share of the largest", yscale="log"
    )
    left.set_ylim(bottom=1e-4)
    unit = "norm of the update, % of the base weight's" if relative else "norm of the update (Frobenius)"
    right.set(title="size of the update by depth", xlabel="layer, first to last", ylabel=unit)
    right.set_ylim(bottom=0)
    right.legend(fontsize=8)
    left.legend(fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    return path


def figure_of(path: str | Path, inches: tuple[float, float]) -> tuple[Path, Any]:
    """An empty matplotlib figure for a file.

    Raises:
        VeneerError: matplotlib is not installed, or the file is to be neither .png nor .svg.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise VeneerError(f"plot {path}: found {path.suffix or 'no ending'!r}, expected a name ending in .png or .svg")
    try:
        from matplotlib.figure import Figure  # not pyplot: no display, no global state
    except ImportError:
        raise VeneerError(
            "plots need matplotlib, which is not installed", hint="pip install 'veneer[report]'"
        ) from None
    return path, Figure(figsize=inches, layout="constrained")
