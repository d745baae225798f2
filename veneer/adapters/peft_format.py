"""PEFT's LoRA files as they lie on disk: every field and tensor checked, all problems at once."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from veneer.adapters.patterns import by_pattern, ends_in, is_regex, is_suffix, matching
from veneer.adapters.tokens import TokenRows
from veneer.config import LoraConfig
from veneer.errors import RefusedError, VeneerError
from veneer.ops import all_finite
from veneer.storage import (
    PICKLE_SUFFIXES,
    pickle_error,
    read_json,
    read_tensors,
)

LONGEST = 120  # characters of a value in a message
FP32_MAX = torch.finfo(torch.float32).max
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

# The base's embeddings and head, which PEFT writes too where one of them is adapted, or it is told to.
_COPY = re.compile(
    r"(?:base_model\.model\.)?(.+\.)?(embed_tokens|wte|embed_in|word_embeddings|lm_head|embed_out|output)"
    r"(?:\.base_layer)?\.(?:weight|bias)"
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

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
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "qalora_group_size", "runtime_config",
)  # fmt: skip


def shown(value: Any) -> str:
    """A value for a message: as Python writes it, the middle left out where that is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... ({len(text):,} characters)"


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _positive(value: Any) -> bool:
    """Not more than fp32 holds, either."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < FP32_MAX


def _names_or_regex(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, str) and part for part in value)
    return isinstance(value, str) and is_regex(value)


def _token_ids(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    if isinstance(value, dict) and not (all(value) and all(lists)):  # an empty name, or no ids for one
        return False
    return all(isinstance(ids, list) and all(_whole(i, 0) for i in ids) and len({*ids}) == len(ids) for ids in lists)


# Every other field we read: what it must be. Those of _OPTIONAL may be null.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "target_modules": ("a list of names or a regex", lambda v: bool(v) and _names_or_regex(v)),
    "target_parameters": ("a list of names", lambda v: isinstance(v, list) and _names_or_regex(v)),
    "trainable_token_indices": ("ids of tokens, each once, or lists of them, not empty, by name", _token_ids),
    "lora_bias": ("true or false", lambda v: isinstance(v, bool)),
    "ensure_weight_tying": ("true or false", lambda v: isinstance(v, bool)),
    "r": ("a whole number from 1", _whole),
    "lora_alpha": ("a number above 0 that fp32 can hold", _positive),
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
    "layers_pattern": ("a name or a list of names", _names_or_regex),
    "rank_pattern": (
        "whole numbers from 1 by name or regex",
        lambda v: isinstance(v, dict) and all(is_regex(ends_in(k)) and _whole(n) for k, n in v.items()),
    ),
    "alpha_pattern": (
        "numbers above 0 that fp32 can hold, by name or regex",
        lambda v: isinstance(v, dict) and all(is_regex(ends_in(k)) and _positive(n) for k, n in v.items()),
    ),
    "base_model_name_or_path": ("a name", lambda v: isinstance(v, str)),
}
_OPTIONAL = (
    "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying", "rank_pattern", "alpha_pattern",
    "base_model_name_or_path", "use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "lora_bias",
)  # fmt: skip


# Fields that exclude one another, as PEFT has it.
_NOT_WITH = (
    ("lora_bias", "use_dora"), ("target_parameters", "lora_dropout"), ("target_parameters", "use_dora"),
    ("target_parameters", "lora_bias"),
)  # fmt: skip

_SAVE_AGAIN = "open it with the tool that wrote it and save it as a plain LoRA"


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
    trained in full, rows of tokens by embedding, weights that are the base's own, the factors' names in the file, all in it
    that is not of factors, what the base was quantised to when it was trained here (None: not at all, or not known), and whether doubly.

    Of `examine_adapter`: what is wrong, what is not supported, what can be done about it, and whether the config can be
    held against the tensors."""

    raw: dict[str, Any]
    config: LoraConfig
    factors: dict[str, Factors]
    replaced: dict[str, Tensor]
    tokens: dict[str, Tensor]
    copies: dict[str, Tensor]
    keys: dict[str, dict[str, str]]
    rest: dict[str, Tensor]
    trained_on: str | None
    double_quant: bool | None
    wrong: list[str]
    refused: list[str]
    hint: str | None
    whole: bool


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
    file = examine_adapter(path, model)
    raise_problems(file.wrong, file.refused, file.hint)
    return file


