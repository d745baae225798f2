"""Checkpoints that are whole or not there: adapter, optimizer, random numbers and the position in the data.

Each is a folder `step-00000050` with state.safetensors and state.json; state.json holds the sha256 of the tensors,
so a damaged checkpoint is seen and the one before it is used.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import VeneerError
from veneer.ops import all_finite
from veneer.storage import atomic_folder, read_json, read_tensors, require_disk_space, sha256, write_json, write_tensors
from veneer.training.weights import Masters

TENSORS, STATE = "state.safetensors", "state.json"


def checkpoint_bytes(weights: Masters) -> int:
    """What one checkpoint takes on disk: what is trained and two moments of each, in fp32, and what else the method keeps."""
    buffers = sum(buffer.nbytes for buffer in weights.buffers().values())
    return sum(12 * parameter.numel() for parameter in weights.parameters.values()) + buffers + (1 << 20)


def save_checkpoint(
    folder: Path,
    step: int,
    weights: Masters,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write checkpoint `step` (steps done) atomically, then keep it and the `keep_last` - 1 before it.

    Later ones are removed too: they are of a run that was resumed before them.
    """
    require_disk_space(folder, checkpoint_bytes(weights), f"the checkpoint of step {step}")
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    device = next(iter(weights.parameters.values())).device
    if device.type == "cuda":
        tensors["rng_cuda"] = torch.cuda.get_rng_state(device)
    tensors |= {f"buffer/{name}": buffer for name, buffer in weights.buffers().items()}
    for name, parameter in weights.parameters.items():
        tensors[f"parameter/{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    path = folder / f"step-{step:08d}"
    with atomic_folder(path, replace=True) as temporary:
        digest = write_tensors(temporary / TENSORS, tensors)
        write_json(temporary / STATE, {**state, "step": step, "sha256": digest})
    there = sorted(folder.glob("step-*"))
    for other in {*there} - {*[p for p in there if p.name <= path.name][-keep_last:]}:
        shutil.rmtree(other)
    return path


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[str]] | None:
    """State and tensors of the newest undamaged checkpoint, and what was wrong with newer ones; None: there is none."""
    problems: list[str] = []
    found = sorted(folder.glob("step-*"), reverse=True)
    for path in found:
        try:
            state = read_json(path / STATE)
            if not isinstance(state.get("step"), int) or not isinstance(state.get("settings"), dict):
                raise VeneerError(f"{path / STATE}: found no step and settings, as a checkpoint has them")
            if sha256(path / TENSORS) != state.get("sha256"):
                raise VeneerError(f"{path / TENSORS}: its sha256 is not the one in {STATE}")
            return state, read_tensors(path / TENSORS), problems
        except (VeneerError, OSError) as error:
            problems.append(str(error).splitlines()[0])
    if found:
        raise VeneerError(problems, hint="no checkpoint of this run can be read; start it again in another folder")
    return None


def _moments(tensors: dict[str, Tensor], weights: Masters) -> dict[str, dict[str, Tensor]]:
    """The optimizer's state of each parameter that has one."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        part, _, name = rest.partition("/")
        if kind == "optimizer" and name in weights.parameters:
            found.setdefault(name, {})[part] = value
    return found


def restore(tensors: dict[str, Tensor], weights: Masters, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back: what is trained, moments, step counts, the method's buffers, random states.

    Raises:
        VeneerError: the checkpoint is of other layers or ranks; no value is changed then.
    """
    weights.make_room({key.removeprefix("buffer/"): x for key, x in tensors.items() if key.startswith("buffer/")})
    here = {f"parameter/{name}": p for name, p in weights.parameters.items()}
    here |= {f"buffer/{name}": buffer for name, buffer in weights.buffers().items()}
    saved = {name: tensor for name, tensor in tensors.items() if name.startswith(("parameter/", "buffer/"))}
    problems = [f"checkpoint: {name.partition('/')[2]} is missing" for name in here.keys() - saved.keys()]
    problems += [f"checkpoint: {name.partition('/')[2]} is not in this run" for name in saved.keys() - here.keys()]
    problems += [
        f"checkpoint: {name.partition('/')[2]}: found {tuple(saved[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in here.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    moments = _moments(tensors, weights)
    for name, values in moments.items():
        shape = weights.parameters[name].shape
        wrong = [key for key, value in values.items() if value.dim() and value.shape != shape]
        problems += [
            f"checkpoint: {key} of {name}: found {tuple(values[key].shape)}, expected {tuple(shape)}" for key in wrong
        ]
    if moments:
        problems += [f"checkpoint: no optimizer state of {name}" for name in weights.parameters.keys() - moments.keys()]
    everything = {**saved, **{f"{key} of {name}": v for name, values in moments.items() for key, v in values.items()}}
    problems += [
        f"checkpoint: {name.partition('/')[2] or name}: found {str(value.dtype).removeprefix('torch.')}, expected numbers "
        "that are finite and of a floating-point type"
        for name, value in everything.items()
        if not name.startswith("buffer/") and not (value.is_floating_point() and all_finite(value))
    ]
    if "rng" not in tensors:
        problems.append("checkpoint: no state of the random numbers (rng)")
    if problems:
        raise VeneerError(
            sorted(problems), hint="it was written by another recipe; lora settings must not change on --resume"
        )
    with torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(saved[name])
    for name, values in moments.items():
        parameter = weights.parameters[name]
        optimizer.state[parameter] = {k: v.to(parameter.device) if v.dim() else v for k, v in values.items()}
    torch.set_rng_state(tensors["rng"])
    device = next(iter(weights.parameters.values())).device
    if "rng_cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng_cuda"], device)
