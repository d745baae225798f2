"""Against bitsandbytes: the same codes and constants bit for bit, and each other's folders."""

import pytest
import torch
from conftest import make_model

import veneer
from veneer import ops
from veneer.quant.linear import QuantizedLinear, quantize, quantized_layers

bnb = pytest.importorskip("bitsandbytes")

SHAPES = [(1,), (2,), (63,), (64,), (65,), (127, 5), (48, 96), (33, 77), (576, 1536), (1000, 333)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
four_bit = pytest.mark.parametrize("kind", ["nf4", "fp4"])


def weight(shape, dtype, size="normal"):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05
    if size == "zero blocks":
        w.view(-1)[: max(1, w.numel() // 2)] = 0
    return w.to(dtype)


@four_bit
@pytest.mark.parametrize("size", ["normal", "zero blocks"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_absmax_and_nested_constants_are_bit_equal(shape, dtype, size, kind):
    w = weight(shape, dtype, size)
    q, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=False)
    packed, absmax = ops.quantize_4bit(w, kind)
    assert torch.equal(packed, q.view(-1)) and torch.equal(absmax, state.absmax)
    q, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=True)
    codes, nested, offset = ops.double_quantize(absmax)
    assert torch.equal(packed, q.view(-1)) and torch.equal(codes, state.absmax.view(-1))
    assert torch.equal(nested, state.state2.absmax) and torch.equal(offset, state.offset)


# bitsandbytes 0.50 decodes (48, 96), whose rows are no multiple of 64, wrongly on this CPU: not code * absmax
@four_bit
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (48, 96)])
@pytest.mark.parametrize("double", [True, False])
def test_dequantised_weights_are_bit_equal(shape, double, kind):
    w = weight(shape, torch.float32)
    q, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=double)
    packed, absmax = ops.quantize_4bit(w, kind)
    if double:
        absmax = ops.double_dequantize(*ops.double_quantize(absmax))
    expected = bnb.functional.dequantize_4bit(q, state).view(shape)
    assert torch.equal(ops.dequantize_4bit(packed, absmax, w.shape, torch.float32, kind=kind), expected)


@four_bit
def test_the_tables_are_theirs(kind):
    assert torch.equal(bnb.functional.create_dynamic_map(), ops.reference.DYNAMIC_MAP)
    assert torch.equal(bnb.functional.get_4bit_type(kind, device="cpu"), ops.reference.CODE_BOOKS[kind].values)


def their_int8(w, threshold):
    layer = bnb.nn.Linear8bitLt(w.shape[1], w.shape[0], bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (48, 96), (33, 77), (576, 1536)])
def test_int8_codes_scales_and_values_are_bit_equal(shape, dtype):
    w = weight(shape, dtype)
    w[0] = 0
    theirs, ours = their_int8(w, 0.0).weight, quantize(w, "int8")
    assert torch.equal(ours.codes, theirs.data) and torch.equal(ours.absmax, theirs.SCB)
    for out in DTYPES:  # as their layers multiply; their int8_vectorwise_dequant rounds once more
        assert torch.equal(ours.dequantize(out), theirs.data.to(out).mul_(theirs.SCB.unsqueeze(1).mul(1.0 / 127.0)))
    torch.testing.assert_close(
        ours.dequantize(torch.float32),
        bnb.functional.int8_vectorwise_dequant(theirs.data, theirs.SCB),
        rtol=3e-7,
        atol=0,
    )


def test_int8_layers_in_training_agree():
    w, x = weight((64, 96), torch.float32), torch.randn(5, 96, requires_grad=True)
    theirs, ours = their_int8(w, 6.0).train(), QuantizedLinear(quantize(w, "int8"), None, torch.float32).train()
    results = []
    for layer in (theirs, ours):
        y = layer(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


def test_int8_outliers_are_kept_as_they_do():
    """In eval mode bitsandbytes rounds x to int8 but for its outlier columns; ours where a threshold is set."""
    w, x = weight((64, 96), torch.float16), torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).half()
    x[:, 11], x[3, 50] = 40.0, -30.0
    theirs, ours = their_int8(w, 6.0).eval(), QuantizedLinear(quantize(w, "int8"), None, torch.float16).eval()
    ours.outlier_threshold = 6.0
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=2e-3, atol=2e-3)


# ---- folders ------------------------------------------------------------------------------------------------------


def config(kind, double, storage=torch.uint8):
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=storage,
    )  # fmt: skip


def their_weights(model, kind):
    """The dense weights of their layers, by name: decoded by the definition, their kernel is wrong for some shapes."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            found[name] = module.weight.data * scale.mul(1.0 / 127.0)[:, None]
        elif isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            absmax = state.absmax
            if state.nested:
                absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
            packed = module.weight.data.view(torch.uint8).view(-1)
            found[name] = ops.dequantize_4bit(packed, absmax.float(), state.shape, torch.float32, kind=kind)
    return found


CASES = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]


@pytest.mark.parametrize(("kind", "double"), CASES)
def test_each_reads_the_others_folder(tmp_path, tokenizer, kind, double):
    from transformers import AutoModelForCausalLM

    plain = veneer.save_model(make_model(hidden_size=64, intermediate_size=128), tokenizer, tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config(kind, double), dtype=torch.float32
    ).eval()
    expected = their_weights(theirs, kind)
    assert len(expected) == 14
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    read, _ = veneer.load(tmp_path / "theirs", dtype="float32")
    assert read.veneer_quantization == kind
    layers = quantized_layers(read)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert layer.double_quant == double and torch.equal(layer.dequantize(torch.float32), expected[name])
    ours, _ = veneer.load(plain, quantize=kind, double_quant=double, dtype="float32")
    for name, layer in quantized_layers(ours).items():
        assert torch.equal(layer.dequantize(torch.float32), expected[name])
    veneer.save_model(ours, tokenizer, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    found = their_weights(again, kind)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        logits = theirs(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=0, atol=1e-5)
        # bitsandbytes' product on the CPU is not fp32 throughout, and in 8 bits rounds x: the logits are only close
        torch.testing.assert_close(read(input_ids=ids).logits, logits, rtol=0, atol=1e-2)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_stored_as_another_type_are_read(tmp_path, tokenizer, storage):
    from transformers import AutoModelForCausalLM

    plain = veneer.save_model(make_model(hidden_size=64, intermediate_size=128), tokenizer, tmp_path / "plain")
    theirs = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config("nf4", True, storage), dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    read, _ = veneer.load(tmp_path / "theirs", dtype="float32")
    expected = their_weights(theirs, "nf4")
    assert theirs.model.layers[0].mlp.up_proj.weight.dtype == storage and len(expected) == 14
    for name, layer in quantized_layers(read).items():
        assert torch.equal(layer.dequantize(torch.float32), expected[name])
