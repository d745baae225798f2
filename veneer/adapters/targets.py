"""Which layers and parameters of a model a user's words mean, and at which rank each is adapted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.adapters.experts import LoraExperts, LoraParameter
from veneer.adapters.lora import CONVOLUTIONS, LoraConv, LoraEmbedding, LoraLayer, LoraLinear, lora_layer
from veneer.adapters.patterns import by_pattern, is_suffix, matching
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

_UNCALLED = "nn.MultiheadAttention reads the weights of its own layers and never calls them"
_FOREIGN = "found a weight that another library has quantised, expected a dense one or one that Veneer has"
_FOREIGN_HINT = "read the model with veneer.load(model, quantize='nf4'), or without its quantization_config"


class Place(NamedTuple):
    """A layer to adapt, by its name in the plain model."""

    path: str
    r: int
    scaling: float


def plan_places(model: nn.Module, config: LoraConfig) -> list[Place]:
    """The layers that a configuration adapts, each with its rank and scaling, in model order; parameters after layers.

    Raises:
        VeneerError: a name matches nothing, a rank is larger than a layer allows; all at once.
    """
    resolved = resolve_all(model, config)
    problems, found = _unknown_words(model, config, resolved), []
    paths = excluded(resolved, config.exclude) if config.exclude else resolved
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
        r, scaling = own_rank or config.r, None
        if config.depth is not None and block is not None and last is not None:
            at_depth = depth_rank(config.depth, block, last)
            if at_depth == 0:
                continue
            r, scaling = own_rank or at_depth, config.scaling  # whichever rank it is
        if own_alpha or scaling is None:
            scaling = config.scaling_at(r, own_alpha or config.alpha)
        found.append(Place(path, r, scaling))
    modules = dict(model.named_modules())
    if foreign := [place.path for place in found if is_foreign(modules.get(place.path))]:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise VeneerError([*problems, f"lora.targets: {foreign[0]}{more}: {_FOREIGN}"], hint=_FOREIGN_HINT)
    layers = {place.path: require_layer(model, place.path) for place in found}
    too_large = {  # layers of one name and shape, as there is one in each block, are one problem
        (path.rsplit(".", 1)[-1], r, *layers[path].sides): None for path, r, _ in found if r > min(layers[path].sides)
    }
    no_bias = sorted({path.rsplit(".", 1)[-1] for path, layer in layers.items() if isinstance(layer, LoraEmbedding)})
    if config.lora_bias and no_bias:
        problems.append(f"lora.lora_bias: {', '.join(no_bias)} are embeddings, whose adapters have no bias")
    problems += [
        f"lora.r: found {r}, expected at most {min(rows, width)} for {kind} ({rows} x {width})"
        for kind, r, rows, width in too_large
    ]
    for path, r, _ in found:
        if isinstance(layer := layers[path], LoraConv):
            problems += _convolution_problems(path, layer, r, config)
    if not found and not problems:
        problems.append("lora.exclude, lora.layers: no layer of lora.targets is left")
    if problems:
        raise VeneerError(
            problems,
            hint="choose a smaller rank, or leave those layers out of lora.targets" if too_large else None,
        )
    return found


def _convolution_problems(path: str, layer: LoraConv, r: int, config: LoraConfig) -> list[str]:
    """What of a configuration a convolution's groups or border do not allow (`LoraConv`)."""
    groups, border = layer.base_layer.groups, layer.base_layer.padding_mode
    problems = []
    if config.dora and (groups > 1 or border != "zeros"):
        problems.append(
            f"lora.dora: {path} is a convolution with {groups} groups and {border} beyond its border, whose rows "
            "have no lengths with the adapter in them: leave it out of lora.targets"
        )
    if config.adalora is not None and groups > 1:
        problems.append(
            f"lora.adalora: {path} is a convolution with {groups} groups, to which ranks belong: they cannot go one by one; "
            "leave it out of lora.targets"
        )
    elif r % groups:
        problems.append(f"lora.r: found {r}, expected a multiple of the convolution's {groups} groups for {path}")
    return problems


