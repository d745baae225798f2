"""Tiny real models built here: a Llama of two layers and a byte-level tokenizer with a chat template."""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from veneer.adapters.attach import adapter_parameters
from veneer.models.fuse import fuse

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(seed=0, dtype=torch.float32, fused=True, **changes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 258, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "eos_token_id": 256, "bos_token_id": 257, "pad_token_id": 256,
    } | changes  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()
    if fused:
        fuse(model)
    return model


def make_mixture(kind="mixtral"):
    own = {
        "mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
        "gpt_oss": {"num_local_experts": 4},
        "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    }  # fmt: skip
    config = AutoConfig.for_model(
        kind, vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, pad_token_id=256, bos_token_id=257,
        eos_token_id=256, **own[kind],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def randomised(model, name="default"):
    """Every parameter of an adapter moved, the same way each time."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_((torch.randn(parameter.shape, generator=g) * 0.1).to(parameter))
    return model


@pytest.fixture(autouse=True)
def _gpu_only_where_marked(request, monkeypatch):
    """A test without the mark `gpu` is about the CPU, also on a machine with a GPU, where device "auto" is that."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def commands(tmp_path):
    path = tmp_path / "commands.jsonl"
    rows = [{"prompt": f"switch lamp {i} on", "completion": f"on {i % 7}"} for i in range(37)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
