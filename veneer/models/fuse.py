"""Faster parts for transformers' own models, same results: layers on the native kernels, isolated packed attention,
RMS norms, and head + cross-entropy on learned tokens only.

A part that is not recognised, or that a call uses in an unusual way, runs as it was.
"""

from __future__ import annotations

import functools
import itertools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from veneer import ops
from veneer.adapters.lora import LoraLinear, adapted_linears
from veneer.adapters.tokens import changed_rows
from veneer.config import IGNORED
from veneer.ops import dry_run, native
from veneer.ops.blocks import AdaptedLinear, Attention, Mlp, Norm, Recompute
from veneer.quant.linear import QuantizedLinear

ATTENTION = "veneer"
# Their forward is: decoder, head, shifted cross-entropy, with nothing done to the logits.
PLAIN_HEADS = {
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM",
    "SmolLM3ForCausalLM", "GemmaForCausalLM",
}  # fmt: skip
# Their forward is: norm, attention with a half-split rotary embedding, residual, norm, gated MLP, residual.
PLAIN_LAYERS = {
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Phi3DecoderLayer",
    "SmolLM3DecoderLayer", "GemmaDecoderLayer",
}  # fmt: skip
# RMS norms: what is added to their weight.
NORMS = {
    "LlamaRMSNorm": 0.0, "MistralRMSNorm": 0.0, "Qwen2RMSNorm": 0.0, "Qwen3RMSNorm": 0.0, "Phi3RMSNorm": 0.0,
    "SmolLM3RMSNorm": 0.0, "GemmaRMSNorm": 1.0,
}  # fmt: skip
ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


def fuse(model: PreTrainedModel) -> list[str]:
    """Swap in what fits this model, in place; returns the names of the parts swapped."""
    done = []
    if model.config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(ATTENTION)
        if not _mixes_tokens_elsewhere(model):
            done.append("attention")
    if type(model).__name__ in PLAIN_HEADS and type(model.get_output_embeddings()) is nn.Linear:
        model.forward = types.MethodType(_forward_as(type(model)), model)  # type: ignore[method-assign]
        done.append("head")
    for module in model.modules():
        name = type(module).__name__
        if name in NORMS:
            module.forward = types.MethodType(_norm_forward, module)  # type: ignore[method-assign]
            done.append("norm")
        elif (
            name in PLAIN_LAYERS
            and type(module.mlp.act_fn if hasattr(module.mlp, "act_fn") else module.mlp.activation_fn).__name__
            in ACTIVATIONS
        ):  # type: ignore[union-attr]
            module.forward = types.MethodType(_layer_forward, module)  # type: ignore[method-assign]
            module.veneer_recompute = "none"
            done.append("layer")
    model.veneer_parts = sorted(set(done))
    return model.veneer_parts  # type: ignore[no-any-return]


def set_recompute(model: nn.Module, how: Recompute) -> bool:
    """What fused layers make again in the backward pass instead of keeping it; False: this model has no such layers."""
    layers = [module for module in model.modules() if hasattr(module, "veneer_recompute")]
    for layer in layers:
        layer.veneer_recompute = how
    return bool(layers)


def _mixes_tokens_elsewhere(model: nn.Module) -> bool:
    """Whether anything but attention carries information between tokens: packed rows could see each other there."""
    kinds = getattr(model.config, "layer_types", None) or []  # type: ignore[union-attr]
    other = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention", "chunked_attention")]
    return bool(other) or any(isinstance(module, nn.Conv1d) for module in model.modules())


# ---- head ---------------------------------------------------------------------------------------------------------


def _forward_as(kind: Any) -> Any:
    """`_forward` with the signature of the class's own: generate and Trainer look there for what a model takes.

    Without it generate makes logits of the whole prompt, and Trainer drops every column.
    """

    @functools.wraps(kind.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    return forward


def _forward(self: PreTrainedModel, *args: Any, skip_logits: bool = False, **kwargs: Any) -> Any:
    """As transformers' forward. With `skip_logits` and `labels`: the loss alone, logits None, much less memory.

    With labels no cache of keys and values is made unless it is asked for: it would keep the fused layers away.
    """
    labels, head = kwargs.get("labels"), self.get_output_embeddings()
    if labels is not None and kwargs.get("past_key_values") is None:
        kwargs.setdefault("use_cache", False)
    if not skip_logits or labels is None or args or type(head) is not nn.Linear:
        # by the class, not by a bound method kept from before: a deep copy of the model must run its own weights
        return type(self).forward(self, *args, **kwargs)
    items = kwargs.pop("num_items_in_batch", None)
    kwargs.pop("labels")
    kwargs.pop("logits_to_keep", None)
    hidden = self.get_decoder()(**kwargs).last_hidden_state
    # Position t predicts token t + 1; rows of the last position and unsupervised ones never reach the head.
    target = labels[:, 1:].reshape(-1)
    keep = (
        torch.arange(len(target)) if target.is_meta else (target != IGNORED).nonzero().view(-1)
    )  # a dry run learns all
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])[keep]
    weight, changed = head.weight, changed_rows(head)
    if head.bias is not None:  # rare: the bias as one more column
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)
        weight = torch.cat([weight, head.bias[:, None]], 1)
        if changed is not None:
            changed = changed[0], torch.cat([changed[1], head.bias[changed[0], None]], 1)
    count = max(1, keep.numel()) if items is None else items
    return CausalLMOutputWithPast(loss=ops.linear_cross_entropy(rows, weight, target[keep], count, changed))