def _unknown_words(model: nn.Module, config: LoraConfig, resolved: list[str]) -> list[str]:
    """Problems of the keys of patterns and of the exclusions that are for nothing in this model that could be adapted.

    resolved: what `targets` and `parameters` mean.
    """
    everything = [name for name, _ in _adaptable(model)] + list(_stacked(model))
    kinds = sorted({name.rsplit(".", 1)[-1] for name in everything})
    problems = []
    for key, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for word in pattern:
            if not word:
                problems.append(f"lora.{key}: expected name suffixes or regexes as keys; found an empty one")
            elif not any(any(by_pattern({word: 1}, names, 0, f"lora.{key}")) for names in (resolved, everything)):
                problems.append(f"lora.{key}: {word!r} matches no layer; {nearest(word, kinds)}")
    # What cannot be adapted, as a router, may be excluded all the same.
    weighted = everything + [plain_name(model, n) for n, m in model.named_modules() if "weight" in m._parameters]
    if isinstance(config.exclude, str):
        words = [] if config.exclude and any(matching(config.exclude, weighted, "lora.exclude")) else [config.exclude]
    else:
        words = [word for word in config.exclude if not any(is_suffix(name, word) for name in weighted)]
    for word in words:
        if not word:
            problems.append("lora.exclude: expected name suffixes; found an empty one")
            continue
        near = _whole_name(word, everything) if isinstance(config.exclude, str) else ""
        problems.append(f"lora.exclude: {word!r} matches no layer{near or '; ' + nearest(word, kinds)}")
    return problems


def _whole_name(word: str, names: list[str]) -> str:
    """What to say of a string that fits the ends of names, where it is a regex for all of one."""
    if not any(is_suffix(name, word) for name in names):
        return ""
    return f" (a string is a regex for a layer's whole name: write [{word}] for names that end so)"


def is_foreign(module: nn.Module | None) -> bool:
    """Whether another library keeps this linear's weight quantised, as bitsandbytes does under transformers."""
    if not isinstance(module, nn.Linear):
        return False
    weight = module.weight
    return (
        weight.shape != (module.out_features, module.in_features)
        or not weight.is_floating_point()
        or weight.element_size() < 2
    )


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) or is_foreign(module)


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
        layers = resolve_targets(model, config.targets, _no_parameters(config))
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


def require_layer(model: nn.Module, path: str) -> LoraLayer:
    layer = layer_at(model, path)
    assert layer is not None
    return layer


def layer_at(model: nn.Module, path: str) -> LoraLayer | None:
    """The adapted layer of this name in the plain model; where there is none yet, one of its kind that is not put there.

    None: nothing of this name can be adapted.

    Raises:
        VeneerError: another library has quantised it.
    """
    parent, _, key = path.rpartition(".")
    try:
        module: Any = model.get_submodule(path)
        if is_foreign(module):
            raise VeneerError(f"{path}: {_FOREIGN}", hint=_FOREIGN_HINT)
        if isinstance(model.get_submodule(parent), nn.MultiheadAttention):
            return None  # never called: its weight is read
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


