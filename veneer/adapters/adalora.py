"""AdaLoRA: a budget of ranks that goes where training needs it (Zhang et al. 2023, arXiv 2303.10512).

    W' = W + scaling * P diag(E) Q,    P = B (out, r), E (r,), Q = A (r, in),    E zero at the start, P and Q Gaussian
    loss + orthogonality * sum over layers of |P^T P - I|^2 + |Q Q^T - I|^2      keeps P, E, Q near a singular value form

Rank k of a layer is worth  S_k = s(E_k) + mean_j s(P_jk) + mean_j s(Q_kj),  where s(w) is the product of two running means:
of the sensitivity |w dL/dw|, and of how far it strays from its own mean. Each layer starts with more ranks than asked for;
then the budget falls as a cubic to what was asked for, and the ranks of all layers that are worth most stay. E of the
others is zero.

Nothing has to be called: an allocator acts before and after each step of whatever optimizer holds its parameters.
A rank outside the budget is zero after every step; so that it can come back, its sensitivity is taken where the step
would have brought it. Once the sharing is over, the others are taken out of the parameters and of the optimizer's state:
what is left costs what plain LoRA does. What is saved is plain LoRA: `Allocator.plain`.
"""

from __future__ import annotations

import math
import warnings
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from veneer import ops
from veneer.adapters.lora import LoraLayer
from veneer.config import AdaLoraConfig
from veneer.errors import VeneerError


