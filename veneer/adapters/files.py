"""PEFT's LoRA files, read and written exactly: adapter_config.json and adapter_model.safetensors.

The scaling is never stored in the weights: it follows from r, alpha and use_rslora in the config.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

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
    freeze_base,
    lora_layers,
    require_adapter,
    set_adapter,
)
from veneer.adapters.experts import LoraParameter
from veneer.adapters.lora import LoraLayer, check_adapter_name
from veneer.adapters.peft_format import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, read_adapter
from veneer.adapters.reference import answer_save_pretrained
from veneer.adapters.targets import block_number, excluded, layer_at, plain_name, resolve_parameters, resolve_targets
from veneer.adapters.tokens import TokenRows, token_layers
from veneer.config import TARGET_PRESETS, Dtype, LoraConfig
from veneer.errors import VeneerError
from veneer.storage import (
    atomic_folder,
    write_json,
    write_tensors,
)


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