def batch_loss(model: Any, batch: dict[str, Any], items: int) -> Tensor:
    """The sum of the batch's cross-entropies over learned tokens, divided by `items`; fp32 scalar."""
    if "head" in getattr(model, "veneer_parts", ()):
        return model(**batch, num_items_in_batch=items, skip_logits=True, use_cache=False).loss  # type: ignore[no-any-return]
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum") / items


# ---- layer --------------------------------------------------------------------------------------------------------


def _norm(module: Any) -> Norm | None:
    name = type(module).__name__
    if name not in NORMS:
        return None
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module.weight, epsilon, NORMS[name])


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    norm = _norm(self)
    if norm is None or not native.takes(x, norm.weight):
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    return ops.rms_norm(x.reshape(-1, x.shape[-1]), norm, _rest(x)).view(x.shape)


def _linears(parent: nn.Module, *names: str) -> list[AdaptedLinear] | None:
    """The layers of these names as the fused halves take them; None when one of them is not such a layer now."""
    layers = [getattr(parent, name) for name in names]
    for layer in layers:
        base: Any = layer.base_layer if isinstance(layer, LoraLinear) else layer
        if isinstance(base, nn.Linear):
            if type(base) is not nn.Linear or base.weight.dtype != torch.bfloat16:
                return None
            if base.weight.requires_grad and base is not layer:  # under an adapter it is taken for frozen
                return None
        elif not isinstance(base, QuantizedLinear) or base.rounds_inputs:
            return None
        if base.in_features % 2 or base.out_features % 2:
            return None
        if base.bias is not None and base.bias.dtype != torch.bfloat16:
            return None
        if isinstance(layer, LoraLinear) and layer.active in layer.lora_bias:
            return None
    return adapted_linears(layers)


def _layer_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """As transformers' forward of a decoder layer; each half on the native kernels when nothing unusual is asked of it.

    Recompute that the halves cannot do is done as transformers does it, for the whole layer.
    """
    given: dict[str, Any] = {
        "attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values,
        "use_cache": use_cache, "position_embeddings": position_embeddings, **kwargs,
    }  # fmt: skip
    if past_key_values is not None:
        return type(self).forward(self, hidden_states, **given)  # type: ignore[no-any-return]
    attention = _attention_half(self, hidden_states.shape[:2], attention_mask, position_embeddings, kwargs)
    mlp = _mlp_half(self)
    if _recompute(self) != "none" and torch.is_grad_enabled() and (attention is None or mlp is None):
        if _is_checkpointed(self):
            return type(self).forward(self, hidden_states, **given)  # type: ignore[no-any-return]
        whole = functools.partial(type(self).forward, self, **given)
        return checkpoint(whole, hidden_states, use_reentrant=False)  # type: ignore[no-any-return]
    x, rest = hidden_states.reshape(-1, hidden_states.shape[-1]), _rest(hidden_states)
    if attention is not None:
        x, rest = ops.attention_block(x, attention, rest)
    else:
        out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        x, rest = (hidden_states + out).reshape(x.shape), None
    if mlp is not None:
        x, rest = ops.mlp_block(x, mlp, rest)
    else:
        x, rest = x + self.mlp(self.post_attention_layernorm(x.view(hidden_states.shape))).reshape(x.shape), None
    y = x.view(hidden_states.shape)
    if rest is not None:
        y.veneer_rest = (rest, _version(y))  # type: ignore[attr-defined]
    return y


def _is_checkpointed(layer: Any) -> bool:
    """Whether transformers' own gradient checkpointing is on; its class's forward does it, which we stand in front of."""
    return layer.training and getattr(layer, "gradient_checkpointing", False)  # type: ignore[no-any-return]


def _recompute(layer: Any) -> Recompute:
    return "full" if _is_checkpointed(layer) else layer.veneer_recompute  # type: ignore[no-any-return]


def _rest(hidden_states: Tensor) -> Tensor | None:
    """What rounding took from the residual stream (T, D), left by the layer before on the very tensor it returned.

    Whoever puts another tensor in its place, or changes it, goes on from that one's 16 bits.
    """
    rest, version = getattr(hidden_states, "veneer_rest", (None, None))
    return rest if version == _version(hidden_states) else None


def _version(x: Tensor) -> int:
    """How often it was changed in place; inference mode does not count."""
    return -1 if x.is_inference() else x._version


