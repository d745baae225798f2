"""Merging: the update becomes part of the weights and the model an ordinary one again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import attach
from veneer.adapters.attach import active_adapter, adapters, lora_layers, require_adapter, set_adapter, unwrap
from veneer.adapters.experts import LoraParameter
from veneer.adapters.lora import LoraLayer
from veneer.adapters.tokens import token_rows
from veneer.errors import VeneerError
from veneer.ops import all_finite
from veneer.quant.linear import QuantizedLinear


@torch.no_grad()
def merge(model: Any, name: str | None = None) -> Any:
    """Fold one adapter (the active one by default) into `model`, in place: a plain transformers model is left.

    A 4-bit base is decoded to its compute dtype first, so the merged model is what the adapter was trained on.
    An update of a tied output head gives the head a weight of its own (the config then says so): the input
    embeddings stay what they were. All adapters are gone afterwards: keep the adapter's files, they cannot be taken out of the weights again.

    Raises:
        VeneerError: no such adapter, the merged weights hold NaN or Inf, or an adapter's bias has no place in the base
            (the model is unchanged then).
    """
    name = _checked(model, name)
    tied = _is_tied(model)
    set_adapter(model, name)  # what it trained in full is in its place from here on
    for path, layer in lora_layers(model).items():
        if isinstance(layer, LoraParameter):
            _fold(model, path, layer, name)
        else:
            _put(model, path, _merged(layer, name))
    for rows in token_rows(model).values():
        if name in rows.rows:  # wherever the weight is used: ties stay
            attach._put(model, rows.base.weight, nn.Parameter(rows.merged(name), requires_grad=False))
        rows.drop()
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            _put(model, path, _plain(module, None))
    if tied and not _is_tied(model):
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapters(model).clear()
    for key in ("veneer_active", "veneer_base", "veneer_original"):
        model.__dict__.pop(key, None)
    if hasattr(model, "veneer_quantization"):
        model.veneer_quantization = None
        model.config.__dict__.pop("quantization_config", None)
    return model


def _checked(model: Any, name: str | None) -> str:
    """The adapter to merge; raises what stands against it."""
    name = name or active_adapter(model)
    if name is None:
        raise VeneerError("there is no active adapter to merge", hint="load one first")
    require_adapter(model, name)
    layers = lora_layers(model)
    bad = [path for path, layer in layers.items() if name in layer.lora_A and not _finite(layer, name)]
    bad += [p for p, rows in token_rows(model).items() if name in rows.rows and not all_finite(rows.rows[name])]
    problems = [f"{path}: the update holds NaN or Inf" for path in bad]
    problems += [
        f"{path}: the adapter's bias (lora_bias) has no place in a layer without one"
        for path, layer in layers.items()
        if name in layer.lora_bias and layer.bias is None
    ]
    if problems:
        raise VeneerError(problems)
    return name


def _finite(layer: LoraLayer, name: str) -> bool:
    """Whether the merged weight is; where its factors leave no doubt it is not made for that."""
    factors = [value.detach() for value in layer.parameters_of(name).values()]
    if not all(map(all_finite, factors)):
        return False
    largest = math.prod(float(value.abs().max()) for value in factors[:2]) * layer.rank(name) * abs(layer.scaling[name])
    if largest < 1e30 and layer.weight.dtype != torch.float16:
        return True
    base = layer.base_layer
    dtype = base.compute_dtype if isinstance(base, QuantizedLinear) else layer.weight.dtype
    return all_finite(layer.merged_to(name, dtype))


@torch.no_grad()
def hot_merge(model: Any, name: str | None = None) -> Any:
    """Let `model` compute with an adapter (the active one by default) folded into its weights, in place; `unmerge` puts the
    weights back bit for bit, another `hot_merge` or `set_adapter` changes to another adapter.

    For serving one adapter at a time: a token then costs what it costs without an adapter. The weights that are replaced
    are kept, so what is adapted takes its memory twice. Merged weights are not trained.

    Raises:
        VeneerError: as `merge`.
    """
    name = _checked(model, name)
    before = model.__dict__.get("veneer_merged", {})
    buffers = {path: layer.weight.detach() for path, layer in lora_layers(model).items() if path in before}
    set_adapter(model, name)
    kept: dict[str, Any] = {}
    model.__dict__["veneer_merged"] = kept
    for path, layer in lora_layers(model).items():
        if name not in layer.lora_A:
            continue
        if isinstance(layer, LoraParameter):
            kept[path] = layer.weight
            merged = layer.merged_to(name, layer.weight.dtype, buffers.get(path))
            layer.owner._parameters[layer.key] = nn.Parameter(merged, requires_grad=False)
        elif isinstance(layer.base_layer, QuantizedLinear):
            kept[path] = layer.base_layer
            merged = layer.merged_to(name, layer.base_layer.compute_dtype, buffers.get(path))
            layer.base_layer = _dense(layer.base_layer, merged, layer.merged_bias(name))
        else:
            base = layer.base_layer
            kept[path] = (base.weight, getattr(base, "bias", None))
            merged = layer.merged_to(name, base.weight.dtype, buffers.get(path))
            bias = layer.merged_bias(name)
            base.weight = nn.Parameter(merged, requires_grad=False)
            if bias is not None:
                base.bias = nn.Parameter(bias.to(base.bias.dtype), requires_grad=False)
        layer.active = None
    return model


def _fold(model: nn.Module, path: str, layer: LoraParameter, name: str) -> None:
    weight = layer.merged(name) if name in layer.lora_A else layer.weight.detach()
    setattr(layer.owner, layer.key, nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False))
    unwrap(model, path, layer)


def _merged(layer: LoraLayer, name: str) -> nn.Module:
    base = layer.base_layer
    if name not in layer.lora_A:
        return _plain(base, None)
    dtype = base.compute_dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
    return _plain(base, layer.merged_to(name, dtype), layer.merged_bias(name))


def _plain(base: Any, weight: Tensor | None, bias: Tensor | None = None) -> nn.Module:
    """The base with another weight and bias, rounded once to its type; a 4-bit base becomes dense."""
    if bias is not None:
        base.bias = nn.Parameter(bias.to(base.bias.dtype), requires_grad=False)
    if isinstance(base, QuantizedLinear):
        return _dense(base, base.dequantize() if weight is None else weight, base.bias)
    if weight is not None:  # a new parameter, never in place: a tied head's weight is the input embedding too
        base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
    return base  # type: ignore[no-any-return]


def _dense(base: QuantizedLinear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear in the compute dtype with this weight, and this bias or the base's."""
    bias, dtype = base.bias if bias is None else bias, base.compute_dtype
    dense = nn.Linear(base.in_features, base.out_features, bias=bias is not None, device="meta", dtype=dtype)
    dense.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return dense.train(base.training)


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
