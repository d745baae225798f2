"""Putting adapters on a transformers model, in place: choosing layers, freezing, switching, counting."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from veneer.adapters.lora import LoraLinear, check_adapter_name, initial_factors
from veneer.config import TARGET_PRESETS, LoraConfig, nearest
from veneer.errors import VeneerError
from veneer.quant.linear import QuantizedLinear

Linear: TypeAlias = nn.Linear | QuantizedLinear | LoraLinear
_PRESET_PARENT = {
    "attention": re.compile(r"(^|_)(attn|attention)", re.I),
    "mlp": re.compile(r"mlp|feed_?forward|ffn", re.I),
}


@dataclass
class Adapter:
    """What the model remembers of one adapter: its settings and, if it came from a file, that file's config."""

    config: LoraConfig
    file_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterCount:
    trainable: int
    total: int

    @property
    def ratio(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable {self.trainable:,} of {self.total:,} parameters ({100 * self.ratio:.2f}%)"


def attach(
    model: nn.Module, config: LoraConfig | None = None, *, name: str = "default", seed: int | None = None
) -> nn.Module:
    """Freeze `model` and put a new, active, trainable adapter on it, in place. The model's output does not change.

    Warns when a preset leaves out a mixture's experts.

    Args:
        seed: of A's random start; left out, torch's global generator is used.

    Raises:
        VeneerError: no layer matches, a rank is larger than a layer allows, or the name is taken; all at once.
    """
    config = config or LoraConfig()
    check_adapter_name(name)
    if name in adapters(model):
        raise VeneerError(f"adapter {name!r} is already on this model", hint="choose another name, or remove it first")
    names = resolve_targets(model, config.targets)
    modules = dict(model.named_modules())
    too_large = [  # layers of one name and shape, as there is one in each block, are one problem
        f"lora.r: found {config.r}, expected at most {min(rows, width)} for {kind} ({rows} x {width})"
        for kind, rows, width in dict.fromkeys(
            (path.rsplit(".", 1)[-1], modules[path].out_features, modules[path].in_features) for path in names
        )
        if config.r > min(rows, width)
    ]
    if too_large:
        raise VeneerError(too_large, hint="choose a smaller rank, or leave those layers out of lora.targets")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    freeze_base(model)
    for path in names:
        layer = adapted(model, path)
        a, b = initial_factors(config.r, layer.in_features, layer.out_features, config.init, generator)
        layer.add(name, a, b, scaling=config.scaling, dropout=config.dropout)
    adapters(model)[name] = Adapter(config)
    set_adapter(model, name)
    if config.targets in ("all-linear", "mlp"):
        _warn_of_experts(model, config.targets)
    return model


def _experts(model: nn.Module) -> tuple[str, int]:
    """Where a mixture keeps its experts, all of a layer in one 3-D parameter, which no adapter reaches; and their size."""
    modules = dict(model.named_modules())
    found = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and len(parameter) > 1
        if not isinstance(modules[name.rpartition(".")[0]], nn.modules.conv._ConvNd)
    }
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in found))
    more = f" and {len(owners) - 3} more" if len(owners) > 3 else ""
    return ", ".join(owners[:3]) + more, sum(found.values())


def _warn_of_experts(model: nn.Module, targets: str | list[str]) -> None:
    where, size = _experts(model)
    if size:
        warnings.warn(
            f"lora.targets: {targets} does not reach the experts of this mixture, which are no linear layers: "
            f"{size:,} parameters stay frozen in {where}",
            stacklevel=3,
        )


