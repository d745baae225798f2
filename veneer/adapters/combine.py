"""Several adapters made one, from their folders to a folder; the base model is not needed.

    D_i = scaling_i * B_i A_i,  w_i: weights

    linear            sum w_i D_i, exact, at the smallest rank that holds it
    cat               the same sum with the factors side by side, its rank the sum of theirs
    svd               the same sum at a chosen rank: no adapter of that rank is nearer to it
    ties, dare_linear, dare_ties, magnitude_prune, della      `sparsify`: dense, then brought back to a rank

All of it is about the updates, never about factors: A_1 + A_2 and B_1 + B_2 would add B_1 A_2 and B_2 A_1, which nobody
trained. Adapters with a weight of zero take no part. The result has scaling 1, and does not depend on the order.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from veneer.adapters.algebra import LowRank, nearest_factors, truncated
from veneer.adapters.peft_format import (
    CONFIG_FILE,
    KEY_PREFIX,
    WEIGHTS_FILE,
    AdapterFile,
    Factors,
    raise_problems,
    read_adapter,
)
from veneer.adapters.sparsify import Prune, Rule, Sign, Update, dense_sum
from veneer.adapters.tokens import TokenRows
from veneer.errors import RefusedError, VeneerError
from veneer.ops import all_finite
from veneer.storage import atomic_folder, require_empty_folder, write_json, write_tensors

REPORT_FILE = "combine_report.json"


class Method(NamedTuple):
    """How a combination is made. prune: None for what the factors alone can do; elect: whether signs are elected."""

    prune: Prune | None = None
    elect: bool = False


METHODS: dict[str, Method] = {
    "linear": Method(),
    "cat": Method(),
    "svd": Method(),
    "magnitude_prune": Method("magnitude"),
    "ties": Method("magnitude", elect=True),
    "dare_linear": Method("random"),
    "dare_ties": Method("random", elect=True),
    "della": Method("della", elect=True),
}
DENSITY = 0.5  # of the methods that prune, where nothing is said
DELLA_WINDOW = 0.2
LARGEST_RANK = 1 << 16
ALONE = 1 << 25  # weights of a layer above which no other is in work beside it


class Source(NamedTuple):
    """One adapter to combine."""

    path: Path
    file: AdapterFile
    weight: float
    key: bytes  # its content: the order and the random numbers come from it


def combine(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    density: float | None = None,
    sign: Sign | None = None,
    seed: int | None = None,
    any_base: bool = False,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Combine adapter folders in PEFT's format into a new one, and say how near it is to what the method means.

    Args:
        method: one of METHODS.
        weights: one each, negative too (the task is taken away); left out: 1/n, with an election 1.
        rank: of the result; left out: what `linear` and `cat` need, else the largest of the adapters'.
        max_error: instead or besides: the smallest rank whose error, of the sum's norm in each layer, is at most this.
        density: of the methods that prune, the share of each update that is kept (0 to 1).
        sign: of the methods that elect: "total" (left out), the larger sum, or "frequency", the more adapters.
        seed: of the methods that keep at random; left out: 0.
        any_base: adapters that name different base models are combined all the same.
        replace: what lies in `out` is replaced.
        progress: called with how many layers are done, of how many.

    Returns:
        What is in `combine_report.json` beside the adapter: method, weights, layers, parameters, ranks, error (of the
        whole update's norm, through the rank alone), largest_error of a layer, and notes.

    Raises:
        VeneerError: all that is wrong with the settings and the adapters, at once.
        RefusedError: nothing is wrong, but a part of an adapter has no exact place in the result.
    """
    problems = _wrong_settings(sources, method, weights, rank, max_error, density, sign, seed)
    sound = not problems
    files: list[AdapterFile | None] = []
    refused: list[str] = []
    for path in sources:
        try:
            files.append(read_adapter(path))
        except VeneerError as error:
            files.append(None)
            (refused if isinstance(error, RefusedError) else problems).extend(error.problems)
    if not sound:
        raise VeneerError(problems + refused)
    elect = METHODS[method].elect
    given = list(weights) if weights is not None else [1.0 if elect else 1 / len(files)] * len(files)
    everything = [
        Source(Path(path), file, float(weight), _content(file))
        for path, file, weight in zip(sources, files, given, strict=True)
        if file is not None
    ]
    live = sorted((one for one in everything if one.weight != 0), key=lambda one: (one.key, one.weight))
    more, inexact = _cannot(everything, live, method, any_base) if everything else ([], [])
    raise_problems(problems + more, refused + inexact, None)
    if not replace:
        require_empty_folder(out)
    rule = None
    if (prune := METHODS[method].prune) is not None:
        rule = Rule(prune, (sign or "total") if elect else None, DENSITY if density is None else density)
        if prune == "della":  # as wide as the density leaves room for
            rule = rule._replace(window=min(DELLA_WINDOW, 2 * rule.density, 2 * (1 - rule.density)))
    seed = seed or 0
    layers = _layers(live, method, rule, rank, max_error, seed, progress)
    report = _report(everything, live, method, rule, seed, layers, rank)
    _write(Path(out), live, layers, report, replace)
    return report


