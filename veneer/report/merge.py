"""Merging with proof: which base to merge onto, how far the merged model is from base and adapter, and when that is too far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from veneer.adapters.files import load_adapter, place_adapters
from veneer.adapters.merge import merge
from veneer.config import Quantization
from veneer.errors import RefusedError, VeneerError
from veneer.evaluation import divergence, text_logits
from veneer.models.load import load, load_tokenizer, read_gguf, resolve, stored_dtype, stored_quantization
from veneer.models.merging import hollow_model, write_merged
from veneer.models.requantize import RESIDUAL, write_quantized
from veneer.storage import atomic_folder

UNKNOWN = "16-bit, or not known"
TOLERANCE = 0.02  # nats: KL of a merged model from base and adapter; bf16 rounding alone makes about a twentieth of it


def merge_model(
    model: str,
    sources: Sequence[str | Path],
    out: str | Path,
    **options: Any,
) -> dict[str, Any]:
    """Write `model` with adapters merged into it to a new folder `out`, atomically; `options` and the rest as `merge_into`.

    Returns:
        what `merge_into` does, with `out`, and the figures of `divergence` one by one.
    """
    with atomic_folder(out) as folder:
        report = merge_into(folder, model, sources, name=str(out), **options)
    return {"out": str(out), **report, **(report["divergence"] or {})}


def merge_into(
    folder: Path,
    model: str,
    sources: Sequence[str | Path],
    *,
    name: str,
    onto: str = "auto",
    trained_on: str | None = None,
    requantize: str | None = None,
    residual_rank: int | None = None,
    check: bool = True,
    tolerance: float | None = None,
    force: bool = False,
    texts: list[str] | None = None,
    convert: Callable[[Path], Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `model` with adapters merged into it, measured against base and adapter on text, into a folder that is there.

    An adapter that was trained on a quantised base belongs to that base: with `onto` "auto" both merges are measured, onto
    that base decoded and onto the 16-bit one, and the nearer is written.

    Args:
        name: the folder's in the end.
        onto: auto, 16-bit, nf4, fp4 or int8.
        trained_on: the same; what the base was when the adapters were trained. Left out, what they say: ours do.
        requantize: nf4, fp4 or int8: the result stays quantised (`merge_quantized`), with what that loses in an adapter of
            `residual_rank` (left out: 16) beside it.
        check: measure; False for models that do not fit into memory.
        tolerance: KL in nats above which nothing is written, but with `force`; left out: TOLERANCE.
        texts: what is measured on; left out, three questions and three pieces of prose.
        convert: turns the merged files in the folder into a GGUF and says where it is; that is measured then.

    Returns:
        the report (`merge_report.json`): that of `merge_files` or `merge_quantized`, `measured`, the divergence of a merge
        onto each base, and `chosen`, why this one.

    Raises:
        RefusedError: the result is further off than `tolerance`.
        VeneerError: what merging finds, and options that do not go together.
    """
    problems = option_problems(onto, trained_on, requantize, len(sources))
    if not check:
        idle = {"--text": texts is not None, "--tolerance": tolerance is not None, "--force": force}
        problems += [
            f"{option}: is of no use without measuring (--no-check)" for option, given in idle.items() if given
        ]
    if residual_rank is not None and requantize is None:
        problems.append("--residual-rank: found without --requantize, expected both")
    if problems:
        raise VeneerError(problems)
    base = _base(model, sources, onto, trained_on)
    if requantize is not None and base.kind not in (None, requantize):
        raise VeneerError(f"--requantize: found {requantize}, but this merges onto a base in {base.kind}")
    limit = TOLERANCE if tolerance is None else tolerance
    ways: dict[str, Any] = {}
    measured = None
    if check:
        both = onto == "auto" and base.belongs is not None and not base.stored
        reference, ways = _measure(model, sources, base, texts, both=both)
        base = _nearer(base, ways)
        found = partial(_found, model, reference, texts, convert)
        measured = partial(_require_near, found, math.inf if force else limit, requantize is not None)
    about = {
        "trained_on": base.trained_on,
        "made_for": base.made_for,
        "measured": ways,
        "chosen": base.why,
        "tolerance": limit if check else None,
        "forced": force,
    }
    common: dict[str, Any] = {"check": measured, "about": about, "progress": progress}
    common["double_quant"] = None if base.stored else base.double_quant
    if requantize is None:
        report = write_merged(model, sources, folder, onto=None if base.stored else base.kind, **common)
        if convert is not None and not check:
            convert(folder)
        return report
    rank = 16 if residual_rank is None else residual_rank
    wanted: Any = requantize
    return write_quantized(
        model, sources[0], folder, name=name, kind=wanted, rank=rank, decoded=base.kind is not None, **common
    )


