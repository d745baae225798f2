"""PEFT's LoRA files, read and written exactly: adapter_config.json and adapter_model.safetensors.

The scaling is never stored in the weights: it follows from r, alpha and use_rslora in the config.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

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
    device_problem,
    freeze_base,
    lora_layers,
    require_adapter,
    set_adapter,
)
from veneer.adapters.experts import LoraParameter
from veneer.adapters.lora import LoraLayer, check_adapter_name
from veneer.adapters.patterns import is_suffix, matching
from veneer.adapters.peft_format import (
    CONFIG_FILE,
    KEY_PREFIX,
    WEIGHTS_FILE,
    AdapterFile,
    examine_adapter,
    is_of,
    raise_problems,
)
from veneer.adapters.reference import answer_save_pretrained
from veneer.adapters.targets import (
    block_number,
    excluded,
    is_factor,
    layer_at,
    plain_name,
    resolve_parameters,
    resolve_targets,
)
from veneer.adapters.tokens import TokenRows, move, token_layers
from veneer.config import TARGET_PRESETS, Dtype, LoraConfig
from veneer.errors import RefusedError, VeneerError
from veneer.ops import all_finite
from veneer.quant.linear import quantized_layers
from veneer.storage import (
    atomic_folder,
    write_json,
    write_tensors,
)


def save_adapter(model: nn.Module, path: str | Path, name: str | None = None, *, replace: bool = False) -> Path:
    """Write one adapter (the active one by default) as PEFT's folder, atomically: tensors in their dtype, config, card.

    One with a base of its own (PiSSA; LoftQ of several iterations) is written for the model that was loaded, before it
    was quantised, as a plain LoRA of twice the rank: B A - B_0 A_0. A module trained in full whose weight is tied to
    another's is written under both names, with `ensure_weight_tying`: PEFT would train a copy of the named one alone.

    Args:
        replace: an adapter already in that folder is replaced; otherwise the folder must be empty or absent.

    Raises:
        VeneerError: no adapter, NaN or Inf in it, or the folder is not empty.
    """
    name = name or active_adapter(model)
    if name is None:
        raise VeneerError("there is no active adapter on this model", hint="attach or load one first")
    require_adapter(model, name)
    if (allocator := adapters(model)[name].allocator) is not None:
        allocator.warn_if_early()
    factors = _plain(model, name)
    bad = [key for key, value in factors.items() if not all_finite(value)]
    if bad:
        raise VeneerError([f"{key}: found NaN or Inf, not saved" for key in bad])
    path = Path(path)
    config = file_config(model, name)
    for layer_path, layer in (own := own_bases(model, name)).items():
        keys = [f"{layer_path}.{key}" for key in layer.KEYS]
        factors |= zip(keys, starts.on_the_original(layer, name), strict=True)
    trained_on = None if own else getattr(model, "veneer_quantization", None)
    tensors = {key: factors[ours] for ours, key in file_keys(model, name).items() if ours in factors}
    tensors |= {key: factors[ours].clone() for key, ours in tied_keys(model, name).items()}
    with atomic_folder(path, replace=replace) as folder:
        write_json(folder / CONFIG_FILE, config)
        write_tensors(
            folder / WEIGHTS_FILE,
            tensors,
            metadata=base_metadata(trained_on, _doubly(model)),
        )
        (folder / "README.md").write_text(_model_card(config, factors), encoding="utf-8")
    return path


def base_metadata(trained_on: str | None, double_quant: bool | None) -> dict[str, str]:
    """What an adapter's file says of the base it was trained on."""
    found = {"veneer.base_quantization": trained_on or "none"}
    return found if not trained_on or double_quant is None else {**found, "veneer.base_double_quant": str(double_quant)}


def _doubly(model: nn.Module) -> bool | None:
    """Whether the constants of the base's 4-bit layers are quantised too; None: it has none."""
    return next((layer.double_quant for layer in quantized_layers(model).values() if layer.kind != "int8"), None)


