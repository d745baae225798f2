"""4-bit weights as bitsandbytes writes them into safetensors, and the config.json part that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import VeneerError
from veneer.ops.reference import BLOCK, DYNAMIC_MAP, NESTED_BLOCK, NF4_CODE
from veneer.quant.linear import Nf4Linear
from veneer.quant.nf4 import Nf4Tensor

STATE_KEY = "weight.quant_state.bitsandbytes__nf4"


def pack_layer(layer: Nf4Linear) -> dict[str, Tensor]:
    """The tensors of one layer by bitsandbytes' key, without the layer's name."""
    tensor = layer.tensor()
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(layer.compute_dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    tensors = {"weight": layer.weight, "weight.absmax": tensor.absmax, "weight.quant_map": NF4_CODE.clone()}
    if tensor.nested_absmax is not None and tensor.offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(tensor.offset)}
        tensors |= {"weight.nested_absmax": tensor.nested_absmax, "weight.nested_quant_map": DYNAMIC_MAP.clone()}
    tensors[STATE_KEY] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).clone()
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return tensors


def unpack_layer(tensors: Mapping[str, Tensor], name: str, compute_dtype: torch.dtype) -> Nf4Linear:
    """One layer from tensors by bitsandbytes' key; `name` is for messages.

    Raises:
        VeneerError: a part is missing, of another type or size, or says it is something else than NF4 in blocks of 64.
    """
    needed = ["weight", "weight.absmax", STATE_KEY]
    missing = [f"{name}.{key}: missing" for key in needed if key not in tensors]
    if missing:
        raise VeneerError(missing)
    try:
        state = json.loads(bytes(tensors[STATE_KEY].to(torch.uint8).tolist()))
        shape = torch.Size(int(size) for size in state["shape"])
        found = (state["quant_type"], int(state["blocksize"]), len(shape))
        nested_block, nested_offset = int(state.get("nested_blocksize", 0)), float(state.get("nested_offset", "nan"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VeneerError(f"{name}.{STATE_KEY}: not the JSON bitsandbytes writes: {error!r}") from None
    if found != ("nf4", BLOCK, 2):
        raise VeneerError(f"{name}: found {found[0]} in blocks of {found[1]}, expected nf4 in blocks of {BLOCK}")
    n = shape.numel()
    blocks = -(-n // BLOCK)
    packed = tensors["weight"].contiguous().view(torch.uint8).reshape(-1)
    sizes = {"weight": (packed.numel(), (n + 1) // 2), "weight.absmax": (tensors["weight.absmax"].numel(), blocks)}
    if "bias" in tensors:
        sizes["bias"] = (tensors["bias"].numel(), shape[0])
    nested = offset = None
    if "nested_offset" in state:
        if "weight.nested_absmax" not in tensors:
            raise VeneerError(f"{name}.weight.nested_absmax: missing")
        nested = tensors["weight.nested_absmax"].float()
        offset = torch.tensor(nested_offset, dtype=torch.float32)
        sizes["weight.nested_absmax"] = (nested.numel(), -(-blocks // NESTED_BLOCK))
        if nested_block != NESTED_BLOCK:
            raise VeneerError(f"{name}: found nested blocks of {nested_block}, expected {NESTED_BLOCK}")
    wrong = [f"{name}.{k}: found {f} elements, expected {e}" for k, (f, e) in sizes.items() if f != e]
    absmax = tensors["weight.absmax"].reshape(-1)
    kind = torch.uint8 if nested is not None else torch.float32
    if absmax.dtype != kind:
        wrong.append(f"{name}.weight.absmax: found {absmax.dtype}, expected {kind}")
    if wrong:
        raise VeneerError(wrong)
    return Nf4Linear(Nf4Tensor(packed, absmax, shape, nested, offset), tensors.get("bias"), compute_dtype)


def quantization_config(*, double_quant: bool, compute_dtype: torch.dtype, skip: list[str]) -> dict[str, Any]:
    """What config.json carries, so that transformers with bitsandbytes reads the folder."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skip,
    }


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model whose 4-bit layers are written in bitsandbytes' layout; tied weights once."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Nf4Linear)}
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


def replace_layers(model: nn.Module, tensors: dict[str, Tensor], compute_dtype: torch.dtype) -> None:
    """Turn the linears whose 4-bit tensors are in `tensors` into `Nf4Linear`, in place, and take those tensors out.

    Raises:
        VeneerError: for every layer that is damaged, not there, or of another shape; all at once.
    """
    problems: list[str] = []
    for name in [key.removesuffix(f".{STATE_KEY}") for key in list(tensors) if key.endswith(STATE_KEY)]:
        parts = {key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
        parent, _, child = name.rpartition(".")
        try:
            owner = model.get_submodule(parent)
            old = getattr(owner, child)
            layer = unpack_layer(parts, name, compute_dtype)
            if (layer.out_features, layer.in_features) != (old.out_features, old.in_features):
                raise VeneerError(f"{name}: found {tuple(layer.tensor().shape)}, expected {tuple(old.weight.shape)}")
            setattr(owner, child, layer)
        except AttributeError:
            problems.append(f"{name}: this architecture has no such linear layer")
        except VeneerError as error:
            problems += error.problems
    if problems:
        raise VeneerError(problems)
