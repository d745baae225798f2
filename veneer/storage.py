"""Files that are either whole or not there: every write and every read of tensors and JSON.

A write goes to a temporary name in the same folder, is fsynced, then renamed. Reads refuse pickle and
name the file that is damaged. Only safetensors and JSON: nothing here can run code.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from veneer.errors import VeneerError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SYNCED = 32 << 20  # bytes; so much is sent to the disk while more is made, and little is left to wait for at the end
_POPULATE = 22  # Linux' MADV_POPULATE_READ, which Python does not name
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.(tmp|old)")  # as `tempfile` names them
JSON_LIMIT = 64 << 20  # bytes; no config or index file of any known model is near it


def fsync(path: Path) -> None:
    """What a file or folder holds is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes 0600; an adapter is an ordinary file
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success all its files are fsynced and it is renamed.

    Args:
        replace: an existing folder at `path` changes places with the new one once that is complete, and is removed.

    Raises:
        VeneerError: `path` exists, is not empty, and `replace` is false.
    """
    path = Path(path)
    if not replace:
        require_empty_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        inside = [Path(folder) / name for folder, _, names in os.walk(temporary) for name in (*names, ".")]
        with ThreadPoolExecutor(8) as pool:  # each waits for the disk, and the disk can do several at once
            list(pool.map(fsync, inside))
        if not path.is_dir():
            temporary.replace(path)
        elif not _exchange(temporary, path):
            # rename() needs an empty target; moving the old folder aside first keeps a whole one at all times
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.replace(old)
            temporary.replace(path)
            shutil.rmtree(old)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one operation (Linux' renameat2); False: not here, and nothing has changed."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0  # type: ignore[no-any-return]


def remove_folder(path: Path) -> None:
    """Remove a folder so that at no time a part of it is under its name."""
    gone = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        path.replace(gone)
    finally:
        shutil.rmtree(gone, ignore_errors=True)  # what stays is under a temporary name


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process of ours left in `folder`."""
    for path in folder.glob(".*") if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def lock_folder(folder: Path) -> int | None:
    """Keep other processes from writing into `folder` until the handle that comes back is closed; None where that cannot be.

    Raises:
        VeneerError: another one does.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise VeneerError(
            f"{folder}: another process writes into it", hint="wait until it has ended, or name another output folder"
        ) from None
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


def require_empty_folder(path: str | Path, *, instead: str = "") -> None:
    """Raise VeneerError when `path` cannot become an output folder: asked before any work, not after it.

    It is a file or holds something, one of its parents is a file, or nothing can be written there.

    Args:
        instead: what else can be done about a folder that holds something; it opens the hint.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        hint = f"{instead}name another folder, or remove this one first; nothing of yours is ever overwritten"
        raise VeneerError(f"output folder {path} is not empty", hint=hint)
    there = _nearest_existing(path)
    if not there.is_dir():
        raise VeneerError(f"output folder {path}: found {there}, which is not a folder, expected a folder or nothing")
    try:  # by trying: permission bits say little about root, read-only disks and special file systems
        os.rmdir(tempfile.mkdtemp(prefix=".veneer.", dir=there))
    except OSError as error:
        raise VeneerError(
            f"output folder {path}: nothing can be written in {there}: {error.strerror}",
            hint="name a folder in a place where you may write",
        ) from error


def _nearest_existing(path: str | Path) -> Path:
    """`path`, or the nearest of its parents that exists (a dangling link does)."""
    found = Path(path).absolute()
    while not os.path.lexists(found):
        found = found.parent
    return found


def require_disk_space(path: str | Path, needed: int, what: str) -> None:
    """Raise VeneerError when the disk that holds `path` has fewer than `needed` bytes free."""
    folder = _nearest_existing(path)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise VeneerError(
            f"disk too small for {what}: found {free / 1e6:,.1f} MB free at {folder}, expected {needed / 1e6:,.1f} MB",
            hint="free some space or choose an output folder on another disk",
        )


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; VeneerError names the file when it is missing, damaged, huge or not an object."""
    path = Path(path)
    if not path.is_file():
        raise VeneerError(f"missing file: {path}")
    if path.stat().st_size > JSON_LIMIT:
        raise VeneerError(f"{path}: found {path.stat().st_size:,} bytes, expected a JSON file below {JSON_LIMIT:,}")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a BOM
    except (ValueError, RecursionError) as error:  # damaged, not UTF-8, or a number of thousands of digits
        raise VeneerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise VeneerError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors to one safetensors file, atomically; returns its sha256. The same tensors give the same bytes.

    Raises:
        VeneerError: the file cannot be written, mostly because the disk is full.
    """
    plan = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return stream_tensors(path, plan, lambda names: (tensors[name].detach().cpu() for name in names), metadata)


