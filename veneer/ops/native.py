"""The C++ kernels through ctypes: optional, for CPU tensors. The operations are defined beside their references.

`VENEER_ISA` (scalar, avx2, avx512, avx512bf16 or amx) forces an instruction set, for tests; left out, the best one the CPU
has is taken. Sizes and types are checked here: past this module only pointers are left.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import torch  # before the library: it then shares torch's OpenMP threads
from torch import Tensor

from veneer.errors import VeneerError
from veneer.ops import arena, products, reference
from veneer.ops.arena import empty, on_cpu
from veneer.ops.reference import (
    BLOCK,
    CODE_BOOKS,
    DYNAMIC_MAP,
    ELECTIONS,
    NESTED_BLOCK,
    TINY,
    double_quantize_table,
    drop_limit,
    drop_scale,
    int8_scale,
)

# Beside the package; with an editable install the package is the source tree and the library is in site-packages.
LIBRARIES = [
    folder / "_kernels.so" for folder in (Path(__file__).parent.parent, Path(sysconfig.get_path("platlib"), "veneer"))
]
ISAS = ("scalar", "avx2", "avx512", "avx512bf16", "amx")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
MAX_TERMS = 16  # of one product
MAX_PARTS = 64  # of one sum
MAX_WIDTH = 512  # of an attention head
FEW_ROWS = 32  # below it, packing a 16-bit weight costs more than the product
WHOLE = {"nf4": 8005.0, "fp4": 41 * 192.0}  # times it, values of a code-book are whole numbers: csrc/few_rows.h

_ARGUMENTS: dict[str, list[Any]] = {
    "quantize_4bit": [c_void_p, c_int, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int],
    "dequantize_4bit": [c_void_p, c_int64, c_void_p, c_int, c_int],
    "double_quantize": [c_void_p, c_int64, c_float, c_void_p, c_void_p, c_void_p, c_int],
    "product": [c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64,
                c_void_p, c_void_p, c_int],
    "outer_sum": [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int],
    "attention_forward": [c_void_p, c_int64] * 3 + [c_void_p] * 4 + [c_int64, c_void_p] + [c_int64] * 4
    + [c_float, c_int],
    "attention_backward": [c_void_p, c_int64] * 3 + [c_void_p] * 5 + [c_int64, c_void_p] + [c_int64] * 4 + [c_float]
    + [c_void_p, c_int64] * 3 + [c_void_p, c_int],
    "rms_norm": [c_void_p] * 3 + [c_float, c_float, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int],
    "rms_norm_backward": [c_void_p] * 4 + [c_float, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int],
    "gated": [c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_void_p, c_int],
    "gated_backward": [c_void_p, c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p,
                       c_void_p, c_int],
    "column_dots": [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int],
    "watch": [c_void_p, c_int64, c_float, c_int],
    "orthogonal": [c_void_p, c_int64, c_float, c_int],
    "row_norms": [c_void_p, c_int64, c_float, c_int],
    "scale_rows": [c_void_p, c_int64, c_int64, c_void_p, c_float, c_void_p, c_void_p, c_void_p, c_void_p, c_int],
    "masked": [c_void_p, c_void_p, c_int64, c_int64, c_uint32, c_int, c_void_p, c_int],
    "add_update": [c_void_p, c_int, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int],
    "sparse_sum": [c_void_p, c_int, c_int64, c_int64, c_int, c_float, c_int, c_void_p, c_int],
    "cross_entropy": [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_float, c_int],
}  # fmt: skip


class _FourBit(ctypes.Structure):
    _fields_ = [
        ("packed", c_void_p), ("absmax", c_void_p), ("absmax_code", c_void_p), ("nested", c_void_p),
        ("dynamic_map", c_void_p), ("code", c_void_p), ("offset", c_void_p),
        ("whole", c_float),
    ]  # fmt: skip


class _Int8(ctypes.Structure):
    _fields_ = [("codes", c_void_p), ("scale", c_void_p)]


class _Term(ctypes.Structure):
    _fields_ = [
        ("a", c_void_p), ("lda", c_int64), ("depth", c_int64), ("weight", c_void_p), ("ldw", c_int64),
        ("four_bit", ctypes.POINTER(_FourBit)), ("int8", ctypes.POINTER(_Int8)), ("kind", c_int64),
        ("row_scale", c_void_p),
    ]  # fmt: skip


class _RowNorms(ctypes.Structure):
    _fields_ = [
        ("weight", _Term), ("rows", c_int64), ("r", c_int64), ("a", c_void_p), ("b", c_void_p), ("squares", c_void_p),
        ("norms", c_void_p), ("s", c_float),
    ]  # fmt: skip


class _Part(ctypes.Structure):
    _fields_ = [("values", c_void_p), ("weight", c_float), ("limit", c_float), ("seed", c_uint32)]


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or the reason why there is none."""
    path = next((path for path in LIBRARIES if path.is_file()), None)
    if path is None:
        return "not built: no C++ compiler was found when veneer was installed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"cannot be loaded: {error}"
    library.veneer_best_isa.restype = c_int
    return library