def _attention_half(
    layer: Any, shape: torch.Size, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None, kwargs: dict[str, Any]
) -> Attention | None:
    attn, norm = layer.self_attn, _norm(layer.input_layernorm)
    if rotary is None or norm is None or not native.takes(norm.weight):
        return None
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    packed = cu_seqlens is not None and shape[0] == 1
    window = attn.sliding_window if hasattr(attn, "sliding_window") else getattr(attn.config, "sliding_window", None)
    longest = kwargs.get("max_length_q", shape[1]) if packed else shape[1]
    if (mask is not None and not packed) or (window and longest > window) or kwargs.get("output_attentions"):
        return None
    width = attn.head_dim
    fused = hasattr(attn, "qkv_proj")
    linears = _linears(attn, *(["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"]), "o_proj")
    if linears is None or width % 16 or width > native.MAX_WIDTH:
        return None
    if layer.training and getattr(attn, "attention_dropout", 0.0):
        return None
    heads, kv_heads = attn.config.num_attention_heads, attn.config.num_key_value_heads
    q_norm, k_norm = (_norm(attn.q_norm), _norm(attn.k_norm)) if hasattr(attn, "q_norm") else (None, None)
    if hasattr(attn, "q_norm") and (q_norm is None or k_norm is None):
        return None
    cos, sin, starts = _places(shape, rotary, cu_seqlens if packed else None)
    if not getattr(attn, "use_rope", True):
        cos = sin = None
    return Attention(
        norm, linears[:-1], linears[-1], heads, kv_heads, width, attn.scaling, cos, sin, starts, q_norm, k_norm,
        _recompute(layer),
    )  # fmt: skip


def _mlp_half(layer: Any) -> Mlp | None:
    mlp, norm = layer.mlp, _norm(layer.post_attention_layernorm)
    if norm is None or not native.takes(norm.weight):
        return None
    fused = hasattr(mlp, "gate_up_proj")
    linears = _linears(mlp, *(["gate_up_proj"] if fused else ["gate_proj", "up_proj"]), "down_proj")
    if linears is None:
        return None
    activation = ACTIVATIONS[type(mlp.activation_fn if fused else mlp.act_fn).__name__]
    return Mlp(norm, linears[:-1], linears[-1], activation, _recompute(layer))


_last: tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor]] | None = None


def _places(
    shape: torch.Size, rotary: tuple[Tensor, Tensor], cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin (tokens, half the rotated width) fp32 and the starts of the rows: made once a step, for all layers."""
    global _last
    if _last is None or _last[0] is not rotary[0] or _last[1] is not cu_seqlens:
        rows, length = shape
        half = rotary[0].shape[-1] // 2
        cos, sin = (x[..., :half].expand(rows, length, half).reshape(-1, half).float() for x in rotary)
        starts = torch.arange(rows + 1) * length if cu_seqlens is None else cu_seqlens
        _last = (rotary[0], cu_seqlens, (cos.contiguous(), sin.contiguous(), starts.to(torch.int32)))
    return _last[2]


# ---- attention of layers that are not recognised -------------------------------------------------------------------


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention; with `cu_seq_lens_q` (rows + 1 starts, int32) each packed row sees only itself.

    query (B, H, T, D), key and value (B, H_kv, T, D) -> (B, T, H, D). Without it: transformers' sdpa, unchanged.
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    whole = query.shape[0] == 1 and query.shape[2] == key.shape[2]
    unusual = any(kwargs.get(name) for name in ("softcap", "dropout"))
    window = kwargs.get("sliding_window")
    if window and window < kwargs.get("max_length_q", query.shape[2]):
        unusual = True
    if query.is_meta and (cu_seqlens is None or not whole or unusual):
        return dry_run.attention(query, key, value).transpose(1, 2), None
    if cu_seqlens is None or not whole or unusual:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if native.takes(query, key, value) and query.shape[-1] % 16 == 0 and query.shape[-1] == value.shape[-1]:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return ops.attention(q, k, v, None, None, cu_seqlens, scale)[None], None
    attend = functools.partial(
        F.scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    rows = [
        (dry_run.attention if query.is_meta else attend)(*(x[:, :, start:end] for x in (query, key, value)))
        for start, end in itertools.pairwise(_starts(cu_seqlens))
    ]
    return torch.cat(rows, 2).transpose(1, 2), None


_last_starts: tuple[Tensor, list[int]] | None = None


def _starts(cu_seqlens: Tensor) -> list[int]:
    """Read once a step, for all layers: a GPU is waited for."""
    global _last_starts
    if _last_starts is None or _last_starts[0] is not cu_seqlens:
        _last_starts = (cu_seqlens, cu_seqlens.tolist())
    return _last_starts[1]


def causal_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask for sdpa; None as well for rows padded on the right, where it changes nothing that is learned:

    under causal attention no real token sees the padding behind it.
    """
    padding = kwargs.get("attention_mask")
    plain = kwargs.get("allow_is_causal_skip", True) and kwargs.get("local_size") is None
    if plain and padding is not None and padding.dim() == 2:
        whole = padding.shape[1] == kwargs.get("q_length") == kwargs.get("kv_length")
        if whole and bool((padding[:, 1:] <= padding[:, :-1]).all()):
            kwargs["attention_mask"] = None
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, causal_mask)
