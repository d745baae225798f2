"""PEFT's LoRA files, read and written exactly: adapter_config.json and adapter_model.safetensors.

The scaling is never stored in the weights: it follows from r, alpha and use_rslora in the config.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.attach import (
    Adapter,
    active_adapter,
    adapted,
    adapter_parameters,
    adapters,
    freeze_base,
    lora_layers,
    require_adapter,
    resolve_targets,
    set_adapter,
)
from veneer.adapters.lora import check_adapter_name
from veneer.config import LoraConfig
from veneer.errors import VeneerError
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
_LAYER_INDEX = re.compile(r".*\.[^.]*\.(\d+)\.")

# Fields of PEFT's LoraConfig that change the result and that we do not support yet: field -> values that change nothing.
_MATHS_FIELDS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "lora_ga_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def save_adapter(model: nn.Module, path: str | Path, name: str | None = None, *, replace: bool = False) -> Path:
    """Write one adapter (the active one by default) as PEFT's folder, atomically: fp32 factors, config, model card.

    Args:
        replace: an adapter already in that folder is replaced; otherwise the folder must be empty or absent.

    Raises:
        VeneerError: no adapter, NaN or Inf in it, or the folder is not empty.
    """
    name = name or active_adapter(model)
    if name is None:
        raise VeneerError("there is no active adapter on this model", hint="attach or load one first")
    require_adapter(model, name)
    factors = adapter_parameters(model, name)
    bad = [key for key, value in factors.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise VeneerError([f"{key}: found NaN or Inf, not saved" for key in bad[:8]])
    path = Path(path)
    config = file_config(model, name)
    with atomic_folder(path, replace=replace) as folder:
        write_json(folder / CONFIG_FILE, config)
        write_tensors(
            folder / WEIGHTS_FILE,
            {KEY_PREFIX + key: value for key, value in factors.items()},
            metadata={"veneer.base_quantization": str(getattr(model, "veneer_quantization", None) or "none")},
        )
        (folder / "README.md").write_text(
            _model_card(config, sum(v.numel() for v in factors.values())), encoding="utf-8"
        )
    return path


def file_config(model: nn.Module, name: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter; fields read from a file that we do not use are kept."""
    adapter, layers = adapters(model)[name], {p: m for p, m in lora_layers(model).items() if name in m.lora_A}
    config, original = adapter.config, adapter.file_config
    if original:
        targets = original["target_modules"]
    elif isinstance(config.targets, list):
        targets = config.targets
    elif config.targets in ("all-linear", "attention", "mlp"):  # presets are ours: write the suffixes they meant
        suffixes = sorted({path.rsplit(".", 1)[-1] for path in layers})
        # A suffix may also name a layer outside the preset (another tower's q_proj): then write the full names.
        targets = suffixes if set(resolve_targets(model, suffixes)) == set(layers) else sorted(layers)
    else:
        targets = config.targets
    return {
        "auto_mapping": None,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **original,
        "base_model_name_or_path": original.get("base_model_name_or_path") or getattr(model, "name_or_path", None),
        "peft_type": "LORA",
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.alpha if config.alpha % 1 else int(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "use_rslora": config.rslora,
    }


def load_adapter(model: nn.Module, path: str | Path, name: str = "default", *, activate: bool = True) -> nn.Module:
    """Put an adapter folder in PEFT's format on `model`, in place, and make it the active one.

    Raises:
        VeneerError: files missing, damaged or pickle; fields that change the maths and are not supported; tensors of
            another base (names and shapes), missing or left over, or with NaN; all at once, and the model unchanged.
    """
    path = Path(path)
    check_adapter_name(name)
    if name in adapters(model):
        raise VeneerError(f"adapter {name!r} is already on this model", hint="choose another name, or remove it first")
    raw, tensors = read_adapter(path)
    config = _lora_config(raw, path)
    layers = dict(model.named_modules())
    problems, factors = [], {}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
        if match is None:
            problems.append(f"tensor {key}: expected names like {KEY_PREFIX}<layer>.lora_A.weight")
            continue
        found.setdefault(match[1], {})[match[2]] = tensor
        if not bool(torch.isfinite(tensor).all()):
            problems.append(f"tensor {key}: found NaN or Inf, expected finite numbers")
    for layer, pair in found.items():
        module = layers.get(layer)
        if not hasattr(module, "in_features"):
            problems.append(f"{layer}: found in the adapter, but this model has no such linear layer")
        elif len(pair) < 2:
            problems.append(f"{layer}: found only lora_{next(iter(pair))}, expected lora_A and lora_B")
        else:
            rank = int(_by_pattern(raw.get("rank_pattern"), layer, config.r))
            expected = {"A": (rank, module.in_features), "B": (module.out_features, rank)}  # type: ignore[union-attr]
            problems += [
                f"{layer}.lora_{k}: found {tuple(pair[k].shape)}, expected {expected[k]}"
                for k in "AB"
                if tuple(pair[k].shape) != expected[k]
            ]
            factors[layer] = (pair["A"], pair["B"])
    problems += [
        f"{layer}: in target_modules, but not in {WEIGHTS_FILE}" for layer in _expected(model, raw) - set(found)
    ]
    if problems:
        shown = [*problems[:12], f"and {len(problems) - 12} more"] if len(problems) > 12 else problems
        base = raw.get("base_model_name_or_path")
        raise VeneerError(
            [f"adapter {path}: {problem}" for problem in shown],
            hint=f"it was made for {base!r}; this model is {getattr(model, 'name_or_path', '?')!r}" if base else None,
        )
    freeze_base(model)
    for layer, (a, b) in factors.items():
        alpha = float(_by_pattern(raw.get("alpha_pattern"), layer, config.alpha))
        scaling = LoraConfig(r=a.shape[0], alpha=alpha, rslora=config.rslora).scaling
        adapted(model, layer).add(name, a, b, scaling=scaling, dropout=config.dropout)
    adapters(model)[name] = Adapter(config, raw)
    set_adapter(model, name if activate else active_adapter(model))
    return model


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter folder, checked for what can be checked without its base."""
    path = Path(path)
    if not path.is_dir():
        raise VeneerError(f"adapter {path}: no such folder", hint=f"expected a folder with {CONFIG_FILE}")
    if not (path / WEIGHTS_FILE).is_file():
        for file in sorted(path.iterdir()):
            if file.suffix in PICKLE_SUFFIXES:
                raise pickle_error(file)
    config = read_json(path / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise VeneerError(f"{path / CONFIG_FILE}: found peft_type {config.get('peft_type')!r}, expected 'LORA'")
    if not config.get("target_modules"):
        raise VeneerError(f"{path / CONFIG_FILE}: target_modules is missing")
    refused = [
        f"{path / CONFIG_FILE}: {field} is {config[field]!r}, which changes the result and is not supported"
        for field, harmless in _MATHS_FIELDS.items()
        if field in config and config[field] not in harmless
    ]
    if refused:
        raise VeneerError(refused, hint="open it with the tool that wrote it and save it as a plain LoRA")
    return config, read_tensors(path / WEIGHTS_FILE)


def base_quantization(path: str | Path) -> str | None:
    """What the base was quantised to when the adapter was trained here ("nf4"); None: not at all, or not known."""
    from safetensors import safe_open

    read_adapter(path)
    with safe_open(Path(path) / WEIGHTS_FILE, framework="pt") as file:
        value = (file.metadata() or {}).get("veneer.base_quantization", "none")
    return None if value == "none" else str(value)


def _lora_config(raw: dict[str, Any], path: Path) -> LoraConfig:
    targets = raw["target_modules"]
    init = raw.get("init_lora_weights")
    try:
        return LoraConfig(
            r=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout", 0.0),
            targets=targets if isinstance(targets, str) else sorted(targets),
            init="gaussian" if init == "gaussian" else "kaiming",
            rslora=raw.get("use_rslora", False),
        )
    except VeneerError as error:
        raise VeneerError([f"{path / CONFIG_FILE}: {problem}" for problem in error.problems]) from None


def _expected(model: nn.Module, raw: dict[str, Any]) -> set[str]:
    """The layers PEFT would adapt for this config; a target that matches nothing here is reported by its tensors."""
    try:
        names = resolve_targets(model, raw["target_modules"])
    except VeneerError:
        return set()
    excluded, chosen = raw.get("exclude_modules"), raw.get("layers_to_transform")
    if isinstance(excluded, str):
        names = [name for name in names if not re.fullmatch(excluded, name)]
    elif excluded:
        names = [name for name in names if not any(name == e or name.endswith(f".{e}") for e in excluded)]
    if chosen is not None:
        wanted = {chosen} if isinstance(chosen, int) else set(chosen)
        names = [name for name in names if (m := _LAYER_INDEX.match(name)) and int(m[1]) in wanted]
    return set(names)


def _by_pattern(pattern: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """PEFT's rule: the first key that is a suffix of the layer's name, or a regex for its end, decides."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default


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