def _nearer(base: _Base, ways: dict[str, Any]) -> _Base:
    """The base of which the merge came out nearer, where both were measured."""
    if not ways:
        return base
    decoded, dense = ways[str(base.belongs)]["kl"], ways["16-bit"]["kl"]
    return base._replace(
        kind=None if dense < decoded else base.belongs,
        why=f"measured: KL {decoded:.2g} onto the {base.belongs} base decoded, {dense:.2g} onto the 16-bit one",
    )


def _found(
    model: str,
    reference: list[torch.Tensor],
    texts: list[str] | None,
    convert: Callable[[Path], Path] | None,
    folder: Path,
) -> dict[str, Any]:
    """How far what was written to the folder, or its GGUF, is from the reference."""
    if convert is None:
        merged, tokenizer = load(folder, dtype=stored_dtype(folder), fused=False)
    else:
        tokenizer = load_tokenizer(folder)
        merged = read_gguf(convert(folder), getattr(torch, stored_dtype(model)), tokenizer=False)[0].eval()
    if (folder / RESIDUAL).is_dir():
        load_adapter(merged, folder / RESIDUAL)
    return divergence(reference, text_logits(merged, tokenizer, texts))


def _require_near(
    found: Callable[[Path], dict[str, Any]], limit: float, requantized: bool, folder: Path
) -> dict[str, Any]:
    """The divergence, if it is at most `limit`."""
    apart = found(folder)
    if not apart["kl"] <= limit and limit < math.inf:  # NaN too
        raise _too_far(apart, limit, requantized=requantized)
    return apart


def option_problems(onto: str, trained_on: str | None, requantize: str | None = None, adapters: int = 1) -> list[str]:
    """What is wrong with these options of a merge."""
    kinds = get_args(Quantization)
    problems = []
    if onto not in ("auto", "16-bit", *kinds):
        problems.append(f"--onto: found {onto!r}, expected auto, 16-bit, {', '.join(kinds)}")
    if trained_on not in (None, "16-bit", *kinds):
        problems.append(f"--trained-on: found {trained_on!r}, expected 16-bit, {', '.join(kinds)}")
    if requantize is not None and requantize not in kinds:
        problems.append(f"--requantize: found {requantize!r}, expected {', '.join(kinds)}")
    if requantize is not None and adapters > 1:
        problems.append("--requantize: found several adapters, expected one; combine them first (veneer combine)")
    return problems


class _Base(NamedTuple):
    """kind: what the base is decoded from before merging, None: it is the 16-bit one; stored: what it is on disk; belongs:
    what adapter and base are in, if that is quantised; why: this kind; double_quant: of the constants of 4 bits; trained_on:
    what the adapters or the user say of the base in training; made_for: the base's names in the adapters."""

    kind: str | None
    stored: str | None
    belongs: str | None
    why: str
    double_quant: bool
    trained_on: str
    made_for: list[str | None]


def _base(model: str, sources: Sequence[str | Path], onto: str, trained_on: str | None) -> _Base:
    """The base to merge onto, as far as it can be said without measuring."""
    stored = stored_quantization(model)
    if stored and onto not in ("auto", stored):
        raise VeneerError(
            f"--onto {onto}: {model} is stored in {stored}, there is no {onto} base in it",
            hint="leave --onto out, or give the 16-bit model it was made from",
        )
    files = place_adapters(hollow_model(resolve(model)), sources)  # what is wrong is said before anything is loaded
    said = {trained_on} if trained_on is not None else {file.trained_on or UNKNOWN for file in files}
    if len(said) > 1:
        raise VeneerError(
            f"the adapters were trained on different bases: {', '.join(sorted(said))}", hint="merge one after the other"
        )
    trained = next(iter(said), UNKNOWN)
    belongs = stored or (None if trained in ("16-bit", UNKNOWN) else trained)
    kind = stored or (belongs if onto == "auto" else None if onto == "16-bit" else onto)
    why = "as asked" if onto != "auto" else "the base it was trained on"
    if stored:
        why = f"the only base in these files; trained on: {trained}"
    elif onto == "auto" and trained == UNKNOWN:
        why = "what it was trained on is not known: taken for the 16-bit base; --trained-on nf4 says otherwise"
    double_quant = next((file.double_quant for file in files if file.double_quant is not None), True)
    made_for = [file.raw.get("base_model_name_or_path") for file in files]
    return _Base(kind, stored, belongs, why, double_quant, trained, made_for)


