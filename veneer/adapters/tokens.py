"""Embeddings of some tokens, trained in full while all others stay: what an adapter for a few new tokens needs.

An adapter has rows (n, dim) that stand in the place of the embedding's own, and of the output head's where that is the same
weight (PEFT's `trainable_token_indices`). The weight itself is neither changed nor copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.lora import LoraLayer
from veneer.errors import VeneerError

CHILD = "token_rows"  # the name under which an embedding holds them


def move(parameter: nn.Parameter, device: torch.device) -> None:
    """In place: it stays the same parameter for who holds it."""
    if parameter.device != device:
        parameter.data = parameter.data.to(device)


class TokenRows(nn.Module):
    """The rows (n, dim), fp32, that adapters have for one embedding (or head that is not tied). At most one is active.

    An active one corrects, by a hook, what each layer on this weight returns: the embeddings of its tokens, and of a head
    the logits of its tokens.
    """

    KEY = "token_adapter.trainable_tokens_delta"  # in PEFT's files; not a difference, in spite of its name

    def __init__(self, base: nn.Embedding | nn.Linear) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not registered: it holds this
        self.rows = nn.ParameterDict()
        self.ids: dict[str, list[int]] = {}
        self.active: str | None = None
        self._hooks: list[Any] = []
        self._places: dict[Any, Tensor] = {}

    @classmethod
    def of(cls, model: nn.Module, path: str) -> TokenRows:
        """Those of the layer at `path`; made if there are none yet."""
        layer = _plain_layer(model.get_submodule(path))
        if CHILD not in layer._modules:
            layer.add_module(CHILD, cls(layer))
        return layer._modules[CHILD]  # type: ignore[return-value]

    def add(self, name: str, ids: list[int], values: Tensor | None = None) -> None:
        """Rows for an adapter, in the order of `ids`; left out, the weight's own."""
        weight: Tensor = self.base.weight.detach()
        values = weight[torch.tensor(ids, device=weight.device)] if values is None else values
        self.rows[name] = nn.Parameter(values.to(device=weight.device, dtype=torch.float32, copy=True))
        self.ids[name] = list(ids)

    def remove(self, name: str) -> None:
        if name in self.rows:
            del self.rows[name], self.ids[name]
        if not self.rows:
            self.drop()

    def drop(self) -> None:
        """Leave the embedding as it was."""
        self._unhook()
        del self.base._modules[CHILD]

    def activate(self, model: nn.Module, name: str | None) -> None:
        self._unhook()
        self.active = name if name in self.rows else None
        for key, rows in self.rows.items():
            rows.requires_grad_(key == name)
        if self.active is None:
            return
        move(self.rows[self.active], self.base.weight.device)
        for module in model.modules():
            if module._parameters.get("weight") is self.base.weight:
                hook = self._on_embeddings if isinstance(module, nn.Embedding) else self._on_logits
                self._hooks.append(module.register_forward_hook(hook))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._places = [], {}

    def merged(self, name: str) -> Tensor:
        """The weight with these rows in it, in its own dtype."""
        weight: Tensor = self.base.weight.detach()
        ids = torch.tensor(self.ids[name], device=weight.device)
        return weight.index_copy(0, ids, self.rows[name].detach().to(weight.dtype))

    def changed(self) -> tuple[Tensor, Tensor]:
        """ids (n,) and the active rows (n, dim) in the weight's dtype, differentiable."""
        assert self.active is not None
        rows = self.rows[self.active]
        ids = self._kept("ids", rows.device, lambda: torch.tensor(self.ids[self.active or ""], device=rows.device))
        return ids, rows.to(self.base.weight.dtype)

    def _kept(self, what: str, device: torch.device, make: Any) -> Tensor:
        if (what, device) not in self._places:
            self._places[what, device] = make()
        return self._places[what, device]

    def _place_of(self, device: torch.device) -> Tensor:
        """For each token which of the rows is its, or -1: (vocabulary,) int32."""
        assert self.active is not None
        ids = self.ids[self.active]
        place = torch.full((self.base.weight.shape[0],), -1, dtype=torch.int32, device=device)
        place[torch.tensor(ids, device=device)] = torch.arange(len(ids), dtype=torch.int32, device=device)
        return place

    def _on_embeddings(self, layer: nn.Embedding, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        place = self._kept("place", args[0].device, lambda: self._place_of(args[0].device))[args[0]]
        _, rows = self.changed()
        ids = self.ids[self.active or ""]
        padding = ids.index(layer.padding_idx) if layer.padding_idx in ids else None  # has no gradient, as everywhere
        new = F.embedding(place.clamp(min=0), rows, padding, layer.max_norm, layer.norm_type)
        scale = getattr(layer, "embed_scale", None)  # Gemma's
        if scale is not None:
            new = new * (scale.to(new.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((place >= 0)[..., None], new.to(y.dtype), y)

    def _on_logits(self, layer: nn.Linear, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        ids, rows = self.changed()
        bias = None if layer.bias is None else layer.bias[ids]
        return y.index_copy_(-1, ids, F.linear(args[0], rows, bias).to(y.dtype))  # in place: logits are large

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {len(ids)} tokens" for name, ids in self.ids.items())


def changed_rows(head: nn.Module) -> tuple[Tensor, Tensor] | None:
    """What an active adapter puts in the place of this head's rows: ids (n,), rows (n, dim); None: nothing."""
    for hook in head._forward_hooks.values():
        rows = getattr(hook, "__self__", None)
        if isinstance(rows, TokenRows):
            return rows.changed()
    return None


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """By the name of their embedding in the plain model."""
    return {
        name.removesuffix(f".{CHILD}").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, TokenRows)
    }


def set_token_rows(model: nn.Module, name: str | None) -> None:
    for rows in token_rows(model).values():
        rows.activate(model, name)


def token_layers(
    model: Any, tokens: list[int] | dict[str, list[int]], adapted: list[str], replaced: dict[str, nn.Parameter]
) -> dict[str, list[int]]:
    """The embeddings (or heads) that `tokens` means, by their names in the plain model, and the ids of each.

    Args:
        adapted, replaced: what the same adapter changes too: the layers' names, and the base's parameters.

    Raises:
        VeneerError: no such layer, ids outside of it, a tied head apart from its embeddings, or a weight that the adapter
            changes in another way too; all at once.
    """
    if not tokens:
        return {}
    layers = {
        name.removesuffix(".base_layer"): layer
        for name, module in model.named_modules()
        if isinstance(layer := _plain_layer(module), nn.Embedding | nn.Linear)
    }
    embeddings = _plain_layer(model.get_input_embeddings()) if hasattr(model, "get_input_embeddings") else None
    problems: list[str] = []
    found: dict[str, list[int]] = {}
    if isinstance(tokens, dict):
        for suffix, ids in tokens.items():
            named = [name for name in layers if name.endswith(suffix)]  # PEFT's rule
            found |= dict.fromkeys(named, ids)
            if not named:
                problems.append(f"lora.tokens: {suffix!r} matches no embedding and no head")
    else:
        named = [name for name, layer in layers.items() if layer is embeddings or name.endswith("embed_tokens")][:1]
        found = dict.fromkeys(named, tokens)
        if not named:
            problems.append("lora.tokens: this model has no input embeddings known by that name; give {name: ids}")
    for name, ids in list(found.items()):
        weight = layers[name].weight
        tied = [other for other, layer in layers.items() if layer.weight is weight]
        first = next((other for other in tied if isinstance(layers[other], nn.Embedding)), tied[0])
        if name != first:
            if found.get(first) == ids:
                del found[name]  # follows by itself
            else:
                problems.append(f"lora.tokens: {name} is tied to {first}: give the ids of that one, and no others here")
            continue
        outside = [i for i in ids if i >= weight.shape[0]]
        if outside:
            problems.append(f"lora.tokens: found {outside}, expected ids below {weight.shape[0]:,}, the rows of {name}")
        if both := sorted(set(tied) & set(adapted)):
            problems.append(f"lora.tokens: {name} is also in lora.targets ({both[0]})")
        if any(parameter is weight for parameter in replaced.values()):
            problems.append(f"lora.tokens: {name} is trained in full already (lora.modules_to_save)")
    if problems:
        raise VeneerError(problems)
    return found


def _plain_layer(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, LoraLayer) else module
