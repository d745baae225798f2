"""Putting adapters on a transformers model, in place: freezing, switching, removing, counting."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from veneer.adapters import adalora, starts
from veneer.adapters.experts import LoraExperts, LoraParameter
from veneer.adapters.lora import LoraLayer, check_adapter_name
from veneer.adapters.targets import (
    Place,
    is_factor,
    is_quantized,
    layer_at,
    left_out_of,
    plain_name,
    plan_places,
    require_layer,
)
from veneer.adapters.tokens import TokenRows, move, set_token_rows, token_layers, token_rows
from veneer.config import LoraConfig, nearest
from veneer.errors import VeneerError
from veneer.quant.linear import QuantizedLinear


@dataclass
class Adapter:
    """What the model remembers of one adapter: its settings, that of its file's config, and what it replaces.

    replaced: parameters of the plain model, by name, that this adapter has trained versions of.
    allocator: of an AdaLoRA adapter.
    device: where it waits while another is active; None: where it was.
    """

    config: LoraConfig
    file_config: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, nn.Parameter] = field(default_factory=dict)
    allocator: adalora.Allocator | None = None
    device: torch.device | None = None


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
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    name: str = "default",
    seed: int | None = None,
    original: nn.Module | None = None,
    data: Iterable[dict[str, Any]] | None = None,
    device: str | None = None,
) -> nn.Module:
    """Freeze `model` and put a new, active, trainable adapter on it, in place. The model's output does not change.

    With `init` pissa it changes by rounding, or on a quantised base, as with loftq, towards that of the model before it
    was quantised. It starts from the base, whichever adapter was active. Warns of what words of the configuration mean and
    is left out: parameters, as a mixture's experts are, layers outside the blocks that `layers` chooses.

    Args:
        seed: of A's random start; left out, torch's global generator is used.
        original: for pissa and loftq on a quantised base: the model before that; left out, what `veneer.load` read is
            read again.
        data: for eva: the model's inputs batch by batch, as `model(**batch)` takes them; only rows to train on.
        device: where the adapter waits while another is active, "cpu" say of a model on a GPU; left out, at the base.

    Raises:
        VeneerError: words that match no layer, a rank that a layer does not allow, layers another library has quantised,
            or the name is taken; all at once. Or `init` cannot be had: layers that are not linear, no original weights,
            no data. The model is as it was then.
    """
    config = LoraConfig() if config is None else config
    generator = _check_arguments(config, name, seed)
    if device is not None and (wrong := device_problem(device)):
        raise VeneerError(wrong)
    if name in adapters(model):
        raise VeneerError(f"adapter {name!r} is already on this model", hint="choose another name, or remove it first")
    before = active_adapter(model)
    set_adapter(model, None)  # a new adapter starts from the base, not from what another one has trained
    try:
        places, replaced, tokens = _plan(model, config)
        left_out = left_out_of(model, config, [place.path for place in places])
        places, found = _starts(model, config, places, original, data)
    except BaseException:
        set_adapter(model, before)
        raise
    freeze_base(model)
    for path, r, scaling in places:
        layer = adapted(model, path)
        diagonal = None
        if config.adalora is not None:
            a, b, diagonal = adalora.start(layer, min(round(r * config.adalora.start), *layer.sides), generator)
            start = starts.Start(a, b)
        else:
            start = found[path] if found else starts.Start(*layer.start(r, config.init, generator))
        bias = torch.zeros(layer.out_features) if config.lora_bias else None
        more = {"diagonal": diagonal, "bias": bias, "dtype": getattr(torch, config.dtype)}
        layer.add(name, start.a, start.b, scaling=scaling, dropout=config.dropout, **more)
        if start.base is not None:
            layer.put_base(name, start.base)
        if config.dora:
            weight = layer.merged(name) if config.init in starts.OF_WEIGHTS else None
            layer.magnitude[name] = nn.Parameter(layer.first_magnitude(weight))
    for path, ids in tokens.items():
        TokenRows.of(model, path).add(name, ids)
    copies = {path: nn.Parameter(base.detach().clone()) for path, base in replaced.items()}
    adapters(model)[name] = adapter = Adapter(
        config, replaced=copies, device=None if device is None else torch.device(device)
    )
    if config.adalora is not None:
        layers = {place.path: adapted(model, place.path) for place in places}
        adapter.allocator = adalora.Allocator(layers, name, config.adalora, sum(place.r for place in places))
    set_adapter(model, name)
    from veneer.adapters.reference import answer_save_pretrained  # here: it imports this module

    answer_save_pretrained(model)
    for words in left_out:
        warnings.warn(words, stacklevel=2)
    return model


def _check_arguments(config: LoraConfig, name: str, seed: int | None) -> torch.Generator | None:
    """The generator of the seed."""
    if not isinstance(config, LoraConfig):
        raise VeneerError(
            f"config: found {type(config)}, expected a veneer.LoraConfig",
            hint="veneer.attach(model, veneer.LoraConfig(r=8)); LoraConfig(**settings) makes one of a dict",
        )
    if not isinstance(name, str):
        raise VeneerError(f"adapter name: found {name!r}, expected 1 to 64 letters, digits, _ or -")
    check_adapter_name(name)
    try:
        return None if seed is None else torch.Generator().manual_seed(seed)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise VeneerError(f"seed: found {seed!r}, expected an integer of 64 bits") from None


def _plan(model: nn.Module, config: LoraConfig) -> tuple[list[Place], dict[str, nn.Parameter], dict[str, list[int]]]:
    """All that a configuration changes: layers and parameters, what is trained in full, tokens by embedding."""
    places: list[Place] = []
    replaced: dict[str, nn.Parameter] = {}
    tokens: dict[str, list[int]] = {}
    problems, hint = [], None
    try:
        places = plan_places(model, config)
    except VeneerError as error:
        problems, hint = error.problems, error.hint
    paths = [place.path for place in places]
    try:
        replaced = _to_replace(model, config, paths)
    except VeneerError as error:
        problems += error.problems
    try:
        tokens = token_layers(model, config.tokens, paths, replaced)
    except VeneerError as error:
        problems += error.problems
    if problems:
        raise VeneerError(problems, hint=hint)
    return places, replaced, tokens


def _starts(
    model: nn.Module,
    config: LoraConfig,
    places: list[Place],
    original: nn.Module | None,
    data: Iterable[dict[str, Any]] | None,
) -> tuple[list[Place], dict[str, starts.Start]]:
    """The starts that know the weights or the data, by layer (`starts.py`; none for random ones), and the places: EVA has
    its own ranks."""
    if config.init in ("kaiming", "gaussian"):
        return places, {}
    layers = {place.path: require_layer(model, place.path) for place in places}
    starts.require_linear(config.init, layers)
    if config.init != "eva":
        weight = starts.original_weights(model, {p: layer.base_of(None) for p, layer in layers.items()}, original)
        return places, {
            path: starts.of_weights(layers[path], weight(path), r, scaling, config) for path, r, scaling in places
        }
    if data is None:
        raise VeneerError(
            "lora.init: eva needs rows to train on: found no data",
            hint="veneer.attach(model, config, data=batches); veneer train takes the recipe's own rows",
        )
    ranks = {place.path: place.r for place in places}
    most = {path: min(max(1, round(r * config.eva_rho)), *layers[path].sides) for path, r in ranks.items()}
    found = starts.input_directions(model, most, data)
    ranks = starts.spread_ranks(ranks, {path: shares for path, (_, shares) in found.items()})
    return [place._replace(r=ranks[place.path]) for place in places], {
        path: starts.Start(found[path][0][:r].clone(), torch.zeros(layers[path].shapes(r)[1]))
        for path, r in ranks.items()
    }


def _to_replace(model: nn.Module, config: LoraConfig, paths: list[str]) -> dict[str, nn.Parameter]:
    """The base's parameters that an adapter has versions of: biases, and modules trained in full.

    Raises:
        VeneerError: a module is not there, has no parameters, or is adapted too.
    """
    found: dict[str, nn.Parameter] = {}
    problems = []
    for suffix in config.modules_to_save:
        matches = [name for name, _ in model.named_modules() if name.endswith(suffix)]  # PEFT's rule
        inside = {
            plain_name(model, f"{name}.{key}"): parameter
            for name in matches
            for key, parameter in model.get_submodule(name).named_parameters()
            if not is_factor(key)
        }
        if not matches:
            kinds = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
            problems.append(f"lora.modules_to_save: {suffix!r} matches no module; {nearest(suffix, kinds)}")
        elif quantized := next((n for n, m in _modules(model, matches) if is_quantized(m)), None):
            problems.append(
                f"lora.modules_to_save: {suffix!r}: the quantised weight of {plain_name(model, quantized)} cannot be trained in full; adapt it "
                "(lora.targets), or load the model without quantize"
            )
        elif not inside:
            problems.append(f"lora.modules_to_save: {suffix!r} has no weights that can be trained")
        both = [path for path in paths if any(path == name or path.startswith(f"{name}.") for name in matches)]
        if both:
            problems.append(f"lora.modules_to_save: {suffix!r} is also in lora.targets ({both[0]})")
        found |= inside
    if problems:
        raise VeneerError(problems)
    for name, parameter in model.named_parameters():
        plain = plain_name(model, name)
        if plain.rsplit(".", 1)[-1] != "bias" or is_factor(name):
            continue
        if config.bias == "all" or (config.bias == "lora_only" and plain.rpartition(".")[0] in paths):
            found[plain] = parameter
    first = {id(parameter): path for path, parameter in reversed(found.items())}  # a tied one is one, by its first name
    found = {path: parameter for path, parameter in found.items() if first[id(parameter)] == path}
    if config.bias != "none" and not any(path.endswith("bias") for path in found):
        where = "this model has none" if config.bias == "all" else "no adapted layer has one"
        warnings.warn(f"lora.bias {config.bias}: {where}, so no bias is trained", stacklevel=4)
    return found


def _modules(model: nn.Module, paths: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules at `paths` and all in them, by name."""
    for path in paths:
        yield from model.get_submodule(path).named_modules(prefix=path)


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that are of no adapter."""
    own = {
        id(p)
        for layer in lora_layers(model).values()
        for name in layer.lora_A
        for p in layer.parameters_of(name).values()
    }
    own |= {id(p) for adapter in adapters(model).values() for p in adapter.replaced.values()}
    own |= {id(p) for rows in token_rows(model).values() for p in rows.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in own]


def freeze_base(model: nn.Module) -> None:
    """No base parameter is trained and no dropout is active in the base, even after `model.train()`."""
    for parameter in base_parameters(model):
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)


def device_problem(device: Any) -> str | None:
    """Why an adapter cannot wait there; None: it can."""
    try:
        found = torch.device(device)
        there = found.type == "cpu" or (found.type == "cuda" and (found.index or 0) < torch.cuda.device_count())
    except (RuntimeError, TypeError):
        there = False
    return None if there else f"device: found {device!r}, expected cpu, or a GPU of this machine as cuda or cuda:0"


def list_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters on this model, in the order they were put there; `active_adapter` is in use."""
    return list(adapters(model))


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on this model by name (a live dict kept on the model)."""
    if "veneer_adapters" not in model.__dict__:
        model.__dict__["veneer_adapters"] = {}
    return model.__dict__["veneer_adapters"]  # type: ignore[no-any-return]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by the name their base layer has in the plain model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapted(model: nn.Module, path: str, wrapped: LoraLayer | None = None) -> LoraLayer:
    """The adapted layer at `path`; a plain layer there is wrapped first. wrapped: what `layer_at` gave for it."""
    wrapped = layer_at(model, path) if wrapped is None else wrapped
    assert wrapped is not None, path
    parent, _, child = path.rpartition(".")
    owner: Any = model.get_submodule(parent)
    if isinstance(wrapped, LoraParameter):
        if not isinstance(owner, LoraExperts):
            above, _, key = parent.rpartition(".")
            owner = LoraExperts(owner).train(owner.training)
            setattr(model.get_submodule(above), key, owner)
        return owner.part(child)
    if model.get_submodule(path) is not wrapped:
        wrapped.train(model.get_submodule(path).training)
        setattr(owner, child, wrapped)
    return wrapped


def unwrap(model: nn.Module, path: str, layer: LoraLayer) -> None:
    """Put the plain layer or parameter back where an adapted one is."""
    parent, _, child = path.rpartition(".")
    owner: Any = model.get_submodule(parent)
    if not isinstance(layer, LoraParameter):
        setattr(owner, child, layer.base_layer)
        return
    del owner._modules[child]
    if not owner.parts():
        above, _, key = parent.rpartition(".")
        setattr(model.get_submodule(above), key, owner.base_layer)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter the active and trainable one; None: the bare base, exactly. What `hot_merge` did is undone first.

    Raises:
        VeneerError: there is no adapter of that name; lists those there are.
    """
    require_adapter(model, name)
    unmerge(model)
    layers = lora_layers(model)
    if any(layer.bases for layer in layers.values()):
        _replace(model, {})  # first: what is replaced in a base that is not in place would not be found again
    for layer in layers.values():
        layer.use(name)
        for factors in layer.factors():
            for key, parameter in factors.items():
                parameter.requires_grad_(key == name)
                if key == name:
                    move(parameter, layer.weight.device)
    set_token_rows(model, name)
    _replace(model, {} if name is None else adapters(model)[name].replaced)
    for key, adapter in adapters(model).items():
        if key != name and adapter.device is not None:
            for parameter in adapter_parameters(model, key).values():
                move(parameter, adapter.device)
    model.__dict__["veneer_active"] = name


