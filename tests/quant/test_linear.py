import copy
import json

import pytest
import torch
from conftest import make_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from veneer import ops
from veneer.errors import VeneerError
from veneer.quant import bnb_format
from veneer.quant.linear import QuantizedLinear, quantize, quantize_model, quantized_layers

CASES = [(48, 96), (7, 5), (1, 64), (33, 100)]
KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]
each_kind = pytest.mark.parametrize(("kind", "double"), KINDS)


def make(out, inner, kind="nf4", double=True, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    dense = nn.Linear(inner, out, bias=bias)
    return QuantizedLinear.from_linear(dense, kind, double_quant=double, compute_dtype=dtype)


@each_kind
@pytest.mark.parametrize("shape", CASES)
def test_forward_and_gradient_equal_a_dense_layer(shape, kind, double):
    layer = make(*shape, kind, double)
    dense = layer.dequantize(torch.float32)
    x = torch.randn(3, 2, shape[1], requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, layer.bias), rtol=0, atol=0)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ dense)


@each_kind
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_forward_and_gradient_in_bf16(kind, double, rows):
    layer = make(64, 96, kind, double, dtype=torch.bfloat16)
    x = torch.randn(rows, 96).bfloat16().requires_grad_()
    dense = layer.dequantize(torch.bfloat16).float()
    y, exact = layer(x), x.float() @ dense.T + layer.bias
    torch.testing.assert_close(y.float(), exact, rtol=1e-2, atol=1e-2)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx.float(), dy.float() @ dense, rtol=1e-2, atol=1e-2)


@each_kind
def test_nothing_dense_is_saved_for_backward(kind, double):
    layer, saved = make(48, 96, kind, double), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(4, 96, requires_grad=True))
    assert not saved


@each_kind
def test_train_eval_train_leaves_the_gradient_unchanged(kind, double):
    layer, x = make(48, 96, kind, double), torch.randn(4, 96, requires_grad=True)
    first = torch.autograd.grad(layer(x).square().sum(), x)[0]
    with torch.no_grad():
        layer.eval()(x)
    assert torch.equal(torch.autograd.grad(layer.train()(x).square().sum(), x)[0], first)


def test_works_under_checkpointing():
    layer, x = make(48, 96), torch.randn(4, 96, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), x)[0]
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)[0]
    assert torch.equal(plain, again)


@each_kind
def test_casting_the_model_keeps_codes_and_constants(kind, double):
    layer = make(48, 96, kind, double)
    before, types = layer.dequantize(torch.float32), {name: b.dtype for name, b in layer.named_buffers()}
    layer.bfloat16().half().float()
    assert {name: b.dtype for name, b in layer.named_buffers()} == types
    assert torch.equal(layer.dequantize(torch.float32), before)


@each_kind
def test_copy_and_state_dict_round_trip(kind, double):
    layer, other = make(48, 96, kind, double), make(48, 96, kind, double)
    other.weight.zero_()
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), other):
        assert torch.equal(twin.dequantize(), layer.dequantize())


@pytest.mark.parametrize(
    ("kind", "double", "least", "most"),
    [("nf4", True, 4.12, 4.14), ("fp4", True, 4.12, 4.14), ("fp4", False, 4.5, 4.5), ("int8", False, 8.06, 8.07)],
)
def test_bits_a_weight(kind, double, least, most):
    tensor = quantize(torch.randn(512, 512), kind, double_quant=double)
    assert least <= 8 * tensor.nbytes / 512**2 <= most


def test_outliers_in_16_bits_where_a_threshold_is_set_and_only_without_gradients():
    layer = make(48, 96, "int8").eval()
    x = torch.randn(5, 96)
    x[:, 7] = 50.0
    plain = layer(x)
    layer.outlier_threshold = 6.0
    with torch.no_grad():
        mixed = layer(x)
    expected = ops.mixed_int8_product(x, layer.weight, layer.absmax, layer.bias, 6.0)
    assert torch.equal(mixed, expected) and not torch.equal(mixed, plain)
    assert torch.equal(layer(x.clone().requires_grad_()), plain) and torch.equal(layer.train()(x), plain)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bad_weights_are_refused(kind):
    weight = torch.randn(8, 64)
    for value in (float("nan"), float("inf")):
        weight[3, 3] = value
        with pytest.raises(VeneerError, match=f"{kind}: found NaN or Inf"):
            quantize(weight, kind)
    for wrong in (torch.ones(4, 4, dtype=torch.int32), torch.ones(0, 4)):
        with pytest.raises(VeneerError, match="expected floating-point"):
            quantize(wrong, kind)


def test_int8_refuses_what_fp16_cannot_hold():
    with pytest.raises(VeneerError, match="int8: found weights beyond 65,504"):
        quantize(torch.full((2, 2), 1e5), "int8")


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_all_bad_layers_of_a_model_are_named_at_once(kind):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
        model.model.layers[1].self_attn.q_proj.weight[3, 3] = float("inf")
    with pytest.raises(VeneerError) as caught:
        quantize_model(model, kind)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_model_keeps_head_embeddings_and_norms(kind):
    model = make_model()
    names = quantize_model(model, kind, compute_dtype=torch.float32)
    assert len(names) == 14 and list(quantized_layers(model)) == names
    assert model.model.layers[0].mlp.up_proj.kind == kind
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight


