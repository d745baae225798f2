import pytest
import torch
from conftest import make_model
from torch import nn

import veneer
from veneer.adapters.attach import adapter_parameters, lora_layers
from veneer.adapters.lora import LoraLinear, initial_factor
from veneer.adapters.targets import resolve_targets
from veneer.ops import reference
from veneer.ops.blocks import AdaptedLinear
from veneer.quant.linear import QuantizedLinear, quantize_model

IDS = torch.arange(1, 30)[None]


@pytest.mark.parametrize("shape", [(48, 96), (7, 5), (100, 33)])
@pytest.mark.parametrize("kind", [None, "nf4", "fp4", "int8"])
def test_layer_equals_reference_with_all_gradients(shape, kind):
    torch.manual_seed(0)
    out, inner = shape
    base = nn.Linear(inner, out).requires_grad_(False)
    if kind:
        base = QuantizedLinear.from_linear(base, kind, compute_dtype=torch.float32)
    layer = LoraLinear(base)
    layer.add("a", torch.randn(3, inner), torch.randn(out, 3), scaling=0.7)
    layer.active = "a"
    weight = base.dequantize(torch.float32) if kind else base.weight
    x = torch.randn(4, 2, inner, requires_grad=True)
    inputs = (x, layer.lora_A["a"], layer.lora_B["a"])
    expected = reference.linear(x, AdaptedLinear(weight, base.bias, inputs[1], inputs[2], 0.7))
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(found)
    for a, b in zip(torch.autograd.grad(found, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_is_the_base_exactly(four_bit, dtype):
    model = make_model(dtype=dtype)
    if four_bit:
        quantize_model(model, compute_dtype=dtype)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        veneer.attach(model, veneer.LoraConfig(r=4))
        after = model(input_ids=IDS).logits
    assert torch.equal(before, after)


def test_no_adapter_active_is_the_base_exactly():
    model = make_model()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        veneer.attach(model, veneer.LoraConfig(r=4))
        for name, p in adapter_parameters(model, "default").items():
            p.add_(1.0 if "lora_B" in name else 0.0)
        assert not torch.equal(model(input_ids=IDS).logits, before)
        veneer.set_adapter(model, None)
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_base_frozen_and_its_dropout_off_in_train_mode():
    model = make_model(attention_dropout=0.5)
    veneer.attach(model, veneer.LoraConfig(r=4))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    model.train()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_adapter_dropout_only_while_training():
    model = make_model()
    veneer.attach(model, veneer.LoraConfig(r=4, dropout=0.5))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["default"])
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
        model.train()
        assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_scaling_and_rslora():
    assert veneer.LoraConfig(r=16, alpha=32).scaling == 2
    assert veneer.LoraConfig(r=16, alpha=32, rslora=True).scaling == 8


def test_initial_factors():
    a = initial_factor((64, 1000), 64, "kaiming")
    assert float(a.abs().max()) <= 1000**-0.5 and float(a.std()) == pytest.approx((3000) ** -0.5, rel=0.05)
    assert float(initial_factor((64, 1000), 64, "gaussian").std()) == pytest.approx(1 / 64, rel=0.05)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("attention", 8),
        ("mlp", 6),
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (r".*layers\.1\..*proj", 7),
        (["lm_head"], 1),
    ],
)
def test_targets(targets, count):
    assert len(resolve_targets(make_model(), targets)) == count


def test_bad_targets_and_ranks_say_what_exists():
    model = make_model()
    with pytest.raises(veneer.VeneerError, match="q_proj") as caught:
        veneer.attach(model, veneer.LoraConfig(targets=["q_prj", "nothing"]))
    assert len(caught.value.problems) == 2
    with pytest.raises(veneer.VeneerError, match="not a valid regex"):
        veneer.attach(model, veneer.LoraConfig(targets="(q"))
    with pytest.raises(veneer.VeneerError, match="at most 24"):
        veneer.attach(model, veneer.LoraConfig(r=40))
    with pytest.raises(veneer.VeneerError, match="found 0"):
        veneer.LoraConfig(r=0)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_count_and_remove():
    model = make_model()
    before = [n for n, _ in model.named_modules()]
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj"]))
    assert veneer.count_parameters(model).trainable == 2 * 2 * (48 + 48)
    veneer.remove_adapter(model, "default")
    assert [n for n, _ in model.named_modules()] == before
