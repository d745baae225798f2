"""What other people's loops need of an adapted model: the base beside it, and `save_pretrained` that saves the adapter."""

from __future__ import annotations

import contextlib
import copy
import math
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from veneer.adapters.attach import (
    active_adapter,
    adapter_parameters,
    adapters,
    lora_layers,
    remove_adapter,
    set_adapter,
)
from veneer.errors import VeneerError
from veneer.quant.linear import QuantizedLinear
from veneer.storage import read_tensors

T = TypeVar("T")


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[Any]:
    """The bare base inside the block, exactly; afterwards the same adapter is active and the same parameters train."""
    name = active_adapter(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    set_adapter(model, None)
    try:
        yield model
    finally:
        set_adapter(model, name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def base_model(model: Any) -> Any:
    """The base of an adapted model as a model of its own on the same weights: no copy of them, no adapter, not trained.

    It stays the base while the adapter learns, so it serves as the reference of DPO and the like
    (`DPOTrainer(model, ref_model=veneer.base_model(model), ...)`). Make it when the model is where it will train.
    """
    with adapter_off(model):  # so that all that belongs to the base is in its place
        parked = [
            base for layer in lora_layers(model).values() for base in layer.bases.values()
        ]  # under PiSSA and LoftQ
        shared = {id(t): t for module in (model, *parked) for t in (*module.parameters(), *module.buffers())}
        bare = copy.deepcopy(model, shared)
        for name in list(adapters(bare)):
            remove_adapter(bare, name)
    return bare.eval()


def answer_save_pretrained(model: Any) -> None:
    """From now on `model.save_pretrained(folder)` writes the active adapter as PEFT's files while adapters are on it.

    transformers' own would write the base with the names of our layers, which nothing can read.
    """
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = types.MethodType(_save_pretrained, model)


def _save_pretrained(
    self: Any, save_directory: str | Path, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
) -> Any:
    if not adapters(self):
        if any(isinstance(module, QuantizedLinear) for module in self.modules()):
            raise VeneerError("save_pretrained cannot write quantised layers", hint="use veneer.save_model")
        return type(self).save_pretrained(self, save_directory, is_main_process, state_dict, **kwargs)
    from veneer.adapters.files import save_adapter

    if not is_main_process:
        return None
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter.", dir=folder) as temporary:  # others keep files beside ours
        for file in save_adapter(self, Path(temporary) / "adapter").iterdir():
            file.replace(folder / file.name)
    return None


def adapter_checkpoints(trainer: T) -> T:
    """Let a `transformers.Trainer` (TRL's are such) read back the adapters in its checkpoints, in place.

    It knows PEFT's class and whole models only; `resume_from_checkpoint` and `load_best_model_at_end` need this.

    Raises:
        VeneerError: the adapter is AdaLoRA, whose files are plain LoRA: where the sharing of ranks stood is not in them.
    """
    active = active_adapter(trainer.model)  # type: ignore[attr-defined]
    if active is not None and adapters(trainer.model)[active].allocator is not None:  # type: ignore[attr-defined]
        raise VeneerError(
            "AdaLoRA cannot be read back from another trainer's checkpoints, which hold it as plain LoRA",
            hint="train without resume_from_checkpoint and load_best_model_at_end, or with veneer.train, which resumes it",
        )

    def load(folder: str) -> None:
        from veneer.adapters.files import file_keys, tied_keys, without_starts
        from veneer.adapters.peft_format import WEIGHTS_FILE, read_adapter

        model = trainer.model  # type: ignore[attr-defined]
        name = active_adapter(model)
        if name is None:
            raise VeneerError("there is no active adapter on this model", hint="attach one before the trainer is made")
        file = read_adapter(folder, model)  # every check there is of a file
        ours = {**tied_keys(model, name), **{theirs: key for key, theirs in file_keys(model, name).items()}}
        found = {ours.get(key, key): t for key, t in read_tensors(Path(folder) / WEIGHTS_FILE).items()}
        found = without_starts(model, name, found)
        trained = adapter_parameters(model, name)
        wrong = [f"{folder}: {key}: missing or left over" for key in sorted(found.keys() ^ trained.keys())]
        wrong += [
            f"{folder}: {key}: found {tuple(found[key].shape)}, expected {tuple(trained[key].shape)}"
            for key in sorted(found.keys() & trained.keys())
            if found[key].shape != trained[key].shape
        ]
        wrong += [
            f"{folder}: {path}: found a scaling of {one.scaling:g}, expected {layer.scaling[name]:g} as on the model"
            for path, one in file.factors.items()
            if (layer := lora_layers(model).get(path)) is not None and name in layer.lora_A
            if not math.isclose(one.scaling, layer.scaling[name], rel_tol=1e-6)
        ]
        if wrong:
            raise VeneerError(wrong, hint="the checkpoint is of another adapter than the one on this model")
        with torch.no_grad():
            for key, tensor in found.items():
                trained[key].copy_(tensor)

    def load_checkpoint(resume_from_checkpoint: str, model: Any = None) -> None:
        load(resume_from_checkpoint)

    def load_best() -> None:
        load(trainer.state.best_model_checkpoint)  # type: ignore[attr-defined]

    trainer._load_from_checkpoint = load_checkpoint  # type: ignore[attr-defined]
    trainer._load_best_model = load_best  # type: ignore[attr-defined]
    return trainer