def resolve_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    """The full names of the linears meant by `targets`, in model order.

    A preset (attention, mlp, all-linear: never the output head), a list of name suffixes, or a regex that must
    match a layer's whole name; the last two mean what PEFT's `target_modules` means.

    Raises:
        VeneerError: a part matches nothing; lists the names that exist.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = {name: module for name, module in _linears(model)}
    hidden = [name for name, module in linears.items() if module is not head]
    if isinstance(targets, str):
        if targets == "all-linear":
            found = hidden
        elif targets in _PRESET_PARENT:
            parent = _PRESET_PARENT[targets]
            found = [name for name in hidden if any(parent.search(part) for part in name.split(".")[:-1])]
        else:
            try:
                pattern = re.compile(targets)
            except re.error as error:
                raise VeneerError(f"lora.targets: {targets!r} is not a valid regex: {error}") from None
            found = [name for name in linears if pattern.fullmatch(name)]
        missing = [] if found else [targets]
    else:
        found = [name for name in linears if any(_is_suffix(name, suffix) for suffix in targets)]
        missing = [suffix for suffix in targets if not any(_is_suffix(name, suffix) for name in linears)]
    if missing:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
        problems = [
            f"lora.targets: {part!r} matches no linear layer"
            + ("" if part in TARGET_PRESETS else f"; {nearest(part, kinds)}")
            for part in missing
        ]
        where, size = _experts(model)
        if size:
            problems[-1] += f" (the experts of this mixture, in {where}, are parameters, not linears: not adapted yet)"
        raise VeneerError(
            problems, hint=f"layers of this model: {', '.join(kinds)}; presets: {', '.join(TARGET_PRESETS)}"
        )
    return found


def freeze_base(model: nn.Module) -> None:
    """No base parameter is trained and no dropout is active in the base, even after `model.train()`."""
    own = {
        id(parameter)
        for layer in lora_layers(model).values()
        for parameter in (*layer.lora_A.values(), *layer.lora_B.values())
    }
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on this model by name (a live dict kept on the model)."""
    if "veneer_adapters" not in model.__dict__:
        model.__dict__["veneer_adapters"] = {}
    return model.__dict__["veneer_adapters"]  # type: ignore[no-any-return]


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by the name their base layer has in the plain model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapted(model: nn.Module, path: str) -> LoraLinear:
    """The LoraLinear at `path`; a plain linear there is wrapped first."""
    layer = model.get_submodule(path)
    if isinstance(layer, LoraLinear):
        return layer
    wrapped = LoraLinear(layer).train(layer.training)  # type: ignore[arg-type]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, wrapped)
    return wrapped


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter the active and trainable one; None: the bare base, exactly.

    Raises:
        VeneerError: there is no adapter of that name; lists those there are.
    """
    require_adapter(model, name)
    for layer in lora_layers(model).values():
        layer.active = name if name in layer.lora_A else None
        for factors in (layer.lora_A, layer.lora_B):
            for key, parameter in factors.items():
                parameter.requires_grad_(key == name)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter, or None."""
    return next((layer.active for layer in lora_layers(model).values() if layer.active is not None), None)


def require_adapter(model: nn.Module, name: str | None) -> None:
    if name is not None and name not in adapters(model):
        there = ", ".join(adapters(model)) or "none"
        raise VeneerError(f"adapter {name!r} is not on this model", hint=f"adapters there are: {there}")


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off; layers left without any become the plain layers they were."""
    require_adapter(model, name)
    for path, layer in lora_layers(model).items():
        if name in layer.lora_A:
            layer.remove(name)
        if not layer.lora_A:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    del adapters(model)[name]


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The factors of one adapter by name: `<layer>.lora_A.weight` (r, in) and `<layer>.lora_B.weight` (out, r)."""
    found = {}
    for path, layer in lora_layers(model).items():
        if name in layer.lora_A:
            found[f"{path}.lora_A.weight"] = layer.lora_A[name]
            found[f"{path}.lora_B.weight"] = layer.lora_B[name]
    return found


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable and total parameters; a 4-bit weight counts as the weights it stands for, a tied one once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    total += sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    return ParameterCount(sum(p.numel() for p in model.parameters() if p.requires_grad), total)


def _linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    inside = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            inside.add(f"{name}.base_layer")
            yield name, module
        elif isinstance(module, nn.Linear | QuantizedLinear) and name not in inside:
            yield name, module


def _is_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
