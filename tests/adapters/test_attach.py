import warnings

import pytest
import torch
from conftest import make_model
from transformers import AutoConfig, AutoModelForCausalLM

import veneer


def mixture():
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        pad_token_id=256, bos_token_id=257, eos_token_id=256,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_a_preset_that_leaves_out_the_experts_says_so():
    frozen = 2 * 4 * 3 * 32 * 16  # layers, experts, matrices of one
    with pytest.warns(
        UserWarning, match=rf"{frozen:,} parameters stay frozen in model\.layers\.0\.mlp\.experts, model"
    ):
        veneer.attach(mixture(), veneer.LoraConfig(r=2))


@pytest.mark.parametrize(("make", "targets"), [(mixture, ["q_proj"]), (make_model, "all-linear"), (make_model, "mlp")])
def test_no_warning_without_experts_in_what_was_asked(make, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.attach(make(), veneer.LoraConfig(r=2, targets=targets))
