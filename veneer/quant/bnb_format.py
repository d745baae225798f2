"""Quantised weights as bitsandbytes writes them into safetensors, and the config.json part that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import VeneerError
from veneer.ops.reference import BLOCK, CODE_BOOKS, DYNAMIC_MAP, NESTED_BLOCK
from veneer.quant.four_bit import FourBitTensor
from veneer.quant.int8 import Int8Tensor
from veneer.quant.linear import QuantizedLinear, quantized_layers

STATE = "weight.quant_state.bitsandbytes__"  # and "nf4" or "fp4"
SCALE, FORMAT = "SCB", "weight_format"  # beside an int8 weight; 0: by row, the only one there is
OUTLIER_THRESHOLD = 6.0


def pack_layer(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one layer by bitsandbytes' key, without the layer's name."""
    bias = {} if layer.bias is None else {"bias": layer.bias}
    tensor = layer.tensor()
    if isinstance(tensor, Int8Tensor):
        return {"weight": tensor.codes, SCALE: tensor.absmax, FORMAT: torch.zeros((), dtype=torch.uint8), **bias}
    state: dict[str, Any] = {
        "quant_type": tensor.kind,
        "blocksize": BLOCK,
        "dtype": str(layer.compute_dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    values = CODE_BOOKS[tensor.kind].values
    tensors = {"weight": layer.weight, "weight.absmax": tensor.absmax, "weight.quant_map": values.clone()}
    if tensor.nested_absmax is not None and tensor.offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(tensor.offset)}
        tensors |= {"weight.nested_absmax": tensor.nested_absmax, "weight.nested_quant_map": DYNAMIC_MAP.clone()}
    tensors[STATE + tensor.kind] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).clone()
    return tensors | bias


def unpack_layer(tensors: Mapping[str, Tensor], name: str, compute_dtype: torch.dtype) -> QuantizedLinear:
    """One layer from tensors by bitsandbytes' key; `name` is for messages.

    Raises:
        VeneerError: parts are missing, of another type or size, not finite, or say they are something else than int8
            by row, or NF4 or FP4 in blocks of 64; all at once.
    """
    problems: list[str] = []
    if SCALE in tensors:
        weight: FourBitTensor | Int8Tensor | None = _unpack_int8(tensors, problems)
    else:
        weight = _unpack_4bit(tensors, problems)
    if weight is not None and "bias" in tensors and tensors["bias"].shape != weight.shape[:1]:
        problems.append(f"bias: found {tuple(tensors['bias'].shape)}, expected {tuple(weight.shape[:1])}")
    if problems or weight is None:
        raise VeneerError([f"{name}.{problem}" for problem in problems])
    bias = tensors["bias"].to(compute_dtype) if "bias" in tensors else None
    return QuantizedLinear(weight, bias, compute_dtype)


def _unpack_int8(tensors: Mapping[str, Tensor], problems: list[str]) -> Int8Tensor | None:
    """The weight, as far as it can be told; what is wrong with it goes to `problems`."""
    codes, absmax = tensors.get("weight"), tensors[SCALE]
    if codes is None:
        problems.append("weight: missing")
        return None
    if codes.dtype != torch.int8 or codes.dim() != 2:
        problems.append(f"weight: found {codes.dtype} {tuple(codes.shape)}, expected torch.int8 (out, in)")
        return None
    if not absmax.is_floating_point() or absmax.numel() != codes.shape[0]:
        found = f"{absmax.dtype} {tuple(absmax.shape)}"
        problems.append(f"{SCALE}: found {found}, expected torch.float32 ({codes.shape[0]},)")
    elif not bool(absmax.isfinite().all()):
        problems.append(f"{SCALE}: found NaN or Inf")
    if FORMAT in tensors and bool(tensors[FORMAT].ne(0).any()):
        problems.append(f"{FORMAT}: found {tensors[FORMAT].tolist()}, expected 0 (by row)")
    return Int8Tensor(codes.contiguous(), absmax.reshape(-1).float())


