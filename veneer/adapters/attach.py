"""Putting adapters on a transformers model, in place: choosing layers, freezing, switching, counting."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.adapters import adalora, starts
from veneer.adapters.experts import LoraExperts, LoraParameter
from veneer.adapters.lora import CONVOLUTIONS, LoraEmbedding, LoraLayer, LoraLinear, check_adapter_name, lora_layer
from veneer.adapters.patterns import by_pattern, is_suffix, matching
from veneer.adapters.tokens import TokenRows, move, set_token_rows, token_layers, token_rows
from veneer.config import TARGET_PRESETS, LoraConfig, nearest
from veneer.errors import VeneerError
from veneer.quant.linear import QuantizedLinear

LINEAR = (nn.Linear, QuantizedLinear, Conv1D, LoraLinear)
_PRESET_PARENT = {
    "attention": re.compile(r"(^|_)(attn|attention)", re.I),
    "mlp": re.compile(r"mlp|feed_?forward|ffn", re.I),
}
_ROUTER = re.compile(r"router|(.*_)?gate")
_OF_EXPERTS = re.compile(r"expert|moe|mlp|feed_?forward|ffn", re.I)
_LAYER_INDEX = re.compile(r".*?\.(\d+)\.")
# The query and the value projection by the names architectures give them, and layers that are both and the key in one.
_QUERY_VALUE = re.compile(r"(to_|w)?(q|query|v|value)(_proj|_lin)?", re.I)
_FUSED_QKV = re.compile(r"qkv|query_key_value|c_attn", re.I)


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


class Place(NamedTuple):
    """A layer to adapt, by its name in the plain model."""

    path: str
    r: int
    scaling: float


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
) -> nn.Module:
    """Freeze `model` and put a new, active, trainable adapter on it, in place. The model's output does not change.

    With `init` pissa it changes by rounding, or on a quantised base, as with loftq, towards that of the model before it
    was quantised. Warns when words of `targets` also fit parameters, as a mixture's experts are, that are left out.

    Args:
        seed: of A's random start; left out, torch's global generator is used.
        original: for pissa and loftq on a quantised base: the model before that; left out, what `veneer.load` read is
            read again.
        data: for eva: the model's inputs batch by batch, as `model(**batch)` takes them; only rows to train on.

    Raises:
        VeneerError: no layer matches, a rank is larger than a layer allows, or the name is taken; all at once. Or `init`
            cannot be had: layers that are not linear, no original weights, no data.
    """
    config = config or LoraConfig()
    check_adapter_name(name)
    if name in adapters(model):
        raise VeneerError(f"adapter {name!r} is already on this model", hint="choose another name, or remove it first")
    places, replaced, tokens = _plan(model, config)
    left_out = _left_out(model, config, [place.path for place in places])
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    places, found = _starts(model, config, places, original, data)
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
    own = model.__dict__.get("veneer_base", {})  # where another adapter's versions are in place now
    copies = {path: nn.Parameter(own.get(path, base).detach().clone()) for path, base in replaced.items()}
    adapters(model)[name] = adapter = Adapter(config, replaced=copies)
    if config.adalora is not None:
        layers = {place.path: adapted(model, place.path) for place in places}
        adapter.allocator = adalora.Allocator(layers, name, config.adalora, sum(place.r for place in places))
    set_adapter(model, name)
    from veneer.adapters.reference import answer_save_pretrained  # here: it imports this module

    answer_save_pretrained(model)
    if left_out:
        warnings.warn(left_out, stacklevel=2)
    return model


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


def plan_places(model: nn.Module, config: LoraConfig) -> list[Place]:
    """The layers that a configuration adapts, each with its rank and scaling, in model order; parameters after layers.

    Raises:
        VeneerError: a name matches nothing, a rank is larger than a layer allows; all at once.
    """
    paths = excluded(resolve_all(model, config), config.exclude)
    problems, found = [], []
    if config.layers is not None or config.depth is not None:
        blocks = [block_number(path) for path in paths]
        last = max((n for n in blocks if n is not None), default=None)
        if last is None:
            problems.append("lora.layers, lora.depth: none of the targets is in a numbered block")
        elif unknown := sorted(set(config.layers or []) - {n for n in blocks if n is not None}):
            problems.append(f"lora.layers: found {unknown}, expected numbers of blocks with targets, 0 to {last}")
    else:
        last = None
    ranks = by_pattern(config.rank_pattern, paths, 0, "lora.rank_pattern")  # 0: no key is for it
    alphas = by_pattern(config.alpha_pattern, paths, 0.0, "lora.alpha_pattern")
    for path, own_rank, own_alpha in zip(paths, ranks, alphas, strict=True):
        block = block_number(path)
        if config.layers is not None and block not in config.layers:
            continue
        r, alpha = config.r, config.alpha
        if config.depth is not None and block is not None and last is not None:
            r, alpha = depth_rank(config.depth, block, last), config.scaling
            alpha *= math.sqrt(r) if config.rslora else r
            if r == 0:
                continue
        r = own_rank or r
        found.append(Place(path, r, config.scaling_at(r, own_alpha or alpha)))
    too_large = {  # layers of one name and shape, as there is one in each block, are one problem
        (path.rsplit(".", 1)[-1], r, *_sides(model, path)): None for path, r, _ in found if r > min(_sides(model, path))
    }
    no_bias = sorted({p.rsplit(".", 1)[-1] for p, _, _ in found if isinstance(layer_at(model, p), LoraEmbedding)})
    if config.lora_bias and no_bias:
        problems.append(f"lora.lora_bias: {', '.join(no_bias)} are embeddings, whose adapters have no bias")
    problems += [
        f"lora.r: found {r}, expected at most {min(rows, width)} for {kind} ({rows} x {width})"
        for kind, r, rows, width in too_large
    ]
    if not found and not problems:
        problems.append("lora.exclude, lora.layers: no layer of lora.targets is left")
    if problems:
        raise VeneerError(
            problems,
            hint="choose a smaller rank, or leave those layers out of lora.targets" if too_large else None,
        )
    return found


def resolve_all(model: nn.Module, config: LoraConfig) -> list[str]:
    """The full names of the layers and parameters that `targets` and `parameters` mean together.

    Raises:
        VeneerError: a part matches nothing, or not what it should; all at once.
    """
    layers: list[str] = []
    found: list[str] = []
    problems, hint = [], None
    if config.parameters:
        try:
            found = resolve_parameters(model, config.parameters)
        except VeneerError as error:
            problems += error.problems
    elif config.targets in ("mlp", "all-linear") and not _no_parameters(config):
        found = expert_parameters(model)
    try:
        layers = resolve_targets(model, config.targets)
    except VeneerError as error:
        if not found or config.targets != "mlp":  # every MLP of a model can be a mixture
            problems, hint = problems + error.problems, error.hint
    if problems:
        raise VeneerError(problems, hint=hint)
    return layers + found


def _no_parameters(config: LoraConfig) -> list[str]:
    """The settings with which no adapter of a parameter goes."""
    found = [key for key in ("dropout", "dora", "lora_bias", "adalora") if getattr(config, key)]
    return found + ([] if config.init in ("kaiming", "gaussian") else [f"init {config.init}"])


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
    layers = {place.path: _layer(model, place.path) for place in places}
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
    active = active_adapter(model)
    set_adapter(model, None)
    try:
        found = starts.input_directions(model, most, data)
    finally:
        set_adapter(model, active)
    ranks = starts.spread_ranks(ranks, {path: shares for path, (_, shares) in found.items()})
    return [place._replace(r=ranks[place.path]) for place in places], {
        path: starts.Start(found[path][0][:r].clone(), torch.zeros(layers[path].shapes(r)[1]))
        for path, r in ranks.items()
    }


def _layer(model: nn.Module, path: str) -> LoraLayer:
    layer = layer_at(model, path)
    assert layer is not None
    return layer


def _sides(model: nn.Module, path: str) -> tuple[int, int]:
    return _layer(model, path).sides


def layer_at(model: nn.Module, path: str) -> LoraLayer | None:
    """The adapted layer of this name in the plain model; where there is none yet, one of its kind that is not put there.

    None: nothing of this name can be adapted.
    """
    parent, _, key = path.rpartition(".")
    try:
        module: Any = model.get_submodule(path)
        return module if isinstance(module, LoraLayer) else lora_layer(module)
    except AttributeError:  # a parameter, or nothing
        if path not in _stacked(model):
            return None
    owner: Any = model.get_submodule(parent)
    return LoraParameter(owner.base_layer if isinstance(owner, LoraExperts) else owner, key)


def depth_rank(anchors: list[int], block: int, last: int) -> int:
    """The rank at block `block` of 0..last: `anchors` stand evenly spaced over the depth, between them it is linear."""
    if len(anchors) == 1 or last == 0:
        return anchors[0]
    at = block / last * (len(anchors) - 1)
    low = min(int(at), len(anchors) - 2)
    return round(anchors[low] + (at - low) * (anchors[low + 1] - anchors[low]))


def block_number(path: str) -> int | None:
    """The first number in a layer's name, which is that of its block; None: it is in none."""
    match = _LAYER_INDEX.match(path)
    return int(match[1]) if match else None