class Allocator:
    """Of one adapter of a model: which ranks of its layers live, at every step of its training.

    Args:
        layers: by path, with the adapter `name` on them, whose ranks are those of the start.
        budget: ranks that are left at the end, of all layers together.
    """

    def __init__(self, layers: dict[str, LoraLayer], name: str, config: AdaLoraConfig, budget: int) -> None:
        self.layers, self.name, self.config, self.budget = layers, name, config, budget
        self.steps = config.steps  # of the whole training; the loop knows, or the user says
        self.done = torch.zeros((), dtype=torch.int64)
        self.alive = {path: torch.ones(layer.rank(name), dtype=torch.bool) for path, layer in layers.items()}
        self.start = sum(map(len, self.alive.values()))  # ranks at step 0
        q, e, p = ([getattr(x, kind)[name] for x in layers.values()] for kind in ("lora_A", "lora_E", "lora_B"))
        self.factors = [x for both in zip(q, p, strict=True) for x in both]  # Q and P of each layer in turn
        self.parameters = [x for three in zip(q, e, p, strict=True) for x in three]  # and E between them
        self.sensitivity = [torch.zeros_like(p) for p in self.parameters]
        self.worth: list[Tensor] = []  # after a step: the product of both, averaged by rank
        self.uncertainty = [torch.zeros_like(p) for p in self.parameters]
        _follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of the model has an allocator of its own at work."""
        self.__dict__.update(state)
        _follow(self)

    def buffers(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold besides the parameters."""
        found = {"done": self.done} | {f"alive/{path}": mask for path, mask in self.alive.items()}
        keys = [f"{path}/{part}" for path in self.layers for part in "QEP"]
        for kind, values in (("sensitivity", self.sensitivity), ("uncertainty", self.uncertainty)):
            found |= {f"{kind}/{key}": value for key, value in zip(keys, values, strict=not self.cut)}
        return found

    @property
    def cut(self) -> bool:
        """Whether dead ranks were taken out: none comes back any more, and nothing is watched."""
        return not self.sensitivity

    def budget_at(self, step: int) -> int:
        """How many ranks live after `step` steps: all, then a cubic, then what was asked for (equation 8 of the paper)."""
        if self.steps is None:
            raise VeneerError(
                "AdaLoRA does not know how long the training is, so it cannot plan its budget",
                hint="in a loop of your own give LoraConfig(adalora={'steps': optimizer steps in all})",
            )
        last = max(self.steps, 1)
        first, settled = self.config.warmup * last, (1 - self.config.settle) * last
        left = 1.0 if step <= first else 0.0 if self.cut or step >= settled else 1 - (step - first) / (settled - first)
        return self.budget + math.ceil((self.start - self.budget) * left**3)

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the orthogonality term's gradient, 4 orthogonality P (P^T P - I), to those of P and Q."""
        self.budget_at(0)
        if not self.config.orthogonality:
            return
        found = [(p, p.grad, at % 2) for at, p in enumerate(self.factors) if p.grad is not None]
        if found:
            factors, gradients, dims = map(list, zip(*found, strict=True))
            ops.orthogonal(factors, gradients, dims, 4 * self.config.orthogonality)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the sensitivities, share out the budget, and set E of the ranks outside it to zero; at last take them out."""
        self.done += 1
        step = int(self.done)
        if not self.cut:
            budget = self.budget_at(step)
            if step <= (1 - self.config.settle) * max(self.steps or 0, 1) or self._living() > budget:
                self._watch()
                if budget < self.start and (step % self.config.every == 0 or self._living() > budget):
                    self._share_out(budget)
            else:
                self._take_out(optimizer)
        dead = [path for path, mask in self.alive.items() if not mask.all()] if self.cut else list(self.alive)
        if dead:
            diagonals = [self.layers[path].lora_E[self.name] for path in dead]
            masks = torch.cat([self.alive[path] for path in dead]).to(diagonals[0].device, diagonals[0].dtype)
            parts = masks.split([len(self.alive[path]) for path in dead])
            torch._foreach_mul_(diagonals, [mask.to(e.device) for mask, e in zip(parts, diagonals, strict=True)])

    def _take_out(self, optimizer: torch.optim.Optimizer) -> None:
        """Cut the parameters, their gradients and what the optimizer keeps of each to the ranks that live.

        Left as they are, with E zero, where that is not known to be safe: other processes hold the same parameters, or
        the optimizer keeps something of another shape than theirs.
        """
        held = [
            [p, *(x for x in optimizer.state[p].values() if isinstance(x, Tensor) and x.dim())] for p in self.parameters
        ]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return
        if any(x.shape != p.shape for p, *others in held for x in others):
            return
        for mask, three in zip(self.alive.values(), zip(*[iter(self.parameters)] * 3, strict=True), strict=True):
            living = self._places(mask)
            for p, dim in zip(three, (0, 0, 1), strict=True):
                take = partial(torch.index_select, dim=dim, index=living.to(p.device))
                state = optimizer.state[p]
                state |= {key: take(x) for key, x in state.items() if isinstance(x, Tensor) and x.dim()}
                gradient = p.grad
                _put(p, take(p.data))
                p.grad = None if gradient is None else take(gradient)
        self.alive = {path: mask[self._places(mask)] for path, mask in self.alive.items()}
        self.sensitivity, self.uncertainty, self.worth = [], [], []

    @staticmethod
    def _places(mask: Tensor) -> Tensor:
        """Of the living ranks; a layer without one keeps its first, whose E is zero."""
        return mask.nonzero().flatten() if mask.any() else torch.tensor([0])

    @torch.no_grad()
    def make_room(self, saved: dict[str, Tensor]) -> None:
        """Take on as many ranks as a checkpoint has, whose `buffers` these are: before, or after, they were taken out.

        The values are to be put in. Nothing happens where they are not a state of this allocator.
        """
        masks = {path: saved.get(f"alive/{path}") for path in self.layers}
        sizes = {path: len(mask) for path, mask in masks.items() if mask is not None and mask.dim() == 1 and len(mask)}
        if sizes.keys() != masks.keys() or sum(sizes.values()) > self.start:
            return
        for path, three in zip(self.layers, zip(*[iter(self.parameters)] * 3, strict=True), strict=True):
            for p, dim in zip(three, (0, 0, 1), strict=True):
                if p.shape[dim] != sizes[path]:
                    shape = [*p.shape]
                    shape[dim] = sizes[path]
                    _put(p, p.new_zeros(shape))
        self.alive = {path: torch.ones(size, dtype=torch.bool) for path, size in sizes.items()}
        whole = any(key.startswith("sensitivity/") for key in saved)
        self.sensitivity, self.uncertainty = (
            [torch.zeros_like(p) for p in self.parameters] if whole else [] for _ in range(2)
        )

    def _living(self) -> int:
        return int(torch.cat(list(self.alive.values())).sum())

    def _watch(self) -> None:
        dims, grads = [0, 0, 1] * len(self.layers), [p.grad for p in self.parameters]
        self.worth = ops.watch(self.parameters, grads, self.sensitivity, self.uncertainty, dims, self.config.beta)

    def _share_out(self, budget: int) -> None:
        scores = list(self.scores().values())
        flat = torch.cat([score.to(scores[0].device) for score in scores]).cpu()
        best = torch.zeros(len(flat), dtype=torch.bool)
        best[flat.topk(budget).indices] = True
        for mask, part in zip(self.alive.values(), self._split(best), strict=True):
            mask.copy_(part)

    def _split(self, ranks: Tensor) -> tuple[Tensor, ...]:
        """What holds one value for every rank of all layers, by layer."""
        return ranks.split([len(mask) for mask in self.alive.values()])

    def scores(self) -> dict[str, Tensor]:
        """What each rank of each layer was worth after the last step: S (r,)."""
        of = iter(self.worth)
        return {path: q + e + p for path, (q, e, p) in zip(self.layers, zip(of, of, of, strict=True), strict=True)}

    def warn_if_early(self) -> None:
        """Warn where more ranks live than were asked for: the training was stopped, or is shorter than it said."""
        if int(self.done) > 0 and self._living() > self.budget:
            warnings.warn(
                f"AdaLoRA is at step {int(self.done):,} of {self.steps:,}: {self._living():,} ranks live, {self.budget:,} were asked for",
                stacklevel=3,
            )

    def plain(self, path: str) -> tuple[Tensor, Tensor]:
        """A and B of a layer as plain LoRA with its living ranks only: diag(E) Q and P."""
        layer = self.layers[path]
        alive = self.alive[path].to(layer.weight.device)
        return layer.a(self.name).detach()[alive], layer.b(self.name).detach()[:, alive]

    def held_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer takes the step: it holds what has a gradient now.

        Raises:
            VeneerError: it holds a part of that; one step must be one step of all ranks.
        """
        moved = {id(p) for p in self.parameters if p.grad is not None}
        there = sum(id(p) in moved for group in optimizer.param_groups for p in group["params"])
        if 0 < there < len(moved):
            raise VeneerError(
                f"AdaLoRA: found an optimizer with {there} of the {len(moved)} parameters that learn, expected all in one",
                hint="use one optimizer, with parameter groups where rates differ",
            )
        return there > 0


def _put(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter a value of another shape. Its gradient is gone then.

    Where an old graph is still alive (a loss that was kept) autograd goes on with its idea of the shape; it forgets that
    only when the type changes, so for a moment it does.
    """
    parameter.grad = None
    parameter.data = parameter.data.to(torch.float64 if parameter.dtype != torch.float64 else torch.float32)
    parameter.data = value


def start(layer: LoraLayer, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Q, P and E of a layer at step 0: Gaussian with rows, or columns, of about unit length, and zero."""
    a, b = layer.shapes(r)
    q = torch.empty(a).normal_(std=1 / math.sqrt(math.prod(a[1:])), generator=generator)
    return q, torch.empty(b).normal_(std=1 / math.sqrt(b[0]), generator=generator), torch.zeros(r)


_allocators: weakref.WeakSet[Allocator] = weakref.WeakSet()
_hooks: list[Any] = []


def _follow(allocator: Allocator) -> None:
    _allocators.add(allocator)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before))
        _hooks.append(register_optimizer_step_post_hook(_after))


def _before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for allocator in list(_allocators):
        if allocator.held_by(optimizer):
            allocator.before_step()


def _after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for allocator in list(_allocators):
        if allocator.held_by(optimizer):
            allocator.after_step(optimizer)
