"""How long a step takes: a few layers of the model's shapes, with random numbers in them, are trained here for some steps.

What is in proportion is multiplied: layers by how many there are, the head by the vocabulary, the optimizer by what is
trained. Every step is timed part by part, and of each part the median is taken: other programs disturb single ones.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.config import IGNORED
from veneer.errors import VeneerError
from veneer.machine import available_bytes
from veneer.models.fuse import batch_loss
from veneer.ops import arena
from veneer.planning.memory import (
    ADAM,
    FP32,
    Optimizer,
    Run,
    dry_step,
    layout,
    prepared,
    rounded,
    rows_of,
    weights_of,
)

WEIGHTS, LAYERS = (
    64 << 20,
    6,
)  # bytes of layers that are enough to be read from memory and not from caches, and layers at most
VOCABULARY = 32_768  # rows of the head that are measured at most
STEPS, LEAST, SECONDS = 9, 3, 4.0  # steps at most; at least; and no further one is begun after so long
DROPPED = 1  # the first: kernels are made, memory is taken


class Speed(NamedTuple):
    """Seconds of an optimizer step with the largest batches, its tokens, and seconds of a forward pass of one token."""

    seconds: float
    tokens: int
    forward: float


class _Parts(NamedTuple):
    """Seconds of one pass: layers forward and back, the head with its gradient, all else; and of the optimizer."""

    forward: float
    backward: float
    head: float
    rest: float
    optimizer: float


def measure(skeleton: Any, run: Run, trained: int, supervised: float = 1.0) -> Speed:
    """Of a skeleton, which is changed.

    Args:
        trained: numbers that the whole model trains. supervised: the share of the tokens that is learned.

    Raises:
        VeneerError: these few layers alone take more memory than is free.
    """
    model = prepared(skeleton, run)
    layers = _layers(model)
    count, first = len(layers), _first_trained(model)
    kept = min(count - first, LAYERS, max(1, math.ceil(WEIGHTS / _nbytes(layers[first], run))))
    wider = _shorten(model, [first + i * (count - first) // kept for i in range(kept)])
    _require_room(model, run)
    parts = _timed(filled(model, torch.device(run.device)), run, supervised)
    rows, passes = rows_of(run, "attention" in model.veneer_parts)
    mine = sum(p.numel() for p in model.parameters() if p.requires_grad)
    forward = parts.forward * count / kept
    once = forward + parts.backward * (count - first) / kept + wider * parts.head
    once += parts.rest * (wider if run.method == "full" else 1)  # the embedding's gradient
    tokens = sum(rows)
    seconds = passes * once + parts.optimizer * trained / mine
    return Speed(seconds, passes * tokens, (forward + wider * parts.head / 2) / tokens)


def _first_trained(model: Any) -> int:
    """The first layer that the way back goes through; all of them where something before them is trained."""
    if any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        return 0
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in _layers(model)]
    return trained.index(True) if True in trained else len(trained) - 1


def _require_room(model: Any, run: Run) -> None:
    """Before it is given memory."""
    weights = weights_of(model, run)
    needed = weights.base + weights.adapter + 2 * FP32 * weights.rounded + ADAM * weights.trained
    needed += dry_step(model, run._replace(evaluate=False)).peak
    free = torch.cuda.mem_get_info()[0] if run.device == "cuda" else available_bytes()
    if needed > free:
        raise VeneerError(f"the layers that would be timed take {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} are free")


def filled(model: Any, device: torch.device) -> Any:
    """A skeleton with memory on a device, and numbers in it as weights have them."""
    model = model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device=device).manual_seed(0)
    normal = 0.02 * torch.randn(1 << 20, generator=generator, device=device)
    codes = torch.randint(0, 256, (1 << 20,), generator=generator, device=device, dtype=torch.uint8)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dtype in (torch.uint8, torch.int8):
                _repeat(tensor, codes.view(tensor.dtype))
            elif tensor.dim() > 1:
                _repeat(tensor, normal)
            else:
                tensor.fill_(1.0 if "norm.weight" in name else 0.01)
    return model


def _repeat(tensor: Tensor, numbers: Tensor) -> None:
    """A million random numbers again and again: to draw as many as a large layer has takes seconds."""
    for piece in tensor.view(-1).split(len(numbers)):
        piece.copy_(numbers[: len(piece)])


def _layers(model: Any) -> nn.ModuleList:
    """A model's decoder layers: its longest list of modules."""
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def _nbytes(layer: nn.Module, run: Run) -> int:
    numbers = sum(p.numel() for p in layer.parameters())
    return int(numbers * {None: run.dtype.itemsize, "int8": 1}.get(run.quantize, 0.5))