def excluded(paths: list[str], exclude: str | list[str] | None) -> list[str]:
    """`paths` without those that a regex matches whole, or whose ends are in a list."""
    if isinstance(exclude, str):
        return [path for path, hit in zip(paths, matching(exclude, paths, "lora.exclude"), strict=True) if not hit]
    return [path for path in paths if not any(is_suffix(path, suffix) for suffix in exclude or [])]


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
            if not _is_factor(key)
        }
        if not matches:
            kinds = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
            problems.append(f"lora.modules_to_save: {suffix!r} matches no module; {nearest(suffix, kinds)}")
        elif not inside:
            problems.append(f"lora.modules_to_save: {suffix!r} has no weights that can be trained (4-bit ones cannot)")
        both = [path for path in paths if any(path == name or path.startswith(f"{name}.") for name in matches)]
        if both:
            problems.append(f"lora.modules_to_save: {suffix!r} is also in lora.targets ({both[0]})")
        found |= inside
    if problems:
        raise VeneerError(problems)
    for name, parameter in model.named_parameters():
        plain = plain_name(model, name)
        if plain.rsplit(".", 1)[-1] != "bias" or _is_factor(name):
            continue
        if config.bias == "all" or (config.bias == "lora_only" and plain.rpartition(".")[0] in paths):
            found[plain] = parameter
    return found


