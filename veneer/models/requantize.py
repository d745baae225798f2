"""An adapter merged into a 4-bit (or int8) model that stays one, and what that loses kept as a small adapter of its own.

W' = W + update is dense; of it a quantised weight Q and a residual of rank k, Q + B A, are to be left. Of each layer three
are tried, and the nearest to W' is taken:

    fresh     Q = quantised W'                       the usual way: most of a small update is rounded away
    nearest   Q = W' in the scales that W has        a code changes only where the update carries a weight over a midpoint
    kept      Q = W itself                           the residual has to hold the whole update; exact where its rank allows

and B A is always the nearest matrix of rank k to W' - Q (Eckart & Young 1936).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.algebra import RowBlocks, nearest_factors
from veneer.adapters.attach import attach, lora_layers, remove_adapter
from veneer.adapters.files import load_adapter, save_adapter
from veneer.adapters.lora import LoraLinear
from veneer.adapters.peft_format import read_adapter
from veneer.config import LoraConfig, Quantization
from veneer.errors import VeneerError
from veneer.models.load import load, resolve, stored_dtype, stored_quantization, write_model
from veneer.models.merging import REPORT_FILE, hashing
from veneer.models.weights import BaseWeights
from veneer.quant.four_bit import FourBitTensor
from veneer.quant.linear import QuantizedLinear, QuantizedTensor, quantize, quantized_layers
from veneer.storage import atomic_folder, sha256, write_json

RESIDUAL = "residual"  # the folder of the residual adapter inside the model's


def merge_quantized(
    model: str | Path, source: str | Path, out: str | Path, *, replace: bool = False, **options: Any
) -> dict[str, Any]:
    """`write_quantized` to a new folder `out`, atomically; `options` and what it returns and raises as there."""
    with atomic_folder(out, replace=replace) as folder:
        return write_quantized(model, source, folder, name=str(out), **options)


def write_quantized(
    model: str | Path,
    source: str | Path,
    out: Path,
    *,
    name: str,
    kind: Quantization = "nf4",
    double_quant: bool | None = None,
    rank: int = 16,
    decoded: bool = True,
    check: Callable[[Path], dict[str, Any]] | None = None,
    about: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `model` with an adapter merged into it in 4 or 8 bits, and in `out`/residual an adapter of what was lost.

    Args:
        out: a folder that is there; what is in it after an error is of no use.
        name: the folder's in the end; the residual says it of its base.
        rank: of the residual; 0: none is kept.
        decoded: onto what `kind` makes of the base, which a QLoRA adapter was trained on; False: onto the 16-bit base.
        double_quant: left out, as the stored base is, or as the adapter's was, if that is known, else True.
        check, about, progress: as of `write_merged`.

    Returns:
        What is in `merge_report.json`: how often each way was nearest, and the error with and without the residual, of the
        update's norm: a value above 1 without it means that nothing of the update is left.

    Raises:
        VeneerError: what `load` and `load_adapter` find; an adapter that changes more than linears.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= 4096:
        raise VeneerError(f"rank of the residual: found {rank!r}, expected a whole number from 0 to 4,096")
    stored = stored_quantization(model)
    if stored and stored != kind:
        raise VeneerError(
            f"{model} is stored in {stored}: found {kind}, expected the same", hint=f"--requantize {stored}"
        )
    if stored and not decoded:
        raise VeneerError(f"{model} is stored in {stored}, there is no 16-bit base in it")
    with hashing(resolve(str(model)), [source]) as hashes:
        doubly = read_adapter(source).double_quant if double_quant is None else double_quant
        how: dict[str, Any] = {"double_quant": True if doubly is None else doubly, "dtype": stored_dtype(model)}
        base, tokenizer = load(model, quantize=None if stored else kind, device="cpu", fused=False, **how)
        load_adapter(base, source)
        _require_linears(base)
        done = _Requantised(base, kind, rank, None if decoded else BaseWeights(resolve(str(model))))
        layers: dict[str, LoraLinear] = {path: x for path, x in lora_layers(base).items() if isinstance(x, LoraLinear)}
        for number, (path, layer) in enumerate(layers.items(), 1):
            done.layer(path, layer)
            if progress is not None:
                progress(number, len(layers))
        remove_adapter(base, "default")
        report: dict[str, Any] = {
            "model": str(model),
            "adapters": [str(source)],
            "onto": kind if decoded else "16-bit",
            "how": f"requantised to {kind}",
            "rank": rank,
            "ways": dict(done.ways),
            "tensors": None,
            "changed": len(layers),
            **(about or {}),
            "error": done.error(),
        }
        write_model(base, tokenizer, out)
        if done.residuals:
            _save_residual(base, done.residuals, out / RESIDUAL, name, rank)
        report["divergence"] = None if check is None else check(out)
        report["inputs"] = hashes()
    outputs = sorted(out.rglob("*.safetensors"))
    report["outputs"] = {str(file.relative_to(out)): sha256(file) for file in outputs}
    write_json(out / REPORT_FILE, report)
    return report


def _require_linears(model: Any) -> None:
    """Raise VeneerError for all that an adapter changes besides quantised linears."""
    layers = lora_layers(model)
    others = [path for path, layer in layers.items() if not isinstance(layer.base_layer, QuantizedLinear)]
    adapter = next(iter(model.veneer_adapters.values()))
    others += [*adapter.replaced, *(f"tokens {n}" for n in (adapter.config.tokens or ()))]
    others += [f"{p}, lora_bias" for p, x in layers.items() if x.lora_bias and x.bias is None]
    if others:
        raise VeneerError(
            [f"{path}: not a quantised linear, it cannot be merged into one" for path in others],
            hint="merge into 16 bits (--out without --requantize), then quantise that",
        )


class _Requantised:
    """What became of the layers: residual factors, how often each way was nearest, squared norms of update and errors."""

    def __init__(self, model: Any, kind: str, rank: int, original: BaseWeights | None) -> None:
        self.kind, self.rank, self.original = kind, rank, original
        self.double_quant = next((x.double_quant for x in quantized_layers(model).values()), True)
        self.residuals: dict[str, tuple[Tensor, Tensor]] = {}
        self.ways: collections.Counter[str] = collections.Counter()
        self.squared = dict.fromkeys(("update", "without", "with"), 0.0)

    @torch.no_grad()
    def layer(self, path: str, layer: LoraLinear) -> None:
        """Merge a layer's adapter into its base and make that a quantised linear again."""
        quantized = layer.base_layer
        start, merged = quantized.dequantize(torch.float32), layer.merged("default")
        if self.original is not None:
            weight = self.original.weight(path)
            if weight is None or weight.shape != start.shape:
                raise VeneerError(
                    f"{path}: not in the files of the model under that name", hint="merge onto nf4 instead"
                )
            dense = nn.Linear(*reversed(start.shape), bias=False, device="meta")
            dense.weight = nn.Parameter(weight.float(), requires_grad=False)
            merged = merged - start + dense.weight if not layer.magnitude else _dora(layer, dense)
            start = dense.weight
        way, tensor, factors, lost = _best(quantized.tensor(), merged, self.kind, self.double_quant, self.rank)
        self.ways[way] += 1
        self.squared["update"] += float((merged - start).double().square().sum())
        self.squared["without"] += lost[0]
        self.squared["with"] += lost[1]
        bias = layer.merged_bias("default")
        bias = quantized.bias if bias is None else bias.to(quantized.bias.dtype)
        layer.base_layer = QuantizedLinear(tensor, bias, quantized.compute_dtype).eval()
        if factors is not None:
            self.residuals[path] = factors

    def error(self) -> dict[str, float]:
        """Of the update's norm, without and with the residual."""
        update = self.squared["update"]
        parts = {key: self.squared[key] for key in ("without", "with")}
        return {f"{key} residual": math.sqrt(value / update) if update else 0.0 for key, value in parts.items()}