def _plain(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter's file holds, by the names of `adapter_parameters`: AdaLoRA's ranks that live, as plain LoRA."""
    factors: dict[str, Tensor] = {**adapter_parameters(model, name)}
    if (allocator := adapters(model)[name].allocator) is not None:
        ranks = _ranks(model, name)
        for path, layer in allocator.layers.items():
            del factors[f"{path}.lora_E"]
            for key, value, shape in zip(layer.KEYS, allocator.plain(path), layer.shapes(1), strict=True):
                if path in ranks:
                    factors[f"{path}.{key}"] = value if value.numel() else torch.zeros(shape)
                else:  # a layer without a rank is none that is adapted
                    del factors[f"{path}.{key}"]
    return factors


def _ranks(model: nn.Module, name: str) -> dict[str, int]:
    """The rank at which an adapter's file adapts each layer and parameter.

    Of AdaLoRA's layers without a rank only those are in it, with a rank of zeros, that have a trained bias as `lora_only`
    means it: PEFT has no place for it elsewhere.
    """
    adapter = adapters(model)[name]
    if adapter.allocator is None:
        return {
            path: layer.rank(name) * (1 + (name in layer.began))
            for path, layer in lora_layers(model).items()
            if name in layer.lora_A
        }
    lora_only = adapter.config.bias == "lora_only"
    least = {path: int(lora_only and f"{path}.bias" in adapter.replaced) for path in adapter.allocator.alive}
    found = {path: max(int(alive.sum()), least[path]) for path, alive in adapter.allocator.alive.items()}
    return {path: rank for path, rank in found.items() if rank}


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

    The bias of a layer that this adapter adapts is `<layer>.base_layer.bias`. Adapted parameters of one module have no
    names there, only wrappers one in the other: the last parameter of the module is the outermost.
    """
    parameters = {p: m for p, m in lora_layers(model).items() if isinstance(m, LoraParameter) and name in m.lora_A}
    wrapped = {}
    for path, layer in parameters.items():
        owner = path.rpartition(".")[0]
        order = [key for key in layer.owner._parameters if f"{owner}.{key}" in parameters]
        wrapped[path] = owner + ".base_layer" * (len(order) - 1 - order.index(layer.key))
    found, layers = {}, _ranks(model, name)
    for ours in adapter_parameters(model, name):
        parent, _, last = ours.rpartition(".")
        layer_path = parent.rpartition(".")[0]
        if layer_path in wrapped:
            key = wrapped[layer_path] + ours.removeprefix(layer_path)
        elif last == "bias" and parent in layers:
            key = f"{parent}.base_layer.bias"
        else:
            key = ours
        found[ours] = KEY_PREFIX + key
    return found


def tied_keys(model: nn.Module, name: str) -> dict[str, str]:
    """What files call the parameters that are tied to one an adapter has trained in full, and that one of
    `adapter_parameters`."""
    return {KEY_PREFIX + key: ours for ours, names in _tied_in_full(model, name).items() for key in names}


def _tied_in_full(model: nn.Module, name: str) -> dict[str, list[str]]:
    """The names of parameters with several, by the one an adapter has its version under."""
    if not adapters(model)[name].replaced:
        return {}
    tied = _tied(_base(model))
    return {key: tied[key] for key in adapters(model)[name].replaced if len(tied[key]) > 1}


def _base(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters by their names in the plain model; a tied one under each of its names."""
    everything = model.named_parameters(remove_duplicate=False)
    return {plain_name(model, key): parameter for key, parameter in everything if not is_factor(key)}


def _tied(base: dict[str, nn.Parameter]) -> dict[str, list[str]]:
    """All names of the parameter that each name of the plain model is for."""
    names: dict[int, list[str]] = {}
    for key, parameter in base.items():
        names.setdefault(id(parameter), []).append(key)
    return {key: names[id(parameter)] for key, parameter in base.items()}


def file_config(model: nn.Module, name: str) -> dict[str, Any]:
    """The adapter_config.json of an adapter; fields read from a file that we do not use are kept."""
    adapter, everything = adapters(model)[name], {p: m for p, m in lora_layers(model).items() if name in m.lora_A}
    layers = {path: layer for path, layer in everything.items() if not isinstance(layer, LoraParameter)}
    config, original = adapter.config, adapter.file_config
    r, alpha = config.r, config.alpha
    if any(name in layer.began for layer in layers.values()):  # written with twice the rank and the same scaling
        r, alpha = 2 * r, alpha * (math.sqrt(2) if config.rslora else 2)
    ranks = _ranks(model, name)
    in_full = config.modules_to_save
    tied = {
        key: any(is_of(key, suffix) for suffix in in_full)
        for names in _tied_in_full(model, name).values()
        for key in names
        if any(is_of(key, suffix) for key in names for suffix in in_full)  # biases that are trained as such are not
    }
    in_full = [*in_full, *sorted({key.rpartition(".")[0] for key, named in tied.items() if not named})]
    blocks = None
    if original:
        targets = original["target_modules"]
    else:
        if len(ranks) < len(everything):  # some layers were left no rank: only the others are adapted
            everything = layers = {path: layers[path] for path in ranks}
        targets, blocks = _names(model, config, layers)
    return {
        "auto_mapping": None,
        "exclude_modules": config.exclude or None,
        "fan_in_fan_out": any(isinstance(layer.base_layer, Conv1D) for layer in layers.values()),
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": blocks,
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
        "modules_to_save": in_full or None,
        "trainable_token_indices": config.tokens or None,
        "lora_bias": config.lora_bias,
        **({"ensure_weight_tying": True} if tied else {}),
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


def _names(
    model: nn.Module, config: LoraConfig, layers: dict[str, LoraLayer]
) -> tuple[str | list[str], list[int] | None]:
    """target_modules and layers_to_transform with which PEFT adapts these layers and no others."""
    targets = config.targets
    if isinstance(targets, str) and targets in TARGET_PRESETS:  # presets are ours: write the suffixes they meant
        targets = sorted({path.rsplit(".", 1)[-1] for path in layers})
    inside = sorted({n for path in layers if (n := block_number(path)) is not None})
    for blocks in [config.layers] if config.layers else [None, inside] if config.depth else [None]:
        if blocks is None or isinstance(targets, list):  # PEFT reads no file with a regex and blocks
            raw = {"target_modules": targets, "layers_to_transform": blocks, "exclude_modules": config.exclude}
            if _expected(model, raw) == set(layers):
                return targets, blocks
    return sorted(layers), None  # as for a suffix that also fits a layer outside the preset, another tower's q_proj


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


_UNTIE = (
    "untie them on the model first: head.weight = nn.Parameter(head.weight.detach().clone()) and "
    "model.config.tie_word_embeddings = False; or train again with ensure_weight_tying"
)


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    activate: bool = True,
    dtype: Dtype = "float32",
    device: str | None = None,
    check_copies: bool = True,
) -> nn.Module:
    """Put an adapter folder in PEFT's format on `model`, in place, and make it the active one.

    Args:
        activate: False: it waits; what is active stays so, and what is merged (`hot_merge`) merged.
        dtype: of A and B on the model, whatever it is in the file.
        device: where the adapter waits while another is active, "cpu" say of a model on a GPU; left out, at the base.
        check_copies: compare weights of the base that the file has too with this base's; False: its shapes alone.

    Raises:
        VeneerError: files missing, damaged or pickle; fields that change the maths and are not supported; tensors of
            another base (names and shapes), missing or left over, or with NaN; all at once, and the model unchanged.
    """
    if wrong := _wrong_settings(path, name, dtype, device):
        raise VeneerError(wrong)
    check_adapter_name(name)
    if name in adapters(model):
        raise VeneerError(f"adapter {name!r} is already on this model", hint="choose another name, or remove it first")
    place_adapter(
        model, examine_adapter(path, model), Path(path), name, dtype=dtype, device=device, check_copies=check_copies
    )
    if activate:
        set_adapter(model, name)
    return model


def place_adapter(
    model: nn.Module,
    file: AdapterFile,
    path: Path,
    name: str,
    *,
    dtype: Dtype = "float32",
    device: str | None = None,
    check_copies: bool = True,
) -> None:
    """Put an adapter that was examined at `path` on `model`, not active: what is active, or merged, stays so.

    Raises:
        VeneerError: what is wrong with it (`read_adapter`) and all that does not fit this base, at once.
    """
    base = _base(model)
    tied = _tied(base)
    weights = {**base, **_put_aside(model)} if file.copies else base
    layers = {path: None if "base_layer" in path.split(".") else layer_at(model, path) for path in file.factors}
    problems = [*_factor_problems(layers, file), *_weight_problems(weights, file, check_copies=check_copies)]
    problems += _left_over_or_missing(model, file, base, tied) if file.whole else []
    broken = _broken_ties(tied, file)
    replaced_there = {key: base[key] for key in file.replaced if key in base}
    try:
        tokens = token_layers(model, file.config.tokens, list(file.factors), replaced_there)
    except VeneerError as error:
        tokens = {}
        problems += [problem.replace("lora.tokens", "trainable_token_indices", 1) for problem in error.problems]
    else:
        problems += _token_problems(base, tokens, file.tokens) if file.whole else []
    made_for, here = file.raw.get("base_model_name_or_path"), getattr(model, "name_or_path", "?")
    hint = file.hint
    if problems:
        hint = hint or (f"it was made for {made_for!r}; this model is {here!r}" if made_for else None)
    elif broken:
        hint = hint or _UNTIE
    wrong, refused = ([f"adapter {path}: {problem}" for problem in found] for found in (problems, broken))
    raise_problems([*file.wrong, *wrong], [*file.refused, *refused], hint)
    config = file.config.model_copy(update={"dtype": dtype})
    for layer, found in file.factors.items():
        more = {"magnitude": found.magnitude, "bias": found.bias, "dtype": getattr(torch, dtype)}
        adapted(model, layer, layers[layer]).add(
            name, found.a, found.b, scaling=found.scaling, dropout=config.dropout, **more
        )
    for embedding, ids in tokens.items():
        TokenRows.of(model, embedding).add(name, ids, file.tokens[embedding])
    replaced = {
        key: nn.Parameter(tensor.to(device=base[key].device, dtype=base[key].dtype))
        for key, tensor in file.replaced.items()
        if not any(other in file.replaced for other in tied[key][: tied[key].index(key)])  # a tied one once
    }
    waits = None if device is None else torch.device(device)
    adapters(model)[name] = Adapter(config, file.raw, replaced, device=waits)
    freeze_base(model)
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(False)
        if waits is not None:
            move(parameter, waits)
    answer_save_pretrained(model)


def place_adapters(model: nn.Module, paths: Sequence[str | Path]) -> list[AdapterFile]:
    """Put several adapters on `model`, called merged0, merged1 and so on, by their shapes alone; returns their files.

    Raises:
        VeneerError: what is wrong with any of them, and all that does not fit.
    """
    files: list[AdapterFile] = []
    wrong: list[str] = []
    refused: list[str] = []
    hint = None
    for number, path in enumerate(paths):
        try:
            files.append(examine_adapter(path, model))
            place_adapter(model, files[-1], Path(path), f"merged{number}", check_copies=False)
        except VeneerError as error:
            (refused if isinstance(error, RefusedError) else wrong).extend(error.problems)
            hint = hint or error.hint
    raise_problems(wrong, refused, hint)
    return files


def _put_aside(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters that are not in place: an adapter's versions of them are, or merged ones."""
    merged: dict[str, Any] = model.__dict__.get("veneer_merged", {})
    found = {f"{path}.weight": kept[0] for path, kept in merged.items() if isinstance(kept, tuple)}
    found |= {path: kept for path, kept in merged.items() if isinstance(kept, nn.Parameter)}
    return {**found, **model.__dict__.get("veneer_base", {})}


def _factor_problems(layers: dict[str, LoraLayer | None], file: AdapterFile) -> list[str]:
    """Factors of layers that the model has not, or of another shape."""
    problems = []
    for layer, found in file.factors.items():
        if (kind := layers[layer]) is None:
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
    return problems


def _weight_problems(base: dict[str, nn.Parameter], file: AdapterFile, *, check_copies: bool) -> list[str]:
    """Weights trained in full that have no place in the base, and copies of the base's that are not this base's."""
    problems = []
    for key, tensor in (*file.replaced.items(), *file.copies.items()):
        if key not in base:
            problems.append(f"{key}: found in the adapter, but this model has no such weight")
        elif key in file.replaced and base[key].shape != tensor.shape:
            problems.append(f"{key}: found {tuple(tensor.shape)}, expected {tuple(base[key].shape)}")
        elif key in file.copies and (
            tensor.shape != base[key].shape or (check_copies and not same_weight(tensor, base[key]))
        ):
            problems.append(
                f"{key}: found with the adapter, {tuple(tensor.shape)}, but this base's, {tuple(base[key].shape)}, is another; "
                "it was changed or resized before the training, or the adapter is of another base"
            )
    return problems


def _wrong_settings(path: Any, name: Any, dtype: Any, device: Any) -> list[str]:
    problems = []
    if not isinstance(path, str | Path):
        problems.append(f"path: found {path!r}, expected an adapter's folder")
    if not isinstance(name, str):
        problems.append(f"name: found {name!r}, expected a string")
    if dtype not in get_args(Dtype):
        problems.append(f"dtype: found {dtype!r}, expected {', '.join(get_args(Dtype))}")
    if device is not None and (wrong := device_problem(device)):
        problems.append(wrong)
    return problems


def same_weight(copy: Tensor, weight: Tensor) -> bool:
    """Whether a file's copy is this weight, as far as the narrower of their types can tell."""
    dtype = min(copy.dtype, weight.dtype, key=lambda kind: kind.itemsize)
    return torch.equal(copy.to(weight.device, dtype), weight.detach().to(dtype))


def _left_over_or_missing(
    model: nn.Module, file: AdapterFile, base: dict[str, nn.Parameter], tied: dict[str, list[str]]
) -> list[str]:
    """Where an adapter's tensors are not those that its config means on this model; PEFT would drop or leave them out
    without a word."""
    raw, config = file.raw, file.config
    tie = bool(raw.get("ensure_weight_tying"))
    problems = []
    layers, parameters = _expected(model, raw), _expected_parameters(model, config)
    problems += [f"{p}: in target_modules, but not in {WEIGHTS_FILE}" for p in sorted(layers - file.keys.keys())]
    problems += [f"{p}: in target_parameters, but not in {WEIGHTS_FILE}" for p in sorted(parameters - file.keys.keys())]
    if tie:  # PEFT adapts what is tied to a target too, and does not list it
        layers |= {other.rpartition(".")[0] for path in layers for other in tied.get(f"{path}.weight", [])}
    problems += [
        f"{path}: found in the adapter, but not meant by target_modules, layers_to_transform and the like"
        for path in sorted(file.keys.keys() - layers - parameters)
        if layer_at(model, path) is not None
    ]
    in_full = {key for key in base if any(is_of(key, suffix) for suffix in config.modules_to_save)}
    biases = {key for key in base if config.bias == "all" and key.rpartition(".")[2] == "bias"}
    if config.bias == "lora_only":
        biases = {f"{path}.bias" for path in file.factors} & base.keys()
    copies = {other for key in in_full for other in tied[key]} if tie else set()
    found = file.replaced.keys()
    for field, wanted in (("modules_to_save", in_full), (f"bias {config.bias}", biases - in_full)):
        problems += [
            f"{key}: meant by {field}, but not in {WEIGHTS_FILE}"
            for key in sorted(wanted - found)
            if not (tie and found & set(tied[key]))
        ]
    problems += [
        f"{key}: found in the adapter, but not meant by modules_to_save and bias"
        for key in sorted((found & base.keys()) - in_full - biases - copies)
    ]
    return problems


def _broken_ties(tied: dict[str, list[str]], file: AdapterFile) -> list[str]:
    """Parameters that are one here, and of which PEFT trained one place only, or each on its own."""
    found = []
    for names in {id(names): names for names in tied.values()}.values():
        there = [key for key in names if key in file.replaced]
        first, *others = there or [""]
        if any(not torch.equal(file.replaced[first], file.replaced[key]) for key in others):
            found.append(
                f"modules_to_save: {' and '.join(there)} are tied here, expected equal weights, found different ones"
            )
        elif there and len(there) < len(names) and not file.raw.get("ensure_weight_tying"):
            rest = " and ".join(key for key in names if key not in there)
            found.append(f"modules_to_save: {first} is tied to {rest} here; PEFT trained a copy of {first} alone")
    return found


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
    with contextlib.suppress(VeneerError):  # a model may have none
        names = resolve_targets(model, "all-linear" if targets == "all-linear" else ".*")
    if isinstance(targets, list):
        names = [name for name in names if any(is_suffix(name, suffix) for suffix in targets)]
    elif targets != "all-linear":
        names = [name for name, hit in zip(names, matching(targets, names, "target_modules"), strict=True) if hit]
    names = excluded(names, raw.get("exclude_modules"))
    in_full = raw.get("modules_to_save") or []
    names = [name for name in names if not any(f".{suffix}." in f".{name}." for suffix in in_full)]
    chosen = raw.get("layers_to_transform")
    if chosen not in (None, []) and isinstance(targets, list):
        wanted = {chosen} if isinstance(chosen, int) else set(chosen)
        parents = raw.get("layers_pattern") or []
        names = [name for name in names if _block(name, [parents] if isinstance(parents, str) else parents) in wanted]
    return set(names)


def _block(name: str, parents: list[str]) -> int | None:
    """The number of a layer's block as PEFT reads it: the first after two other parts, or after one of `parents`."""
    before = "|".join(rf"(?:.*?\.)?{re.escape(parent)}" for parent in parents) or r".*?\.[^.]*"
    match = re.match(rf"(?:{before})\.(\d+)\.", name)
    return int(match[1]) if match else None


def _expected_parameters(model: nn.Module, config: LoraConfig) -> set[str]:
    names: list[str] = []
    for name in config.parameters:
        with contextlib.suppress(VeneerError):
            names += resolve_parameters(model, [name])
    return set(names)


def _model_card(config: dict[str, Any], factors: dict[str, Tensor]) -> str:
    parameters = sum(factor.numel() for factor in factors.values())
    dtypes = sorted({str(factor.dtype).removeprefix("torch.") for factor in factors.values()})
    base = config["base_model_name_or_path"] or "unknown"
    front = {"library_name": "peft", "tags": ["lora", "veneer"]}
    if base and "/" in str(base) and not str(base).startswith((".", "/")):
        front["base_model"] = base
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return (
        f"---\n{lines}\n---\n\n# LoRA adapter for {Path(str(base)).name}\n\n"
        f"Rank {config['r']}, alpha {config['lora_alpha']}, {parameters:,} parameters in {' and '.join(dtypes)}, "
        f"on {json.dumps(config['target_modules'])}. Trained with Veneer; any tool that reads PEFT's LoRA files can load it.\n"
    )
