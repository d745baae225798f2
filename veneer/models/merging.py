"""Adapters folded into the files of a model, one tensor at a time: memory holds a few tensors, whatever the model's size.

The model is built from its config with weights that take no memory, the adapters are put on it with every check that
`load_adapter` makes, and then each tensor passes once: read, merged in fp32, rounded once, hashed and written. What was
done is beside the weights in `merge_report.json`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer import ops
from veneer.adapters.attach import adapters, lora_layers
from veneer.adapters.experts import LoraParameter
from veneer.adapters.files import load_adapter, place_adapters, same_weight
from veneer.adapters.lora import LoraLayer, LoraLinear
from veneer.adapters.merge import merge
from veneer.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from veneer.adapters.targets import is_factor, plain_name
from veneer.adapters.tokens import token_rows
from veneer.errors import VeneerError
from veneer.machine import release_memory
from veneer.models.load import (
    build_skeleton,
    load,
    read_config,
    resolve,
    stored_dtype,
    weight_files,
    write_model,
)
from veneer.models.weights import pieces
from veneer.ops import all_finite
from veneer.ops.reference import TINY
from veneer.quant.bnb_format import SCALE, STATE, unpack_layer
from veneer.quant.linear import quantize
from veneer.storage import (
    TensorFile,
    atomic_folder,
    read_json,
    require_disk_space,
    sha256,
    stream_tensors,
    write_json,
)

REPORT_FILE = "merge_report.json"
INDEX_FILE = "model.safetensors.index.json"
REUSED = 8 << 20  # bytes of a tensor whose memory is kept for the next of its shape
ROWS = 16  # of a merged matrix that are compared with fp64, in the weight's layout or turned
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "README.md")  # besides the weights
COMPUTED = r"rotary_emb\.inv_freq$"  # old files have it; a model makes it from its config


def merge_files(
    model: str | Path, sources: Sequence[str | Path], out: str | Path, *, replace: bool = False, **options: Any
) -> dict[str, Any]:
    """`write_merged` to a new folder `out`, atomically; `options` and what it returns and raises as there."""
    with atomic_folder(out, replace=replace) as folder:
        return write_merged(model, sources, folder, **options)


def write_merged(
    model: str | Path,
    sources: Sequence[str | Path],
    out: Path,
    *,
    onto: str | None = None,
    double_quant: bool | None = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
    about: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `model` with adapters merged into it as the same files, in the dtype they are stored in.

    Args:
        model: as `load` takes it; a quantised one is decoded.
        sources: adapter folders; the updates of several are added.
        out: a folder that is there; what is in it after an error is of no use.
        onto: "nf4", "fp4" or "int8": every linear but the head becomes what that would make of it, decoded, before it is
            merged: the base that a QLoRA adapter was trained on.
        double_quant: with `onto`; left out, as the first adapter's base was, if that is known, else True.
        about: more for the report.
        check: called with the complete folder, returns what goes into the report as `divergence`.
        progress: called with how many tensors are done, of how many.

    Returns:
        What is in `merge_report.json`: model, adapters, onto, how (streamed or in memory), tensors, changed, error (of the
        changed tensors against fp64: max_error, and rounding, what rounding the exact sum costs; None in memory),
        divergence, inputs and outputs with their sha256.

    Raises:
        VeneerError: what `load` and `load_adapter` find; adapters that cannot be added; NaN or Inf in a result; the disk is
            too small, or full.
    """
    if not sources:
        raise VeneerError("adapters: found none, expected one or more folders")
    folder = resolve(str(model))
    config, stored = read_config(folder)
    if stored and onto not in (None, stored):
        raise VeneerError(
            f"onto {onto}: {model} is stored in {stored}, there is no {onto} base in it",
            hint="leave it out, or give the 16-bit model it was made from",
        )
    kind = stored or onto
    report: dict[str, Any] = {
        "model": str(model),
        "adapters": [str(path) for path in sources],
        "onto": kind or "16-bit",
        **(about or {}),
    }
    with hashing(folder, sources) as hashes:
        files = [TensorFile(file) for file in weight_files(folder)]
        plan = _Plan(folder, config, hollow_model(folder, config, files), files, sources)
        if double_quant is None:
            double_quant = next(
                (file.double_quant for file in plan.read_adapters if file.double_quant is not None), True
            )
        plan.check(out.parent, bool(stored))
        if onto and not stored:
            plan.decode_as(onto, double_quant)
        if plan.strange:
            report |= _in_memory(plan, model, sources, out, kind, double_quant)
        else:
            report |= _streamed(plan, out, progress)
        report["divergence"] = None if check is None else check(out)
        report["inputs"] = hashes()
    write_json(out / REPORT_FILE, report)
    return report