# ---- bitsandbytes' layout -----------------------------------------------------------------------------------------


@each_kind
def test_bitsandbytes_layout_round_trip(kind, double):
    layer = make(33, 100, kind, double)
    again = bnb_format.unpack_layer(bnb_format.pack_layer(layer), "q", torch.float32)
    assert again.kind == kind and again.double_quant == double
    assert torch.equal(again.dequantize(), layer.dequantize()) and torch.equal(again.bias, layer.bias)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_codes_stored_as_another_type_are_the_same_codes(storage):
    layer = make(16, 64, "fp4")
    tensors = bnb_format.pack_layer(layer)
    stored = {**tensors, "weight": tensors["weight"].view(-1).view(storage).view(-1, 1)}
    assert torch.equal(bnb_format.unpack_layer(stored, "q", torch.float32).weight, layer.weight)


def state(tensors, kind="nf4", **changes):
    """The JSON of a 4-bit layer with some values changed."""
    key = bnb_format.STATE + kind
    values = json.loads(bytes(tensors[key].tolist())) | changes
    return {key: torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)}


DAMAGE_4BIT = {
    "no absmax": (lambda t: t.pop("weight.absmax"), r"q\.weight\.absmax: missing"),
    "no weight": (lambda t: t.pop("weight"), r"q\.weight: missing"),
    "no state": (lambda t: t.pop(bnb_format.STATE + "nf4"), "found 0, expected one"),
    "two states": (lambda t: t.update({bnb_format.STATE + "fp4": t[bnb_format.STATE + "nf4"]}), "found 2, expected one"),
    "a short weight": (lambda t: t.update(weight=t["weight"][:-1]), r"q\.weight: found 1649 elements"),
    "state no JSON": (lambda t: t.update({bnb_format.STATE + "nf4": torch.zeros(3, dtype=torch.uint8)}), "not the JSON"),
    "another type": (lambda t: t.update(state(t, quant_type="af4")), "found af4 of shape"),
    "other blocks": (lambda t: t.update(state(t, blocksize=128)), "in blocks of 128"),
    "three dimensions": (lambda t: t.update(state(t, shape=[3, 11, 100])), r"of shape \(3, 11, 100\)"),
    "another code-book": (lambda t: t.update({"weight.quant_map": torch.zeros(16)}), "other values than those of nf4"),
    "no nested absmax": (lambda t: t.pop("weight.nested_absmax"), "nested_absmax: missing"),
    "NaN in the constants": (lambda t: t["weight.nested_absmax"].fill_(torch.nan), "nested_absmax: found NaN or Inf"),
    "an offset that is NaN": (lambda t: t.update(state(t, nested_offset=float("nan"))), "nested_offset nan"),
    "constants of another type": (lambda t: t.update({"weight.absmax": torch.ones(52)}), "expected 52 of torch.uint8"),
    "a bias of another size": (lambda t: t.update(bias=torch.ones(7)), r"q\.bias: found \(7,\), expected \(33,\)"),
}  # fmt: skip
DAMAGE_INT8 = {
    "no weight": (lambda t: t.pop("weight"), r"q\.weight: missing"),
    "another type": (lambda t: t.update(weight=t["weight"].float()), "expected torch.int8"),
    "a flat weight": (lambda t: t.update(weight=t["weight"].view(-1)), "expected torch.int8"),
    "scales of another size": (lambda t: t.update(SCB=torch.ones(7)), r"q\.SCB: found torch.float32 \(7,\)"),
    "whole numbers as scales": (
        lambda t: t.update(SCB=torch.ones(33, dtype=torch.int32)),
        r"q\.SCB: found torch.int32",
    ),
    "NaN in the scales": (lambda t: t["SCB"].fill_(torch.nan), "SCB: found NaN or Inf"),
    "another format": (lambda t: t.update(weight_format=torch.tensor(2, dtype=torch.uint8)), "expected 0"),
}


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [("nf4", *case) for case in DAMAGE_4BIT.values()] + [("int8", *case) for case in DAMAGE_INT8.values()],
    ids=[f"nf4: {name}" for name in DAMAGE_4BIT] + [f"int8: {name}" for name in DAMAGE_INT8],
)
def test_damage_is_named(kind, damage, message):
    tensors = bnb_format.pack_layer(make(33, 100, kind))
    damage(tensors)
    with pytest.raises(VeneerError, match=message):
        bnb_format.unpack_layer(tensors, "q", torch.float32)


def test_all_problems_of_a_layer_are_named_at_once():
    tensors = bnb_format.pack_layer(make(33, 100))
    tensors |= {"weight": tensors["weight"][:-1], "bias": torch.ones(7), "weight.quant_map": torch.zeros(16)}
    with pytest.raises(VeneerError) as caught:
        bnb_format.unpack_layer(tensors, "q", torch.float32)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "q.weight",
        "q.weight.quant_map",
        "q.bias",
    ]


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),
        ({"load_in_8bit": True, "load_in_4bit": False, "bnb_4bit_quant_type": "fp4"}, "int8"),
        ({"quant_method": "gptq", "load_in_4bit": True}, None),
        ({"quant_method": "bitsandbytes"}, None),
        (["nf4"], None),
    ],
)
def test_what_a_config_says(config, kind):
    assert bnb_format.stored_kind(config) == kind