def _measure(
    model: str, sources: Sequence[str | Path], base: _Base, texts: list[str] | None, *, both: bool
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Logits of base and adapters, and with `both` how far a merge onto each base is from that."""
    wanted: Any = None if base.stored else base.belongs
    how: dict[str, Any] = {"dtype": stored_dtype(model), "fused": False}
    loaded, tokenizer = load(model, quantize=wanted, double_quant=base.double_quant, **how)
    for path in sources[:-1]:  # one after the other: what is in already is base for the next
        merge(load_adapter(loaded, path))
    load_adapter(loaded, sources[-1])
    reference = text_logits(loaded, tokenizer, texts)
    if not both:
        return reference, {}
    ways = {str(base.belongs): divergence(reference, text_logits(merge(loaded), tokenizer, texts))}
    del loaded
    dense, _ = load(model, **how)
    for path in sources:
        merge(load_adapter(dense, path))
    ways["16-bit"] = divergence(reference, text_logits(dense, tokenizer, texts))
    return reference, ways


def _too_far(found: dict[str, Any], limit: float, *, requantized: bool) -> RefusedError:
    higher = "keep a residual adapter of a higher rank (--residual-rank), " if requantized else ""
    return RefusedError(
        f"the merged model is too far from base and adapter: found a KL of {found['kl']:.3g} nats "
        f"(largest logit difference {found['max_logit_difference']:.3g}, the same likeliest token at "
        f"{100 * found['top1_agreement']:.1f}% of {found['tokens']} positions), expected at most {limit:g}",
        hint=f"serve the adapter beside its base, merge onto another base (--onto; --trained-on, if the adapter does not say what "
        f"it was trained on), {higher}or write it all the same with "
        "--force",
    )


def describe(report: dict[str, Any]) -> str:
    """The same for people."""
    onto = report["onto"]
    base = "the base as it is stored" if onto == "16-bit" else f"the {onto} base, decoded"
    lines = [f"merged onto {base}: {report['out']}"]
    lines[0] += f"\n  ({report['chosen']})"
    error = report["error"] or {}
    if "rank" in report:
        lines.append(
            f"{report['how']}, of the update's norm lost: {100 * error['without residual']:.3g}% without, "
            f"{100 * error['with residual']:.3g}% with the residual adapter of rank {report['rank']}"
            + (f" ({Path(report['out']) / RESIDUAL})" if report["rank"] else "")
        )
    elif error:
        lines.append(
            f"{report['changed']} of {report['tensors']} tensors changed; largest error against fp64, 16 rows of each, "
            f"{error['max_error']:.3g}, of which rounding {error['rounding']:.3g}"
        )
    else:
        lines.append(
            f"{report['changed']} layers changed; merged in memory, not tensor by tensor: no error against fp64"
        )
    found = report["divergence"]
    if found is None:
        lines.append("not measured on text (--no-check)")
    else:
        lines.append(
            f"from base and adapter on text: KL {found['kl']:.2g} nats, largest logit difference "
            f"{found['max_logit_difference']:.4g}, same likeliest token at {100 * found['top1_agreement']:.1f}% of "
            f"{found['tokens']} positions"
        )
    lines += [
        f"note: {path} says it was made for {name!r}, merged into {report['model']!r}"
        for path, name in zip(report["adapters"], report["made_for"], strict=True)
        if name and Path(name).name.lower() != Path(report["model"]).name.lower()
    ]
    return "\n".join(lines)
