import json

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM

import veneer
from veneer.adapters.attach import adapter_parameters
from veneer.quant.linear import quantize_model

IDS = torch.arange(1, 30)[None]


def adapted(targets, four_bit=False):
    model = make_model()
    if four_bit:
        quantize_model(model, compute_dtype=torch.float32)
    veneer.attach(model, veneer.LoraConfig(r=4, targets=targets))
    for parameter in adapter_parameters(model, "default").values():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_same_logits_and_a_plain_model(four_bit, tmp_path, tokenizer):
    model = adapted("all-linear", four_bit)
    before = logits(model)
    merged = veneer.merge(model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)
    veneer.save_model(merged, tokenizer, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_tied_head_gets_its_own_weight_and_the_embeddings_stay(four_bit, tmp_path, tokenizer):
    model = adapted(["q_proj", "lm_head"], four_bit)
    before, embeddings = logits(model), model.get_input_embeddings().weight.clone()
    merged = veneer.merge(model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    merged.tie_weights()  # transformers does so now and then: the config must say that nothing is tied
    veneer.save_model(merged, tokenizer, tmp_path / "ours")
    merged.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["tie_word_embeddings"] is False
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(veneer.load(tmp_path / "ours", dtype="float32")[0]), before, rtol=1e-5, atol=1e-5)


def test_a_head_without_an_update_stays_tied():
    merged = veneer.merge(adapted("all-linear"))
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.get_input_embeddings().weight
