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
from veneer.models.fuse import batch_loss
from veneer.ops import arena
from veneer.planning.memory import Optimizer, Run, layout, prepared, rounded, rows_of

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
    """
    layers, vocabulary = _layers(skeleton), skeleton.get_output_embeddings().weight.shape[0]
    count = len(layers)
    kept = min(count, LAYERS, max(1, math.ceil(WEIGHTS / _nbytes(layers[0], run))))
    _shorten(skeleton, kept, min(vocabulary, VOCABULARY))
    model = filled(prepared(skeleton, run), torch.device(run.device))
    parts = _timed(model, run, supervised)
    rows, passes = rows_of(run, "attention" in model.veneer_parts)
    mine = sum(p.numel() for p in model.parameters() if p.requires_grad)
    scale, wider = count / kept, max(1.0, vocabulary / VOCABULARY)
    once = scale * (parts.forward + parts.backward) + wider * parts.head
    once += parts.rest * (wider if run.method == "full" else 1)  # the embedding's gradient
    tokens = sum(rows)
    seconds = passes * once + parts.optimizer * trained / mine
    return Speed(seconds, passes * tokens, (scale * parts.forward + wider * parts.head / 2) / tokens)


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


def _shorten(model: Any, layers: int, vocabulary: int) -> None:
    """Leave the first layers and the first tokens."""
    del _layers(model)[layers:]
    model.config.get_text_config().num_hidden_layers = layers
    seen: dict[int, nn.Parameter] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = module.weight
        module.weight = seen.setdefault(id(weight), nn.Parameter(weight[:vocabulary]))
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(module.bias[:vocabulary])


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
