import pytest
import torch

from veneer import ops
from veneer.errors import VeneerError
from veneer.ops import native, reference

SHAPES = [(1,), (2,), (63,), (64,), (65,), (127, 5), (48, 96), (33, 64), (100, 333)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape, dtype, kind):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    if kind == "zeros":
        w.zero_()
    if kind == "denormal":
        w *= 1e-39
    if kind == "large":
        w *= 1e5
    return w.to(dtype)


@pytest.mark.parametrize("kind", ["normal", "zeros", "denormal", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_reference_bit_for_bit(isa, shape, dtype, kind):
    w = weights(shape, dtype, kind)
    packed, absmax = native.nf4_quantize(w)
    expected = reference.nf4_quantize(w)
    assert torch.equal(packed, expected[0]) and torch.equal(absmax, expected[1])
    for out in DTYPES:
        assert torch.equal(
            native.nf4_dequantize(packed, absmax, w.shape, out), reference.nf4_dequantize(packed, absmax, w.shape, out)
        )


def test_non_contiguous_weight(isa):
    w = torch.randn(96, 70).T
    assert torch.equal(native.nf4_quantize(w)[0], reference.nf4_quantize(w)[0])


@pytest.mark.parametrize("m", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("kind", ["spread", "equal", "tiny"])
def test_double_quantisation_equals_reference_bit_for_bit(isa, m, kind):
    absmax = torch.rand(m, generator=torch.Generator().manual_seed(2)) * (1e-30 if kind == "tiny" else 0.1)
    absmax = torch.full((m,), 0.25) if kind == "equal" else absmax
    for found, expected in zip(native.double_quantize(absmax), reference.double_quantize(absmax), strict=True):
        assert torch.equal(found, expected)


def test_double_quantised_weight_is_decoded_in_one_go(isa):
    packed, absmax = reference.nf4_quantize(torch.randn(700, 65, generator=torch.Generator().manual_seed(3)))
    parts = reference.double_quantize(absmax)
    expected = reference.nf4_dequantize(packed, reference.double_dequantize(*parts), (700, 65), torch.bfloat16)
    out = torch.empty(700, 65, dtype=torch.bfloat16)
    found = native.nf4_dequantize(packed, parts[0], (700, 65), torch.bfloat16, *parts[1:], out=out)
    assert found is out and torch.equal(found, expected)


def test_every_code_value_survives():
    w = reference.NF4_CODE.repeat(4) * 3.0
    packed, absmax = ops.nf4_quantize(w)
    assert torch.equal(ops.nf4_dequantize(packed, absmax, w.shape, torch.float32), w)


def test_error_is_within_half_a_step():
    w = torch.randn(64 * 50)
    back = ops.nf4_dequantize(*ops.nf4_quantize(w), w.shape, torch.float32)
    gap = reference.NF4_CODE.diff().max() / 2
    limit = w.view(-1, 64).abs().amax(1).repeat_interleave(64) * gap
    assert bool(((w - back).abs() <= limit * 1.0001).all())


def test_double_quantisation_is_close_and_small():
    absmax = torch.rand(5000) * 0.1 + 0.05
    codes, nested, offset = ops.double_quantize(absmax)
    assert codes.dtype == torch.uint8 and nested.shape == (20,)
    assert float((ops.double_dequantize(codes, nested, offset) - absmax).abs().max()) < 0.001


@pytest.mark.parametrize("value", ["sse2", "AVX512", "avx1024"])
def test_unknown_isa_is_named(monkeypatch, value):
    monkeypatch.setenv("VENEER_ISA", value)
    with pytest.raises(VeneerError, match="expected one of scalar, avx2, avx512"):
        native.isa()


def test_without_the_library_the_reference_is_used(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "not built: no compiler")
    assert {row["chosen"] for row in ops.describe()} <= {"reference", "torch"}
    assert "no compiler" in ops.describe()[0]["reason"]
    w = torch.randn(65)
    assert torch.equal(ops.nf4_quantize(w)[0], reference.nf4_quantize(w)[0])