def _dora(layer: LoraLinear, dense: nn.Linear) -> Tensor:
    """DoRA's weight on another base."""
    before, layer.base_layer = layer.base_layer, dense
    try:
        return layer.merged("default")
    finally:
        layer.base_layer = before


def _best(
    old: QuantizedTensor, merged: Tensor, kind: str, double_quant: bool, rank: int
) -> tuple[str, QuantizedTensor, tuple[Tensor, Tensor] | None, tuple[float, float]]:
    """The way that is nearest with the residual: its name, Q, (A, B), and the squared errors without and with it."""
    tried: dict[str, QuantizedTensor] = {"kept": old, "fresh": quantize(merged, kind, double_quant=double_quant)}
    if isinstance(old, FourBitTensor):
        tried["nearest"] = old.nearest(merged)
    found: list[tuple[float, str, QuantizedTensor, tuple[Tensor, Tensor] | None, float]] = []
    for way, tensor in tried.items():
        rest = merged - tensor.dequantize(torch.float32)
        without = float(rest.double().square().sum())
        if not rank:
            found.append((without, way, tensor, None, without))
            continue
        shape = (rest.shape[0], rest.shape[1])
        low = nearest_factors(RowBlocks(shape, len(rest), lambda i, j, rest=rest: rest[i:j]), min(rank, *shape))  # type: ignore[misc]
        found.append((low.lost, way, tensor, (low.a, low.b), without))
    lost, way, tensor, factors, without = min(found, key=lambda one: one[0])
    return way, tensor, factors, (without, lost)


def _save_residual(model: Any, residuals: dict[str, tuple[Tensor, Tensor]], path: Path, name: str, rank: int) -> None:
    ranks = {path: len(a) for path, (a, _) in residuals.items()}
    less = {path: r for path, r in ranks.items() if r < rank}  # layers that allow no more
    config = LoraConfig(r=rank, alpha=rank, targets=sorted(residuals), rank_pattern=less, alpha_pattern=dict(less))
    attach(model, config, name=RESIDUAL, seed=0)
    with torch.no_grad():
        for layer_path, layer in lora_layers(model).items():
            a, b = residuals[layer_path]
            layer.lora_A[RESIDUAL].copy_(a)
            layer.lora_B[RESIDUAL].copy_(b)
    model.name_or_path = name
    save_adapter(model, path, RESIDUAL)