def _wrong_settings(
    sources: Sequence[Any], method: Any, weights: Any, rank: Any, max_error: Any, density: Any, sign: Any, seed: Any
) -> list[str]:
    problems = []
    if len(sources) < 1:
        problems.append("adapters: found none, expected one or more folders")
    if method not in METHODS:
        problems.append(f"method: found {method!r}, expected {', '.join(METHODS)}")
    prunes = method in METHODS and METHODS[method].prune is not None
    if weights is not None and not isinstance(weights, Sequence):
        problems.append(f"weights: found {weights!r}, expected a list of numbers, one for each adapter")
    elif weights is not None:
        if len(weights) != len(sources):
            problems.append(f"weights: found {len(weights)}, expected one for each of {len(sources)} adapters")
        bad = [w for w in weights if not _number(w)]
        problems += [f"weights: found {w!r}, expected a finite number" for w in bad]
        if not bad and not any(weights):
            problems.append("weights: found zeros alone, expected one that is not")
    if rank is not None and not (isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= LARGEST_RANK):
        problems.append(f"rank: found {rank!r}, expected a whole number from 1 to {LARGEST_RANK:,}")
    if method == "cat" and (rank is not None or max_error is not None):
        problems.append("rank: cat has the sum of the adapters' ranks; for a lower one take svd")
    if max_error is not None and not (_number(max_error) and 0 <= max_error < 1):
        problems.append(f"max_error: found {max_error!r}, expected a share of the norm from 0 to below 1")
    if density is not None and not prunes and method in METHODS:
        problems.append(f"density: found {density!r}, which {method} does not take: it keeps everything")
    elif density is not None and not (_number(density) and 0 < density <= 1):
        problems.append(f"density: found {density!r}, expected a share above 0, up to 1")
    elif density is not None and METHODS[method].prune != "magnitude" and density < 1 / 65536:
        problems.append(f"density: found {density!r}, expected at least 1/65,536: masks are random numbers of 16 bits")
    if sign not in (None, *get_args(Sign)):
        problems.append(f"sign: found {sign!r}, expected {', '.join(get_args(Sign))}")
    elif sign is not None and method in METHODS and not METHODS[method].elect:
        problems.append(f"sign: found {sign!r}, which {method} does not take: it elects no signs")
    if seed is not None and not (isinstance(seed, int) and not isinstance(seed, bool)):
        problems.append(f"seed: found {seed!r}, expected a whole number")
    elif seed is not None and method in METHODS and METHODS[method].prune not in ("random", "della"):
        problems.append(f"seed: found {seed!r}, which {method} does not take: nothing in it is random")
    return problems


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _content(file: AdapterFile) -> bytes:
    digest = hashlib.sha256()
    for layer in sorted(file.factors):
        one = file.factors[layer]
        digest.update(f"{layer} {one.scaling}".encode())
        for factor in (one.a, one.b):
            digest.update(memoryview(factor.float().contiguous().numpy().reshape(-1)))
    return digest.digest()


