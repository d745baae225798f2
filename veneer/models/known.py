"""Sizes of known models, from their papers and configs: enough to plan for one that is not here."""

from __future__ import annotations

from typing import Any


def _llama(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> tuple[str, dict[str, Any]]:
    sizes = {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    return "llama", sizes


# GPT-3 is built as a GPT-Neo: its shapes, with q, k, v apart.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt3": ("gpt_neo", {
        "hidden_size": 12288, "num_layers": 96, "num_heads": 96, "attention_types": [[["global"], 96]],
        "vocab_size": 50257, "max_position_embeddings": 2048,
    }),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": _llama(5120, 13824, 40, 40, 40, 32000),
    "llama-33b": _llama(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": _llama(8192, 22016, 80, 64, 64, 32000),
    "llama2-70b": _llama(8192, 28672, 80, 64, 8, 32000),
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "mistral-7b": ("mistral", _llama(4096, 14336, 32, 32, 8, 32000)[1]),
}  # fmt: skip
