"""Adapters folded into the files of a model, one tensor at a time: memory holds a few tensors, whatever the model's size.

The model is built from its config with weights that take no memory, the adapters are put on it with every check that
`load_adapter` makes, and then each tensor passes once: read, merged in fp32, rounded once, hashed and written. What was
done is beside the weights in `merge_report.json`.
"""

from __future__ import annotations

import collections
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.adapters.attach import adapters, lora_layers
from veneer.adapters.experts import LoraParameter
from veneer.adapters.files import load_adapter
from veneer.adapters.lora import LoraLayer, LoraLinear
from veneer.adapters.merge import merge
from veneer.adapters.targets import is_factor, plain_name
from veneer.adapters.tokens import token_rows
from veneer.errors import VeneerError
from veneer.models.load import (
    build_skeleton,
    load,
    read_config,
    resolve,
    save_model,
    stored_dtype,
    weight_files,
)
from veneer.quant.bnb_format import SCALE, STATE, unpack_layer
from veneer.quant.linear import quantize
from veneer.storage import (
    TensorFile,
    atomic_folder,
    read_json,
    require_disk_space,
    require_empty_folder,
    sha256,
    stream_tensors,
    write_json,
)

REPORT_FILE = "merge_report.json"
INDEX_FILE = "model.safetensors.index.json"
ROWS = 16  # of a merged matrix that are compared with fp64
COPIED = ("*.json", "*.model", "*.txt", "*.jinja")  # of a model folder, besides its weights