def _shorten(model: Any, places: list[int]) -> float:
    """Leave these layers, and the first tokens where embedding and head have no adapter; how many times as many they were."""
    layers = _layers(model)
    for place in sorted({*range(len(layers))} - {*places}, reverse=True):
        del layers[place]
    model.config.get_text_config().num_hidden_layers = len(places)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    vocabulary = ends[1].weight.shape[0]
    plain = type(ends[0]) is nn.Embedding and type(ends[1]) is nn.Linear and not any(m._forward_hooks for m in ends)
    if vocabulary <= VOCABULARY or not plain:
        return 1.0
    seen: dict[int, nn.Parameter] = {}
    for module in ends:
        weight = module.weight
        fewer = nn.Parameter(weight[:VOCABULARY], requires_grad=weight.requires_grad)
        module.weight = seen.setdefault(id(weight), fewer)
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(module.bias[:VOCABULARY], requires_grad=module.bias.requires_grad)
    return float(vocabulary / VOCABULARY)


class _Clock:
    """When a pass comes to the layers, to the head, back to the layers, and back out of them."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, float] = {}
        layers = _layers(model)
        self.hooks = [layers[0].register_forward_pre_hook(self._enter), layers[-1].register_forward_hook(self._leave)]

    def mark(self, name: str, *_: Any) -> None:
        """The first time: layers that are made again come by again."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.setdefault(name, time.perf_counter())

    def _enter(self, _: Any, inputs: tuple[Any, ...]) -> None:
        hidden = inputs[0]
        if not hidden.requires_grad:  # else the first layer would not be gone through on the way back
            hidden.requires_grad_()
        hidden.register_hook(functools.partial(self.mark, "out"))
        self.mark("layers")

    def _leave(self, _: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(functools.partial(self.mark, "back"))
        self.mark("head")


def _timed(model: Any, run: Run, supervised: float) -> _Parts:
    device = torch.device(run.device)
    batch = _batch(model, run, supervised, device)
    optimizer = Optimizer(list(model.parameters()), foreach=run.device == "cuda")
    hooks = [p.register_post_accumulate_grad_hook(optimizer.add) for p in rounded(optimizer.masters)]
    clock = _Clock(model, device)
    found: list[_Parts] = []
    began = time.perf_counter()
    while len(found) < DROPPED + STEPS and (len(found) < DROPPED + LEAST or time.perf_counter() - began < SECONDS):
        clock.times.clear()
        optimizer.adam.zero_grad()
        clock.mark("start")
        torch.autograd.backward(batch_loss(model, batch, 1000))
        clock.mark("end")
        optimizer.step()
        clock.mark("done")
        at = clock.times
        found.append(_Parts(
            at["head"] - at["layers"], at["out"] - at["back"], at["back"] - at["head"],
            at["layers"] - at["start"] + at["end"] - at["out"], at["done"] - at["end"],
        ))  # fmt: skip
    for hook in (*hooks, *clock.hooks):
        hook.remove()
    arena.release()
    return _Parts(*(statistics.median(values) for values in zip(*found[DROPPED:], strict=True)))


def _batch(model: Any, run: Run, supervised: float, device: torch.device) -> dict[str, Any]:
    """The inputs of a pass, as `training.packing` makes them, of random tokens."""
    packs = "attention" in model.veneer_parts
    rows, shape, ends = layout(run, rows_of(run, packs)[0], packs)
    ids = torch.randint(model.get_output_embeddings().weight.shape[0], shape)
    labels = torch.where(torch.rand(shape) < supervised, ids, IGNORED)
    places = torch.cat([torch.arange(row) for row in rows])  # without ends all rows are of a length
    batch = {"input_ids": ids, "labels": labels, "position_ids": places.view(shape), **ends}
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
