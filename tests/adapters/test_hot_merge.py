"""Serving one adapter at a time from merged weights: the same logits, quick changes, and the base back bit for bit."""

import copy

import pytest
import torch
from conftest import make_mixture, make_model, randomised
from safetensors.torch import load_file, save_file

import veneer
from veneer.adapters.attach import active_adapter, adapter_parameters, remove_adapter
from veneer.models.fuse import fuse
from veneer.quant.linear import quantize_model

IDS = torch.arange(1, 30)[None]


def quantised(kind):
    def make():
        model = make_model(fused=False)
        quantize_model(model, kind, compute_dtype=torch.float32)
        fuse(model)
        return model

    return make


ALL = {"targets": "all-linear"}
CASES = {
    "plain": (make_model, ALL),
    "not fused": (lambda: make_model(fused=False), ALL),
    "DoRA": (make_model, {**ALL, "dora": True}),
    "nf4": (quantised("nf4"), ALL),
    "int8": (quantised("int8"), ALL),
    "nf4, DoRA": (quantised("nf4"), {**ALL, "dora": True}),
    "embedding and head, tied": (make_model, {"targets": ["embed_tokens", "lm_head", "v_proj"]}),
    "biases": (lambda: make_model(attention_bias=True), {"targets": "attention", "lora_bias": True, "bias": "all"}),
    "tokens and modules": (make_model, {"targets": ["q_proj"], "tokens": [5, 9], "modules_to_save": ["norm"]}),
    "experts": (make_mixture, ALL),
    "experts, gpt_oss": (lambda: make_mixture("gpt_oss"), ALL),
}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def weights(model):
    """All of the base: parameters and buffers by identity, and their values."""
    veneer.set_adapter(model, None)
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    found = {key: value for key, value in found.items() if "lora_" not in key and "token_rows" not in key}
    return found, {key: value.detach().clone() for key, value in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_merged_logits_and_the_base_bit_for_bit(case, tmp_path):
    make, settings = CASES[case]
    model = make()
    for seed, name in enumerate(("one", "two")):
        veneer.attach(model, veneer.LoraConfig(r=4, **settings), name=name, seed=seed)
        randomised(model, name)
    for parameter in adapter_parameters(model, "two").values():
        parameter.data.mul_(-0.7)
    there, before = weights(model)
    plain = logits(model)
    expected = {}
    for name in ("one", "two"):
        veneer.set_adapter(model, name)
        expected[name] = logits(model)
    assert float((expected["one"] - expected["two"]).abs().max()) > 0.01
    for name in ("one", "two", "one", "one"):  # without putting the base back between
        veneer.hot_merge(model, name)
        torch.testing.assert_close(logits(model), expected[name], rtol=1e-4, atol=1e-4)
        assert active_adapter(model) == name
    veneer.save_adapter(model, tmp_path / "merged")
    veneer.unmerge(model)
    assert torch.equal(logits(model), expected["one"])
    veneer.save_adapter(model, tmp_path / "apart")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("merged", "apart")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[1])
    veneer.hot_merge(model, "two")
    now, values = weights(model)  # set_adapter(None) takes it out again
    assert now.keys() == there.keys() and all(now[key] is there[key] for key in there)
    assert all(torch.equal(values[key], before[key]) for key in before)
    assert torch.equal(logits(model), plain)


def test_in_bf16_within_rounding_and_swapped_in_the_same_memory():
    model = make_model(dtype=torch.bfloat16)
    for seed, name in enumerate(("one", "two")):
        veneer.attach(model, veneer.LoraConfig(r=4, **ALL), name=name, seed=seed)
        randomised(model, name)
    layer = model.model.layers[0].mlp.up_proj
    original = layer.weight
    veneer.hot_merge(model, "one")
    one = layer.weight
    exact = original.double() + layer.scaling["one"] * layer.lora_B["one"].double() @ layer.lora_A["one"].double()
    off = (one.double() - exact).abs() > 1.001 * 2.0**-8 * exact.abs()  # half a unit in the last place, at most
    assert not off.any() and one.data_ptr() != original.data_ptr()
    veneer.hot_merge(model, "two")
    assert layer.weight.data_ptr() == one.data_ptr()
    veneer.unmerge(model)
    veneer.unmerge(model)  # nothing more to put back
    assert layer.weight is original


