"""The C++ kernels through ctypes: optional, for CPU tensors, equal to the reference bit for bit.

`VENEER_ISA` (scalar, avx2 or avx512) forces a path, for tests; left out, the best one the CPU has is taken.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from pathlib import Path

import torch  # before the library: it then shares torch's OpenMP threads
from torch import Tensor

from veneer.errors import VeneerError
from veneer.ops.reference import BLOCK, NF4_CODE, NF4_MIDPOINTS

# Beside the package; with an editable install the package is the source tree and the library is in site-packages.
LIBRARIES = [
    folder / "_kernels.so" for folder in (Path(__file__).parent.parent, Path(sysconfig.get_path("platlib"), "veneer"))
]
ISAS = ("scalar", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.veneer_best_isa.restype = number
    library.veneer_nf4_quantize.argtypes = [pointer, number, size, pointer, pointer, pointer, number, number]
    library.veneer_nf4_quantize.restype = None
    library.veneer_nf4_dequantize.argtypes = [pointer, pointer, size, pointer, pointer, number, number, number]
    library.veneer_nf4_dequantize.restype = None
    return library


def missing() -> str | None:
    """Why the native kernels cannot be used; None when they can."""
    library = _library()
    return library if isinstance(library, str) else None


def isa() -> str:
    """The instruction set in use.

    Raises:
        VeneerError: VENEER_ISA names an unknown one, or one that this CPU lacks.
    """
    library = _library()
    best = 0 if isinstance(library, str) else int(library.veneer_best_isa())
    wanted = os.environ.get("VENEER_ISA")
    if not wanted:
        return ISAS[best]
    if wanted not in ISAS:
        raise VeneerError(f"VENEER_ISA: found {wanted!r}, expected one of {', '.join(ISAS)}")
    if ISAS.index(wanted) > best:
        raise VeneerError(f"VENEER_ISA: found {wanted!r}, but the best this machine can run is {ISAS[best]}")
    return wanted


def nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    library = _loaded()
    flat = weight.detach().contiguous().view(-1)
    assert flat.device.type == "cpu" and flat.dtype in DTYPES, (flat.device, flat.dtype)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32)
    library.veneer_nf4_quantize(
        flat.data_ptr(), DTYPES[flat.dtype], n, NF4_MIDPOINTS.data_ptr(), packed.data_ptr(), absmax.data_ptr(), *_how()
    )
    return packed, absmax


def nf4_dequantize(packed: Tensor, absmax: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    library = _loaded()
    packed, absmax = packed.contiguous(), absmax.contiguous()
    out = torch.empty(shape, dtype=dtype)
    n = out.numel()
    # Sizes are checked here: past this line only pointers are left.
    assert packed.dtype == torch.uint8 and absmax.dtype == torch.float32 and dtype in DTYPES
    assert packed.numel() == (n + 1) // 2 and absmax.numel() == -(-n // BLOCK), (packed.shape, absmax.shape, shape)
    library.veneer_nf4_dequantize(
        packed.data_ptr(), absmax.data_ptr(), n, NF4_CODE.data_ptr(), out.data_ptr(), DTYPES[dtype], *_how()
    )
    return out


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert not isinstance(library, str), library
    return library


def _how() -> tuple[int, int]:
    return ISAS.index(isa()), torch.get_num_threads()
