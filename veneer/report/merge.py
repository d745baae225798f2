"""Merging with proof: which base to merge onto, how far the merged model is from base and adapter, and when that is too far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from veneer.adapters.attach import lora_layers
from veneer.adapters.files import load_adapter
from veneer.adapters.merge import hot_merge, merge
from veneer.adapters.peft_format import base_quantization
from veneer.config import Quantization
from veneer.errors import RefusedError, VeneerError
from veneer.evaluation import divergence, text_logits
from veneer.models.load import load, stored_dtype, stored_quantization
from veneer.models.merging import merge_files
from veneer.models.requantize import RESIDUAL, merge_quantized
from veneer.quant.linear import quantized_layers
from veneer.storage import require_empty_folder

TOLERANCE = 0.02  # nats: KL of a merged model from base and adapter; bf16 rounding alone makes about a twentieth of it


def merge_model(
    model: str,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    onto: str = "auto",
    trained_on: str | None = None,
    requantize: str | None = None,
    residual_rank: int = 16,
    check: bool = True,
    tolerance: float | None = None,
    force: bool = False,
    texts: list[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `model` with adapters merged into it, measured against base and adapter on text before it gets its name.

    An adapter that was trained on a quantised base belongs to that base: with `onto` "auto" both merges are measured, onto
    that base decoded and onto the 16-bit one, and the nearer is written.

    Args:
        onto: auto, 16-bit, nf4, fp4 or int8.
        trained_on: the same; what the base was when the adapters were trained. Left out, what they say: ours do.
        requantize: nf4, fp4 or int8: the result stays quantised (`merge_quantized`), with what that loses in an adapter of
            `residual_rank` beside it.
        check: measure; False for models that do not fit into memory.
        tolerance: KL in nats above which nothing is written, but with `force`; left out: TOLERANCE.
        texts: what is measured on; left out, three questions and three pieces of prose.

    Returns:
        the report (`merge_report.json`): that of `merge_files` or `merge_quantized`, `divergence` also one by one, `measured`,
        the divergence of a merge onto each base, and `chosen`, why this one.

    Raises:
        RefusedError: the result is further off than `tolerance`.
        VeneerError: what merging finds.
    """
    kinds = get_args(Quantization)
    problems = []
    if onto not in ("auto", "16-bit", *kinds):
        problems.append(f"--onto: found {onto!r}, expected auto, 16-bit, {', '.join(kinds)}")
    if trained_on not in (None, "16-bit", *kinds):
        problems.append(f"--trained-on: found {trained_on!r}, expected 16-bit, {', '.join(kinds)}")
    if requantize is not None and requantize not in kinds:
        problems.append(f"--requantize: found {requantize!r}, expected {', '.join(kinds)}")
    if requantize is not None and len(sources) > 1:
        problems.append("--requantize: found several adapters, expected one; combine them first (veneer combine)")
    if problems:
        raise VeneerError(problems)
    require_empty_folder(out)
    stored = stored_quantization(model)
    if stored and onto not in ("auto", stored):
        raise VeneerError(
            f"--onto {onto}: {model} is stored in {stored}, there is no {onto} base in it",
            hint="leave --onto out, or give the 16-bit model it was made from",
        )
    known = trained_on is not None
    trained = (
        {base_quantization(path) for path in sources} if not known else {None if trained_on == "16-bit" else trained_on}
    )
    if len(trained) > 1 and not stored:
        found = ", ".join(sorted(kind or "16-bit, or not known" for kind in trained))
        raise VeneerError(f"the adapters were trained on different bases: {found}", hint="merge one after the other")
    belongs = stored or trained.pop()
    kind = stored or (belongs if onto == "auto" else onto if onto in kinds else None)
    if requantize is not None and kind not in (None, requantize):
        raise VeneerError(f"--requantize: found {requantize}, but this merges onto a base in {kind}")
    reference: list[torch.Tensor] | None = None
    ways: dict[str, Any] = {}
    limit = TOLERANCE if tolerance is None else tolerance
    chosen = "as asked" if onto != "auto" else "the base it was trained on"
    if onto == "auto" and belongs is None and not known:
        chosen = "what it was trained on is not known: taken for the 16-bit base; --trained-on nf4 says otherwise"
    if check:
        both = onto == "auto" and belongs is not None and not stored
        reference, ways = _measure(model, sources, belongs, stored, texts, both=both)
        if ways:
            decoded, dense = ways[str(belongs)]["kl"], ways["16-bit"]["kl"]
            kind = None if dense < decoded else belongs
            chosen = f"measured: KL {decoded:.2g} onto the {belongs} base decoded, {dense:.2g} onto the 16-bit one"

    def measured(folder: Path) -> dict[str, Any]:
        merged, tokenizer = load(folder, dtype=stored_dtype(folder), fused=False)
        if requantize is not None and (folder / RESIDUAL).is_dir():
            load_adapter(merged, folder / RESIDUAL)
        assert reference is not None
        found = divergence(reference, text_logits(merged, tokenizer, texts))
        if not found["kl"] <= limit and not force:  # NaN too
            raise RefusedError(
                f"the merged model is too far from base and adapter: found a KL of {found['kl']:.3g} nats "
                f"(largest logit difference {found['max_logit_difference']:.3g}, the same likeliest token at "
                f"{100 * found['top1_agreement']:.1f}% of {found['tokens']} positions), expected at most {limit:g}",
                hint="serve the adapter beside its base, merge onto another base (--onto), keep a residual adapter of a higher "
                "rank (--residual-rank), or write it all the same with --force",
            )
        return found

    verify = measured if check else None
    about = {
        "trained_on": belongs or ("16-bit" if known else "16-bit, or not known"),
        "measured": ways,
        "chosen": chosen,
        "tolerance": limit if check else None,
        "forced": force,
    }
    if requantize is not None:
        wanted: Any = requantize
        report = merge_quantized(
            model, sources[0], out, kind=wanted, rank=residual_rank, decoded=kind is not None, check=verify,
            about=about, progress=progress,
        )  # type: ignore[arg-type]  # fmt: skip
    else:
        report = merge_files(
            model, sources, out, onto=None if stored else kind, check=verify, about=about, progress=progress
        )
    return {"out": str(out), **report, **(report["divergence"] or {})}