def _cannot(everything: list[Source], live: list[Source], method: str, any_base: bool) -> tuple[list[str], list[str]]:
    """What is wrong with these adapters, and what of them could not be combined exactly."""
    problems, refused = [], []
    shapes: dict[str, tuple[Any, ...]] = {}
    for source in everything:
        for layer, one in source.file.factors.items():
            shape = (tuple(one.a.shape[1:]), one.b.shape[0], len(one.a) // one.r, *one.b.shape[2:])
            if shapes.setdefault(layer, shape) != shape:
                problems.append(
                    f"{source.path}: {layer}: found (out, in) {_sides(shape)}, expected {_sides(shapes[layer])} as in the first "
                    "adapter that has it: they are of different base models"
                )
    names = {source.file.raw.get("base_model_name_or_path") for source in everything} - {None}
    if len(names) > 1 and not any_base and not problems:
        problems.append(
            f"the adapters name different base models: {', '.join(sorted(map(repr, names)))}; if these are one model under "
            "several names, say so with any_base (--any-base)"
        )
    values: dict[str, tuple[int, ...]] = {}
    copies: dict[str, Tensor] = {}
    for source in live:
        own = {**source.file.replaced, **source.file.tokens}
        for layer, one in source.file.factors.items():
            more = {"magnitude": one.magnitude, "bias": one.bias}
            own |= {f"{layer}, {part}": value for part, value in more.items() if value is not None}
        for key, value in own.items():
            if values.setdefault(key, tuple(value.shape)) != tuple(value.shape):
                problems.append(f"{source.path}: {key}: found {tuple(value.shape)}, expected {values[key]}")
        for key, value in source.file.copies.items():
            there = copies.setdefault(key, value)
            if there.shape != value.shape or not torch.equal(there, value):
                problems.append(f"{source.path}: {key}: a copy of another base's weight than in the adapters before it")
    keys: dict[str, dict[str, str]] = {}
    for source in live:
        for layer, parts in source.file.keys.items():
            named = {part: parts[part] for part in ("a", "b")}
            if keys.setdefault(layer, named) != named:
                refused.append(
                    f"{source.path}: {layer}: its tensors are named otherwise than in the adapters before it"
                )
            one = source.file.factors[layer]
            if one.b.ndim > 2 and one.b.shape[1] != one.r:
                refused.append(
                    f"{source.path}: {layer}: a convolution in groups, whose update no product of factors is"
                )
    extras = {
        "use_dora": lambda f: {k: one.magnitude for k, one in f.factors.items() if one.magnitude is not None},
        "lora_bias": lambda f: {k: one.bias for k, one in f.factors.items() if one.bias is not None},
        "modules_to_save or bias": lambda f: f.replaced,
        "trainable_token_indices": lambda f: f.tokens,
    }
    averages = METHODS[method].prune is None and math.isclose(sum(s.weight for s in live), 1, abs_tol=1e-9)
    for field, of in extras.items():
        have = [source for source in live if of(source.file)]
        if not have:
            continue
        alike = len(have) == len(live) and len({tuple(sorted(of(source.file))) for source in have}) == 1
        alike &= field != "trainable_token_indices" or len({str(s.file.config.tokens) for s in have}) == 1
        if not (averages and alike):
            refused.append(
                f"{field}: found in {', '.join(str(source.path) for source in have)}; these are values, not updates: they are "
                "averaged where all adapters have the same ones, the method is linear, cat or svd, and the weights sum to 1"
            )
    return problems, list(dict.fromkeys(refused))


def _sides(shape: tuple[Any, ...]) -> str:
    inner, out, experts, *_ = shape
    return f"({out}, {', '.join(map(str, inner))})" + (f" x {experts} experts" if experts > 1 else "")


def _elements(live: list[Source], name: str) -> int:
    one = next(source.file.factors[name] for source in live if name in source.file.factors)
    return (one.a.numel() // len(one.a)) * len(one.b)


class Layer(NamedTuple):
    """A combined layer: factors as files have them, and the squared norm of the whole and of what the rank left out."""

    a: Tensor
    b: Tensor
    rank: int
    squared: float
    lost: float


def _layers(
    live: list[Source],
    method: str,
    rule: Rule | None,
    rank: int | None,
    max_error: float | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Layer]:
    names = sorted({layer for source in live for layer in source.file.factors})
    largest = max(one.r for source in live for one in source.file.factors.values())
    if rank is None and max_error is None and method not in ("linear", "cat"):
        rank = largest

    def one_layer(name: str) -> Layer:
        parts = [(source, source.file.factors[name]) for source in live if name in source.file.factors]
        return _layer(name, parts, method, rule, rank, max_error, seed)

    def made() -> Generator[tuple[str, Layer], None, None]:
        # one thread for each layer, where its matrices are too small to share; large ones, an embedding's, one by one
        small = [name for name in names if _elements(live, name) <= ALONE]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from zip(small, pool.map(one_layer, small), strict=True)
        torch.set_num_threads(threads)
        yield from ((name, one_layer(name)) for name in names if name not in set(small))

    threads = torch.get_num_threads()
    found = {}
    with contextlib.closing(made()) as layers:
        try:
            for name, layer in layers:
                if not (all_finite(layer.a) and all_finite(layer.b)):
                    raise VeneerError(
                        f"{name}: the result holds NaN or Inf: its weights, or the adapters, are too large"
                    )
                found[name] = layer
                if progress is not None:
                    progress(len(found), len(names))
        finally:
            torch.set_num_threads(threads)
    return found


def _layer(
    name: str,
    parts: list[tuple[Source, Factors]],
    method: str,
    rule: Rule | None,
    rank: int | None,
    max_error: float | None,
    seed: int,
) -> Layer:
    first = parts[0][1]
    experts = len(first.a) // first.r
    done = []
    for expert in range(experts):
        updates = []
        for source, one in parts:
            a, b = _of_expert(one, expert, experts)
            key = source.key + f" {name} {expert}".encode()
            updates.append(Update(b * one.scaling, a, source.weight, key))
        if rule is None:
            done.append(_exact(updates, method, rank, max_error))
        else:
            done.append(nearest_factors(dense_sum(updates, rule, seed), rank, max_error))
    r = max(len(one.a) for one in done)
    a = torch.cat([torch.nn.functional.pad(one.a, (0, 0, 0, r - len(one.a))) for one in done])
    b = torch.stack([torch.nn.functional.pad(one.b, (0, r - len(one.a))) for one in done], 2).flatten(1)  # experts last
    a, b = a.view(-1, *first.a.shape[1:]), b.view(*b.shape, *[1] * (first.b.ndim - 2))
    return Layer(a, b, r, sum(one.squared for one in done), sum(one.lost for one in done))


def _of_expert(one: Factors, expert: int, experts: int) -> tuple[Tensor, Tensor]:
    """A and B of one expert of a parameter, or of a layer, as matrices in fp32: files have A by expert and B by rank."""
    a, b = one.a.flatten(1).float(), one.b.flatten(1).float()
    return (
        (a, b) if experts == 1 else (a.view(experts, one.r, -1)[expert], b.view(len(b), one.r, experts)[:, :, expert])
    )


def _exact(updates: list[Update], method: str, rank: int | None, max_error: float | None) -> LowRank:
    """The sum, from the factors alone."""
    a = torch.cat([one.a for one in updates])
    b = torch.cat([one.b.double() * one.weight for one in updates], 1)
    if method == "cat" or (len(updates) == 1 and (rank is None or rank >= len(a)) and max_error is None):
        squared = float(((b.T @ b) * (a.double() @ a.double().T)).sum())  # |B A|^2
        return LowRank(b.float(), a, squared, 0.0)
    return truncated(a, b, rank, max_error)


def _report(
    everything: list[Source],
    live: list[Source],
    method: str,
    rule: Rule | None,
    seed: int,
    layers: dict[str, Layer],
    rank: int | None,
) -> dict[str, Any]:
    squared, lost = sum(one.squared for one in layers.values()), sum(one.lost for one in layers.values())
    errors = {name: _share(one.lost, one.squared) for name, one in layers.items()}
    worst = max(errors, key=lambda name: errors[name])
    total = sum(source.weight for source in live)
    elects = rule is not None and rule.elect is not None
    notes = []
    if not elects and not math.isclose(total, 1, rel_tol=1e-6):
        notes.append(f"the weights sum to {total:g}: the result is not an average of the adapters")
    negative = [str(source.path) for source in live if source.weight < 0]
    if negative:
        turned = "its votes turn round too" if elects else "what it does is taken away"
        notes.append(f"a negative weight for {', '.join(negative)}: {turned}")
    sizes = [abs(source.weight) for source in live]
    if elects and not math.isclose(sum(sizes), len(sizes), rel_tol=1e-6):
        notes.append(
            f"the weights' sizes have a mean of {sum(sizes) / len(sizes):g}: {method} averages what was elected already, "
            "so 1 each keeps an adapter's size"
        )
    if any(abs(source.weight) > 4 for source in live):
        notes.append("a weight above 4: an update of that size may leave where the base model works")
    if skipped := [str(source.path) for source in everything if source.weight == 0]:
        notes.append(f"weight 0, no part in it: {', '.join(skipped)}")
    if any(one.magnitude is not None for source in live for one in source.file.factors.values()):
        notes.append("DoRA: directions and lengths were averaged each by itself")
    if rank is not None and layers and (most := max(one.rank for one in layers.values())) < rank:
        notes.append(f"rank {rank} was asked: {most} is all that the layers or the update have")
    if squared == 0:
        notes.append("the result is no update at all: the adapters cancel out, or are all zero")
    kinds = {source.file.trained_on or "16-bit, or not known" for source in live}
    if len(kinds) > 1:
        notes.append(f"they were trained on different bases: {', '.join(sorted(kinds))}")
    return {
        "method": method,
        "adapters": [str(source.path) for source in everything],
        "weights": [source.weight for source in everything],
        "density": None if rule is None else rule.density,
        "sign": None if rule is None else rule.elect,
        "seed": seed if rule is not None and rule.prune != "magnitude" else None,
        "layers": len(layers),
        "ranks": sorted({one.rank for one in layers.values()}),
        "parameters": sum(one.a.numel() + one.b.numel() for one in layers.values()),
        "error": _share(lost, squared),
        "largest_error": errors[worst],
        "largest_error_at": worst,
        "norm": math.sqrt(squared),
        "notes": notes,
    }


def _share(lost: float, squared: float) -> float:
    return math.sqrt(lost / squared) if squared > 0 else 0.0


def _write(out: Path, live: list[Source], layers: dict[str, Layer], report: dict[str, Any], replace: bool) -> None:
    tensors: dict[str, Tensor] = {}
    keys = {layer: parts for source in live for layer, parts in source.file.keys.items()}
    for name, layer in layers.items():
        tensors[keys[name]["a"]], tensors[keys[name]["b"]] = layer.a.contiguous(), layer.b.contiguous()
        for part in ("magnitude", "bias"):
            values = [(source, getattr(source.file.factors.get(name), part, None)) for source in live]
            if all(value is not None for _, value in values):
                # B's bias is added times the scaling, which is 1 from here on
                scales = [source.file.factors[name].scaling if part == "bias" else 1.0 for source, _ in values]
                tensors[keys[name][part]] = _average(values, scales)
    for key in live[0].file.rest:  # by the names they have there
        plain = key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".")
        token = plain.removesuffix(f".{TokenRows.KEY}")
        if plain in live[0].file.replaced:
            tensors[key] = _average([(source, source.file.replaced[plain]) for source in live])
        elif token in live[0].file.tokens:
            tensors[key] = _average([(source, source.file.tokens[token]) for source in live])
    for source in live:  # of the base's weights
        for key, value in source.file.rest.items():
            if key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".") in source.file.copies:
                tensors.setdefault(key, value)
    kinds = {source.file.trained_on or "none" for source in live}
    with atomic_folder(out, replace=replace) as folder:
        write_json(folder / CONFIG_FILE, _config(live, layers))
        doubly = {source.file.double_quant for source in live}
        metadata = {"veneer.base_quantization": kinds.pop() if len(kinds) == 1 else "none"}
        if len(doubly) == 1 and None not in doubly:
            metadata["veneer.base_double_quant"] = str(doubly.pop())
        write_tensors(folder / WEIGHTS_FILE, tensors, metadata=metadata)
        write_json(folder / REPORT_FILE, report)