@contextlib.contextmanager
def hashing(folder: Path, sources: Sequence[str | Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """The sha256 of a model's and of adapters' files, made beside what is done meanwhile; called, waits for all of them."""
    pool, stop = ThreadPoolExecutor(1), threading.Event()
    files = [
        folder / "config.json",
        *weight_files(folder),
        *(Path(path) / name for path in sources for name in (CONFIG_FILE, WEIGHTS_FILE)),
    ]
    hashes = {str(file): pool.submit(sha256, file, stop) for file in files}
    try:
        yield lambda: {file: value.result() for file, value in hashes.items()}
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def hollow_model(folder: Path, config: Any = None, files: Sequence[TensorFile] | None = None) -> Any:
    """The model of a folder whose every weight is one zero seen everywhere: it has the shape, the type it has in the files
    and a device, and takes no memory. Adapters go on it with all checks; nothing can be computed with it."""
    config = read_config(folder)[0] if config is None else config
    files = [TensorFile(file) for file in weight_files(folder)] if files is None else files
    types = {key: kind for file in files for key, (kind, _) in file.tensors.items() if kind.is_floating_point}
    model = build_skeleton(config, folder)
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                kind = types.get(f"{path}.{key}" if path else key, parameter.dtype)
                empty = torch.zeros((), dtype=kind).expand(parameter.shape)
                module._parameters[key] = made.setdefault(id(parameter), nn.Parameter(empty, requires_grad=False))
    return model


class _Plan:
    """Which tensors of which files become what.

    pieces: stored tensors that are parameters under other names, or rows of them (experts stored one by one).
    strange: other names of files that are not the model's, or the other way round: transformers would convert them.
    """

    def __init__(
        self, folder: Path, config: Any, model: Any, stored: Sequence[TensorFile], sources: Sequence[str | Path]
    ) -> None:
        self.folder, self.model, self.sources = folder, model, sources
        self.files = files = {file.path.name: file for file in stored}
        dtype = getattr(config, "dtype", None) or torch.bfloat16
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.linears = {f"{name}.weight" for name, x in model.named_modules() if type(x) is nn.Linear and x is not head}
        self.parts = _quantized_parts(files)
        self.shapes = {key: shape for file in files.values() for key, (_, shape) in file.tensors.items()}
        other = {key for key in self.shapes if self._owner(key) is None} - model.state_dict().keys()
        other = {key for key in other if not re.search(COMPUTED, key)}
        self.pieces = pieces(model, other) if other else {}
        self.read_adapters = place_adapters(model, sources)
        copies = {key: copy for file in self.read_adapters for key, copy in file.copies.items()}
        self.onto, self.double_quant = "", True
        self.buffers: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}
        self.quantized: set[str] = set()
        self.names = list(adapters(model))
        self.layers = {path: layer for path, layer in lora_layers(model).items() if layer.lora_A}
        everything = model.named_parameters(remove_duplicate=False)
        self.base = base = {plain_name(model, key): parameter for key, parameter in everything if not is_factor(key)}
        buffers = {plain_name(model, key) for key, _ in model.named_buffers()}
        self.ids = {key: id(parameter) for key, parameter in base.items()}  # tied ones are one
        self.values: dict[int, Tensor] = {}  # trained in full
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}  # ids of tokens, and what stands there
        for name, adapter in adapters(model).items():
            self.values |= {self.ids[key]: value.detach() for key, value in adapter.replaced.items()}
            for path, tokens in token_rows(model).items():
                if name in tokens.rows:
                    found = (torch.tensor(tokens.ids[name]), tokens.rows[name].detach())
                    self.rows[self.ids[f"{path}.weight"]] = found
        self.copies = {self.ids[key]: value for key, value in copies.items() if key in self.ids}
        self.outputs: dict[str, dict[str, tuple[torch.dtype, torch.Size]]] = {name: {} for name in files}
        for name, file in files.items():
            for key, (kind, shape) in file.tensors.items():
                owner = self._owner(key)
                if owner is None:
                    self.outputs[name][key] = (kind, shape)
                else:
                    self.parts[owner][key.removeprefix(f"{owner}.")] = name
                    if key == f"{owner}.weight" and f"{owner}.weight" in base:
                        self.outputs[name][key] = (dtype, base[f"{owner}.weight"].shape)
        idle = [re.compile(text) for text in (COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))]
        there = {key for tensors in self.outputs.values() for key in tensors} - buffers
        there -= {
            key for key in there - base.keys() if any(pattern.search(key) for pattern in idle)
        }  # passed on as they are
        self.strange = sorted(there - base.keys() - self.pieces.keys()) + self._unfit(buffers)
        whole = {self.place(key)[0]: key for key in sorted(there)}
        tied = {self.ids.get(key) for key in whole}
        self.strange += sorted(key for key in base if self.ids[key] not in tied)
        self.untied = self._untie(whole) if not self.strange else {}
        adapted = {self.ids[self.key(path)] for path in self.layers}
        names = collections.Counter(self.ids[key] for key in whole.keys() & base.keys())
        self.apart = bool(self.untied) or any(names[which] > 1 for which in adapted)  # what was tied is so no more

    def _owner(self, key: str) -> str | None:
        """The quantised layer that a stored tensor is a part of."""
        owner = next((o for o in (key.rpartition(".")[0], key.partition(".weight.")[0]) if o in self.parts), None)
        return None if key == f"{owner}.bias" else owner

    def _unfit(self, buffers: set[str]) -> list[str]:
        """Pieces that are not a whole parameter or rows of one expert, and parameters of which not all rows are there."""
        found, rows = [], collections.Counter[str]()
        for key, piece in self.pieces.items():
            if piece.key in buffers:
                continue
            full, (start, stop) = self.base[piece.key].shape, (piece.rows.start, piece.rows.stop)
            rows[piece.key] += stop - start
            layer = self.layer(piece.key)
            of_one = len(full) == 3 and start // full[1] == (stop - 1) // full[1]
            as_rows = of_one and self.shapes[key] == (stop - start, full[-1])
            if self.shapes[key] != full and not (as_rows and (layer is None or isinstance(layer, LoraParameter))):
                found.append(key)
        return found + [key for key, count in rows.items() if count != self.base[key].shape[:-1].numel()]

    def _untie(self, whole: dict[str, str]) -> dict[str, str]:
        """Weights that are another's in the files, and one of them adapted: which one they are now. They go beside it.
        whole: the stored name of each parameter."""
        found = {}
        for key in self.base.keys() - whole.keys():
            tied = [other for other in self.base if self.base[other] is self.base[key]]
            if any(self.layer(other) is not None for other in tied):
                found[key] = whole[next(other for other in tied if other in whole)]
                file = next(name for name, tensors in self.outputs.items() if found[key] in tensors)
                self.outputs[file][key] = self.outputs[file][found[key]]
        return found

    def place(self, key: str) -> tuple[str, slice | None]:
        """The parameter that a stored tensor is of, and which rows of it, None: it is the parameter."""
        if key not in self.pieces:
            return key, None
        name, rows = self.pieces[key]
        return name, rows if name in self.base and self.base[name].shape != self.shapes[key] else None

    def key(self, path: str) -> str:
        """The name of the weight that an adapted layer changes."""
        return path if isinstance(self.layers[path], LoraParameter) else f"{path}.weight"

    def decode_as(self, kind: str, double_quant: bool) -> None:
        """The linears but the head become what quantising would make of them."""
        self.onto, self.double_quant, self.quantized = kind, double_quant, self.linears

    def check(self, disk: Path, quantized: bool) -> None:
        """Raise VeneerError for a disk that is too small, adapters that cannot be added and tensors that do not fit."""
        size = sum(s.numel() * d.itemsize for file in self.files.values() for d, s in file.tensors.values())
        require_disk_space(disk, size * (4 if quantized else 1), "the merged model")
        if problems := self.not_together():
            raise VeneerError(problems, hint="combine them first (veneer combine), or merge one after the other")
        if problems := self.problems():
            raise VeneerError([f"{self.folder}: {problem}" for problem in problems])

    def not_together(self) -> list[str]:
        """Why adapters cannot be added: low-rank updates of a weight can, a value in its place cannot, and DoRA is no
        update."""
        problems: list[str] = []
        seen: dict[int, tuple[int, bool]] = {}
        sources = self.sources
        for number, (name, adapter) in enumerate(adapters(self.model).items()):
            if len(sources) > 1 and adapter.config.dora:
                problems.append(
                    f"{sources[number]}: DoRA scales the whole weight, it cannot be added to another adapter"
                )
            in_full = {self.ids[key]: key for key in adapter.replaced}
            rows = {path: found for path, found in token_rows(self.model).items() if name in found.rows}
            in_full |= {self.ids[f"{path}.weight"]: f"{path}.weight" for path in rows}
            low = {self.ids[self.key(path)]: self.key(path) for path, x in self.layers.items() if name in x.lora_A}
            for which, key in {**low, **in_full}.items():
                other, both_low = seen.get(which, (number, True))
                if other != number and not (both_low and which in low and which not in in_full):
                    problems.append(
                        f"{sources[number]} and {sources[other]} both change {key}, and not both by low-rank updates"
                    )
                seen[which] = (number, which not in in_full)
        return problems

    def problems(self) -> list[str]:
        """Tensors of other shapes than config.json says, and parts of adapters that have no place."""
        found = [
            f"{key}: found {tuple(shape)}, expected {tuple(self.base[key].shape)} as config.json says"
            for tensors in self.outputs.values()
            for key, (_, shape) in tensors.items()
            if key in self.base and shape != self.base[key].shape
        ]
        found += [
            f"{path}: the adapter's bias (lora_bias) has no place in a layer without one"
            for path, layer in self.layers.items()
            if layer.lora_bias and f"{path}.bias" not in self.base
        ]
        return found

    def layer(self, key: str) -> LoraLayer | None:
        return self.layers.get(key) or self.layers.get(key.removesuffix(".weight"))

    def cost(self, file: str, key: str) -> int:
        """Bytes that making a tensor takes: what is read and what is written, and fp32 forms of it where those are made."""
        kind, shape = self.outputs[file][key]
        name = self.place(key)[0]
        layer = self.layer(name)
        dense = name in self.quantized or key.removesuffix(".weight") in self.parts
        dense |= layer is not None and (len(self.names) > 1 or bool(layer.magnitude))
        return shape.numel() * (2 * kind.itemsize + (12 if dense else 0))

    def read(self, file: str, key: str) -> Tensor:
        """A tensor as it is before merging; of quantised layers, and with `onto`, what their codes say, in fp32."""
        source = self.untied.get(key, key)
        owner = source.removesuffix(".weight")
        if owner in self.parts:
            parts = {part: self.files[where].read(f"{owner}.{part}") for part, where in self.parts[owner].items()}
            return unpack_layer(parts, owner, torch.float32).dequantize(torch.float32)
        weight = self.files[file].read(source)
        if self.place(key)[0] in self.quantized:
            return quantize(weight, self.onto, double_quant=self.double_quant).dequantize(torch.float32)
        return weight

    def _buffer(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        try:
            return self.buffers[dtype, shape].pop()
        except (KeyError, IndexError):
            return torch.empty(shape, dtype=dtype)

    def written(self, file: str, key: str, tensor: Tensor, error: dict[str, float] | None) -> None:
        """Its memory is free: what was merged gives place to the next of its shape (new pages cost more than merging), and
        the pages of the file go back."""
        if error and tensor.nbytes <= REUSED:
            self.buffers.setdefault((tensor.dtype, tensor.shape), []).append(tensor)
        source = self.untied.get(key, key)
        if source.removesuffix(".weight") not in self.parts:
            self.files[file].release(source)

    @torch.no_grad()
    def made(self, file: str, key: str) -> tuple[Tensor, dict[str, float] | None]:
        """A tensor of the merged model and its error, if it changed."""
        dtype = self.outputs[file][key][0]
        weight = self.read(file, key)
        name, part = self.place(key)
        value, changed = weight, name in self.quantized or name.removesuffix(".weight") in self.parts
        which = self.ids.get(name)
        if which in self.copies and not same_weight(_part(self.copies[which], part), weight):
            raise VeneerError(f"{key}: the adapter has a copy of this weight, and it is of another base")
        if which in self.values:
            value, changed = _part(self.values[which], part).view(weight.shape), True
        if which in self.rows:
            ids, rows = self.rows[which]
            value, changed = value.index_copy(0, ids, rows.to(value.dtype)), True
        layer, (owner, _, last) = self.layer(name), name.rpartition(".")
        if isinstance(layer, LoraParameter) and part is not None:
            merged, error = self._merged_expert(layer, value, part, dtype)
            return _finite(key, merged), error
        if layer is not None and (last == "weight" or isinstance(layer, LoraParameter)):
            merged, error = self._merged(layer, value, dtype)
            return _finite(key, merged), error
        bias = self.layers.get(owner) if last == "bias" else None
        if bias is not None and bias.lora_bias:
            total = value.float()
            for adapter, added in bias.lora_bias.items():
                total = total + bias.scaling[adapter] * added.detach()
            value, changed = total, True
        return _finite(key, value.to(dtype)), {} if changed else None

    def _merged_expert(
        self, layer: LoraParameter, weight: Tensor, rows: slice, dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, float]]:
        """Of one expert's tensor, `rows` of the parameter seen as a matrix."""
        expert, first = divmod(rows.start, layer.weight.shape[1])
        factors = [layer.of_expert(name, expert) for name in self.names if name in layer.lora_A]
        left = torch.cat([left for left, _ in factors], 1)[first : first + len(weight)]
        right = torch.cat([right for _, right in factors])
        some = _some_rows(len(weight))
        exact = weight[some].double() + left[some].double() @ right.double()
        merged = ops.add_update(weight.contiguous(), left.contiguous(), right.contiguous()).to(dtype)
        return merged, _differences(merged[some], exact)

    def _merged(self, layer: LoraLayer, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, float]]:
        names = [name for name in self.names if name in layer.lora_A]
        holder, key = (layer.owner, layer.key) if isinstance(layer, LoraParameter) else (layer.base_layer, "weight")
        matrix = layer.as_matrices(weight, layer.a(names[0]), layer.b(names[0]))[0]
        rows = _some_rows(len(matrix))
        before = matrix[rows].clone()
        plain = isinstance(layer, LoraLinear) and not isinstance(layer.base_layer, Conv1D) and len(names) == 1
        hollow = holder._parameters[key]
        holder._parameters[key] = nn.Parameter(weight, requires_grad=False)
        try:
            if len(names) == 1:
                out = self._buffer(dtype, weight.shape) if plain and weight.dtype == dtype else None
                merged = layer.merged_to(names[0], dtype, out)
            else:
                merged = (weight.float() + sum(layer.delta(name) for name in names)).to(dtype)
        finally:
            holder._parameters[key] = hollow
        return merged, _error(layer, names, before, merged, rows)