def raise_problems(wrong: list[str], refused: list[str], hint: str | None) -> None:
    """RefusedError if no more than that is the matter."""
    if wrong or refused:
        raise (VeneerError if wrong else RefusedError)([*wrong, *refused], hint=hint)


def examine_adapter(path: str | Path, model: nn.Module | None = None) -> AdapterFile:
    """`read_adapter` that keeps what it finds wrong beside what can be read all the same, for those who will find more.

    Raises:
        VeneerError: there is no adapter to look at.
    """
    path = Path(path)
    raw = _raw_config(path)
    found, refused, bad = _config_problems(raw)
    wrong = [f"{path / CONFIG_FILE}: {problem}" for problem in found]
    refused = [f"{path / CONFIG_FILE}: {problem}" for problem in refused]
    hint = _SAVE_AGAIN if refused else None
    fields = (*_FIELDS, *_MATHS_FIELDS, *_HARMLESS_FIELDS)
    if unknown := [
        field for field, value in raw.items() if field not in fields and value not in (None, False, "", [], {})
    ]:
        warnings.warn(
            f"{path / CONFIG_FILE}: {', '.join(field if field.isidentifier() else shown(field) for field in unknown)}: not known here, and kept as it is; if it changes the result, the "
            "adapter is not what it was",
            stacklevel=3,
        )
    usable = {field: value for field, value in raw.items() if field not in bad}
    config = _our_config(usable)
    tensors: dict[str, Tensor] | None = None
    said: dict[str, str] = {}
    try:
        tensors = read_tensors(path / WEIGHTS_FILE)
        with safe_open(path / WEIGHTS_FILE, framework="pt") as opened:
            said = opened.metadata() or {}
    except VeneerError as error:
        wrong, hint = wrong + error.problems, hint or error.hint
    known = bad.isdisjoint({"r", "rank_pattern", "target_parameters"})
    ours = _Sorted(tensors or {}, usable, config, model, ranks_known=known)
    if "target_parameters" in bad:  # which layer is which is not known
        ours.factors.clear()
    if tensors is not None and ours.problems:
        wrong += [f"{path / WEIGHTS_FILE}: {problem}" for problem in ours.problems]
        hint = hint or "the adapter is damaged; copy it again"
    trained_on = said.get("veneer.base_quantization", "none")
    doubly = {"True": True, "False": False}.get(said.get("veneer.base_double_quant", ""))
    return AdapterFile(
        raw, config, ours.factors, ours.replaced, ours.tokens, ours.copies, ours.keys, ours.rest,
        None if trained_on == "none" else trained_on, doubly, wrong, refused, hint, not bad and tensors is not None,
    )  # fmt: skip


def _raw_config(path: Path) -> dict[str, Any]:
    """adapter_config.json as it stands there, if it is a LoRA's."""
    try:
        there = path.is_dir()
    except OSError as error:  # a name that is too long, or one that may not be looked at
        raise VeneerError(f"adapter {shown(str(path))}: {error.strerror}") from None
    if not there:
        raise VeneerError(f"adapter {path}: no such folder", hint=f"expected a folder with {CONFIG_FILE}")
    if not (path / WEIGHTS_FILE).is_file():
        for file in sorted(path.iterdir()):
            if file.suffix in PICKLE_SUFFIXES:
                raise pickle_error(file)
    raw = read_json(path / CONFIG_FILE)
    if raw.get("peft_type") != "LORA":
        raise VeneerError(
            f"{path / CONFIG_FILE}: found peft_type {shown(raw.get('peft_type'))}, expected 'LORA'",
            hint="only LoRA and what PEFT saves as LORA is read here (DoRA, PiSSA and EVA are); merge this one into its "
            "base with PEFT's merge_and_unload, or save it as a LoRA with the tool that wrote it",
        )
    raw.setdefault("target_modules", None)
    if not raw["target_modules"] and raw.get("target_parameters"):
        raw["target_modules"] = []  # parameters alone
    return raw