def merge_files(
    model: str | Path,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    onto: str | None = None,
    double_quant: bool = True,
    check: Callable[[Path], dict[str, Any]] | None = None,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `model` with adapters merged into it as a folder of the same files, in the dtype they are stored in.

    Args:
        model: as `load` takes it; a quantised one is decoded.
        sources: adapter folders; the updates of several are added.
        onto: "nf4", "fp4" or "int8": every linear but the head becomes what that would make of it, decoded, before it is
            merged: the base that a QLoRA adapter was trained on.
        check: called with the complete folder before it gets its name, returns what goes into the report as `divergence`;
            what it raises leaves nothing behind.
        progress: called with how many tensors are done, of how many.

    Returns:
        What is in `merge_report.json`: model, adapters, onto, how (streamed or in memory), tensors, changed, error (of the
        changed tensors against fp64: max_error, and rounding, what rounding the exact sum costs; None in memory),
        divergence, inputs and outputs with their sha256.

    Raises:
        VeneerError: what `load` and `load_adapter` find; adapters that cannot be added; NaN or Inf in a result; the disk is
            too small, or full. Nothing is left under the final name.
    """
    if not replace:
        require_empty_folder(out)
    if not sources:
        raise VeneerError("adapters: found none, expected one or more folders")
    folder = resolve(str(model))
    config, stored = read_config(folder)
    if stored and onto not in (None, stored):
        raise VeneerError(
            f"onto {onto}: {model} is stored in {stored}, there is no {onto} base in it",
            hint="leave it out, or give the 16-bit model it was made from",
        )
    files = {file.name: TensorFile(file) for file in weight_files(folder)}
    hollow = _hollow(build_skeleton(config, folder))
    for number, path in enumerate(sources):
        load_adapter(hollow, path, f"merged{number}", activate=False, check_copies=False)
    if problems := _not_together(hollow, sources):
        raise VeneerError(problems, hint="combine them first (veneer combine), or merge one after the other")
    size = sum(shape.numel() * dtype.itemsize for file in files.values() for dtype, shape in file.tensors.values())
    require_disk_space(out, size * (4 if stored else 1), "the merged model")
    plan = _Plan(
        hollow, files, None if stored else onto, double_quant, getattr(config, "dtype", None) or torch.bfloat16
    )
    report: dict[str, Any] = {
        "model": str(model),
        "adapters": [str(path) for path in sources],
        "onto": stored or onto or "16-bit",
    }
    with atomic_folder(out, replace=replace) as temporary:
        if plan.strange:
            if len(sources) > 1:
                raise VeneerError(
                    f"{folder}: its files name {plan.strange[0]} otherwise than the model, and it cannot be streamed",
                    hint="combine the adapters first (veneer combine): one can be merged in memory",
                )
            report |= _in_memory(model, sources[0], temporary, stored or onto, double_quant)
        else:
            report |= _streamed(plan, folder, temporary, progress)
        report["divergence"] = None if check is None else check(temporary)
        report["inputs"] = {
            str(file): sha256(file)
            for file in (*weight_files(folder), *(f for p in sources for f in sorted(Path(p).glob("adapter_*"))))
        }
        write_json(temporary / REPORT_FILE, report)
    return report


def _hollow(model: Any) -> Any:
    """Every weight becomes one zero seen everywhere: it has a shape, a type and a device, and takes no memory."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[key] = made.setdefault(id(parameter), nn.Parameter(empty, requires_grad=False))
    return model


def _not_together(model: nn.Module, sources: Sequence[Any]) -> list[str]:
    """Why adapters cannot be added: what each puts in place of something of the base can be there once."""
    if len(sources) == 1:
        return []
    problems = [
        f"{sources[number]}: DoRA scales the whole weight, it cannot be added to another adapter"
        for number, adapter in enumerate(adapters(model).values())
        if adapter.config.dora
    ]
    seen: dict[str, int] = {}
    for number, (name, adapter) in enumerate(adapters(model).items()):
        own = [*adapter.replaced, *(path for path, rows in token_rows(model).items() if name in rows.rows)]
        for key in own:
            if key in seen:
                problems.append(f"{sources[number]} and {sources[seen[key]]} both have values of their own for {key}")
            seen.setdefault(key, number)
    return problems


class _Plan:
    """Which tensors of which files become what.

    strange: names of files that are not the model's, or the other way round: transformers would rename or join them.
    """

    def __init__(
        self, model: Any, files: dict[str, TensorFile], onto: str | None, double_quant: bool, dtype: torch.dtype
    ) -> None:
        self.model, self.files, self.onto, self.double_quant, self.dtype = model, files, onto, double_quant, dtype
        self.names = list(adapters(model))
        self.layers = {path: layer for path, layer in lora_layers(model).items() if layer.lora_A}
        everything = model.named_parameters(remove_duplicate=False)
        base = {plain_name(model, key): parameter for key, parameter in everything if not is_factor(key)}
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
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linears = [
            (plain_name(model, name), module)
            for name, module in model.named_modules()
            if type(module) is nn.Linear and module is not head
        ]
        self.quantized = {f"{name.removesuffix('.base_layer')}.weight" for name, _ in linears} if onto else set()
        self.parts: dict[str, dict[str, str]] = {}  # of stored quantised layers: which file holds which part
        self.outputs: dict[str, dict[str, tuple[torch.dtype, torch.Size]]] = {name: {} for name in files}
        for file in files.values():
            for key in file.tensors:
                owner = key.partition(f".{STATE}")[0] if f".{STATE}" in key else key.removesuffix(f".{SCALE}")
                if owner != key:
                    self.parts[owner] = {}
        for name, file in files.items():
            for key, (kind, shape) in file.tensors.items():
                owner = next(
                    (o for o in (key.rpartition(".")[0], key.partition(".weight.")[0]) if o in self.parts), None
                )
                if owner is None or key == f"{owner}.bias":
                    self.outputs[name][key] = (kind, shape)
                else:
                    self.parts[owner][key.removeprefix(f"{owner}.")] = name
                    if key == f"{owner}.weight" and f"{owner}.weight" in base:
                        self.outputs[name][key] = (dtype, base[f"{owner}.weight"].shape)
        there = {key for tensors in self.outputs.values() for key in tensors}
        tied = {id(base[key]) for key in there if key in base}
        self.strange = sorted(there - base.keys() - buffers)
        self.strange += sorted(key for key in base if key not in there and id(base[key]) not in tied)
        self.untied = self._untie(base, there) if not self.strange else {}
        if self.untied:
            model.config.tie_word_embeddings = False

    def _untie(self, base: dict[str, nn.Parameter], there: set[str]) -> dict[str, str]:
        """Weights that are another's in the files, and one of them adapted: which one they are now. They go beside it."""
        found = {}
        for key in base.keys() - there:
            tied = [other for other in base if base[other] is base[key]]
            if any(self.layer(other) is not None for other in tied):
                found[key] = next(other for other in tied if other in there)
                file = next(name for name, tensors in self.outputs.items() if found[key] in tensors)
                self.outputs[file][key] = self.outputs[file][found[key]]
        return found

    def layer(self, key: str) -> LoraLayer | None:
        return self.layers.get(key) or self.layers.get(key.removesuffix(".weight"))

    def read(self, file: str, key: str) -> Tensor:
        """A tensor as it is before merging; of quantised layers, and with `onto`, what their codes say, in fp32."""
        source = self.untied.get(key, key)
        owner = source.removesuffix(".weight")
        if owner in self.parts:
            parts = {part: self.files[where].read(f"{owner}.{part}") for part, where in self.parts[owner].items()}
            return unpack_layer(parts, owner, torch.float32).dequantize(torch.float32)
        weight = self.files[file].read(source)
        if key in self.quantized and self.onto is not None:
            return quantize(weight, self.onto, double_quant=self.double_quant).dequantize(torch.float32)
        return weight

    @torch.no_grad()
    def make(self, file: str, key: str) -> tuple[Tensor, dict[str, float] | None]:
        """A tensor of the merged model, and if it changed, its error."""
        dtype = self.outputs[file][key][0]
        weight = self.read(file, key)
        value, changed = weight, weight.dtype != dtype
        owner, _, last = key.rpartition(".")
        which = self.ids.get(key)
        if which in self.values:
            value, changed = self.values[which], True
        if which in self.rows:
            ids, rows = self.rows[which]
            value, changed = value.index_copy(0, ids, rows.to(value.dtype)), True
        layer = self.layer(key)
        if layer is not None and (key.endswith(".weight") or isinstance(layer, LoraParameter)):
            return self._merged(layer, value, dtype)
        bias = self.layers.get(owner) if last == "bias" else None
        if bias is not None and bias.lora_bias:
            total = value.float()
            for name, added in bias.lora_bias.items():
                total = total + bias.scaling[name] * added.detach()
            value, changed = total, True
        return value.to(dtype), {"max_error": 0.0, "rounding": 0.0} if changed else None

    def _merged(self, layer: LoraLayer, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, float]]:
        names = [name for name in self.names if name in layer.lora_A]
        holder, key = (layer.owner, layer.key) if isinstance(layer, LoraParameter) else (layer.base_layer, "weight")
        by_row = isinstance(layer, LoraLinear) and not layer.magnitude and not isinstance(layer.base_layer, Conv1D)
        rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).long() if by_row else None
        before = weight[rows].clone() if rows is not None else weight
        in_place = weight if by_row and weight.dtype == dtype and len(names) == 1 else None
        hollow = holder._parameters[key]
        holder._parameters[key] = nn.Parameter(weight, requires_grad=False)
        try:
            if len(names) == 1:
                merged = layer.merged_to(names[0], dtype, in_place)
            else:
                merged = (weight.float() + sum(layer.delta(name) for name in names)).to(dtype)
        finally:
            holder._parameters[key] = hollow
        return merged, _error(layer, names, before, merged, rows)