def _unpack_4bit(tensors: Mapping[str, Tensor], problems: list[str]) -> FourBitTensor | None:
    """The same; without a readable state nothing more can be told."""
    states = [key for key in tensors if key.startswith(STATE)]
    problems += [f"{key}: missing" for key in ("weight", "weight.absmax") if key not in tensors]
    if len(states) != 1:
        problems.append(f"{STATE}nf4 or fp4: found {len(states)}, expected one")
    if problems:
        return None
    try:
        state = json.loads(bytes(tensors[states[0]].to(torch.uint8).flatten().tolist()))
        kind, shape = state["quant_type"], torch.Size(int(size) for size in state["shape"])
        block, nested_block = int(state["blocksize"]), int(state.get("nested_blocksize", NESTED_BLOCK))
        nested_offset = float(state["nested_offset"]) if "nested_offset" in state else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{states[0]}: not the JSON bitsandbytes writes: {error!r}")
        return None
    if (kind not in CODE_BOOKS, block, nested_block, len(shape)) != (False, BLOCK, NESTED_BLOCK, 2):
        problems.append(
            f"weight: found {kind} of shape {tuple(shape)} in blocks of {block} (their constants: {nested_block}), "
            f"expected {' or '.join(CODE_BOOKS)} of two dimensions in blocks of {BLOCK} ({NESTED_BLOCK})"
        )
        return None
    count = shape.numel()
    blocks = -(-count // BLOCK)
    packed = tensors["weight"].contiguous().view(torch.uint8).reshape(-1)  # whatever type it was stored as
    expected = {"weight": (torch.uint8, (count + 1) // 2), "weight.absmax": (torch.float32, blocks)}
    parts = {"weight": packed, "weight.absmax": tensors["weight.absmax"].reshape(-1)}
    nested = offset = None
    if nested_offset is not None:
        expected |= {"weight.absmax": (torch.uint8, blocks)}
        expected |= {"weight.nested_absmax": (torch.float32, -(-blocks // NESTED_BLOCK))}
        nested, offset = tensors.get("weight.nested_absmax"), torch.tensor(nested_offset, dtype=torch.float32)
        if nested is None:
            problems.append("weight.nested_absmax: missing")
        else:
            parts["weight.nested_absmax"] = nested = nested.reshape(-1)
    for key, part in parts.items():
        if (part.dtype, part.numel()) != expected[key]:
            dtype, size = expected[key]
            problems.append(f"{key}: found {part.numel()} elements of {part.dtype}, expected {size} of {dtype}")
        elif part.is_floating_point() and not bool(part.isfinite().all()):
            problems.append(f"{key}: found NaN or Inf")
    if offset is not None and not bool(offset.isfinite()):
        problems.append(f"{states[0]}: found nested_offset {nested_offset}")
    for key, table in (("weight.quant_map", CODE_BOOKS[kind].values), ("weight.nested_quant_map", DYNAMIC_MAP)):
        theirs = tensors.get(key, table)
        if theirs.shape != table.shape or not torch.allclose(theirs.float(), table, rtol=0, atol=1e-4):
            problems.append(f"{key}: found other values than those of {kind}")
    return FourBitTensor(packed, parts["weight.absmax"], shape, nested, offset, kind)


def quantization_config(model: nn.Module) -> dict[str, Any] | None:
    """What config.json carries, so that transformers with bitsandbytes reads the folder; None: nothing is quantised."""
    layers = quantized_layers(model)
    if not layers:
        return None
    some = next(iter(layers.values()))
    four_bit = some.kind != "int8"
    config: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": four_bit, "load_in_8bit": not four_bit}
    if four_bit:
        config |= {
            "bnb_4bit_quant_type": some.kind,
            "bnb_4bit_use_double_quant": some.double_quant,
            "bnb_4bit_compute_dtype": str(some.compute_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }
    else:
        config["llm_int8_threshold"] = OUTLIER_THRESHOLD
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return config | {"llm_int8_skip_modules": plain}


def stored_kind(config: Any) -> str | None:
    """ "nf4", "fp4" or "int8", as the quantization_config of a config.json says; None: none that we read."""
    if not isinstance(config, dict) or config.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return None
    if config.get("load_in_8bit"):
        return "int8"
    kind = config.get("bnb_4bit_quant_type", "fp4" if config.get("load_in_4bit") else None)  # theirs without a word
    return kind if kind in CODE_BOOKS else None


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model whose quantised layers are written in bitsandbytes' layout; tied weights once."""
    layers = quantized_layers(model)
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[int, torch.Size], str] = {}
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] in layers:
            continue
        place = (value.data_ptr(), value.shape)
        if place not in seen:
            seen[place] = key
            tensors[key] = value
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": value for key, value in pack_layer(layer).items()}
    return tensors


def replace_layers(model: nn.Module, tensors: dict[str, Tensor], compute_dtype: torch.dtype, kind: str) -> None:
    """Turn the linears whose quantised tensors are in `tensors` into `QuantizedLinear`, in place, and take those out.

    Raises:
        VeneerError: for every layer that is damaged, not there, of another shape, or not of this kind; all at once.
    """
    problems: list[str] = []
    names = [key.partition(f".{STATE}")[0] for key in tensors if f".{STATE}" in key]
    names += [key.removesuffix(f".{SCALE}") for key in tensors if key.endswith(f".{SCALE}")]
    for name in dict.fromkeys(names):
        parts = {key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
        parent, _, child = name.rpartition(".")
        try:
            owner = model.get_submodule(parent)
            old = getattr(owner, child)
            layer = unpack_layer(parts, name, compute_dtype)
            if (layer.out_features, layer.in_features) != (old.out_features, old.in_features):
                raise VeneerError(f"{name}: found {tuple(layer.tensor().shape)}, expected {tuple(old.weight.shape)}")
            if layer.kind != kind:
                raise VeneerError(f"{name}: found {layer.kind}, expected {kind} as config.json says")
            setattr(owner, child, layer)
        except AttributeError:
            problems.append(f"{name}: this architecture has no such linear layer")
        except VeneerError as error:
            problems += error.problems
    problems += [
        f"{key}: found {tensor.dtype} without its {SCALE if tensor.dtype == torch.int8 else STATE + kind}"
        for key, tensor in tensors.items()
        if key.endswith(".weight") and tensor.dtype in (torch.int8, torch.uint8)
    ]
    if problems:
        raise VeneerError(problems)