def _config_problems(raw: dict[str, Any]) -> tuple[list[str], list[str], set[str]]:
    """What cannot be, what is not supported, and the fields that say nothing now."""
    problems = {
        field: f"{field}: found {shown(raw[field])}, expected {expected}"
        for field, (expected, fits) in _FIELDS.items()
        if field in raw and not (fits(raw[field]) or (raw[field] is None and field in _OPTIONAL))
        if not (field == "target_modules" and raw[field] == [])
    }
    excluding = {
        field: f"{field}: found {shown(raw[field])}, which does not go with {other}"
        for field, other in _NOT_WITH
        if raw.get(field) and raw.get(other)
    }
    refused = [
        f"{field} is {shown(raw[field])}, which changes the result and is not supported"
        for field, harmless in _MATHS_FIELDS.items()
        if field in raw and raw[field] not in harmless
    ]
    apart = {other if field == "target_parameters" else field for field, other in _NOT_WITH if field in excluding}
    return [*problems.values(), *excluding.values()], refused, {*problems, *apart}


def _our_config(raw: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        r=raw.get("r", 8),
        alpha=raw.get("lora_alpha", 8),
        dropout=raw.get("lora_dropout", 0.0),
        targets=raw.get("target_modules") or ([] if raw.get("target_parameters") else "all-linear"),
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


class _Sorted:
    """An adapter's tensors by what they are for, and all that is wrong with them."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        raw: dict[str, Any],
        config: LoraConfig,
        model: nn.Module | None,
        *,
        ranks_known: bool,
    ) -> None:
        self.config, self.ranks_known = config, ranks_known
        self.factors: dict[str, Factors] = {}
        self.replaced: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}
        self.keys: dict[str, dict[str, str]] = {}
        strange = [key for key in tensors if not key.isprintable() or ".." in key or "/" in key or "\\" in key]
        tensors = {key: tensor for key, tensor in tensors.items() if key not in strange}  # each names a module
        self.rest = {key: tensor for key, tensor in tensors.items() if _FACTOR.fullmatch(key) is None}
        layers = {match[1] for key in tensors if (match := _FACTOR.fullmatch(key))}
        self.names, self.problems = _parameters_by_wrapper(layers, config, model)
        self.problems += [
            f"tensor {shown(key)}: expected a name of letters, digits, dots and underscores" for key in strange
        ]
        paths = sorted({self.names.get(layer, layer) for layer in layers})
        self.ranks = dict(zip(paths, by_pattern(config.rank_pattern, paths, config.r, "rank_pattern"), strict=True))
        alphas = dict(zip(paths, by_pattern(config.alpha_pattern, paths, config.alpha, "alpha_pattern"), strict=True))
        twice = [key for key in tensors if f"{KEY_PREFIX}{key}" in tensors]
        self.problems += [
            f"tensor {key}: found with {KEY_PREFIX} before it as well, expected one of them" for key in twice
        ]
        parts: dict[str, dict[str, Tensor]] = {}
        unfit: set[str] = set()
        for key, tensor in tensors.items():
            if problem := _value_problem(tensor):
                self.problems.append(f"tensor {key}: {problem}")
            match = _FACTOR.fullmatch(key)
            if match is None:
                self._beside(key, tensor, raw)
                continue
            part, layer = _WHICH[match[2]], self.names.get(match[1], match[1])
            parts.setdefault(layer, {})[part] = tensor
            self.keys.setdefault(layer, {})[part] = KEY_PREFIX + key.removeprefix(KEY_PREFIX)
            if problem := self._factor_problem(tensor, part, self._rank(layer, parts[layer]), match[1] in self.names):
                self.problems.append(f"tensor {key}: {problem}")
                unfit.add(layer)
        self.problems += self._incomplete(parts)
        for layer, there in parts.items():
            rank = self._rank(layer, there)
            if rank and {"a", "b"} <= there.keys() and layer not in unfit:
                self.factors[layer] = Factors(rank, config.scaling_at(rank, alphas[layer]), **there)

    def _rank(self, layer: str, parts: dict[str, Tensor]) -> int:
        """As the config says; where that is no number, as A has it. 0: not known."""
        if self.ranks_known:
            return self.ranks[layer]
        return len(parts["a"]) if "a" in parts and parts["a"].ndim and layer not in self.names.values() else 0

    def _beside(self, key: str, tensor: Tensor, raw: dict[str, Any]) -> None:
        """A tensor that is no factor."""
        config, name = self.config, key.removeprefix(KEY_PREFIX)
        if config.bias == "all" and key.endswith((".original_module.bias", ".modules_to_save.bias")):
            return  # PEFT writes these biases of its wrappers besides the trained one
        in_full = any(is_of(key, suffix) for suffix in config.modules_to_save)
        in_full |= bool(raw.get("ensure_weight_tying") and config.modules_to_save)  # what is tied to one of them
        if config.tokens and key.endswith(f".{TokenRows.KEY}"):
            self.tokens[name.removesuffix(f".{TokenRows.KEY}")] = tensor
        elif in_full or (config.bias != "none" and key.endswith(".bias")):
            self.replaced[name.replace(".base_layer.", ".")] = tensor
        elif _COPY.fullmatch(key):
            self.copies[name.replace(".base_layer.", ".")] = tensor
        else:
            self.problems.append(f"tensor {key}: expected names like {KEY_PREFIX}<layer>.lora_A.weight")

    def _factor_problem(self, tensor: Tensor, part: str, rank: int, of_parameter: bool) -> str | None:
        if part in ("magnitude", "bias"):
            if part == "magnitude" and not self.config.dora:
                return "found a magnitude, but use_dora is not true"
            return "found a bias, but lora_bias is not true" if part == "bias" and not self.config.lora_bias else None
        if not rank:
            return None
        if of_parameter:
            fits = tensor.ndim == 2 and tensor.shape[part == "b"] % rank == 0
            shape = f"({rank} x experts, in)" if part == "a" else f"(out, {rank} x experts)"
        else:
            fits = tensor.ndim >= 2 and (part == "b" or tensor.shape[0] == rank)
            fits &= part == "a" or (rank % tensor.shape[1] == 0 if tensor.ndim > 2 else tensor.shape[1:] == (rank,))
            shape = f"({rank}, in)" if part == "a" else f"(out, {rank})"
        return None if fits else f"found {tuple(tensor.shape)}, expected {shape}"

    def _incomplete(self, parts: dict[str, dict[str, Tensor]]) -> list[str]:
        """Halves of different numbers of experts, parts that are missing."""
        problems = [
            f"{layer}: found lora_A of {len(there['a']) // rank} experts, lora_B of {there['b'].shape[1] // rank}"
            for layer, there in parts.items()
            if layer in self.names.values() and "a" in there and "b" in there and there["a"].ndim == there["b"].ndim == 2
            if (rank := self._rank(layer, there)) and len(there["a"]) // rank != there["b"].shape[1] // rank
        ]  # fmt: skip
        needed = {"a": "lora_A", "b": "lora_B"} | ({"magnitude": "lora_magnitude_vector"} if self.config.dora else {})
        needed |= {"bias": "lora_B.bias"} if self.config.lora_bias else {}
        problems += [
            f"{layer}: found no {name}, expected {', '.join(needed.values())}"
            for layer, there in parts.items()
            for part, name in needed.items()
            if part not in there
        ]
        problems += [
            f"no weights of {suffix!r}, which is in modules_to_save"
            for suffix in self.config.modules_to_save
            if not any(is_of(key, suffix) for key in self.replaced)
        ]
        return problems if parts else [*problems, "no lora_A and lora_B tensors in it"]


def _value_problem(tensor: Tensor) -> str | None:
    if tensor.dtype not in _DTYPES:
        found, *expected = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *_DTYPES))
        return f"found {found}, expected floating point: {', '.join(expected)}"
    if not tensor.numel():
        return f"found {tuple(tensor.shape)}, which holds nothing"
    return None if all_finite(tensor) else "found NaN or Inf, expected finite numbers"


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


def is_of(key: str, suffix: str) -> bool:
    """Whether a tensor belongs to a module that `modules_to_save` means by a suffix; PEFT's rule."""
    path = key.split(".")[:-1]
    return any(".".join(path[:n]).endswith(suffix) for n in range(1, len(path) + 1))


def base_quantization(path: str | Path) -> str | None:
    """What the base was quantised to when the adapter was trained here ("nf4", "fp4", "int8"); None: not at all, or not known."""
    return read_adapter(path).trained_on
