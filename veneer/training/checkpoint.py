"""Checkpoints that are whole or not there: what is trained, the optimizer, random numbers and the position in the data.

Each is a folder `step-00000050` (steps done; `step-00000050-0003`: and three batches of the next one) with

    state.safetensors   parameter/NAME, optimizer/KIND/NAME, buffer/NAME, gradient/NAME, rng; good/...: the point to go back to
    state.json          the run's state; `format`
    manifest.json       `format` again, bytes and sha256 of each of the two

A folder is made under another name and renamed when all of it is on the disk. What a manifest does not vouch for is damaged:
it is named, and the checkpoint before it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import RefusedError, VeneerError
from veneer.ops import all_finite
from veneer.storage import (
    atomic_folder,
    read_json,
    read_tensors,
    remove_folder,
    require_disk_space,
    sha256,
    write_json,
    write_tensors,
)
from veneer.training.weights import Masters

TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 3  # of what is written here; 1 had no manifest, 2 no format in it
_NAME = re.compile(r"step-\d{8,}(-\d{4,})?")
_whole: dict[Path, tuple[int, ...]] = {}  # checkpoints that were looked through here, and what their files were then


def checkpoint_bytes(weights: Masters, *, within_a_step: bool = False) -> int:
    """What a checkpoint takes on disk: what is trained and two moments of each, in fp32, and what else the method keeps;
    within a step the gradients too, and the point to go back to where that is in memory."""
    numbers = sum(parameter.numel() for parameter in weights.parameters.values())
    size = 12 * numbers + sum(buffer.nbytes for buffer in weights.buffers().values())
    return size + within_a_step * (4 * numbers + weights.small * size) + (1 << 20)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Of torch's generators that a step draws from."""
    found = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        found["rng_cuda"] = torch.cuda.get_rng_state(device)
    return found


