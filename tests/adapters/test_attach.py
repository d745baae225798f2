import warnings

import pytest
import torch
from conftest import make_model
from transformers import AutoConfig, AutoModelForCausalLM

import veneer
from veneer.adapters.attach import lora_layers
from veneer.errors import VeneerError


def mixture(kind="mixtral"):
    own = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16}}
    config = AutoConfig.for_model(
        kind, vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, pad_token_id=256, bos_token_id=257,
        eos_token_id=256, **own[kind],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(("kind", "width"), [("mixtral", 64), ("qwen3_moe", 16)])
def test_a_preset_that_leaves_out_the_experts_says_so(kind, width):
    frozen = 2 * 4 * 3 * 32 * width  # layers, experts, matrices of one
    model = mixture(kind)
    with pytest.warns(
        UserWarning, match=rf"{frozen:,} parameters stay frozen in model\.layers\.0\.mlp\.experts, model"
    ):
        veneer.attach(model, veneer.LoraConfig(r=2))
    assert {name.split(".")[3] for name in lora_layers(model)} == {"self_attn"}


@pytest.mark.parametrize("targets", ["mlp", ["q_proj", "down_proj"], r".*experts.*"])
def test_targets_in_the_experts_alone_say_why_nothing_is_there(targets):
    model = mixture()
    with pytest.raises(VeneerError, match=r"model\.layers\.0\.mlp\.experts.* are parameters, not linears") as caught:
        veneer.attach(model, veneer.LoraConfig(r=2, targets=targets))
    assert len(caught.value.problems) == 1 and not lora_layers(model)


def test_a_rank_too_large_is_one_problem_for_each_kind_of_layer():
    with pytest.raises(VeneerError) as caught:
        veneer.attach(make_model(), veneer.LoraConfig(r=40, targets="attention"))
    assert caught.value.problems == [
        f"lora.r: found 40, expected at most 24 for {kind} (24 x 48)" for kind in ("k_proj", "v_proj")
    ]


def test_a_dense_model_says_nothing_of_experts():
    with pytest.raises(VeneerError, match="matches no layer") as caught:
        veneer.attach(make_model(), veneer.LoraConfig(r=2, targets=["w_proj"]))
    assert "experts" not in str(caught.value) and "q_proj" in str(caught.value)


@pytest.mark.parametrize(("make", "targets"), [(mixture, ["q_proj"]), (make_model, "all-linear"), (make_model, "mlp")])
def test_no_warning_without_experts_in_what_was_asked(make, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.attach(make(), veneer.LoraConfig(r=2, targets=targets))