def _quantized_parts(files: dict[str, TensorFile]) -> dict[str, dict[str, str]]:
    """The quantised layers of stored tensors, each with room for which file holds which part."""
    found: dict[str, dict[str, str]] = {}
    for file in files.values():
        for key in file.tensors:
            owner = key.partition(f".{STATE}")[0] if f".{STATE}" in key else key.removesuffix(f".{SCALE}")
            if owner != key:
                found[owner] = {}
    return found


def _finite(key: str, tensor: Tensor) -> Tensor:
    if not all_finite(tensor):
        raise VeneerError(
            f"{key}: the merged weight holds NaN or Inf",
            hint="the base or the adapter is damaged, or its scale is far too large",
        )
    return tensor


def _error(layer: LoraLayer, names: list[str], before: Tensor, merged: Tensor, rows: Tensor) -> dict[str, float]:
    """The largest difference of these output features of the merged weight from the sum in fp64, and that of rounding the
    exact sum; of experts those of one."""
    exact, found = before.double(), merged
    for name in names:
        found, a, b = layer.as_matrices(merged, layer.a(name).detach(), layer.b(name).detach())
        exact = torch.addmm(exact, b[rows].double(), a.double(), alpha=layer.scaling[name])
    for magnitude in layer.magnitude.values():
        length = magnitude.detach().double().flatten()[rows] / torch.linalg.vector_norm(exact, dim=1).clamp(min=TINY)
        exact = exact * length[:, None]
    return _differences(found[rows], exact)


