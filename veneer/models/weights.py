"""A base model's weights looked at one after the other, as they lie on the disk: for what needs no model."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.errors import VeneerError
from veneer.models.load import as_stored, build_skeleton, read_config, weight_files
from veneer.quant.bnb_format import SCALE, STATE, unpack_layer

HEADS = ("lm_head", "embed_out", "output")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")


class Piece(NamedTuple):
    """A stored tensor that is called otherwise than the parameter or buffer it is of, or is some rows of it, seen as a matrix."""

    key: str
    rows: slice


def pieces(model: Any, stored: set[str]) -> dict[str, Piece]:
    """Where stored tensors with other names than the model's (older ones; an expert a tensor) lie in its parameters.

    transformers knows: each row's number goes, twice, the way it would write the parameters. What comes out in another
    order than that of rows, or turned, is left out.
    """
    rows = {key: tensor.shape[:-1].numel() for key, tensor in model.state_dict().items()}
    starts, total = [], 0
    for count in rows.values():
        starts.append(total)
        total += count
    keys = list(rows)
    first = dict(zip(keys, starts, strict=True))

    def numbered(key: str, tensor: Tensor) -> Tensor:
        lead = tensor.shape[:-1]
        return torch.arange(2 * first[key], 2 * (first[key] + rows[key])).view(*lead, 2)

    found = {}
    for name, numbers in as_stored(model, numbered):
        if name not in stored:
            continue
        flat = numbers.flatten()
        begin = int(flat[0])
        key = keys[bisect.bisect_right(starts, begin // 2) - 1]
        at = begin // 2 - first[key]
        inside = len(flat) % 2 == 0 and at + len(flat) // 2 <= rows[key]
        if inside and torch.equal(flat, torch.arange(begin, begin + len(flat))):
            found[name] = Piece(key, slice(at, at + len(flat) // 2))
    return found


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
        for name in (layer, f"{layer}.weight"):
            if name in self._renamed:
                return self._read(self._renamed[name])
        if layer.rpartition(".")[2] in HEADS:  # not in the file: it is the embeddings' own
            embeddings = [key for key in self._file if key.rpartition(".weight")[0].rpartition(".")[2] in EMBEDDINGS]
            if len(embeddings) == 1:
                return self._read(embeddings[0])
        return None

    @functools.cached_property
    def _renamed(self) -> dict[str, str]:
        """What the files call the parameters that they have whole, but under other names."""
        model = build_skeleton(read_config(self.folder)[0], self.folder)
        whole = {key: tensor.shape[:-1].numel() for key, tensor in model.state_dict().items()}
        found = pieces(model, self._file.keys() - whole.keys())
        return {x.key: name for name, x in found.items() if x.rows.stop - x.rows.start == whole[x.key]}

    def _decoded(self, name: str, keys: list[str]) -> Tensor:
        parts = {key.removeprefix(f"{name}."): self._read(key) for key in keys}
        return unpack_layer(parts, name, torch.float32).dequantize(torch.float32)

    def _read(self, key: str) -> Tensor:
        with self._open(self._file[key]) as opened:
            return opened.get_tensor(key)