@functools.cache
def _kernels(isa: str) -> dict[str, Any]:
    library = _library()
    assert not isinstance(library, str), library
    found = {}
    for name, arguments in _ARGUMENTS.items():
        found[name] = getattr(library, f"veneer_{name}_{isa}")
        found[name].argtypes, found[name].restype = arguments, None
    return found


def missing() -> str | None:
    """Why the native kernels cannot be used; None when they can."""
    library = _library()
    return library if isinstance(library, str) else None


def isa() -> str:
    """The instruction set in use.

    Raises:
        VeneerError: VENEER_ISA names an unknown one, or one that this CPU or this build lacks.
    """
    return _isa(os.environ.get("VENEER_ISA"))


@functools.cache
def _isa(wanted: str | None) -> str:
    if wanted and wanted not in ISAS:
        raise VeneerError(f"VENEER_ISA: found {wanted!r}, expected one of {', '.join(ISAS)}")
    best = _best()
    if wanted and ISAS.index(wanted) > best:
        raise VeneerError(f"VENEER_ISA: found {wanted!r}, but the best this machine can run is {ISAS[best]}")
    return wanted or ISAS[best]


@functools.cache
def _best() -> int:
    library = _library()
    if isinstance(library, str):
        return 0
    built = [n for n, name in enumerate(ISAS) if hasattr(library, f"veneer_product_{name}")]
    return max(n for n in built if n <= library.veneer_best_isa())


def _run(name: str, *arguments: Any) -> None:
    if arena.dry is not None:  # nothing is behind the pointers
        return
    _kernels(isa())[name](*arguments, torch.get_num_threads())


def quantize_4bit(weight: Tensor, kind: str = "nf4") -> tuple[Tensor, Tensor]:
    flat = weight.detach().contiguous().view(-1)
    assert flat.device.type == "cpu" and flat.dtype in DTYPES, (flat.device, flat.dtype)
    n, book = flat.numel(), CODE_BOOKS[kind]
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32)
    _run(
        "quantize_4bit", flat.data_ptr(), DTYPES[flat.dtype], n, book.midpoints.data_ptr(), book.order.data_ptr(),
        packed.data_ptr(), absmax.data_ptr(),
    )  # fmt: skip
    return packed, absmax


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, ...] | torch.Size,
    dtype: torch.dtype,
    nested: Tensor | None = None,
    offset: Tensor | None = None,
    out: Tensor | None = None,
    kind: str = "nf4",
) -> Tensor:
    out = empty(tuple(shape), dtype) if out is None else out
    assert out.is_contiguous() and out.shape == torch.Size(shape) and out.dtype == dtype and dtype in DTYPES
    weight, _keep = _four_bit(packed, absmax, nested, offset, out.numel(), kind)
    _run("dequantize_4bit", ctypes.byref(weight), out.numel(), out.data_ptr(), DTYPES[dtype])
    return out