def plain_name(model: nn.Module, name: str) -> str:
    """The name a parameter has in the plain model."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _is_factor(name: str) -> bool:
    return any(
        part in ("lora_A", "lora_B", "lora_E", "magnitude", "lora_bias", "token_rows") for part in name.split(".")
    )


def _stacked(model: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters that are no layer's weight, by their names in the plain model: matrices, one upon the other."""
    modules = dict(model.named_modules())
    return {
        plain_name(model, name): parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "." in name and not _is_factor(name)
        if not isinstance(modules[name.rpartition(".")[0]], nn.modules.conv._ConvNd)
    }


def expert_parameters(model: nn.Module) -> list[str]:
    """Where a mixture keeps its experts, which the presets mlp and all-linear reach: 3-D parameters of modules so called.

    Not biases, and not routers, which have two dimensions.
    """
    return [
        name
        for name, parameter in _stacked(model).items()
        if min(parameter.shape) > 1 and parameter.is_floating_point() and "bias" not in name.rsplit(".", 1)[-1]
        if _OF_EXPERTS.search(name.rpartition(".")[0])
    ]


def resolve_parameters(model: nn.Module, names: list[str]) -> list[str]:
    """The full names of the 3-D parameters meant by a list of name suffixes, in model order; PEFT's `target_parameters`.

    Raises:
        VeneerError: a name matches nothing, or a parameter of other dimensions, or a layer's weight; all at once.
    """
    stacked = _stacked(model)
    others = {plain_name(model, n): p for n, p in model.named_parameters() if not _is_factor(n)}
    problems = []
    for suffix in names:
        if any(is_suffix(name, suffix) for name in stacked):
            continue
        wrong = next((name for name in others if is_suffix(name, suffix)), None)
        if wrong is None:
            kinds = sorted({".".join(name.rsplit(".", 2)[-2:]) for name in stacked})
            there = nearest(suffix, kinds) if kinds else "this model has no 3-D parameters, as a mixture's experts are"
            problems.append(f"lora.parameters: {suffix!r} matches no parameter; {there}")
        else:
            problems.append(
                f"lora.parameters: {suffix!r} is {wrong} {tuple(others[wrong].shape)}, expected a parameter (experts, rows, "
                "columns) that is no layer's weight; layers are named in lora.targets"
            )
    if problems:
        raise VeneerError(problems)
    return [name for name in stacked if any(is_suffix(name, suffix) for suffix in names)]


def _left_out(model: nn.Module, config: LoraConfig, paths: list[str]) -> str | None:
    """What to warn of: parameters that the words of `targets` fit, or a preset means, and that no adapter reaches."""
    stacked = {name: p for name, p in _stacked(model).items() if name not in paths and len(p) > 1}
    if config.targets in ("mlp", "all-linear"):
        experts = expert_parameters(model)
        if config.parameters or _no_parameters(config):  # else what is missing was left out by layers, exclude or depth
            stacked = {name: p for name, p in stacked.items() if name in experts or config.targets == "all-linear"}
        else:
            stacked = {name: p for name, p in stacked.items() if name not in experts and config.targets == "all-linear"}
        why = f"with {' and '.join(_no_parameters(config))}, " if _no_parameters(config) else ""
        words = f"{config.targets} {why}does not reach"
    elif isinstance(config.targets, list):
        stacked = {n: p for n, p in stacked.items() if any(is_suffix(n, suffix) for suffix in config.targets)}
        words = f"{config.targets} reaches layers only, not"
    else:
        return None
    if not stacked:
        return None
    where = list(dict.fromkeys(name.rpartition(".")[0] for name in stacked))
    more = f" and {len(where) - 3} more" if len(where) > 3 else ""
    return (
        f"lora.targets: {words} these parameters, as a mixture's experts are: {sum(p.numel() for p in stacked.values()):,} "
        f"parameters stay frozen in {', '.join(where[:3])}{more}"
    )