# safetensors' names of the types of numbers.
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class TensorFile:
    """A safetensors file of which one tensor at a time is looked at.

    Raises:
        VeneerError: missing, damaged, pickle, or a type of numbers that torch here has none for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        _checked(self.path, lambda path: safe_open(path, framework="pt"))  # maps it and checks all of its header
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._start = 8 + length
        if unknown := sorted({entry["dtype"] for entry in header.values()} - _TYPES.keys()):
            raise VeneerError(f"{self.path}: found tensors of {', '.join(unknown)}, expected {', '.join(_TYPES)}")
        self._places = {name: entry["data_offsets"][0] for name, entry in header.items()}
        self.tensors = {name: (_TYPES[entry["dtype"]], torch.Size(entry["shape"])) for name, entry in header.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor where it lies in the mapped file; what is written into it is not in the file."""
        dtype, shape = self.tensors[name]
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        start = self._start + self._places[name]
        with contextlib.suppress(OSError, ValueError):  # all its pages in one go; an older system takes them one by one
            self._map.madvise(_POPULATE, start // mmap.PAGESIZE * mmap.PAGESIZE, shape.numel() * dtype.itemsize)
        return torch.frombuffer(self._map, dtype=dtype, count=shape.numel(), offset=start).view(shape)

    def release(self, name: str) -> None:
        """Let go of the pages that only this tensor lies on, so that what was read does not count as memory any more."""
        dtype, shape = self.tensors[name]
        start = self._start + self._places[name]
        first, last = -(-start // mmap.PAGESIZE), (start + shape.numel() * dtype.itemsize) // mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    @functools.cached_property
    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def stream_tensors(
    path: str | Path,
    plan: Mapping[str, tuple[torch.dtype, torch.Size]],
    tensors: Callable[[list[str]], Iterator[torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file one tensor at a time, atomically; returns its sha256.

    The order of all that is in it is fixed, as it is not in what the safetensors library writes.

    Args:
        plan: what will be in it.
        tensors: given the names in the order of the file, makes one after the other.

    Raises:
        VeneerError: the file cannot be written, mostly because the disk is full.
    """
    names = sorted(plan, key=lambda name: (-plan[name][0].itemsize, name))  # large types first: all are aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    place = 0
    for name in names:
        dtype, shape = plan[name]
        end = place + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def pieces() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name, tensor in zip(names, tensors(names), strict=True):
            assert (tensor.dtype, tensor.shape) == plan[name], name
            yield tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b""

    with atomic_file(path) as temporary:
        try:
            with (
                open(temporary, "wb", buffering=0) as file,
                ThreadPoolExecutor(1) as beside,
                ThreadPoolExecutor(1) as disk,
            ):
                unsynced, syncs = 0, []
                for piece in pieces():
                    hashing = beside.submit(digest.update, piece)  # neither it nor the write holds Python's lock
                    view = memoryview(piece)
                    while len(view):
                        view = view[file.write(view) :]
                    hashing.result()
                    if (unsynced := unsynced + len(piece)) >= SYNCED:
                        unsynced = 0
                        syncs.append(disk.submit(os.fsync, file.fileno()))
                for sync in syncs:
                    sync.result()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(temporary.parent).free
            raise VeneerError(
                f"{path} could not be written: {error}; found {free / 1e6:,.1f} MB free, expected {place / 1e6:,.1f} MB",
                hint="free some space or choose an output folder on another disk",
            ) from error
    return digest.hexdigest()


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read one safetensors file to the CPU. VeneerError names the file when it is missing, damaged or pickle."""
    return _checked(path, load_file)  # type: ignore[no-any-return]


def _checked(path: str | Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a safetensors file."""
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_error(path)
    if not path.is_file():
        raise VeneerError(f"missing file: {path}")
    try:
        return read(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise VeneerError(
            f"{path} is not a valid safetensors file: {error}", hint="it is damaged or incomplete; copy it again"
        ) from error


def pickle_error(path: str | Path) -> VeneerError:
    return VeneerError(
        f"{path}: found a pickle file, expected safetensors",
        hint="a pickle file can run any code when it is opened; ask its author for safetensors",
    )


def sha256(path: str | Path, stop: threading.Event | None = None) -> str:
    """Hex sha256 of a file; stop: once it is set the rest is not read, and what comes back is none."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as handle:
        while (count := handle.readinto(buffer)) and not (stop and stop.is_set()):
            digest.update(view[:count])
    return digest.hexdigest()