def test_what_follows_a_hot_merge():
    model = randomised(veneer.attach(make_model(), veneer.LoraConfig(r=4, **ALL), seed=0))
    expected, plain = logits(model), logits(make_model())
    veneer.hot_merge(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert not loss.requires_grad  # nothing is trained through merged weights
    veneer.set_adapter(model, "default")
    assert model(input_ids=IDS, labels=IDS).loss.requires_grad
    veneer.hot_merge(model)
    merged = veneer.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    remove_adapter(model, "default")
    assert torch.equal(logits(model), plain) and not model.__dict__.get("veneer_merged")


def test_an_adapter_that_is_loaded_to_wait_leaves_the_merge_and_what_is_active(tmp_path):
    model = randomised(veneer.attach(make_model(), veneer.LoraConfig(r=4, **ALL), seed=0))
    more = {"targets": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}
    other = randomised(veneer.attach(make_model(), veneer.LoraConfig(r=2, **more), seed=1))
    path = veneer.save_adapter(other, tmp_path / "other")
    veneer.hot_merge(model)
    merged = logits(model)
    veneer.load_adapter(model, path, "other", activate=False)
    assert torch.equal(logits(model), merged) and model.__dict__["veneer_merged"]
    assert not any(p.requires_grad for p in adapter_parameters(model, "other").values())
    veneer.hot_merge(model, "other")
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-4)
    veneer.hot_merge(model, "default")
    torch.testing.assert_close(logits(model), merged, rtol=1e-6, atol=1e-6)
    plain = veneer.load_adapter(make_model(), path, "waits", activate=False)
    assert torch.equal(logits(plain), logits(make_model())) and active_adapter(plain) is None


def test_copies_of_the_base_are_compared_with_the_base_and_not_with_what_is_merged(tmp_path):
    model = randomised(veneer.attach(make_model(), veneer.LoraConfig(r=4, targets=["embed_tokens", "q_proj"]), seed=0))
    other = randomised(veneer.attach(make_model(), veneer.LoraConfig(r=2, targets=["q_proj"]), seed=1))
    path = veneer.save_adapter(other, tmp_path / "other")
    tensors, base = load_file(path / "adapter_model.safetensors"), make_model().model.embed_tokens.weight.detach()
    save_file(
        {**tensors, "base_model.model.model.embed_tokens.weight": base.clone()}, path / "adapter_model.safetensors"
    )
    veneer.hot_merge(model)
    assert not torch.equal(model.model.embed_tokens.weight, base)
    veneer.load_adapter(model, path, "other", activate=False)


def test_what_cannot_be_merged():
    with pytest.raises(veneer.VeneerError, match="no active adapter to merge"):
        veneer.hot_merge(make_model())
    model = veneer.attach(make_model(), veneer.LoraConfig(r=4, **ALL))
    with pytest.raises(veneer.VeneerError, match="is not on this model"):
        veneer.hot_merge(model, "other")
    next(iter(adapter_parameters(model, "default").values())).data[0, 0] = float("nan")
    with pytest.raises(veneer.VeneerError, match="holds NaN or Inf"):
        veneer.hot_merge(model)
    model = veneer.attach(make_model(dtype=torch.float16, fused=False), veneer.LoraConfig(r=4, targets=["q_proj"]))
    for parameter in adapter_parameters(model, "default").values():
        parameter.data.fill_(1e4)
    with pytest.raises(veneer.VeneerError, match="holds NaN or Inf"):
        veneer.hot_merge(model)
    assert "veneer_merged" not in model.__dict__