def captured(weights: Masters, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that the next step depends on but the random states, by the names in a checkpoint: the tensors themselves."""
    tensors = {f"buffer/{name}": buffer for name, buffer in weights.buffers().items()}
    for name, parameter in weights.parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    return tensors


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep_last: int,
    *,
    batches: int = 0,
    spare: bool = False,
) -> Path:
    """Write the checkpoint of `step` steps and `batches` batches of the next one, then keep it and the `keep_last` - 1 whole
    ones before it.

    Later ones are removed too: they are of a run that was resumed before them.

    Args:
        spare: keep the newest one that is a point to go back to as well (`state` of others has `interrupted`).

    Raises:
        VeneerError: the disk is too small, or full; the checkpoints that were there are as they were.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    require_disk_space(folder, size + (1 << 20), f"the checkpoint of step {step}")
    path = folder / (f"step-{step:08d}" + (f"-{batches:04d}" if batches else ""))
    try:
        with atomic_folder(path, replace=True) as temporary:
            digests = {TENSORS: write_tensors(temporary / TENSORS, tensors)}
            write_json(temporary / STATE, {**state, "format": FORMAT, "step": step, "batches": batches})
            digests[STATE] = sha256(temporary / STATE)
            (temporary / MANIFEST).write_text(_manifest(temporary, digests), encoding="utf-8")
        _whole[path] = _stamp(path)
        _prune(path, keep_last, spare)
    except OSError as error:
        raise VeneerError(
            f"the checkpoint of step {step} could not be written: {error.strerror or error}",
            hint="free some space; --resume goes on from the checkpoint before it",
        ) from error
    return path


def _manifest(path: Path, digests: dict[str, str]) -> str:
    """The one text that says what the files are: another is damaged, even where it would be read as the same."""
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": digest} for name, digest in digests.items()}
    return json.dumps({"files": files, "format": FORMAT}, indent=2, sort_keys=True) + "\n"


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file of a checkpoint does."""
    found = [(path / name).stat() for name in (TENSORS, STATE, MANIFEST)]
    return tuple(number for one in found for number in (one.st_ino, one.st_size, one.st_mtime_ns))


def checkpoints(folder: Path) -> list[Path]:
    """Those in a folder, the newest first."""
    found = (path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: [int(part) for part in path.name.split("-")[1:]], reverse=True)


def _require_format(path: Path) -> None:
    """Raise RefusedError for a checkpoint of another version of Veneer: its manifest and its state say so, both."""
    try:
        found = {read_json(path / name).get("format", 2) for name in (MANIFEST, STATE)}
    except (VeneerError, OSError):
        return
    if len(found) == 1 and isinstance(kind := found.pop(), int) and kind != FORMAT:
        raise RefusedError(
            f"{path}: found a checkpoint of format {kind}, expected {FORMAT}: {'a newer' if kind > FORMAT else 'an older'} "
            "version of Veneer wrote it",
            hint="update Veneer" if kind > FORMAT else "go on with the version that wrote it, or start the run again",
        )


def require_whole(path: Path) -> None:
    """Raise VeneerError when a checkpoint is not as it was written."""
    try:
        stamp = _stamp(path)
        if _whole.get(path) == stamp:
            return
        digests = {name: sha256(path / name) for name in (TENSORS, STATE)}
        expected, found = _manifest(path, digests), (path / MANIFEST).read_bytes()
    except OSError as error:
        raise VeneerError(f"{error.filename}: {error.strerror}") from error
    if found != expected.encode():
        wrong = [name for name, digest in digests.items() if digest.encode() not in found]
        if len(wrong) in (0, len(digests)):
            raise VeneerError(f"{path / MANIFEST}: it does not fit the files that it is about")
        raise VeneerError(f"{path / wrong[0]}: it is not what {MANIFEST} says (sha256)")
    _whole[path] = stamp


def _is_whole(path: Path) -> bool:
    try:
        require_whole(path)
    except VeneerError:
        return False
    return True


def _prune(newest: Path, keep_last: int, spare: bool) -> None:
    """Keep `newest` and the whole ones before it, `keep_last` in all; what is older goes, and what is later.

    A damaged one does not count: so many that can be resumed from are always there.
    """
    kept = 0
    earlier = False
    for path in checkpoints(newest.parent):
        earlier = earlier or path == newest
        wanted = earlier and (kept < keep_last or (spare and _is_good(path)))
        if not wanted:
            _whole.pop(path, None)
            remove_folder(path)
        elif _is_whole(path):
            kept, spare = kept + 1, spare and not _is_good(path)


def _is_good(path: Path) -> bool:
    """Whether a checkpoint is a point to go back to: whole, and a loss was seen of it."""
    return _is_whole(path) and not read_json(path / STATE).get("interrupted")


def newest_checkpoint(
    folder: Path, *, interrupted: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]] | None:
    """State and tensors of the newest undamaged checkpoint, and what was wrong with newer ones; None: there is none.

    Args:
        interrupted: False: not of those that an interruption left, which no loss has shown to be good.

    Raises:
        VeneerError: there are some, and none of them can be read; not where only some are asked for.
        RefusedError: another version of Veneer wrote it.
    """
    problems: list[str] = []
    for path in checkpoints(folder):
        try:
            _require_format(path)
            require_whole(path)
            state = read_json(path / STATE)
            if not isinstance(state.get("step"), int) or not isinstance(state.get("settings"), dict):
                raise VeneerError(f"{path / STATE}: found no step and settings, as a checkpoint has them")
            if state.get("interrupted") and not interrupted:
                continue
            return state, read_tensors(path / TENSORS), problems
        except RefusedError:
            raise
        except (VeneerError, OSError) as error:
            problems.append(str(error).splitlines()[0] if isinstance(error, VeneerError) else f"{path}: {error}")
    if problems and interrupted:
        raise VeneerError(problems, hint="no checkpoint of this run can be read; start it again in another folder")
    return None


def part(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `kind`/, by the rest of their names."""
    return {name.removeprefix(f"{kind}/"): x for name, x in tensors.items() if name.startswith(f"{kind}/")}


def _moments(tensors: dict[str, Tensor], weights: Masters) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of each parameter that has one."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in part(tensors, "optimizer").items():
        kind, _, name = key.partition("/")
        if name in weights.parameters:
            found.setdefault(name, {})[kind] = value
    return found


def restore(tensors: dict[str, Tensor], weights: Masters, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back: what is trained, moments, step counts, the method's buffers, gradients, random states.

    Raises:
        VeneerError: the checkpoint is of other layers or ranks; no value is changed then.
    """
    weights.make_room(part(tensors, "buffer"))
    here = {f"parameter/{name}": p for name, p in weights.parameters.items()}
    here |= {f"buffer/{name}": buffer for name, buffer in weights.buffers().items()}
    moments = _moments(tensors, weights)
    if problems := [*_problems(tensors, here, moments, weights)]:
        raise VeneerError(
            sorted(problems), hint="it was written by another recipe; lora settings must not change on --resume"
        )
    gradients = part(tensors, "gradient")
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(tensors[name])
        for name, parameter in weights.parameters.items():
            parameter.grad = gradients[name].to(parameter.device, copy=True) if name in gradients else None
    for parameter in weights.parameters.values():
        optimizer.state.pop(parameter, None)
    for name, values in moments.items():
        parameter = weights.parameters[name]
        # copies: a step changes them in place, and what was given may be gone back to again
        optimizer.state[parameter] = {
            k: v.to(parameter.device, copy=True) if v.dim() else v.clone() for k, v in values.items()
        }
    set_random_states(tensors, next(iter(weights.parameters.values())).device)


def set_random_states(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng_cuda"], device)


def _problems(
    tensors: dict[str, Tensor], here: dict[str, Tensor], moments: dict[str, dict[str, Tensor]], weights: Masters
) -> Iterable[str]:
    """Why a checkpoint's tensors cannot be put in the place of those `here`."""
    saved = {name: x for name, x in tensors.items() if name.startswith(("parameter/", "buffer/"))}
    yield from (f"checkpoint: {name.partition('/')[2]} is missing" for name in here.keys() - saved.keys())
    yield from (f"checkpoint: {name.partition('/')[2]} is not in this run" for name in saved.keys() - here.keys())
    shapes = {name: (saved[name], here[name].shape) for name in here.keys() & saved.keys()}
    for name, values in (moments | {"": part(tensors, "gradient")}).items():
        for key, value in values.items():
            owner = weights.parameters.get(name or key)
            if owner is not None and value.dim():
                shapes[f"/{key} of {name}" if name else f"/gradient of {key}"] = (value, owner.shape)
    for name, (value, shape) in shapes.items():
        if value.shape != shape:
            yield f"checkpoint: {name.partition('/')[2]}: found {tuple(value.shape)}, expected {tuple(shape)}"
    if moments:
        yield from (f"checkpoint: no optimizer state of {x}" for x in weights.parameters.keys() - moments.keys())
    everything = {**saved, **{f"{key} of {name}": v for name, values in moments.items() for key, v in values.items()}}
    for name, value in everything.items():
        if not name.startswith("buffer/") and not (value.is_floating_point() and all_finite(value)):
            kind = str(value.dtype).removeprefix("torch.")
            yield (
                f"checkpoint: {name.partition('/')[2] or name}: found {kind}, expected numbers that are finite and of a "
                "floating-point type"
            )
    if "rng" not in tensors:
        yield "checkpoint: no state of the random numbers (rng)"