def plain_name(model: nn.Module, name: str) -> str:
    """The name a parameter has in the plain model."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def is_factor(name: str) -> bool:
    return any(
        part in ("lora_A", "lora_B", "lora_E", "magnitude", "lora_bias", "token_rows") for part in name.split(".")
    )


def _stacked(model: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters that are no layer's weight, by their names in the plain model: matrices, one upon the other."""
    modules = dict(model.named_modules())
    return {
        plain_name(model, name): parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "." in name and not is_factor(name)
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
    others = {plain_name(model, n): p for n, p in model.named_parameters() if not is_factor(n)}
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


def left_out_of(model: nn.Module, config: LoraConfig, paths: list[str]) -> list[str]:
    """What to warn of: what words of a configuration mean and no adapter reaches. paths: what is adapted."""
    found = [_parameters_left_out(model, config, paths)]
    resolved = resolve_all(model, config)
    if config.layers is not None and config.targets not in TARGET_PRESETS:
        outside = [p for p in excluded(resolved, config.exclude) if block_number(p) is None]
        if outside:
            found.append(
                f"lora.targets: {', '.join(outside)} not adapted: in none of the numbered blocks that lora.layers chooses"
            )
    for key, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if idle := [word for word in pattern if not any(by_pattern({word: 1}, resolved, 0, f"lora.{key}"))]:
            found.append(f"lora.{key}: {', '.join(idle)}: for no layer of lora.targets, so without effect")
    if other := _others_left_out(model, config, paths):
        found.append(other)
    if uncalled := _meant(_uncalled(model), config.targets):
        found.append(f"lora.targets: {', '.join(uncalled)} not adapted: {_UNCALLED}")
    return [words for words in found if words is not None]


def _meant(names: list[str], targets: str | list[str]) -> list[str]:
    """Those of `names` that a list of suffixes or a regex fits; a preset fits none."""
    if not isinstance(targets, str):
        return [name for name in names if any(is_suffix(name, suffix) for suffix in targets)]
    if not names or targets in TARGET_PRESETS:
        return []
    return [name for name, hit in zip(names, matching(targets, names, "lora.targets"), strict=True) if hit]


def _others_left_out(model: nn.Module, config: LoraConfig, paths: list[str]) -> str | None:
    """Modules with a matrix of their own that the words fit, and no adapter can be put on: another kind of layer."""
    plain = {
        name: module
        for name, module in model.named_modules()
        if name
        and name not in paths
        and lora_layer(module) is None
        and not isinstance(module, LoraLayer | nn.MultiheadAttention)
        if any(parameter is not None and parameter.dim() == 2 for parameter in module._parameters.values())
    }
    names = [name for name in _meant(list(plain), config.targets) if name in set(excluded(list(plain), config.exclude))]
    if not names:
        return None
    kinds = sorted({type(plain[name]).__name__ for name in names})
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"lora.targets: {', '.join(names[:3])}{more} not adapted: no adapter for {', '.join(kinds)}"


def _parameters_left_out(model: nn.Module, config: LoraConfig, paths: list[str]) -> str | None:
    stacked = {name: p for name, p in _stacked(model).items() if name not in paths and len(p) > 1}
    if config.targets in ("mlp", "all-linear"):
        experts = expert_parameters(model)
        if config.parameters or _no_parameters(config):  # else what is missing was left out by layers, exclude or depth
            stacked = {name: p for name, p in stacked.items() if name in experts or config.targets == "all-linear"}
        else:
            stacked = {name: p for name, p in stacked.items() if name not in experts and config.targets == "all-linear"}
        why = f"with {' and '.join(_no_parameters(config))}, " if _no_parameters(config) else ""
        words = f"{config.targets} {why}does not reach"
    else:
        stacked = {name: stacked[name] for name in _meant(list(stacked), config.targets)}
        words = f"{config.targets} reaches layers only, not"
    if not stacked:
        return None
    where = list(dict.fromkeys(name.rpartition(".")[0] for name in stacked))
    more = f" and {len(where) - 3} more" if len(where) > 3 else ""
    return (
        f"lora.targets: {words} these parameters, as a mixture's experts are: {sum(p.numel() for p in stacked.values()):,} "
        f"parameters stay frozen in {', '.join(where[:3])}{more}"
    )


def resolve_targets(model: nn.Module, targets: str | list[str], without: Sequence[str] = ()) -> list[str]:
    """The full names of the layers meant by `targets`, in model order.

    A preset (attention, qv, mlp, all-linear: linears, never the output head nor what routes to experts), a list of name suffixes, or a regex that
    must match a layer's whole name; the last two mean what PEFT's `target_modules` means, and also reach convolutions and
    embeddings.

    Args:
        without: settings for which a mixture's experts cannot be adapted, for the error.

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
        problems = []
        for part in missing:
            near = _whole_name(part, list(layers)) if isinstance(targets, str) else ""
            near = "" if part in TARGET_PRESETS else near or f"; {nearest(part, kinds)}"
            problems.append(f"lora.targets: {part!r} matches no layer that can be adapted{near}")
        if experts := expert_parameters(model):
            problems[-1] += f" (the experts of this mixture, as {experts[0]}, are parameters, not linears: " + (
                f"with {' and '.join(without)} they cannot be adapted)" if without else "name them in lora.parameters)"
            )
        if _meant(_uncalled(model), targets):
            problems[-1] += f" ({_UNCALLED})"
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


def _uncalled(model: nn.Module) -> list[str]:
    """The linears of torch's attention, which it does not call: it reads their weights."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for key, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]


def _adaptable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside = set(_uncalled(model))
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