def _error(layer: LoraLayer, names: list[str], weight: Tensor, merged: Tensor, rows: Tensor | None) -> dict[str, float]:
    """The largest difference from the sum in fp64, in these rows of a linear, and that of rounding the exact sum."""
    if isinstance(layer, LoraParameter):
        return {"max_error": 0.0, "rounding": 0.0}  # made expert by expert, in fp32
    a, b = ({name: getattr(layer, kind)(name).detach().double() for name in names} for kind in ("a", "b"))
    if rows is not None:
        merged = merged[rows]
        exact = weight.double() + sum(layer.scaling[name] * b[name][rows] @ a[name] for name in names)
    else:
        exact = weight.double() + sum(layer.scaling[name] * layer._update(a[name], b[name]) for name in names)
        for magnitude in layer.magnitude.values():
            exact = exact * (layer._over_rows(magnitude.detach().double()) / layer._row_norms(exact))
    difference, rounding = (merged.double() - exact).abs().max(), (exact.to(merged.dtype).double() - exact).abs().max()
    return {"max_error": float(difference), "rounding": float(rounding)}


def _streamed(plan: _Plan, folder: Path, out: Path, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    total = sum(len(tensors) for tensors in plan.outputs.values())
    done, changed, worst = 0, 0, {"max_error": 0.0, "rounding": 0.0, "at": ""}
    outputs: dict[str, str] = {}
    bad: list[str] = []
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for file, tensors in plan.outputs.items():

            def made(names: list[str], file: str = file) -> Iterator[Tensor]:
                nonlocal done, changed
                for key, (tensor, error) in zip(names, _ahead(pool, threads, plan.make, file, names), strict=True):
                    done += 1
                    if error is not None:
                        changed += 1
                        if error["max_error"] >= worst["max_error"]:
                            worst.update(error, at=key)  # type: ignore[arg-type]
                        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                            bad.append(f"{key}: the merged weight holds NaN or Inf")
                    if progress is not None:
                        progress(done, total)
                    yield tensor

            if tensors:
                outputs[file] = stream_tensors(out / file, tensors, made)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    if bad:
        raise VeneerError(bad, hint="the base or the adapter is damaged, or its scale is far too large")
    _write_rest(plan, folder, out)
    return {"how": "streamed", "tensors": total, "changed": changed, "error": worst, "outputs": outputs}


def _ahead(pool: ThreadPoolExecutor, threads: int, make: Any, file: str, names: list[str]) -> Iterator[Any]:
    """make(file, name) of all names, in order, a few at a time."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    for name in names:
        waiting.append(pool.submit(make, file, name))
        if len(waiting) >= threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write_rest(plan: _Plan, folder: Path, out: Path) -> None:
    """All that a model folder has besides weights: byte for byte, but for what merging changes in the config."""
    for pattern in COPIED:
        for file in folder.glob(pattern):
            if file.name not in ("config.json", INDEX_FILE, REPORT_FILE, "complete.json") and file.is_file():
                shutil.copyfile(file, out / file.name)
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    if plan.untied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    write_json(out / "config.json", config)
    kept = {name: tensors for name, tensors in plan.outputs.items() if tensors}
    if (folder / INDEX_FILE).is_file():
        size = sum(s.numel() * d.itemsize for tensors in kept.values() for d, s in tensors.values())
        where = {key: name for name, tensors in kept.items() for key in tensors}
        write_json(out / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})


def _in_memory(model: Any, source: Any, out: Path, kind: str | None, double_quant: bool) -> dict[str, Any]:
    """For models whose files have other names or other tensors than the model, as mixtures with an expert a tensor."""
    stored = read_config(resolve(str(model)))[1]
    wanted: Any = None if stored else kind
    loaded, tokenizer = load(
        model, quantize=wanted, double_quant=double_quant, dtype=stored_dtype(model), device="cpu", fused=False
    )  # type: ignore[arg-type]
    load_adapter(loaded, source)
    changed = len(lora_layers(loaded))
    merge(loaded)
    save_model(loaded, tokenizer, out / "model")
    for file in (out / "model").iterdir():
        file.rename(out / file.name)
    (out / "model").rmdir()
    outputs = {file.name: sha256(file) for file in sorted(out.glob("*.safetensors"))}
    return {"how": "in memory", "tensors": None, "changed": changed, "error": None, "outputs": outputs}