def _differences(found: Tensor, exact: Tensor) -> dict[str, float]:
    both = torch.stack((found, exact.to(found.dtype))).double()
    difference, rounding = both.sub_(exact).abs_().amax(dim=(1, 2)).tolist()
    return {"max_error": difference, "rounding": rounding}


@functools.cache
def _some_rows(count: int) -> Tensor:
    """The rows that are compared: ROWS of them, from the first to the last."""
    return torch.linspace(0, count - 1, min(ROWS, count)).long()


def _part(whole: Tensor, rows: slice | None) -> Tensor:
    return whole if rows is None else whole.reshape(-1, whole.shape[-1])[rows]


def _streamed(plan: _Plan, out: Path, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    total = sum(len(tensors) for tensors in plan.outputs.values())
    done, changed = 0, 0
    worst: dict[str, Any] | None = None
    outputs: dict[str, str] = {}
    threads = torch.get_num_threads()
    shards = [sum(s.numel() * d.itemsize for d, s in tensors.values()) for tensors in plan.outputs.values()]
    limit = max(1 << 20, max(shards) // 4)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for file, tensors in plan.outputs.items():

            def made(names: list[str], file: str = file) -> Iterator[Tensor]:
                nonlocal done, changed, worst
                written = 0
                for key, (tensor, error) in zip(names, _ahead(pool, limit, plan, file, names), strict=True):
                    done += 1
                    if error is not None:
                        changed += 1
                        if error and (worst is None or error["max_error"] >= worst["max_error"]):
                            worst = {**error, "at": key}
                    if progress is not None:
                        progress(done, total)
                    yield tensor  # it is on its way to the disk when this goes on
                    plan.written(file, key, tensor, error)
                    written += tensor.nbytes
                    if written > limit:  # what was freed stays with the threads otherwise
                        written = 0
                        release_memory()

            if tensors:
                outputs[file] = stream_tensors(out / file, tensors, made)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    _write_rest(plan, plan.folder, out)
    return {"how": "streamed", "tensors": total, "changed": changed, "error": worst, "outputs": outputs}


def _ahead(pool: ThreadPoolExecutor, limit: int, plan: _Plan, file: str, names: list[str]) -> Iterator[Any]:
    """What becomes of all names, in order, some at a time: what is in work takes at most about `limit` bytes, or is one."""
    waiting: collections.deque[tuple[Future[Any], int]] = collections.deque()
    held = 0
    for name in names:
        size = plan.cost(file, name)
        while waiting and held + size > limit:
            future, freed = waiting.popleft()
            yield future.result()
            held -= freed
        waiting.append((pool.submit(plan.made, file, name), size))
        held += size
    while waiting:
        yield waiting.popleft()[0].result()


def _write_rest(plan: _Plan, folder: Path, out: Path) -> None:
    """All that a model folder has besides weights: byte for byte, but for what merging changes in the config."""
    for pattern in COPIED:
        for file in folder.glob(pattern):
            if file.name not in ("config.json", INDEX_FILE, REPORT_FILE, "complete.json") and file.is_file():
                shutil.copyfile(file, out / file.name)
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    if plan.apart:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    write_json(out / "config.json", config)
    kept = {name: tensors for name, tensors in plan.outputs.items() if tensors}
    if (folder / INDEX_FILE).is_file():
        size = sum(s.numel() * d.itemsize for tensors in kept.values() for d, s in tensors.values())
        where = {key: name for name, tensors in kept.items() for key in tensors}
        write_json(out / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})


def _in_memory(
    plan: _Plan, model: Any, sources: Sequence[Any], out: Path, kind: str | None, double_quant: bool
) -> dict[str, Any]:
    """For models whose files hold what transformers makes the parameters of in another way than row by row."""
    if len(sources) > 1:
        raise VeneerError(
            f"{plan.folder}: {plan.strange[0]} is in its files otherwise than in the model, and it cannot be streamed",
            hint="combine the adapters first (veneer combine): one can be merged in memory",
        )
    wanted: Any = None if read_config(plan.folder)[1] else kind
    loaded, tokenizer = load(
        model, quantize=wanted, double_quant=double_quant, dtype=stored_dtype(model), device="cpu", fused=False
    )
    load_adapter(loaded, sources[0])
    changed = len(lora_layers(loaded))
    merge(loaded)
    write_model(loaded, tokenizer, out)
    outputs = {file.name: sha256(file) for file in sorted(out.glob("*.safetensors"))}
    return {"how": "in memory", "tensors": None, "changed": changed, "error": None, "outputs": outputs}
