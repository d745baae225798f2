import contextlib
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import VeneerError
from veneer.models.gguf_check import check_gguf


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf(tensors=1, keys=None, offset=0, shape=(32, 2), kind=2, data=36):
    keys = keys or [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    raw = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(keys)) + b"".join(keys)
    raw += (
        text("w")
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )
    raw += b"\0" * (-len(raw) % 32)
    return raw + b"\0" * data


def check(tmp_path, raw):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    return check_gguf(path)


def test_a_good_file(tmp_path):
    summary = check(tmp_path, gguf())
    assert summary.architecture == "llama" and summary.tensors == {"w": ((2, 32), 2)}


HUGE = 1 << 60
BAD = {
    "magic": b"GGML" + gguf()[4:],
    "version": b"GGUF" + struct.pack("<I", 9) + gguf()[8:],
    "tensor count": b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0),
    "metadata count": b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE),
    "items of": gguf(keys=[text("a") + struct.pack("<IIQ", 9, 4, HUGE)]),
    "length of": gguf(keys=[text("a") + struct.pack("<IQ", 8, HUGE)]),
    "arrays of arrays": gguf(keys=[text("a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1)]),
    "type of": gguf(keys=[text("a") + struct.pack("<I", 77)]),
    "each key once": gguf(keys=[text("a") + struct.pack("<IB", 0, 1)] * 2),
    "place of tensor": gguf(data=8),
    "aligned": gguf(offset=5, data=100),
    "rows of a multiple": gguf(shape=(33, 2)),
    "dimensions": gguf(shape=(32, 1, 1, 1, 1)),
    "a ggml type": gguf(kind=99),
    "architecture is missing": gguf(keys=[text("a") + struct.pack("<IB", 0, 1)]),
    "bytes left": gguf()[:6],
}


@pytest.mark.parametrize("words", BAD)
def test_damage_is_named_at_once(tmp_path, words):
    start = time.monotonic()
    with pytest.raises(VeneerError, match=words):
        check(tmp_path, BAD[words])
    assert time.monotonic() - start < 1


@settings(max_examples=300, deadline=1000)
@given(st.data())
def test_any_damage_is_an_error_of_ours_or_harmless(tmp_path_factory, data):
    raw = bytearray(gguf())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    with contextlib.suppress(VeneerError):
        check(tmp_path_factory.mktemp("g"), bytes(raw))
