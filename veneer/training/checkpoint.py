"""Checkpoints that are whole or not there: adapter, optimizer, random numbers and the position in the data.

Each is a folder `step-00000050` with state.safetensors and state.json; state.json holds the sha256 of the tensors,
so a damaged checkpoint is seen and the one before it is used.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import VeneerError
from veneer.storage import atomic_folder, read_json, read_tensors, require_disk_space, sha256, write_json, write_tensors

TENSORS, STATE = "state.safetensors", "state.json"


def checkpoint_bytes(parameters: dict[str, nn.Parameter]) -> int:
    """What one checkpoint takes on disk: the factors and two moments of each, in fp32."""
    return sum(12 * parameter.numel() for parameter in parameters.values()) + (1 << 20)


def save_checkpoint(
    folder: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write checkpoint `step` (steps done) atomically, then keep it and the `keep_last` - 1 before it.

    Later ones are removed too: they are of a run that was resumed before them.
    """
    require_disk_space(folder, checkpoint_bytes(parameters), f"the checkpoint of step {step}")
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    device = next(iter(parameters.values())).device
    if device.type == "cuda":
        tensors["rng_cuda"] = torch.cuda.get_rng_state(device)
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    path = folder / f"step-{step:08d}"
    with atomic_folder(path, replace=True) as temporary:
        write_tensors(temporary / TENSORS, tensors)
        write_json(temporary / STATE, {**state, "step": step, "sha256": sha256(temporary / TENSORS)})
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
            if sha256(path / TENSORS) != state.get("sha256"):
                raise VeneerError(f"{path / TENSORS}: its sha256 is not the one in {STATE}")
            return state, read_tensors(path / TENSORS), problems
        except (VeneerError, OSError) as error:
            problems.append(str(error).splitlines()[0])
    if found:
        raise VeneerError(problems, hint="no checkpoint of this run can be read; start it again in another folder")
    return None


def restore(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back: factors, moments, step counts, random states.

    Raises:
        VeneerError: the checkpoint is of other layers or ranks; nothing is changed then.
    """
    saved = {name.removeprefix("parameter/"): t for name, t in tensors.items() if name.startswith("parameter/")}
    problems = [f"checkpoint: {name} is missing" for name in parameters.keys() - saved.keys()]
    problems += [f"checkpoint: {name} is not in this run's adapter" for name in saved.keys() - parameters.keys()]
    problems += [
        f"checkpoint: {name}: found {tuple(saved[name].shape)}, expected {tuple(p.shape)}"
        for name, p in parameters.items()
        if name in saved and saved[name].shape != p.shape
    ]
    if problems:
        raise VeneerError(
            sorted(problems), hint="it was written by another recipe; lora settings must not change on --resume"
        )
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(saved[name])
        moments = {
            key.split("/", 2)[1]: value
            for key, value in tensors.items()
            if key.startswith("optimizer/") and key.endswith(f"/{name}")
        }
        if moments:
            optimizer.state[parameter] = {k: v.to(parameter.device) if v.dim() else v for k, v in moments.items()}
    torch.set_rng_state(tensors["rng"])
    device = next(iter(parameters.values())).device
    if "rng_cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng_cuda"], device)