def unmerge(model: nn.Module) -> None:
    """Put back the weights that `hot_merge` stands for, bit for bit: they were kept, nothing is subtracted. The adapter is
    active as before, and computed beside the weights again. Nothing happens where nothing is merged."""
    merged: dict[str, Any] = model.__dict__.pop("veneer_merged", {})
    for path, layer in lora_layers(model).items():
        if path not in merged:
            continue
        now = layer.weight.device
        if isinstance(merged[path], nn.Module):
            merged[path].to(now)
        else:
            for kept in merged[path] if isinstance(merged[path], tuple) else (merged[path],):
                if kept is not None:
                    move(kept, now)  # the model may have been moved meanwhile
        if isinstance(layer, LoraParameter):
            layer.owner._parameters[layer.key] = merged[path]
        elif isinstance(merged[path], nn.Module):
            layer.base_layer = merged[path].train(layer.base_layer.training)
        else:
            layer.base_layer.weight, layer.base_layer.bias = merged[path]
        layer.active = active_adapter(model)


def _replace(model: nn.Module, wanted: dict[str, nn.Parameter]) -> None:
    """Put an adapter's versions in the place of the base's parameters, wherever those are used (ties are kept), and the
    base's own back where none is wanted."""
    base: dict[str, nn.Parameter] = model.__dict__.setdefault("veneer_base", {})  # of what is replaced now
    for path in [path for path in base if path not in wanted]:
        _put(model, getattr(*_owner(model, path)), base.pop(path))
    for path, parameter in wanted.items():
        there = getattr(*_owner(model, path))
        if there is parameter:
            continue
        base.setdefault(path, there)
        move(parameter, there.device)
        _put(model, there, parameter.requires_grad_(True))


