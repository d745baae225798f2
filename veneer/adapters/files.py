"""PEFT's LoRA files, read and written exactly: adapter_config.json and adapter_model.safetensors.

The scaling is never stored in the weights: it follows from r, alpha and use_rslora in the config.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.adapters import starts
from veneer.adapters.attach import (
    Adapter,
    active_adapter,
    adapted,
    adapter_parameters,
    adapters,
    block_number,
    excluded,
    freeze_base,
    layer_at,
    lora_layers,
    plain_name,
    require_adapter,
    resolve_parameters,
    resolve_targets,
    set_adapter,
)
from veneer.adapters.experts import LoraParameter
from veneer.adapters.lora import LoraLayer, check_adapter_name
from veneer.adapters.patterns import by_pattern, ends_in, is_regex, is_suffix, matching
from veneer.adapters.reference import answer_save_pretrained
from veneer.adapters.tokens import TokenRows, token_layers
from veneer.config import TARGET_PRESETS, Dtype, LoraConfig
from veneer.errors import RefusedError, VeneerError
from veneer.storage import (
    PICKLE_SUFFIXES,
    atomic_folder,
    pickle_error,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:(?<=vector)\.weight)?"
)
_WHICH = {
    "lora_A.weight": "a", "lora_embedding_A": "a", "lora_B.weight": "b", "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude", "lora_B.bias": "bias",
}  # fmt: skip

# Fields of PEFT's LoraConfig that change the result and that we do not support yet: field -> values that change nothing.
_MATHS_FIELDS: dict[str, tuple[Any, ...]] = {
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


# What PEFT writes besides: it says how an adapter was started, saved or is run elsewhere, or is read with another field.
_HARMLESS_FIELDS = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "revision", "inference_mode", "fan_in_fan_out",
    "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
)  # fmt: skip


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _names_or_regex(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, str) and part for part in value)
    return isinstance(value, str) and is_regex(value)


def _token_ids(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(ids, list) and all(_whole(i, 0) for i in ids) and len({*ids}) == len(ids) for ids in lists)


# Every other field we read: what it must be. Those of _OPTIONAL may be null.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "target_modules": ("a list of names or a regex", lambda v: bool(v) and _names_or_regex(v)),
    "target_parameters": ("a list of names", lambda v: isinstance(v, list) and _names_or_regex(v)),
    "trainable_token_indices": ("ids of tokens, each once, or lists of them by name", _token_ids),
    "lora_bias": ("true or false", lambda v: isinstance(v, bool)),
    "r": ("a whole number from 1", _whole),
    "lora_alpha": ("a number above 0", _positive),
    "lora_dropout": ("a number from 0 to below 1", lambda v: v == 0 or (_positive(v) and v < 1)),
    "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
    "use_dora": ("true or false", lambda v: isinstance(v, bool)),
    "bias": ("none, all or lora_only", lambda v: v in ("none", "all", "lora_only")),
    "modules_to_save": ("a list of names", lambda v: isinstance(v, list) and _names_or_regex(v)),
    "exclude_modules": ("a list of names or a regex", _names_or_regex),
    "layers_to_transform": (
        "a layer's number or a list of them",
        lambda v: all(_whole(i, 0) for i in (v if isinstance(v, list) else [v])),
    ),
    "rank_pattern": (
        "whole numbers from 1 by name or regex",
        lambda v: isinstance(v, dict) and all(is_regex(ends_in(k)) and _whole(n) for k, n in v.items()),
    ),
    "alpha_pattern": (
        "numbers above 0 by name or regex",
        lambda v: isinstance(v, dict) and all(is_regex(ends_in(k)) and _positive(n) for k, n in v.items()),
    ),
    "base_model_name_or_path": ("a name", lambda v: isinstance(v, str)),
}
_OPTIONAL = (
    "exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "use_dora",
    "modules_to_save", "target_parameters", "trainable_token_indices", "lora_bias",
)  # fmt: skip


# Fields that exclude one another, as PEFT has it.
_NOT_WITH = (
    ("lora_bias", "use_dora"), ("target_parameters", "lora_dropout"), ("target_parameters", "use_dora"),
    ("target_parameters", "lora_bias"),
)  # fmt: skip


class Factors(NamedTuple):
    """One layer's tensors in a file, and what the config says of it: rank (of each expert of a parameter) and scaling."""

    r: int
    scaling: float
    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None
    bias: Tensor | None = None


