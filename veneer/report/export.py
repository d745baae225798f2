"""Adapters for other tools, so that each computes exactly this adapter, or none at all with the reason.

    peft        plain names and files; the scale folded into B, alpha = r: nothing is left for a reader to work out
    vllm        one rank for all layers, of those it allows (zeros fill up), one alpha over r of 1
    llama.cpp   a GGUF adapter
    ollama      that, or a merged GGUF model, with a Modelfile

What a tool cannot hold as an adapter goes as a merged model, where a base is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from veneer.adapters.combine import portable_config
from veneer.adapters.files import base_metadata, load_adapter
from veneer.adapters.peft_format import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, AdapterFile, read_adapter
from veneer.errors import RefusedError, VeneerError
from veneer.models import gguf_export
from veneer.models.load import EMBEDDED, embedded_gguf, load_tokenizer, read_config, resolve
from veneer.models.merging import REPORT_FILE, hollow_model
from veneer.report.merge import merge_into, option_problems
from veneer.storage import atomic_folder, require_empty_folder, sha256, write_json, write_tensors

CONSUMERS = ("peft", "vllm", "llama.cpp", "ollama")
GGUF_CONSUMERS = CONSUMERS[2:]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_OTHERS = ("embed_tokens", "lm_head")  # layers besides linears that it takes adapters of
GGUF_ADAPTER, GGUF_MODEL, MODELFILE = "adapter.gguf", "model.gguf", "Modelfile"


def export(
    source: str | Path,
    out: str | Path,
    consumer: str,
    *,
    model: str | None = None,
    merged: bool = False,
    kind: str | None = None,
    like: str | Path | None = None,
    system: str | None = None,
    **merging: Any,
) -> dict[str, Any]:
    """Write an adapter folder for another tool into the folder `out`.

    Args:
        consumer: one of CONSUMERS.
        model: the base; needed for llama.cpp and ollama, and where the adapter has to be merged.
        merged: a merged model although an adapter would do.
        kind: f16 (left out) or q8_0, of a merged GGUF; like: a GGUF of the base, whose metadata it takes; left out, the
            base itself where that is a GGUF.
        system: of a Modelfile; left out, what the model's template says.
        merging: of a merged model, the options of `merge_into`: onto, check, tolerance, ...

    Returns:
        out, consumer, form ("adapter" or "merged model"), reasons (why it was merged), files, merge (its report, or None).

    Raises:
        RefusedError: the tool cannot hold this adapter, and there is no base to merge it into; the merged model is too far
            from base and adapter.
        VeneerError: what reading, merging and writing find; options that this consumer has no use for.
    """
    problems = _option_problems(consumer, model, merged, kind, like, system)
    if problems := [*problems, *option_problems(merging.get("onto", "auto"), merging.get("trained_on"))]:
        raise VeneerError(problems)
    require_empty_folder(out)
    file = read_adapter(source)
    config = None if model is None else read_config(resolve(model))[0]
    reasons = _reasons(file, consumer, bool(getattr(config, "tie_word_embeddings", False)))
    if reasons and model is None:
        raise RefusedError(
            [f"{consumer} cannot hold this adapter: {reason}" for reason in reasons],
            hint="give the base with --model: then it is merged into it",
        )
    whole = bool(reasons) or merged
    if not whole:
        _refuse_merging({**merging, "type": kind, "like": like if consumer == "llama.cpp" else None})
    if model is not None and consumer in GGUF_CONSUMERS:
        gguf_export.Names(config)  # before anything is merged
        if (whole or consumer == "ollama") and not (base := _base_gguf(model, like, reasons)).is_file():
            raise VeneerError(f"--like {base}: no such file, expected a GGUF of the base")
        if whole:
            gguf_export.require_dense(resolve(model))
    if model is not None and not whole:  # an adapter of another base is seen here
        load_adapter(hollow_model(resolve(model)), source, check_copies=False)
    report, modelfile = None, ""
    if consumer == "ollama":
        assert model is not None
        comes_from = f"./{GGUF_MODEL}" if whole else str(_base_gguf(model, like))
        beside = None if whole else f"./{GGUF_ADAPTER}"
        modelfile = gguf_export.modelfile(load_tokenizer(resolve(model)), comes_from, beside, system)
    with atomic_folder(out) as folder:
        if whole:
            assert model is not None
            convert = partial(_as_gguf, model, like, kind or "f16") if consumer in GGUF_CONSUMERS else None
            report = merge_into(folder, model, [source], name=str(out), convert=convert, **merging)
            if consumer in GGUF_CONSUMERS:
                report["outputs"] = {GGUF_MODEL: sha256(folder / GGUF_MODEL)}
                write_json(folder / REPORT_FILE, report)
        elif consumer in GGUF_CONSUMERS:
            gguf_export.write_adapter(file, config, folder / GGUF_ADAPTER, name=Path(source).name)
        else:
            _write_peft(file, folder, VLLM_RANKS if consumer == "vllm" else None)
        if modelfile:
            (folder / MODELFILE).write_text(modelfile, encoding="utf-8")
        files = sorted(path.name for path in folder.iterdir())
    form = "merged model" if whole else "adapter"
    return {"out": str(out), "consumer": consumer, "form": form, "reasons": reasons, "files": files, "merge": report}


def _option_problems(consumer: str, model: Any, merged: bool, kind: Any, like: Any, system: Any) -> list[str]:
    if consumer not in CONSUMERS:
        return [f"--for: found {consumer!r}, expected {', '.join(CONSUMERS)}"]
    problems = []
    if model is None and (merged or consumer in GGUF_CONSUMERS):
        problems.append(f"--model: found none, expected the base model for {consumer}{' --merged' if merged else ''}")
    if kind not in (None, *gguf_export.TYPES):
        problems.append(f"--type: found {kind!r}, expected {', '.join(gguf_export.TYPES)}")
    if consumer not in GGUF_CONSUMERS:
        idle = {"--type": kind, "--like": like}
        problems += [f"{name}: is for {' and '.join(GGUF_CONSUMERS)}" for name, x in idle.items() if x is not None]
    if system is not None and consumer != "ollama":
        problems.append("--system: is for ollama's Modelfile")
    return problems


_OPTIONS = {"check": "no-check", "trained_on": "trained-on", "texts": "text"}


def _refuse_merging(options: dict[str, Any]) -> None:
    """Raise VeneerError for options of a merge where nothing is merged."""
    unset: dict[str, Any] = {"onto": "auto", "check": True, "force": False}
    given = [name for name, value in options.items() if name != "progress" and value != unset.get(name)]
    if given:
        names = ", ".join(f"--{_OPTIONS.get(name, name)}" for name in given)
        raise VeneerError(f"{names}: of a merged model, and this goes as an adapter", hint="--merged merges it")


def _as_gguf(model: str, like: Any, kind: str, folder: Path) -> Path:
    """The merged model in `folder` becomes a GGUF there."""
    merged = [path for path in folder.iterdir() if path.name != REPORT_FILE]
    gguf_export.write_model(folder, _base_gguf(model, like), folder / GGUF_MODEL, base=resolve(model), kind=kind)
    for path in merged:
        path.unlink()
    return folder / GGUF_MODEL


def _reasons(file: AdapterFile, consumer: str, tied: bool) -> list[str]:
    """Why a tool cannot hold this as an adapter."""
    if consumer == "peft":
        return []
    if consumer != "vllm":
        return gguf_export.unsupported(file, tied)
    found = []
    if file.config.dora:
        found.append("use_dora: vLLM refuses DoRA")
    if file.replaced:
        found.append("modules_to_save or bias: vLLM refuses them")
    if file.tokens:
        found.append("trainable_token_indices: vLLM has no place for rows of tokens")
    if any(one.bias is not None for one in file.factors.values()):
        found.append("lora_bias: vLLM has no bias of B")
    strange = [
        name
        for name, one in file.factors.items()
        if one.a.ndim > 2 or len(one.a) != one.r or ("lora_embedding" in file.keys[name]["a"] and not _is_other(name))
    ]
    if strange:
        found.append(f"{strange[0]}: vLLM takes adapters of linear layers, embed_tokens and lm_head")
    largest = max(one.r for one in file.factors.values())
    if largest > VLLM_RANKS[-1]:
        found.append(
            f"rank {largest}: vLLM allows {', '.join(map(str, VLLM_RANKS))}; veneer combine --rank makes a smaller one"
        )
    return found


def _is_other(name: str) -> bool:
    return name.rpartition(".")[2] in VLLM_OTHERS


def _write_peft(file: AdapterFile, folder: Path, ranks: tuple[int, ...] | None) -> None:
    """The same adapter with scaling 1. ranks: one of these for all layers; None: each its own."""
    largest = max(one.r for one in file.factors.values())
    one_rank = None if ranks is None else next(r for r in ranks if r >= largest)
    tensors: dict[str, Tensor] = {}
    chosen = {}
    for name, one in file.factors.items():
        keys, a, b = file.keys[name], one.a.float(), one.b.double() * one.scaling
        r = chosen[name] = one_rank or one.r
        if r > one.r:  # zeros, which add nothing; only of plain linears and embeddings
            a, b = F.pad(a, (0, 0, 0, r - one.r)), F.pad(b, (0, r - one.r))
        tensors[keys["a"]], tensors[keys["b"]] = a.contiguous(), b.float().contiguous()
        if one.magnitude is not None:
            tensors[keys["magnitude"]] = one.magnitude
        if one.bias is not None:
            tensors[keys["bias"]] = (one.bias.double() * one.scaling).float()
    copies = {f"{KEY_PREFIX}{key}" for key in file.copies}
    for key, value in file.rest.items():
        if ranks is None or key.replace(".base_layer.", ".") not in copies:  # vLLM takes no weights of the base
            tensors[key] = value
    config = {**file.raw, **portable_config(chosen)}
    if ranks is not None:  # it looks for the last part of names
        config |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        config["bias"] = "none"
        config["target_modules"] = sorted({name.rpartition(".")[2] for name in file.factors})
    write_json(folder / CONFIG_FILE, config)
    write_tensors(folder / WEIGHTS_FILE, tensors, metadata=base_metadata(file.trained_on, file.double_quant))


def _base_gguf(model: str, like: str | Path | None, reasons: Sequence[str] = ()) -> Path:
    """A GGUF of the base model. reasons: why it is wanted: what cannot go as an adapter."""
    if like is not None:
        return Path(like).absolute()
    if model == EMBEDDED:
        return embedded_gguf()
    if Path(model).suffix == ".gguf":
        return Path(model).absolute()
    raise VeneerError(
        [
            *(f"it cannot go as an adapter: {reason}" for reason in reasons),
            f"{model} is no GGUF: found no --like, expected a GGUF of the same model, for its metadata or to stand beside",
        ],
        hint="make one with llama.cpp's convert_hf_to_gguf.py, or fetch one",
    )