def _put(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = new


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, key = path.rpartition(".")
    module = model.get_submodule(parent)
    return (module.base_layer if isinstance(module, LoraLayer | LoraExperts) else module), key


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter, or None."""
    return model.__dict__.get("veneer_active")


def require_adapter(model: nn.Module, name: str | None) -> None:
    if name is not None and (not isinstance(name, str) or name not in adapters(model)):
        there = ", ".join(adapters(model)) or "none"
        raise VeneerError(f"adapter {name!r} is not on this model", hint=f"adapters there are: {there}")


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off; layers left without any become the plain layers they were."""
    require_adapter(model, name)
    if active_adapter(model) == name:
        set_adapter(model, None)
    for path, layer in lora_layers(model).items():
        if name in layer.lora_A:
            layer.remove(name)
        if not layer.lora_A:
            unwrap(model, path, layer)
    for rows in token_rows(model).values():
        rows.remove(name)
    del adapters(model)[name]


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """All that an adapter trains, by name: `<layer>.lora_A.weight` (r, in), `<layer>.lora_B.weight` (out, r) and what
    else its layers have, and its versions of the base's parameters by their names in the plain model."""
    found = {
        f"{path}.{key}": parameter
        for path, layer in lora_layers(model).items()
        if name in layer.lora_A
        for key, parameter in layer.parameters_of(name).items()
    }
    found |= {
        f"{path}.{TokenRows.KEY}": rows.rows[name] for path, rows in token_rows(model).items() if name in rows.rows
    }
    return found | adapters(model)[name].replaced if name in adapters(model) else found


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable and total parameters; a 4-bit weight counts as the weights it stands for, a tied one once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    total += sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    return ParameterCount(sum(p.numel() for p in model.parameters() if p.requires_grad), total)