def _measure(
    model: str,
    sources: Sequence[str | Path],
    kind: str | None,
    stored: str | None,
    texts: list[str] | None,
    *,
    both: bool,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Logits of base and adapters, the base in `kind`, and how far a merge onto each base is from that."""
    loaded, tokenizer = load(model, quantize=None if stored else kind, dtype=stored_dtype(model), fused=False)  # type: ignore[arg-type]
    if len(sources) == 1:
        load_adapter(loaded, sources[0])
        reference = text_logits(loaded, tokenizer, texts)
    else:  # one after the other: what is in already is base for the next
        for path in sources:
            load_adapter(loaded, path)
            reference = text_logits(loaded, tokenizer, texts)
            merge(loaded)
    if kind is None or not both or len(sources) > 1:
        return reference, {}
    hot_merge(loaded)
    ways = {kind: divergence(reference, text_logits(loaded, tokenizer, texts))}
    del loaded
    dense, _ = load(model, dtype=stored_dtype(model), fused=False)
    load_adapter(dense, sources[0])
    ways["16-bit"] = divergence(reference, text_logits(hot_merge(dense), tokenizer, texts))
    assert not quantized_layers(dense) and lora_layers(dense)
    return reference, ways


def describe(report: dict[str, Any]) -> str:
    """The same for people."""
    onto = report["onto"]
    base = "the 16-bit base" if onto == "16-bit" else f"the {onto} base, decoded to 16 bits"
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
            f"{report['changed']} of {report['tensors']} tensors changed; largest error against fp64 {error['max_error']:.3g}, "
            f"of which rounding {error['rounding']:.3g}"
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
    return "\n".join(lines)
