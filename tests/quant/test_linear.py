import copy

import pytest
import torch
from conftest import make_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from veneer.errors import VeneerError
from veneer.quant import bnb_format
from veneer.quant.linear import Nf4Linear, quantize_model
from veneer.quant.nf4 import Nf4Tensor

CASES = [(48, 96), (7, 5), (1, 64), (33, 100)]


def make(out, inner, double=True, bias=True):
    torch.manual_seed(0)
    return Nf4Linear.from_linear(nn.Linear(inner, out, bias=bias), double_quant=double, compute_dtype=torch.float32)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", CASES)
def test_forward_and_gradient_equal_a_dense_layer(shape, double):
    layer = make(*shape, double)
    dense = layer.dequantize(torch.float32)
    x = torch.randn(3, 2, shape[1], requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, layer.bias), rtol=0, atol=0)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ dense)


def test_nothing_dense_is_saved_for_backward():
    layer, saved = make(48, 96), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(4, 96, requires_grad=True))
    assert not saved


def test_train_eval_train_leaves_the_gradient_unchanged():
    layer, x = make(48, 96), torch.randn(4, 96, requires_grad=True)
    first = torch.autograd.grad(layer(x).square().sum(), x)[0]
    with torch.no_grad():
        layer.eval()(x)
    assert torch.equal(torch.autograd.grad(layer.train()(x).square().sum(), x)[0], first)


def test_works_under_checkpointing():
    layer, x = make(48, 96), torch.randn(4, 96, requires_grad=True)
    plain = torch.autograd.grad(layer(x).sum(), x)[0]
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)[0]
    assert torch.equal(plain, again)


def test_casting_the_model_keeps_codes_and_constants():
    layer = make(48, 96)
    before = layer.dequantize(torch.float32)
    layer.bfloat16().half().float()
    assert layer.weight.dtype == torch.uint8 and layer.nested_absmax.dtype == torch.float32
    assert torch.equal(layer.dequantize(torch.float32), before)


def test_copy_and_state_dict_round_trip():
    layer, other = make(48, 96), make(48, 96)
    other.weight.zero_()
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), other):
        assert torch.equal(twin.dequantize(), layer.dequantize())


def test_size_is_about_four_bits():
    tensor = Nf4Tensor.quantize(torch.randn(512, 512))
    assert 4.12 < 8 * tensor.nbytes / 512**2 < 4.14


def test_bad_weights_are_refused():
    weight = torch.randn(8, 64)
    weight[3, 3] = float("nan")
    with pytest.raises(VeneerError, match="NaN"):
        Nf4Tensor.quantize(weight)
    with pytest.raises(VeneerError, match="expected floating-point"):
        Nf4Tensor.quantize(torch.ones(4, 4, dtype=torch.int32))


def test_model_keeps_head_embeddings_and_norms():
    model = make_model()
    names = quantize_model(model, compute_dtype=torch.float32)
    assert len(names) == 14 and isinstance(model.model.layers[0].mlp.up_proj, Nf4Linear)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_layout_round_trip(double):
    layer = make(33, 100, double)
    tensors = bnb_format.pack_layer(layer)
    again = bnb_format.unpack_layer(tensors, "q", torch.float32)
    assert torch.equal(again.dequantize(), layer.dequantize()) and torch.equal(again.bias, layer.bias)


def test_bitsandbytes_layout_damage_is_named():
    tensors = bnb_format.pack_layer(make(33, 100))
    with pytest.raises(VeneerError, match=r"q\.weight: found"):
        bnb_format.unpack_layer({**tensors, "weight": tensors["weight"][:-1]}, "q", torch.float32)
    with pytest.raises(VeneerError, match="missing"):
        bnb_format.unpack_layer({"weight": tensors["weight"]}, "q", torch.float32)
    with pytest.raises(VeneerError, match="not the JSON"):
        bnb_format.unpack_layer(
            {**tensors, bnb_format.STATE_KEY: torch.zeros(3, dtype=torch.uint8)}, "q", torch.float32
        )
