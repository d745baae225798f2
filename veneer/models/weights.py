"""A base model's weights looked at one after the other, as they lie on the disk: for what needs no model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.errors import VeneerError
from veneer.models.load import weight_files
from veneer.quant.bnb_format import SCALE, STATE, unpack_layer

HEADS = ("lm_head", "embed_out", "output")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")


class BaseWeights:
    """The matrices of a model folder by layer; one at a time is in memory, quantised ones decoded.

    Raises:
        VeneerError: no weights there, or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: dict[str, Path] = {}
        for file in weight_files(folder):
            with self._open(file) as opened:
                self._file |= dict.fromkeys(opened.keys(), file)

    @staticmethod
    def _open(file: Path) -> safe_open:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise VeneerError(
                f"{file} is not a valid safetensors file: {error}", hint="it is damaged or incomplete; copy it again"
            ) from error

    def norms(self, layers: Iterable[str]) -> dict[str, tuple[float, tuple[int, ...]]]:
        """The Frobenius norm and the shape of each of these layers' weights; what is not there is left out.

        A file may leave out or add the first part of a name (`model.`, `transformer.`); that is tried as well.
        """
        found = {}
        for layer in layers:
            weight = self.weight(layer)
            if weight is not None:
                found[layer] = (float(torch.linalg.vector_norm(weight, dtype=torch.float32)), tuple(weight.shape))
            elif experts := self._experts(layer):
                found[layer] = experts
        return found

    def _experts(self, parameter: str) -> tuple[float, tuple[int, ...]] | None:
        """The same of a mixture's experts, which transformers has in one parameter and files often one by one."""
        owner, _, key = parameter.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("down_proj", "w2")}.get(key, ())
        for name in (owner, owner.replace(".mlp.", ".block_sparse_moe.")):
            pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.({'|'.join(parts)})\.weight")
            files = {file: match for file in self._file if parts and (match := pattern.fullmatch(file))}
            if files:
                weights = {file: self._read(file) for file in files}
                square = sum(float(torch.linalg.vector_norm(w, dtype=torch.float32)) ** 2 for w in weights.values())
                experts, kinds = ({match[i] for match in files.values()} for i in (1, 2))
                rows, width = next(iter(weights.values())).shape
                return square**0.5, (len(experts), rows * len(kinds), width)
        return None

    def weight(self, layer: str) -> Tensor | None:
        """The weight of a layer, or a parameter, decoded where it is quantised; None: it is not there."""
        for name in (layer, layer.partition(".")[2], f"model.{layer}", f"transformer.{layer}"):
            if name in self._file:
                return self._read(name)
            if f"{name}.weight" in self._file:
                keys = [key for key in self._file if key.startswith(f"{name}.")]
                quantised = any(key == f"{name}.{SCALE}" or key.startswith(f"{name}.{STATE}") for key in keys)
                return self._decoded(name, keys) if quantised else self._read(f"{name}.weight")
        if layer.rpartition(".")[2] in HEADS:  # not in the file: it is the embeddings' own
            embeddings = [key for key in self._file if key.rpartition(".weight")[0].rpartition(".")[2] in EMBEDDINGS]
            if len(embeddings) == 1:
                return self._read(embeddings[0])
        return None

    def _decoded(self, name: str, keys: list[str]) -> Tensor:
        parts = {key.removeprefix(f"{name}."): self._read(key) for key in keys}
        return unpack_layer(parts, name, torch.float32).dequantize(torch.float32)

    def _read(self, key: str) -> Tensor:
        with self._open(self._file[key]) as opened:
            return opened.get_tensor(key)