def resolve_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    """The full names of the layers meant by `targets`, in model order.

    A preset (attention, qv, mlp, all-linear: linears, never the output head nor what routes to experts), a list of name suffixes, or a regex that
    must match a layer's whole name; the last two mean what PEFT's `target_modules` means, and also reach convolutions and
    embeddings.

    Raises:
        VeneerError: a part matches nothing; lists the names that exist.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = dict(_adaptable(model))
    mixtures = {name.rsplit(".", 2)[0] for name in expert_parameters(model)}
    hidden = [
        name
        for name, module in layers.items()
        if isinstance(module, LINEAR) and module is not head
        if not (name.rpartition(".")[0] in mixtures and _ROUTER.fullmatch(name.rpartition(".")[2]))
    ]
    if isinstance(targets, str):
        if targets == "all-linear":
            found = hidden
        elif targets in TARGET_PRESETS:
            parent = _PRESET_PARENT["attention" if targets == "qv" else targets]
            found = [name for name in hidden if any(parent.search(part) for part in name.split(".")[:-1])]
            if targets == "qv":
                found = _query_value(found)
        else:
            found = [
                name for name, hit in zip(layers, matching(targets, list(layers), "lora.targets"), strict=True) if hit
            ]
        missing = [] if found else [targets]
    else:
        found = [name for name in layers if any(is_suffix(name, suffix) for suffix in targets)]
        missing = [suffix for suffix in targets if not any(is_suffix(name, suffix) for name in layers)]
    if missing:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in layers})
        problems = [
            f"lora.targets: {part!r} matches no layer that can be adapted"
            + ("" if part in TARGET_PRESETS else f"; {nearest(part, kinds)}")
            for part in missing
        ]
        if experts := expert_parameters(model):
            problems[-1] += (
                f" (the experts of this mixture, as {experts[0]}, are parameters, not linears: "
                "name them in lora.parameters)"
            )
        raise VeneerError(
            problems, hint=f"layers of this model: {', '.join(kinds)}; presets: {', '.join(TARGET_PRESETS)}"
        )
    return found


def _query_value(attention: list[str]) -> list[str]:
    """Of the linears of attention layers the query and value projections; one linear for q, k and v is refused."""
    found = [name for name in attention if _QUERY_VALUE.fullmatch(name.rsplit(".", 1)[-1])]
    fused = sorted({name.rsplit(".", 1)[-1] for name in attention if _FUSED_QKV.search(name.rsplit(".", 1)[-1])})
    if fused and not found:
        raise VeneerError(
            f"lora.targets: qv: query, key and value are one layer here ({', '.join(fused)}), which has no q and v apart",
            hint=f"adapt all three, as targets: [{', '.join(fused)}] does",
        )
    return found


def freeze_base(model: nn.Module) -> None:
    """No base parameter is trained and no dropout is active in the base, even after `model.train()`."""
    own = {
        id(p)
        for layer in lora_layers(model).values()
        for name in layer.lora_A
        for p in layer.parameters_of(name).values()
    }
    own |= {id(p) for adapter in adapters(model).values() for p in adapter.replaced.values()}
    own |= {id(p) for rows in token_rows(model).values() for p in rows.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoraLayer):
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


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by the name their base layer has in the plain model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapted(model: nn.Module, path: str) -> LoraLayer:
    """The adapted layer at `path`; a plain layer there is wrapped first."""
    wrapped = layer_at(model, path)
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
    """Make one adapter the active and trainable one; None: the bare base, exactly.

    Raises:
        VeneerError: there is no adapter of that name; lists those there are.
    """
    require_adapter(model, name)
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
    if name is not None and name not in adapters(model):
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


def _adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraParameter):
            continue
        if isinstance(module, LoraLayer):
            inside.add(f"{name}.base_layer")
            yield name, module
        elif (
            isinstance(module, (nn.Linear, QuantizedLinear, Conv1D, nn.Embedding, *CONVOLUTIONS)) and name not in inside
        ):
            yield name, module
