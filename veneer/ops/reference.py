"""The definition of every operation in plain torch. The only NF4 code-book is here.

NF4 (Dettmers et al. 2023, QLoRA, arXiv 2305.14314) as bitsandbytes writes it: docs/formats.md.
Arithmetic is spelled out where rounding depends on it, because codes and constants must equal bitsandbytes' bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmax values that share one second-level absmax
NF4_CODE = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    dtype=torch.float32,
)  # fmt: skip
NF4_MIDPOINTS = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2
_TINY = 1e-38  # smallest absmax divided by: a block of zeros must not give NaN


def _dynamic_map() -> Tensor:
    """The 8-bit signed dynamic data type (Dettmers et al. 2022, arXiv 2110.02861): 256 sorted fp32 values in [-1, 1].

    Seven decades 10^-6 ... 1; decade i has 2^i equal steps of [0.1, 1], each step's middle is a value, both signs; 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += [sign * v for v in (10.0 ** (i - 6) * middles).tolist() for sign in (1, -1)]
    return torch.tensor(sorted(values), dtype=torch.float32)


DYNAMIC_MAP = _dynamic_map()


def nf4_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight of any shape (n elements, fp32/bf16/fp16), taken flat in blocks of 64.

    Returns: packed uint8 (ceil(n/2),), the earlier weight in the high nibble; absmax fp32 (ceil(n/64),).
    """
    flat = weight.detach().reshape(-1).float()
    n = flat.numel()
    whole = n // BLOCK * BLOCK
    code = torch.full(
        (n + n % 2,), 7, dtype=torch.uint8, device=flat.device
    )  # 7 is zero: what an odd end is padded with
    midpoints = NF4_MIDPOINTS.to(flat.device)
    blocks = flat[:whole].view(-1, BLOCK)
    absmax = blocks.abs().amax(1) if whole else flat.new_empty(0)
    scaled = (blocks * (1 / absmax.clamp(min=_TINY)).unsqueeze(1)).clamp(-1, 1)
    code[:whole] = torch.bucketize(scaled.reshape(-1), midpoints).to(torch.uint8)
    if whole < n:  # a short last block: bitsandbytes divides here, and keeps the clamped absmax
        rest = flat[whole:].abs().amax().clamp(min=_TINY)
        code[whole:n] = torch.bucketize((flat[whole:] / rest).clamp(-1, 1), midpoints).to(torch.uint8)
        absmax = torch.cat([absmax, rest.view(1)])
    return (code[0::2] << 4) | code[1::2], absmax


def nf4_dequantize(packed: Tensor, absmax: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """code * absmax in fp32, rounded once to `dtype`; shape as given."""
    n = int(torch.Size(shape).numel())
    code = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:n]
    value = NF4_CODE.to(packed.device)[code.long()]
    return (value * absmax.repeat_interleave(BLOCK)[:n]).to(dtype).view(shape)


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of the scales: absmax (m,) fp32 -> codes uint8 (m,), nested absmax fp32 (ceil(m/256),), offset fp32 ().

    offset = mean(absmax); absmax - offset, in blocks of 256, goes to the nearest value of the dynamic map.
    """
    offset = absmax.mean()
    centred = absmax - offset
    m = centred.numel()
    blocks = torch.nn.functional.pad(centred, (0, -m % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = blocks.abs().amax(1)
    scaled = (blocks / nested.unsqueeze(1)).reshape(-1)[:m]
    # bitsandbytes looks the code up in a table of 65,536 steps from -1 to 1; a block of equal scales gets code 0.
    step = ((scaled + 1) / 2 * 65535 + 0.5).floor() / 65535 * 2 - 1
    table = DYNAMIC_MAP.to(absmax.device)
    code = torch.bucketize(step, (table[:-1] + table[1:]) / 2)
    code = torch.where(scaled.isnan(), torch.zeros_like(code), code)
    return code.to(torch.uint8), nested, offset


def double_dequantize(code: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """absmax (m,) fp32 = map[code] * nested absmax + offset."""
    value = DYNAMIC_MAP.to(code.device)[code.long()]
    return value * nested.repeat_interleave(NESTED_BLOCK)[: code.numel()] + offset
