"""Faster parts for transformers' own models, same results: isolated packed attention, and head + cross-entropy.

A part that is not recognised stays as it was.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from veneer import ops

ATTENTION = "veneer"
# Their forward is: decoder, head, shifted cross-entropy, with nothing done to the logits.
PLAIN_HEADS = {
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM",
    "SmolLM3ForCausalLM",
}  # fmt: skip


def fuse(model: PreTrainedModel) -> list[str]:
    """Swap in what fits this model, in place; returns the names of the parts swapped."""
    done = []
    if model.config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(ATTENTION)
        done.append("attention")
    if type(model).__name__ in PLAIN_HEADS and type(model.get_output_embeddings()) is nn.Linear:
        model.forward = types.MethodType(_forward, model)  # type: ignore[method-assign]
        done.append("head")
    model.veneer_parts = done
    return done


def _forward(self: PreTrainedModel, *args: Any, skip_logits: bool = False, **kwargs: Any) -> Any:
    """As transformers' forward. With `skip_logits` and `labels`: the loss alone, logits None, much less memory."""
    labels = kwargs.get("labels")
    if not skip_logits or labels is None or args:
        # by the class, not by a bound method kept from before: a deep copy of the model must run its own weights
        return type(self).forward(self, *args, **kwargs)
    items = kwargs.pop("num_items_in_batch", None)
    kwargs.pop("labels")
    kwargs.pop("logits_to_keep", None)
    hidden = self.get_decoder()(**kwargs).last_hidden_state
    # Position t predicts token t + 1; rows of the last position and unsupervised ones never reach the head.
    target = labels[:, 1:].reshape(-1)
    keep = (target != -100).nonzero().view(-1)
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])[keep]
    head = self.get_output_embeddings()
    weight = head.weight
    if head.bias is not None:  # rare: the bias as one more column
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)
        weight = torch.cat([weight, head.bias[:, None]], 1)
    count = max(1, keep.numel()) if items is None else items
    return CausalLMOutputWithPast(loss=ops.linear_cross_entropy(rows, weight, target[keep], count))


class _Segments:
    """Where the tokens of packed rows lie in a padded batch; made once a step, for all layers."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        lengths = cu_seqlens.diff()
        self.count, self.longest = int(lengths.numel()), int(lengths.max())
        row = torch.repeat_interleave(torch.arange(self.count, device=cu_seqlens.device), lengths)
        column = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device) - cu_seqlens[:-1].long()[row]
        self.slot = row * self.longest + column

    def unpack(self, x_1HTD: Tensor) -> Tensor:
        """(1, H, T, D) -> (rows, H, longest, D), zeros behind each row's end."""
        _, heads, _, width = x_1HTD.shape
        padded = x_1HTD.new_zeros(self.count * self.longest, heads, width)
        padded = padded.index_copy(0, self.slot, x_1HTD[0].transpose(0, 1))
        return padded.view(self.count, self.longest, heads, width).transpose(1, 2)

    def pack(self, x_BHLD: Tensor) -> Tensor:
        """(rows, H, longest, D) -> (1, T, H, D)."""
        flat = x_BHLD.transpose(1, 2).reshape(self.count * self.longest, x_BHLD.shape[1], x_BHLD.shape[3])
        return flat.index_select(0, self.slot).unsqueeze(0)


_last: tuple[Tensor, _Segments] | None = None


def _segments(cu_seqlens: Tensor) -> _Segments:
    global _last
    if _last is None or _last[0] is not cu_seqlens:
        _last = (cu_seqlens, _Segments(cu_seqlens))
    return _last[1]


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention; with `cu_seq_lens_q` (rows + 1 starts, int32) each packed row sees only itself.

    query (B, H, T, D), key and value (B, H_kv, T, D) -> (B, T, H, D). Without it: transformers' sdpa, unchanged.
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    whole = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    unusual = any(kwargs.get(name) for name in ("sliding_window", "softcap", "dropout"))
    if cu_seqlens is None or not whole or unusual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    segments = _segments(cu_seqlens)
    q, k, v = segments.unpack(query), segments.unpack(key), segments.unpack(value)
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=kwargs.get("scaling"), enable_gqa=q.shape[1] != k.shape[1]
    )
    return segments.pack(out), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
