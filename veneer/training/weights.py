"""What a run trains and writes: the factors of the active adapter, or every weight of the model (`method: full`).

Both give the loop `parameters`, fp32 tensors by name with their gradients, which the optimizer changes and a checkpoint
holds. Of 16-bit weights these are masters: steps smaller than the rounding add up in them, and the weights are rounded
from them after each step. An fp32 weight, as an adapter's factor is, is its own master, so there is no second copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from veneer.adapters import starts
from veneer.adapters.adalora import Allocator
from veneer.adapters.attach import (
    active_adapter,
    adapter_parameters,
    adapters,
    base_parameters,
    freeze_base,
    lora_layers,
)
from veneer.adapters.files import save_adapter
from veneer.config import Method, TrainConfig
from veneer.errors import VeneerError
from veneer.models.load import save_model
from veneer.ops import all_finite
from veneer.optim.groups import parameter_groups
from veneer.quant.linear import QuantizedLinear, quantized_layers
from veneer.training.guard import update_share


def trained_weights(method: Method, model: nn.Module, tokenizer: Any) -> AdapterWeights | FullWeights:
    """What `method` trains of `model`.

    Raises:
        VeneerError: there is no such method, or the model is not in the state for it; all reasons at once.
    """
    if method not in get_args(Method):
        raise VeneerError(f"method: found {method!r}, expected {' or '.join(get_args(Method))}")
    return FullWeights(model, tokenizer) if method == "full" else AdapterWeights(model)


SAMPLED = 4096  # bytes of a weight
_OF_STARTS = ("svd_niter", "loftq_iterations", "eva_rho")  # all that is left of them are weights and a base


class Masters:
    """fp32 versions of weights: `parameters`, by name; an fp32 weight is its own. `rounded`: (weight, master) of others."""

    small = True  # against the base: a copy in memory, to go back to, is no matter

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.rounded: list[tuple[nn.Parameter, nn.Parameter]] = []
        for name, weight in weights.items():
            if weight.dtype == torch.float32:
                self.parameters[name] = weight
            else:
                master = self.parameters[name] = nn.Parameter(weight.detach().float())
                self.rounded.append((weight, master))

    @contextmanager
    def training(self) -> Iterator[None]:
        """While it lasts each 16-bit gradient is added to its master's as soon as it is there, and let go."""
        handles = [weight.register_post_accumulate_grad_hook(_hand_over(master)) for weight, master in self.rounded]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, steps: int) -> None:
        """How many steps the run has in all."""

    def shares(self) -> Iterator[tuple[str, float]]:
        """Layers and the length of their update over that of their weight."""
        return iter(())

    def buffers(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the parameters."""
        return {}

    def make_room(self, saved: dict[str, Tensor]) -> None:
        """Take on the shapes of a checkpoint with these `buffers`, where they change in training."""

    @torch.no_grad()
    def changed(self) -> None:
        """After a step, or after a checkpoint was put back: the weights follow."""
        for weight, master in self.rounded:
            weight.copy_(master)


class AdapterWeights(Masters):
    """All that the active adapter trains: its factors, and versions of the base's weights; the base is frozen."""

    what = "adapter weights"
    no_gradient = "leave them out of lora.targets"

    def __init__(self, model: nn.Module) -> None:
        name = active_adapter(model)
        if model.__dict__.get("veneer_merged"):
            raise VeneerError(
                "the adapter is merged into the weights: training would change nothing that is computed",
                hint="veneer.unmerge(model) first",
            )
        if name is None:
            raise VeneerError(
                "this model has no active adapter to train",
                hint="veneer.attach(model, LoraConfig(...)) first, or train every weight with method='full'",
            )
        self.model, self.name = model, name
        self._lengths: dict[str, float] = {}
        super().__init__(adapter_parameters(model, name))

    def settings(self) -> dict[str, Any]:
        """What decides the numbers of a run besides the training settings, by the name the user knows."""
        config = adapters(self.model)[self.name].config.model_dump(mode="json", exclude={"init", *_OF_STARTS})
        start = starts.fingerprint(lora_layers(self.model), self.name)
        return {f"lora.{key}": value for key, value in config.items()} | {"start of lora's base (sha256)": start}

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        groups = parameter_groups(self.parameters, config.lora_plus)
        return [{**group, "weight_decay": config.weight_decay} for group in groups]

    def begin(self, steps: int) -> None:
        if (allocator := self._allocator) is None:
            return
        if allocator.config.steps not in (None, steps):
            raise VeneerError(
                f"lora.adalora.steps: found {allocator.config.steps}, but this run has {steps} steps",
                hint="leave it out: it is for other training loops",
            )
        allocator.steps = steps

    def make_room(self, saved: dict[str, Tensor]) -> None:
        if (allocator := self._allocator) is not None:
            allocator.make_room({key.removeprefix("adalora/"): value for key, value in saved.items()})

    def buffers(self) -> dict[str, Tensor]:
        allocator = self._allocator
        return {} if allocator is None else {f"adalora/{key}": value for key, value in allocator.buffers().items()}

    @property
    def _allocator(self) -> Allocator | None:
        return adapters(self.model)[self.name].allocator

    @contextmanager
    def training(self) -> Iterator[None]:
        """Train mode is for the adapter's dropout only: the base has none."""
        freeze_base(self.model)
        with super().training():
            yield

    @torch.no_grad()
    def shares(self) -> Iterator[tuple[str, float]]:
        """Of linears with one base; weights' lengths are worked out once."""
        for path, layer in lora_layers(self.model).items():
            if self.name in layer.lora_A and self.name not in layer.began and layer.lora_A[self.name].dim() == 2:
                if path not in self._lengths:
                    self._lengths[path] = float(torch.linalg.vector_norm(layer.dense(layer.base_of(self.name))))
                a, b = layer.a(self.name), layer.b(self.name)
                yield path, update_share(b, a, layer.scaling[self.name], self._lengths[path])

    def output_bytes(self) -> int:
        return sum(4 * p.numel() for p in self.parameters.values())

    @torch.no_grad()
    def base_fingerprint(self) -> str | None:
        """sha256 of the first bytes of every frozen weight: another base of the same shapes differs in them."""
        digest = hashlib.sha256()
        layers = quantized_layers(self.model).values()
        for weight in [*base_parameters(self.model), *(layer.weight for layer in layers)]:
            some = weight.detach().flatten()[: SAMPLED // weight.element_size()]
            digest.update(some.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, out: Path) -> dict[str, str | None]:
        return {"adapter": str(save_adapter(self.model, out / "adapter", self.name, replace=True)), "model": None}


class FullWeights(Masters):
    """Every weight of the model, tied ones once. The model's own dropout, if it has any, is active."""

    small = False
    what = "weights"
    no_gradient = "full fine-tuning trains every weight; train an adapter on the layers that take part instead"

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        problems = []
        if there := adapters(model):
            problems.append(f"the model carries adapters ({', '.join(there)}): merge or remove them first")
        if layers := [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]:
            problems.append(f"{len(layers)} layers are quantised ({layers[0]}, ...): load the base without quantize")
        weights = dict(model.named_parameters())  # a tied one has one name
        kinds = {str(p.dtype).removeprefix("torch.") for p in weights.values()} - {"bfloat16", "float32"}
        if kinds:
            problems.append(f"weights are {', '.join(sorted(kinds))}, expected bfloat16 or float32")
        if problems:
            raise VeneerError([f"method full: {problem}" for problem in problems])
        self.model, self.tokenizer = model, tokenizer
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        super().__init__(weights)

    def settings(self) -> dict[str, Any]:
        return {"method": "full"}

    def groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Norms and biases do not decay, as everywhere."""
        flat = [p for p in self.parameters.values() if p.dim() < 2]
        matrices = [p for p in self.parameters.values() if p.dim() >= 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        return [{**group, "factor": 1.0} for group in groups if group["params"]]

    def output_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    def base_fingerprint(self) -> str | None:
        """None: all of it is in the checkpoint."""
        return None

    def save(self, out: Path) -> dict[str, str | None]:
        bad = [name for name, p in self.parameters.items() if not all_finite(p)]
        if bad:
            raise VeneerError([f"{name}: found NaN or Inf, not saved" for name in bad])
        return {"adapter": None, "model": str(save_model(self.model, self.tokenizer, out / "model", replace=True))}


def _hand_over(master: nn.Parameter) -> Callable[[Tensor], None]:
    """micro-batches add up in fp32. The memory of the sum is kept from step to step: new pages cost more than the sum."""
    total: list[Tensor] = []

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        if not total:
            total.append(torch.empty_like(master.detach()))
        if master.grad is None:
            master.grad = total[0].copy_(weight.grad)
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    return hook