class AdapterFile(NamedTuple):
    """An adapter folder: its config as it stands there and as ours, factors by layer (or adapted parameter), parameters
    trained in full, and rows of tokens by embedding."""

    raw: dict[str, Any]
    config: LoraConfig
    factors: dict[str, Factors]
    replaced: dict[str, Tensor]
    tokens: dict[str, Tensor]


def save_adapter(model: nn.Module, path: str | Path, name: str | None = None, *, replace: bool = False) -> Path:
    """Write one adapter (the active one by default) as PEFT's folder, atomically: fp32 factors, config, model card.

    One with a base of its own (PiSSA; LoftQ of several iterations) is written for the model that was loaded, before it
    was quantised, as a plain LoRA of twice the rank: B A - B_0 A_0.

    Args:
        replace: an adapter already in that folder is replaced; otherwise the folder must be empty or absent.

    Raises:
        VeneerError: no adapter, NaN or Inf in it, or the folder is not empty.
    """
    name = name or active_adapter(model)
    if name is None:
        raise VeneerError("there is no active adapter on this model", hint="attach or load one first")
    require_adapter(model, name)
    factors = _plain(model, name)
    bad = [key for key, value in factors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise VeneerError([f"{key}: found NaN or Inf, not saved" for key in bad])
    path = Path(path)
    config = file_config(model, name)
    for layer_path, layer in (own := own_bases(model, name)).items():
        keys = [f"{layer_path}.{key}" for key in layer.KEYS]
        factors |= zip(keys, starts.on_the_original(layer, name), strict=True)
    trained_on = None if own else getattr(model, "veneer_quantization", None)
    with atomic_folder(path, replace=replace) as folder:
        write_json(folder / CONFIG_FILE, config)
        write_tensors(
            folder / WEIGHTS_FILE,
            {key: factors[ours] for ours, key in file_keys(model, name).items() if ours in factors},
            metadata={"veneer.base_quantization": str(trained_on or "none")},
        )
        (folder / "README.md").write_text(
            _model_card(config, sum(v.numel() for v in factors.values())), encoding="utf-8"
        )
    return path


def _plain(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter's file holds, by the names of `adapter_parameters`: AdaLoRA's ranks that live, as plain LoRA."""
    factors: dict[str, Tensor] = {**adapter_parameters(model, name)}
    if (allocator := adapters(model)[name].allocator) is not None:
        for path, layer in allocator.layers.items():
            del factors[f"{path}.lora_E"]
            for key, value in zip(layer.KEYS, allocator.plain(path), strict=True):
                if value.numel():
                    factors[f"{path}.{key}"] = value
                else:  # a layer without a rank is none that is adapted
                    del factors[f"{path}.{key}"]
    return factors


def own_bases(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    """The layers in which an adapter stands on a base of its own."""
    return {path: layer for path, layer in lora_layers(model).items() if name in layer.began}


def without_starts(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by the names of `adapter_parameters`, as the adapter on the model has them: what `save_adapter`
    added is taken off.

    Raises:
        VeneerError: the file is of another start.
    """
    tensors, wrong = dict(tensors), []
    for path, layer in own_bases(model, name).items():
        r, (a0, b0) = layer.rank(name), (start.cpu() for start in layer.began[name])
        keys = [f"{path}.{key}" for key in layer.KEYS]
        a, b = (tensors.get(key) for key in keys)
        if a is None or b is None or len(a) != 2 * r:
            continue
        if not (torch.equal(a[r:], a0) and torch.equal(b[:, r:], -b0)):
            wrong.append(f"{path}: the file is of another start than the adapter on this model")
        tensors |= zip(keys, (a[:r], b[:, :r]), strict=True)
    if wrong:
        raise VeneerError(wrong, hint="attach it with the settings, the base and the seed of the first time")
    return tensors


def file_keys(model: nn.Module, name: str) -> dict[str, str]:
    """What PEFT's files call each of `adapter_parameters`.

    The bias of an adapted layer is `<layer>.base_layer.bias`. Adapted parameters of one module have no names there, only
    wrappers one in the other: the last parameter of the module is the outermost.
    """
    parameters = {p: m for p, m in lora_layers(model).items() if isinstance(m, LoraParameter) and name in m.lora_A}
    wrapped = {}
    for path, layer in parameters.items():
        owner = path.rpartition(".")[0]
        order = [key for key in layer.owner._parameters if f"{owner}.{key}" in parameters]
        wrapped[path] = owner + ".base_layer" * (len(order) - 1 - order.index(layer.key))
    found = {}
    for ours in adapter_parameters(model, name):
        parent, _, last = ours.rpartition(".")
        layer_path = parent.rpartition(".")[0]
        if layer_path in wrapped:
            key = wrapped[layer_path] + ours.removeprefix(layer_path)
        elif last == "bias" and not parent.endswith(".lora_B") and isinstance(model.get_submodule(parent), LoraLayer):
            key = f"{parent}.base_layer.bias"
        else:
            key = ours
        found[ours] = KEY_PREFIX + key
    return found


def file_config(model: nn.Module, name: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter; fields read from a file that we do not use are kept."""
    adapter, everything = adapters(model)[name], {p: m for p, m in lora_layers(model).items() if name in m.lora_A}
    layers = {path: layer for path, layer in everything.items() if not isinstance(layer, LoraParameter)}
    config, original = adapter.config, adapter.file_config
    r, alpha = config.r, config.alpha
    twice = any(name in layer.began for layer in layers.values())
    if twice:  # written with twice the rank and the same scaling
        r, alpha = 2 * r, alpha * (math.sqrt(2) if config.rslora else 2)
    ranks = {path: layer.rank(name) * (1 + twice) for path, layer in everything.items()}
    if adapter.allocator is not None:
        ranks = {path: int(alive.sum()) for path, alive in adapter.allocator.alive.items() if alive.any()}
    if original:
        targets = original["target_modules"]
    elif len(ranks) < len(everything):  # some layers were left no rank: only the others are adapted
        targets = sorted(ranks)
        everything = layers = {path: layers[path] for path in ranks}
    elif isinstance(config.targets, list):
        targets = config.targets
    elif config.targets in TARGET_PRESETS:  # presets are ours: write the suffixes they meant
        suffixes = sorted({path.rsplit(".", 1)[-1] for path in layers})
        # A suffix may also name a layer outside the preset (another tower's q_proj): then write the full names.
        targets = suffixes if set(resolve_targets(model, suffixes)) == set(layers) else sorted(layers)
    else:
        targets = config.targets
    return {
        "auto_mapping": None,
        "exclude_modules": config.exclude or None,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": config.layers if config.depth is None else _blocks(model, targets, layers),
        "revision": None,
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        **_patterns(config, {path: layer.scaling[name] for path, layer in everything.items()}, ranks, r, alpha),
        "target_parameters": _parameter_names(model, config, [path for path in everything if path not in layers]),
        **original,
        "base_model_name_or_path": original.get("base_model_name_or_path") or getattr(model, "name_or_path", None),
        "peft_type": "LORA",
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha if alpha % 1 else int(alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": config.bias,
        "modules_to_save": config.modules_to_save or None,
        "trainable_token_indices": config.tokens or None,
        "lora_bias": config.lora_bias,
    }


def _parameter_names(model: nn.Module, config: LoraConfig, paths: list[str]) -> list[str] | None:
    """The shortest names that mean these parameters and no others; layers_to_transform and the like do not apply to them."""
    if not paths:
        return None
    suffixes = sorted({".".join(path.split(".")[-2:]) for path in paths})
    for names in (config.parameters, suffixes):
        if names and set(resolve_parameters(model, names)) == set(paths):
            return names
    return paths


def _blocks(model: nn.Module, targets: str | list[str], layers: dict[str, LoraLayer]) -> list[int] | None:
    """The blocks that have adapters; None: all that the targets name."""
    there, asked = ({block_number(path) for path in paths} for paths in (layers, resolve_targets(model, targets)))
    return sorted(n for n in there if n is not None) if there != asked else None


def _patterns(
    config: LoraConfig, scalings: dict[str, float], ranks: dict[str, int], r: int, alpha: float
) -> dict[str, Any]:
    """What of ranks and alphas differs from r and alpha, by the layers' full names where a rule made them."""
    by_name = config.depth is None and config.adalora is None and config.init != "eva"
    if by_name and r == config.r:
        return {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    alphas = {path: scalings[path] * (math.sqrt(rank) if config.rslora else rank) for path, rank in ranks.items()}
    return {
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {re.escape(path): a for path, a in alphas.items() if not math.isclose(a, alpha)},
    }


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    activate: bool = True,
    dtype: Dtype = "float32",
    device: str | None = None,
) -> nn.Module:
    """Put an adapter folder in PEFT's format on `model`, in place, and make it the active one.

    Args:
        dtype: of A and B on the model, whatever it is in the file.
        device: where the adapter waits while another is active, "cpu" say of a model on a GPU; left out, at the base.

    Raises:
        VeneerError: files missing, damaged or pickle; fields that change the maths and are not supported; tensors of
            another base (names and shapes), missing or left over, or with NaN; all at once, and the model unchanged.
    """
    path = Path(path)
    check_adapter_name(name)
    if name in adapters(model):
        raise VeneerError(f"adapter {name!r} is already on this model", hint="choose another name, or remove it first")
    waits = _device(device)
    file = read_adapter(path, model)
    raw, config = file.raw, file.config.model_copy(update={"dtype": dtype})
    problems = []
    for layer, found in file.factors.items():
        kind = layer_at(model, layer)
        if kind is None:
            problems.append(f"{layer}: found in the adapter, but this model has no such layer that can be adapted")
            continue
        try:
            a, b = kind.shapes(found.r)
        except VeneerError as error:
            problems += [f"{layer}: {problem}" for problem in error.problems]
            continue
        expected = {"A": (found.a, a), "B": (found.b, b)}
        if found.magnitude is not None:
            expected["magnitude_vector"] = (found.magnitude, kind.magnitude_shape())
        if found.bias is not None:
            expected["B.bias"] = (found.bias, (kind.out_features,))
        problems += [
            f"{layer}.lora_{part}: found {tuple(tensor.shape)}, expected {shape}"
            for part, (tensor, shape) in expected.items()
            if tuple(tensor.shape) != shape
        ]
    base = {plain_name(model, key): parameter for key, parameter in model.named_parameters(remove_duplicate=False)}
    for key, tensor in file.replaced.items():
        if key not in base:
            problems.append(f"{key}: found in the adapter, but this model has no such weight")
        elif base[key].shape != tensor.shape:
            problems.append(f"{key}: found {tuple(tensor.shape)}, expected {tuple(base[key].shape)}")
    left_out = sorted(_expected(model, raw) - file.factors.keys())
    problems += [f"{layer}: in target_modules, but not in {WEIGHTS_FILE}" for layer in left_out]
    left_out = sorted(_expected_parameters(model, config) - file.factors.keys())
    problems += [f"{layer}: in target_parameters, but not in {WEIGHTS_FILE}" for layer in left_out]
    replaced_there = {key: base[key] for key in file.replaced if key in base}
    try:
        tokens = token_layers(model, config.tokens, list(file.factors), replaced_there)
    except VeneerError as error:
        tokens = {}
        problems += [problem.replace("lora.tokens", "trainable_token_indices", 1) for problem in error.problems]
    else:
        problems += _token_problems(base, tokens, file.tokens)
    if problems:
        made_for = raw.get("base_model_name_or_path")
        raise VeneerError(
            [f"adapter {path}: {problem}" for problem in problems],
            hint=f"it was made for {made_for!r}; this model is {getattr(model, 'name_or_path', '?')!r}"
            if made_for
            else None,
        )
    freeze_base(model)
    for layer, found in file.factors.items():
        more = {"magnitude": found.magnitude, "bias": found.bias, "dtype": getattr(torch, dtype)}
        adapted(model, layer).add(name, found.a, found.b, scaling=found.scaling, dropout=config.dropout, **more)
    for embedding, ids in tokens.items():
        TokenRows.of(model, embedding).add(name, ids, file.tokens[embedding])
    replaced = {
        key: nn.Parameter(tensor.to(device=base[key].device, dtype=base[key].dtype))
        for key, tensor in file.replaced.items()
    }
    adapters(model)[name] = Adapter(config, raw, replaced, device=waits)
    set_adapter(model, name if activate else active_adapter(model))
    answer_save_pretrained(model)
    return model


def _device(name: str | None) -> torch.device | None:
    try:
        return None if name is None else torch.device(name)
    except RuntimeError:
        raise VeneerError(f"device: found {name!r}, expected cpu, cuda or cuda:0") from None


def _token_problems(base: dict[str, nn.Parameter], wanted: dict[str, list[int]], found: dict[str, Tensor]) -> list[str]:
    problems = [
        f"{path}: found in the adapter, but trainable_token_indices does not mean it"
        for path in found.keys() - wanted.keys()
    ]
    for path, ids in wanted.items():
        shape = (len(ids), base[f"{path}.weight"].shape[1])
        if path not in found:
            problems.append(f"{path}: in trainable_token_indices, but not in {WEIGHTS_FILE}")
        elif tuple(found[path].shape) != shape:
            problems.append(f"{path}.{TokenRows.KEY}: found {tuple(found[path].shape)}, expected {shape}")
    return problems


def read_adapter(path: str | Path, model: nn.Module | None = None) -> AdapterFile:
    """An adapter folder in PEFT's format.

    Args:
        model: the one it is for; it decides which of several adapted parameters of a module is which, as their names are
            not in the file. Left out, a `down` projection is taken for the last of them, as in all of transformers' mixtures.

    Raises:
        VeneerError: all that is wrong without looking at a base: files missing, damaged or pickle; a field that cannot
            be; no tensors, half a pair, another rank than the config's, NaN.
        RefusedError: nothing is wrong, but a field asks for what is not supported and changes the result.
    """
    path = Path(path)
    if not path.is_dir():
        raise VeneerError(f"adapter {path}: no such folder", hint=f"expected a folder with {CONFIG_FILE}")
    if not (path / WEIGHTS_FILE).is_file():
        for file in sorted(path.iterdir()):
            if file.suffix in PICKLE_SUFFIXES:
                raise pickle_error(file)
    raw = read_json(path / CONFIG_FILE)
    if raw.get("peft_type") != "LORA":
        raise VeneerError(f"{path / CONFIG_FILE}: found peft_type {raw.get('peft_type')!r}, expected 'LORA'")
    raw.setdefault("target_modules", None)
    if not raw["target_modules"] and raw.get("target_parameters"):
        raw["target_modules"] = []  # parameters alone
    problems = [
        f"{field}: found {raw[field]!r}, expected {expected}"
        for field, (expected, fits) in _FIELDS.items()
        if field in raw and not (fits(raw[field]) or (raw[field] is None and field in _OPTIONAL))
        if not (field == "target_modules" and raw[field] == [])
    ]
    problems += [
        f"{field}: found {raw[field]!r}, which does not go with {other}"
        for field, other in _NOT_WITH
        if raw.get(field) and raw.get(other)
    ]
    refused = [
        f"{field} is {raw[field]!r}, which changes the result and is not supported"
        for field, harmless in _MATHS_FIELDS.items()
        if field in raw and raw[field] not in harmless
    ]
    if problems or refused:
        raise (VeneerError if problems else RefusedError)(
            [f"{path / CONFIG_FILE}: {problem}" for problem in problems + refused],
            hint="open it with the tool that wrote it and save it as a plain LoRA" if refused else None,
        )
    known = (*_FIELDS, *_MATHS_FIELDS, *_HARMLESS_FIELDS)
    if unknown := [
        field for field, value in raw.items() if field not in known and value not in (None, False, "", [], {})
    ]:
        warnings.warn(
            f"{path / CONFIG_FILE}: {', '.join(unknown)}: not known here, and kept as it is; if it changes the result, the "
            "adapter is not what it was",
            stacklevel=3,
        )
    config = LoraConfig(
        r=raw.get("r", 8),
        alpha=raw.get("lora_alpha", 8),
        dropout=raw.get("lora_dropout", 0.0),
        targets=raw["target_modules"],
        init="gaussian" if raw.get("init_lora_weights") == "gaussian" else "kaiming",
        rslora=raw.get("use_rslora", False),
        dora=bool(raw.get("use_dora")),
        bias=raw.get("bias", "none"),
        modules_to_save=raw.get("modules_to_save") or [],
        exclude=raw.get("exclude_modules") or [],
        rank_pattern=raw.get("rank_pattern") or {},
        alpha_pattern=raw.get("alpha_pattern") or {},
        parameters=raw.get("target_parameters") or [],
        tokens=raw.get("trainable_token_indices") or [],
        lora_bias=bool(raw.get("lora_bias")),
    )
    return AdapterFile(raw, config, *_read_tensors(path / WEIGHTS_FILE, raw, config, model))


def _read_tensors(
    path: Path, raw: dict[str, Any], config: LoraConfig, model: nn.Module | None
) -> tuple[dict[str, Factors], dict[str, Tensor], dict[str, Tensor]]:
    problems: list[str] = []
    found: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    tensors = read_tensors(path)
    layers = {match[1] for key in tensors if (match := _FACTOR.fullmatch(key))}
    names, unnamed = _parameters_by_wrapper(layers, config, model)
    problems += unnamed
    paths = sorted({names.get(layer, layer) for layer in layers})
    ranks = dict(zip(paths, by_pattern(config.rank_pattern, paths, config.r, "rank_pattern"), strict=True))
    alphas = dict(zip(paths, by_pattern(config.alpha_pattern, paths, config.alpha, "alpha_pattern"), strict=True))
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            problems.append(f"tensor {key}: found {str(tensor.dtype).removeprefix('torch.')}, expected floating point")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"tensor {key}: found NaN or Inf, expected finite numbers")
        match = _FACTOR.fullmatch(key)
        if match is None:
            in_full = any(_is_of(key, suffix) for suffix in config.modules_to_save)
            if config.tokens and key.endswith(f".{TokenRows.KEY}"):
                tokens[key.removeprefix(KEY_PREFIX).removesuffix(f".{TokenRows.KEY}")] = tensor
            elif in_full or (config.bias != "none" and key.endswith(".bias")):
                replaced[key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".")] = tensor
            else:
                problems.append(f"tensor {key}: expected names like {KEY_PREFIX}<layer>.lora_A.weight")
            continue
        part, layer = _WHICH[match[2]], names.get(match[1], match[1])
        found.setdefault(layer, {})[part] = tensor
        if part in ("magnitude", "bias"):
            if part == "magnitude" and not config.dora:
                problems.append(f"tensor {key}: found a magnitude, but use_dora is not true")
            if part == "bias" and not config.lora_bias:
                problems.append(f"tensor {key}: found a bias, but lora_bias is not true")
            continue
        rank = ranks[layer]
        if match[1] in names:
            if tensor.ndim != 2 or tensor.shape[part == "b"] % rank:
                shape = f"({rank} x experts, in)" if part == "a" else f"(out, {rank} x experts)"
                problems.append(f"tensor {key}: found {tuple(tensor.shape)}, expected {shape}")
            continue
        fits = tensor.ndim >= 2 and (part == "b" or tensor.shape[0] == rank)
        fits = fits and (part == "a" or (rank % tensor.shape[1] == 0 if tensor.ndim > 2 else tensor.shape[1] == rank))
        if not fits:
            shape = f"({rank}, in)" if part == "a" else f"(out, {rank})"
            problems.append(f"tensor {key}: found {tuple(tensor.shape)}, expected {shape}")
    needed = {"a": "lora_A", "b": "lora_B"} | ({"magnitude": "lora_magnitude_vector"} if config.dora else {})
    needed |= {"bias": "lora_B.bias"} if config.lora_bias else {}
    problems += [
        f"{layer}: found no {name}, expected {', '.join(needed.values())}"
        for layer, parts in found.items()
        for part, name in needed.items()
        if part not in parts
    ]
    problems += [
        f"no weights of {suffix!r}, which is in modules_to_save"
        for suffix in config.modules_to_save
        if not any(_is_of(key, suffix) for key in replaced)
    ]
    if not found:
        problems.append("no lora_A and lora_B tensors in it")
    if problems:
        raise VeneerError([f"{path}: {problem}" for problem in problems], hint="the adapter is damaged; copy it again")
    factors = {
        layer: Factors(ranks[layer], config.scaling_at(ranks[layer], alphas[layer]), **parts)
        for layer, parts in found.items()
    }
    return factors, replaced, tokens


def _parameters_by_wrapper(
    layers: set[str], config: LoraConfig, model: nn.Module | None
) -> tuple[dict[str, str], list[str]]:
    """Which parameter the tensors of `<module>`, `<module>.base_layer` and so on are for, and what cannot be told."""
    depths: dict[str, list[str]] = {}
    for layer in layers if config.parameters else ():
        owner = layer
        while owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
        if owner != layer or not _names_module(owner, config.targets):
            depths.setdefault(owner, []).append(layer)
    found: dict[str, str] = {}
    problems = []
    for owner, wrappers in depths.items():
        keys = _parameters_of(owner, config, model)
        if len(keys) != len(wrappers):
            problems.append(
                f"{owner}: found adapters of {len(wrappers)} parameters, expected one for each of {', '.join(keys) or 'none'}"
            )
            continue
        wrappers.sort(key=len)
        found |= {wrapper: f"{owner}.{key}" for wrapper, key in zip(wrappers, reversed(keys), strict=True)}
    return found, problems


def _parameters_of(owner: str, config: LoraConfig, model: nn.Module | None) -> list[str]:
    """The adapted parameters of one module, innermost wrapper first."""
    if model is not None:
        with contextlib.suppress(AttributeError):
            module: Any = model.get_submodule(owner)
            there = module.base_layer._parameters if hasattr(module, "base_layer") else module._parameters
            wanted = [key for key in there if any(is_suffix(f"{owner}.{key}", name) for name in config.parameters)]
            if wanted:
                return wanted
    keys = [name.rpartition(".") for name in config.parameters]
    found = {key: "down" in key or key == "w2" for parent, _, key in keys if not parent or is_suffix(owner, parent)}
    return sorted(found, key=lambda key: found[key])


def _names_module(name: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return matching(targets, [name])[0]
    return any(is_suffix(name, suffix) for suffix in targets)


def _is_of(key: str, suffix: str) -> bool:
    """Whether a tensor belongs to a module that `modules_to_save` means by a suffix; PEFT's rule."""
    path = key.split(".")[:-1]
    return any(".".join(path[:n]).endswith(suffix) for n in range(1, len(path) + 1))


def base_quantization(path: str | Path) -> str | None:
    """What the base was quantised to when the adapter was trained here ("nf4", "fp4", "int8"); None: not at all, or not known."""
    from safetensors import safe_open

    read_adapter(path)
    with safe_open(Path(path) / WEIGHTS_FILE, framework="pt") as file:
        value = (file.metadata() or {}).get("veneer.base_quantization", "none")
    return None if value == "none" else str(value)


def _expected(model: nn.Module, raw: dict[str, Any]) -> set[str]:
    """The layers PEFT would adapt for this config; as there, a name that matches nothing is no error."""
    targets = raw["target_modules"]
    names: list[str] = []
    for part in [targets] if isinstance(targets, str) else [[suffix] for suffix in targets]:
        with contextlib.suppress(VeneerError):
            names += resolve_targets(model, part)
    names = excluded(names, raw.get("exclude_modules"))
    chosen = raw.get("layers_to_transform")
    if chosen not in (None, []):
        wanted = {chosen} if isinstance(chosen, int) else set(chosen)
        names = [name for name in names if block_number(name) in wanted]
    return set(names)


def _expected_parameters(model: nn.Module, config: LoraConfig) -> set[str]:
    names: list[str] = []
    for name in config.parameters:
        with contextlib.suppress(VeneerError):
            names += resolve_parameters(model, [name])
    return set(names)


def _model_card(config: dict[str, Any], parameters: int) -> str:
    base = config["base_model_name_or_path"] or "unknown"
    front = {"library_name": "peft", "tags": ["lora", "veneer"]}
    if base and "/" in str(base) and not str(base).startswith((".", "/")):
        front["base_model"] = base
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return (
        f"---\n{lines}\n---\n\n# LoRA adapter for {Path(str(base)).name}\n\n"
        f"Rank {config['r']}, alpha {config['lora_alpha']}, {parameters:,} parameters in fp32, "
        f"on {json.dumps(config['target_modules'])}. Trained with Veneer; any tool that reads PEFT's LoRA files can load it.\n"
    )
