import pytest
import torch

from veneer import ops
from veneer.errors import VeneerError
from veneer.ops import native, reference

SHAPES = [(1,), (2,), (63,), (64,), (65,), (127, 5), (48, 96), (33, 64), (100, 333)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
four_bit = pytest.mark.parametrize("kind", list(reference.CODE_BOOKS))


def weights(shape, dtype, size):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    if size == "zeros":
        w.zero_()
    if size == "denormal":
        w *= 1e-39
    if size == "large":
        w *= 1e5
    return w.to(dtype)


@four_bit
@pytest.mark.parametrize("size", ["normal", "zeros", "denormal", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_reference_bit_for_bit(isa, shape, dtype, size, kind):
    w = weights(shape, dtype, size)
    packed, absmax = native.quantize_4bit(w, kind)
    expected = reference.quantize_4bit(w, kind)
    assert torch.equal(packed, expected[0]) and torch.equal(absmax, expected[1])
    for out in DTYPES:
        found, wanted = (form.dequantize_4bit(packed, absmax, w.shape, out, kind=kind) for form in (native, reference))
        assert torch.equal(found, wanted)


@four_bit
def test_values_between_two_of_the_code_book_go_where_the_reference_takes_them(isa, kind):
    """All midpoints, and their neighbours on both sides."""
    middle = reference.CODE_BOOKS[kind].midpoints
    near = torch.cat([middle, middle.nextafter(torch.tensor(-2.0)), middle.nextafter(torch.tensor(2.0))])
    w = torch.zeros(64)
    w[: len(near)], w[63] = near, 1.0
    assert torch.equal(native.quantize_4bit(w, kind)[0], reference.quantize_4bit(w, kind)[0])


@four_bit
def test_non_contiguous_weight(isa, kind):
    w = torch.randn(96, 70).T
    assert torch.equal(native.quantize_4bit(w, kind)[0], reference.quantize_4bit(w, kind)[0])


@pytest.mark.parametrize("m", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("size", ["spread", "equal", "tiny"])
def test_double_quantisation_equals_reference_bit_for_bit(isa, m, size):
    absmax = torch.rand(m, generator=torch.Generator().manual_seed(2)) * (1e-30 if size == "tiny" else 0.1)
    absmax = torch.full((m,), 0.25) if size == "equal" else absmax
    for found, expected in zip(native.double_quantize(absmax), reference.double_quantize(absmax), strict=True):
        assert torch.equal(found, expected)


@four_bit
def test_double_quantised_weight_is_decoded_in_one_go(isa, kind):
    packed, absmax = reference.quantize_4bit(torch.randn(700, 65, generator=torch.Generator().manual_seed(3)), kind)
    parts = reference.double_quantize(absmax)
    scales = reference.double_dequantize(*parts)
    expected = reference.dequantize_4bit(packed, scales, (700, 65), torch.bfloat16, kind=kind)
    out = torch.empty(700, 65, dtype=torch.bfloat16)
    found = native.dequantize_4bit(packed, parts[0], (700, 65), torch.bfloat16, *parts[1:], out=out, kind=kind)
    assert found is out and torch.equal(found, expected)


@four_bit
def test_every_code_value_survives(kind):
    w = reference.CODE_BOOKS[kind].values.repeat(4) * 3.0
    packed, absmax = ops.quantize_4bit(w, kind)
    assert torch.equal(ops.dequantize_4bit(packed, absmax, w.shape, torch.float32, kind=kind), w)


@four_bit
def test_error_is_within_half_a_step(kind):
    w = torch.randn(64 * 50)
    back = ops.dequantize_4bit(*ops.quantize_4bit(w, kind), w.shape, torch.float32, kind=kind)
    gap = reference.CODE_BOOKS[kind].values.sort()[0].diff().max() / 2
    limit = w.view(-1, 64).abs().amax(1).repeat_interleave(64) * gap
    assert bool(((w - back).abs() <= limit * 1.0001).all())


def test_nf4_is_nearer_to_normal_weights_than_fp4():
    w = torch.randn(64 * 500, generator=torch.Generator().manual_seed(4))
    error = {
        kind: (w - ops.dequantize_4bit(*ops.quantize_4bit(w, kind), w.shape, torch.float32, kind=kind)).norm()
        for kind in reference.CODE_BOOKS
    }
    assert error["nf4"] < 0.85 * error["fp4"]


@four_bit
def test_times_a_whole_number_the_values_are_nearly_whole(kind):
    """What few rows are multiplied with (csrc/few_rows.h): eight products of a lane with 15 bits fit into 31."""
    values = reference.CODE_BOOKS[kind].values.double() * native.WHOLE[kind]
    assert (values - values.round()).abs().max() <= (0.33 if kind == "nf4" else 1e-3) and native.WHOLE[kind] < 8192


def test_double_quantisation_is_close_and_small():
    absmax = torch.rand(5000) * 0.1 + 0.05
    codes, nested, offset = ops.double_quantize(absmax)
    assert codes.dtype == torch.uint8 and nested.shape == (20,)
    assert float((ops.double_dequantize(codes, nested, offset) - absmax).abs().max()) < 0.001


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_within_half_a_step_and_keeps_the_largest_of_each_row(dtype):
    w = weights((33, 100), torch.float32, "normal").to(dtype)
    w[5] = 0
    codes, absmax = ops.quantize_int8(w)
    back = ops.dequantize_int8(codes, absmax, torch.float32)
    half = w.half().float()
    assert codes.dtype == torch.int8 and codes.shape == w.shape and codes.abs().amax(1).eq(127).sum() == 32
    assert not codes[5].any() and torch.equal(absmax, half.abs().amax(1))
    assert bool(((half - back).abs() <= absmax[:, None] / 127 * 0.5001).all())


def test_mixed_int8_product_keeps_outlier_columns_in_16_bits():
    """LLM.int8(): columns 3 and 40 hold values over 6 in some row; without them in 16 bits the rest would drown."""
    generator = torch.Generator().manual_seed(5)
    x, w = torch.randn(20, 64, generator=generator), torch.randn(30, 64, generator=generator) * 0.1
    x[:, 3] *= 100
    x[7, 40] = -60
    codes, absmax = ops.quantize_int8(w)
    bias = torch.randn(30, generator=generator)
    exact = x @ ops.dequantize_int8(codes, absmax, torch.float32).T + bias
    errors = [(ops.mixed_int8_product(x, codes, absmax, bias, t) - exact).norm() for t in (6.0, float("inf"))]
    assert errors[0] < 0.02 * (exact - bias).norm() and errors[0] < errors[1] / 10
    every = ops.mixed_int8_product(x, codes, absmax, bias, 0.0)  # all columns are outliers: nothing is rounded
    torch.testing.assert_close(every, exact)


def test_mixed_int8_product_in_16_bits_of_a_row_without_outliers_and_of_zeros():
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[0] = 1.0
    codes, absmax = ops.quantize_int8(torch.randn(8, 64, generator=torch.Generator().manual_seed(6)))
    y = ops.mixed_int8_product(x, codes, absmax)
    assert y.dtype == torch.bfloat16 and not y[1].any()
    torch.testing.assert_close(
        y[0].float(), ops.dequantize_int8(codes, absmax, torch.float32).sum(1), rtol=1e-2, atol=1e-2
    )


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
    assert torch.equal(ops.quantize_4bit(w)[0], reference.quantize_4bit(w)[0])