def _average(values: Sequence[tuple[Source, Tensor | None]], scales: Sequence[float] | None = None) -> Tensor:
    total = sum(
        value.double() * source.weight * scale
        for (source, value), scale in zip(values, scales or [1.0] * len(values), strict=True)
        if value is not None
    )
    assert isinstance(total, Tensor)
    kinds = {value.dtype for _, value in values if value is not None}
    return total.to(kinds.pop() if len(kinds) == 1 else torch.float32)


def _config(live: list[Source], layers: dict[str, Layer]) -> dict[str, Any]:
    """The adapter_config.json of the result: that of one of them, with ranks, alphas and targets of its own."""
    selection = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
    config = {**live[0].file.raw, **{key: live[0].file.raw.get(key) for key in selection}}
    same = all(
        source.file.factors.keys() == layers.keys() and all(source.file.raw.get(k) == config[k] for k in selection)
        for source in live
    )
    if not same:  # each layer by its whole name
        parameters = {name for source in live for name in source.file.factors if _is_parameter(source.file, name)}
        config |= dict.fromkeys(selection[2:])
        config["target_modules"] = sorted(layers.keys() - parameters)
        config["target_parameters"] = sorted(parameters) or None
    return {
        **config,
        **portable_config({name: layer.rank for name, layer in layers.items()}),
        "use_dora": any(one.magnitude is not None for one in live[0].file.factors.values()),
        "lora_bias": any(one.bias is not None for one in live[0].file.factors.values()),
    }


def portable_config(ranks: dict[str, int]) -> dict[str, Any]:
    """What an adapter_config.json says of layers of these ranks whose true scale is in B: alpha = r everywhere."""
    r = collections.Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "lora_dropout": 0.0,
    }


def _is_parameter(file: AdapterFile, name: str) -> bool:
    """Whether a layer's factors are those of a parameter: files call them by the module it is in."""
    return (
        file.keys[name]["a"].endswith(".lora_A.weight") and file.keys[name]["a"] != f"{KEY_PREFIX}{name}.lora_A.weight"
    )