def _four_bit(
    packed: Tensor, absmax: Tensor, nested: Tensor | None, offset: Tensor | None, n: int, kind: str
) -> tuple[_FourBit, list[Tensor]]:
    """The C view of a 4-bit weight of n elements, and what must stay alive as long."""
    keep = [packed.contiguous(), absmax.contiguous()]
    blocks = -(-n // BLOCK)
    assert packed.dtype == torch.uint8 and packed.numel() == (n + 1) // 2, (packed.shape, n)
    assert absmax.numel() == blocks and absmax.dtype == (torch.float32 if nested is None else torch.uint8)
    if nested is None:
        scales = [keep[1].data_ptr(), None, None]
    else:
        assert offset is not None and nested.dtype == torch.float32 and nested.numel() == -(-blocks // NESTED_BLOCK)
        keep += [nested.contiguous(), offset.float()]
        scales = [None, keep[1].data_ptr(), keep[2].data_ptr()]
    at = keep[3].data_ptr() if nested is not None else None
    code = CODE_BOOKS[kind].values.data_ptr()
    return _FourBit(keep[0].data_ptr(), *scales, DYNAMIC_MAP.data_ptr(), code, at, WHOLE[kind]), keep


def _int8(weight: Any) -> tuple[_Int8, list[Tensor]]:
    codes, scale = weight.codes.contiguous(), int8_scale(weight.absmax)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and scale.shape == codes.shape[:1]
    assert scale.dtype == torch.float32
    return _Int8(codes.data_ptr(), scale.data_ptr()), [codes, scale]


def _view(weight: Any) -> Any:
    """A pointer to the C view of a quantised weight (`veneer.quant`), made once and kept on it: one token waits for it."""
    view = weight.__dict__.get("_view")
    if view is None:
        if weight.kind == "int8":
            made: Any
            made, keep = _int8(weight)
        else:
            nested = (weight.nested_absmax, weight.offset)
            made, keep = _four_bit(weight.packed, weight.absmax, *nested, weight.shape.numel(), weight.kind)
        view = weight.__dict__["_view"] = (ctypes.pointer(made), made, keep)
    return view[0]


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    absmax = absmax.contiguous()
    assert absmax.dtype == torch.float32 and absmax.device.type == "cpu"
    offset, m = absmax.mean(), absmax.numel()
    code, nested = torch.empty(m, dtype=torch.uint8), torch.empty(-(-m // NESTED_BLOCK), dtype=torch.float32)
    _run("double_quantize", absmax.data_ptr(), m, float(offset), double_quantize_table().data_ptr(), code.data_ptr(), nested.data_ptr())  # fmt: skip
    return code, nested, offset


def takes(*tensors: Tensor) -> bool:
    """Whether the bf16 kernels can be used on these tensors here."""
    return missing() is None and all(on_cpu(t) and t.dtype == torch.bfloat16 for t in tensors)


def worth_it(terms: Sequence[tuple[Tensor, Any, bool]]) -> bool:
    """Whether `product` can take these terms, and is faster than torch: few rows of a 16-bit weight are not."""
    if any(a.shape[1] % 2 for a, _, _ in terms) or len(terms) > MAX_TERMS:
        return False
    if any(isinstance(w, Tensor) and w.dtype != torch.bfloat16 for _, w, _ in terms):
        return False
    return terms[0][0].shape[0] >= FEW_ROWS or not isinstance(terms[0][1], Tensor)


def product(
    terms: Sequence[tuple[Tensor, Any, bool]],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    *,
    residual_rest: Tensor | None = None,
    rest: Tensor | None = None,
    scale: Tensor | None = None,
    plain: Tensor | None = None,
    row_scales: Sequence[Tensor | None] = (),
) -> Tensor:
    """`ops.product`; out: a place for y, with dense rows, which is not residual's. rest (m, n): a place for what rounding
    took from y; residual_rest (m, n): what it took from residual. Both lie as y and residual do.

    scale (n,) fp32: the sum of the terms is multiplied with it, before bias and residual. plain (m, n), lying as y: a
    place for the sum itself. row_scales: one (depth,) fp32 or None a term, for the rows of a weight that is not `by_row`.
    """
    keep: list[Any] = []
    m, n = terms[0][0].shape[0], terms[0][1].shape[0 if terms[0][2] else 1]
    made = (_Term * len(terms))()
    assert 0 < len(terms) <= MAX_TERMS
    for term, (a, weight, by_row) in zip(made, terms, strict=True):
        rows, columns = weight.shape
        depth = columns if by_row else rows
        assert a.shape == (m, depth) and (rows if by_row else columns) == n and depth % 2 == 0, (a.shape, weight.shape)
        a = _rows(a)
        if a.stride(0) % 2:
            a = a.contiguous()
        term.a, term.lda, term.depth = a.data_ptr(), a.stride(0), depth
        if isinstance(weight, Tensor):
            weight = _rows(weight)
            term.weight, term.ldw, term.kind = weight.data_ptr(), weight.stride(0), 0 if by_row else 1
        else:
            setattr(term, "int8" if weight.kind == "int8" else "four_bit", _view(weight))
            term.ldw, term.kind = columns, 2 if by_row else 3
        keep += [a, weight]
    if bias is not None:
        bias = bias.contiguous()
        assert bias.shape == (n,) and bias.dtype == torch.bfloat16
    if residual is not None:
        residual = _rows(residual)
        assert residual.shape == (m, n)
    y = empty((m, n), torch.bfloat16) if out is None else out
    assert y.shape == (m, n) and y.dtype == torch.bfloat16 and (y.stride(1) == 1 or n == 1)
    for part, whole in ((residual_rest, residual), (rest, y), (plain, y)):
        assert part is None or (whole is not None and part.dtype == whole.dtype and part.stride() == whole.stride())
    assert scale is None or _is_vector(scale, n)
    for term, (_, _, by_row), row_scale in zip(made, terms, row_scales, strict=False):
        if row_scale is not None:
            assert not by_row and _is_vector(row_scale, term.depth)
            term.row_scale = row_scale.data_ptr()
    _run(
        "product", ctypes.addressof(made), len(terms), m, n, _pointer(bias), _pointer(residual),
        _pointer(residual_rest), 0 if residual is None else residual.stride(0), y.data_ptr(), _pointer(rest),
        y.stride(0), _pointer(scale), _pointer(plain),
    )  # fmt: skip
    return y


def outer_sum(left: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    left, right = _rows(left), _rows(right)
    (tokens, r), n = left.shape, right.shape[1]
    assert right.shape[0] == tokens
    out = torch.empty((n, r) if transposed else (r, n), dtype=torch.float32)
    _run(
        "outer_sum", left.data_ptr(), left.stride(0), r, right.data_ptr(), right.stride(0), n, tokens, out.data_ptr(),
        *((1, r) if transposed else (n, 1)),
    )  # fmt: skip
    return out


def watch(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], means: Sequence[Tensor], strays: Sequence[Tensor],
    dims: Sequence[int], beta: float,
) -> list[Tensor]:  # fmt: skip
    shapes = [_matrix(w, dim) for w, dim in zip(weights, dims, strict=True)]
    found = list(torch.empty(sum(w.shape[d] for w, d in zip(weights, dims, strict=True))).split(
        [w.shape[dim] for w, dim in zip(weights, dims, strict=True)]
    ))  # fmt: skip
    gradients = [g if g is None else g.contiguous() for g in gradients]
    pointers = [_fp32(tensors) for tensors in (weights, gradients, means, strays, found)]
    fields = torch.tensor(
        [*pointers, *zip(*shapes, strict=True)], dtype=torch.int64
    ).T.contiguous()  # rows of `Watched`
    _run("watch", fields.data_ptr(), len(shapes), beta)
    return found


def orthogonal(matrices: Sequence[Tensor], gradients: Sequence[Tensor], dims: Sequence[int], factor: float) -> None:
    shapes = [_matrix(m, dim) for m, dim in zip(matrices, dims, strict=True)]
    pointers = [_fp32(matrices), _fp32(gradients)]
    fields = torch.tensor([*pointers, *zip(*shapes, strict=True)], dtype=torch.int64).T.contiguous()
    _run("orthogonal", fields.data_ptr(), len(shapes), factor)


def _fp32(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where they lie; None: 0."""
    assert all(x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in tensors)
    return [0 if x is None else x.data_ptr() for x in tensors]


def _matrix(x: Tensor, dim: int) -> tuple[int, int, int]:
    """Rows, columns, and whether `dim` is the rows: of a vector, or of a tensor flat but for dimension 0 or the last."""
    first = x.shape[0]
    if dim == 0:
        return first, x.numel() // first, 1
    assert x.numel() == first * x.shape[1]  # a convolution's B has no extent
    return first, x.shape[1], 0


def row_norms(
    weights: Sequence[tuple[Any, bool]], factors: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float],
    squares: Sequence[Tensor], dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    if not all(by_row for _, by_row in weights) or any(a.shape[1] % 2 for a, _ in factors):
        return products.row_norms(weights, factors, scalings, squares, dtype)
    norms = list(torch.empty(sum(map(len, squares))).split(list(map(len, squares))))
    held: list[Any] = []  # what the pointers point to
    all_ = (_RowNorms * len(norms))()
    for one, (weight, _), (a, b), s, square, norm in zip(all_, weights, factors, scalings, squares, norms, strict=True):
        (out, r), inner = b.shape, a.shape[1]
        a, b = a.contiguous(), b.contiguous()
        assert a.shape == (r, inner) and weight.shape == (out, inner) and _is_vector(square, out)
        assert a.dtype == b.dtype == torch.float32
        term = one.weight
        term.depth = term.ldw = inner
        if isinstance(weight, Tensor):
            weight = _rows(weight)
            term.weight, term.ldw, term.kind = weight.data_ptr(), weight.stride(0), 0
        else:
            setattr(term, "int8" if weight.kind == "int8" else "four_bit", _view(weight))
            term.kind = 2
        one.rows, one.r, one.s = out, r, s
        one.a, one.b, one.squares, one.norms = a.data_ptr(), b.data_ptr(), square.data_ptr(), norm.data_ptr()
        held += (weight, a, b)
    _run("row_norms", ctypes.addressof(all_), len(norms), TINY)
    return norms


def scale_rows(
    x: Tensor, factors: Tensor, unit: float, *, out: Tensor | None = None, other: Tensor | None = None
) -> Tensor | None:
    """x (r, n) fp32 <- unit * diag(factors) x; with `out` (r, n) bf16 that goes there and x stays as it is.

    With `other` (r, n) fp32 returns, of x as it was, unit * its sums of products with it by row (r,).
    """
    dots = None if other is None else torch.empty(len(factors), dtype=torch.float32)
    assert out is None or (out.shape == x.shape and out.dtype == torch.bfloat16 and out.is_contiguous())
    wide, half = (x, None) if out is None else (None, out)
    x_, factors_, wide_, other_, dots_ = _fp32([x, factors, wide, other, dots])
    _run("scale_rows", x_, *x.shape, factors_, unit, wide_, 0 if half is None else half.data_ptr(), other_, dots_)
    return dots


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    tokens, heads, width = q.shape
    o = empty((tokens, heads, width), torch.bfloat16)
    lse = empty((heads, tokens), torch.float32)
    _run(
        "attention_forward", *_heads(q, k, v, cos, sin, starts), o.data_ptr(), lse.data_ptr(), *_rotary(cos, sin),
        starts.data_ptr(), starts.numel() - 1, heads, k.shape[1], width, scale,
    )  # fmt: skip
    return o, lse


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, d_o: Tensor, cos: Tensor | None, sin: Tensor | None,
    starts: Tensor, scale: float, gradients: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    (tokens, heads, width), kv_heads, segments = q.shape, k.shape[1], starts.numel() - 1
    d_o = d_o.contiguous()
    assert d_o.shape == o.shape == q.shape and o.is_contiguous() and lse.is_contiguous()
    assert all(g.shape == x.shape and g.stride()[1:] == (width, 1) for g, x in zip(gradients, (q, k, v), strict=True))
    few = segments * kv_heads < 16
    part = empty((2, heads, tokens, width), torch.float32) if few else None
    _run(
        "attention_backward", *_heads(q, k, v, cos, sin, starts), o.data_ptr(), lse.data_ptr(), d_o.data_ptr(),
        *_rotary(cos, sin), starts.data_ptr(), segments, heads, kv_heads, width, scale,
        *(value for g in gradients for value in (g.data_ptr(), g.stride(0))), _pointer(part),
    )  # fmt: skip


def _heads(q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, starts: Tensor) -> list[int]:
    tokens, heads, width = q.shape
    assert k.shape == v.shape == (tokens, k.shape[1], width) and heads % k.shape[1] == 0
    assert width % 16 == 0 and width <= MAX_WIDTH and int(starts[-1]) == tokens and starts.dtype == torch.int32
    if cos is not None and sin is not None:
        assert cos.shape == sin.shape and cos.shape[0] == tokens and 2 * cos.shape[1] <= width
        assert cos.is_contiguous() and sin.is_contiguous() and cos.dtype == sin.dtype == torch.float32
    for x in (q, k, v):
        assert x.stride()[1:] == (width, 1) and x.stride(0) % 2 == 0 and x.dtype == torch.bfloat16, x.stride()
    return [value for x in (q, k, v) for value in (x.data_ptr(), x.stride(0))]


def _rotary(cos: Tensor | None, sin: Tensor | None) -> tuple[int | None, int | None, int]:
    return (_pointer(cos), _pointer(sin), 0 if cos is None else cos.shape[1])


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, shift: float, rest: Tensor | None = None
) -> tuple[Tensor, Tensor, bool]:
    """y, rstd (rows) fp32, and whether y tells x: no weight + shift is 0."""
    rows, width = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    assert weight.shape == (width,) and weight.dtype == x.dtype == torch.bfloat16
    assert rest is None or (rest.shape == x.shape and rest.is_contiguous() and rest.dtype == x.dtype)
    y, rstd, zeros = empty(x.shape, x.dtype), torch.empty(rows, dtype=torch.float32), c_int64()
    _run(
        "rms_norm", x.data_ptr(), _pointer(rest), weight.data_ptr(), shift, epsilon, rows, width, y.data_ptr(),
        rstd.data_ptr(), ctypes.byref(zeros),
    )  # fmt: skip
    return y, rstd, zeros.value == 0


def rms_norm_backward(
    dy: Tensor, kept: Tensor, weight: Tensor, rstd: Tensor, shift: float, d_residual: Tensor | None, *, normed: bool
) -> Tensor:
    """kept: x, or with `normed` what `rms_norm` gave for it, which tells x where no weight + shift is 0."""
    dy, kept, weight = dy.contiguous(), kept.contiguous(), weight.contiguous()
    d_residual = None if d_residual is None else d_residual.contiguous()
    assert dy.shape == kept.shape and rstd.shape == kept.shape[:1]
    assert d_residual is None or d_residual.shape == kept.shape
    dx = empty(kept.shape, kept.dtype)
    x, y = (None, kept.data_ptr()) if normed else (kept.data_ptr(), None)
    _run(
        "rms_norm_backward", dy.data_ptr(), x, y, weight.data_ptr(), shift, rstd.data_ptr(), _pointer(d_residual),
        *dy.shape, dx.data_ptr(),
    )  # fmt: skip
    return dx


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    rows, width = gate.shape
    assert up.shape == gate.shape and gate.stride() == up.stride() and (gate.stride(1) == 1 or width == 1)
    out = empty((rows, width), torch.bfloat16)
    _run("gated", gate.data_ptr(), up.data_ptr(), ACTIVATIONS[activation], rows, width, gate.stride(0), out.data_ptr())
    return out


def gated_backward(
    d_out: Tensor, gate: Tensor, up: Tensor, activation: str, gradients: tuple[Tensor, Tensor],
    out: Tensor | None = None, dots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """gradients: may be gate and up; out, for what `gated` gives: may be d_out.

    dots (2, width) fp32: a place for the sums over the rows of d_gate gate and of d_up up.
    """
    rows, width = gate.shape
    d_out = d_out.contiguous()
    assert d_out.shape == gate.shape and all(x.stride() == gate.stride() for x in (up, *gradients))
    out = empty((rows, width), torch.bfloat16) if out is None else out
    assert out.shape == gate.shape and out.is_contiguous()
    assert dots is None or (dots.shape == (2, width) and dots.dtype == torch.float32 and dots.is_contiguous())
    _run(
        "gated_backward", d_out.data_ptr(), gate.data_ptr(), up.data_ptr(), ACTIVATIONS[activation], rows, width,
        gate.stride(0), gradients[0].data_ptr(), gradients[1].data_ptr(), out.data_ptr(), _pointer(dots),
    )  # fmt: skip
    return out


def column_dots(x: Tensor, y: Tensor) -> Tensor:
    """The sums over the rows of x y, both (rows, n) bf16 -> (n,) fp32."""
    x, y = _rows(x), _rows(y)
    assert x.shape == y.shape, (x.shape, y.shape)
    dots = torch.empty(x.shape[1], dtype=torch.float32)
    _run("column_dots", x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), *x.shape, dots.data_ptr())
    return dots


def masked(x: Tensor, p: float, seed: int, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    x = x.contiguous()
    out = empty(tuple(x.shape), x.dtype) if out is None else out
    assert x.dim() == 2 and 0 <= seed < 2**32, (x.shape, seed)
    for y in (x, out) if residual is None else (x, out, residual):
        assert y.shape == x.shape and y.is_contiguous() and y.dtype == torch.bfloat16 and on_cpu(y)
    _run("masked", x.data_ptr(), _pointer(residual), *x.shape, seed, drop_limit(p), out.data_ptr())
    return out


def add_update(weight: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return reference.add_update(weight, left, right, out)
    weight = weight.contiguous()
    out = torch.empty_like(weight) if out is None else out
    (rows, columns), rank = weight.shape, left.shape[1]
    assert left.shape == (rows, rank) and right.shape == (rank, columns) and out.shape == weight.shape
    assert out.is_contiguous() and out.dtype == weight.dtype and {weight.device.type, out.device.type} == {"cpu"}
    factors = [left.contiguous(), right.contiguous()]
    _run(
        "add_update", weight.data_ptr(), int(weight.dtype == torch.bfloat16), rows, columns, *_fp32(factors), rank,
        out.data_ptr(),
    )  # fmt: skip
    return out


def sparse_sum(
    parts: Sequence[Tensor], weights: Sequence[float], limits: Sequence[float], seeds: Sequence[int], p: float,
    elect: str | None,
) -> Tensor:  # fmt: skip
    if len(parts) > MAX_PARTS:
        return reference.sparse_sum(parts, weights, limits, seeds, p, elect)
    rows, width = parts[0].shape
    parts = [part.contiguous() for part in parts]
    assert all(part.shape == (rows, width) and part.device.type == "cpu" for part in parts)
    fields = (_Part * len(parts))(*(_Part(*one) for one in zip(_fp32(parts), weights, limits, seeds, strict=True)))
    out = torch.empty(rows, width)
    how = (None, *ELECTIONS).index(elect)
    _run(
        "sparse_sum",
        ctypes.addressof(fields),
        len(parts),
        rows,
        width,
        drop_limit(p),
        drop_scale(p),
        how,
        out.data_ptr(),
    )
    return out


def cross_entropy_(logits: Tensor, labels: Tensor, factor: float) -> Tensor:
    rows, width = logits.shape
    labels = labels.contiguous()
    assert logits.is_contiguous() and logits.dtype == torch.bfloat16 and labels.dtype == torch.int64
    assert labels.shape == (rows,)
    assert rows == 0 or labels.is_meta or 0 <= int(labels.min()) <= int(labels.max()) < width
    loss = torch.empty(rows, dtype=torch.float32)
    _run("cross_entropy", logits.data_ptr(), labels.data_ptr(), rows, width, loss.data_ptr(), factor)
    return loss


def _rows(x: Tensor) -> Tensor:
    """x with dense rows of bf16; what is not so is copied."""
    assert x.dtype == torch.bfloat16 and on_cpu(x) and x.dim() == 2, (x.dtype, x.device, x.shape)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _is_vector(x: Tensor, n: int) -> bool:
    return x.shape == (n,) and x.dtype == torch.float32 and x.is_contiguous() and on_cpu(x)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
