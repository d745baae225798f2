"""The model to plan for: by name, by numbers, or from a config.json that transformers cannot build, taken for a Llama of its sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from veneer.config import nearest
from veneer.errors import VeneerError
from veneer.models.known import MODELS
from veneer.models.load import EMBEDDED, config_folder, dtype_of, read_config, skeleton_of, skeletons
from veneer.storage import read_json

# By the name here: Llama's own name, what other configs call it, and the most that is taken for a size.
NAMES: dict[str, tuple[str, tuple[str, ...], int]] = {
    "layers": ("num_hidden_layers", ("n_layer", "n_layers", "num_layers"), 2000),
    "hidden": ("hidden_size", ("n_embd", "d_model", "n_embed", "dim", "model_dim"), 1 << 18),
    "heads": ("num_attention_heads", ("n_head", "n_heads", "num_heads"), 1 << 12),
    "kv_heads": ("num_key_value_heads", ("n_kv_heads", "num_kv_heads", "n_head_kv"), 1 << 12),
    "intermediate": ("intermediate_size", ("n_inner", "d_ff", "ffn_dim", "ffn_hidden_size", "d_inner"), 1 << 20),
    "vocab": ("vocab_size", ("n_vocab", "padded_vocab_size"), 1 << 24),
    "head_dim": ("head_dim", (), 1 << 12),
}
OPTIONAL = ("kv_heads", "head_dim")  # as many as heads; hidden / heads


def skeleton_maker(model: str | Mapping[str, int]) -> tuple[Callable[[], Any], list[str]]:
    """What makes the skeleton of a model as often as it is called, and what was guessed.

    Raises:
        VeneerError: no such model; sizes that are missing, no whole numbers from 1 or absurd, all at once.
    """
    if not isinstance(model, str):
        return functools.partial(skeleton_of, "llama", **_llama(dict(model), {}, "shape")), ["a Llama of these sizes"]
    if not _has_config(model) or not (file := config_folder(model) / "config.json").is_file():
        return skeletons(model), []  # where there should be one it says what is wrong
    raw = read_json(file)
    kind = raw.get("model_type")
    text = raw["text_config"] if isinstance(raw.get("text_config"), dict) else raw
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        notes = _require_sizes(CONFIG_MAPPING[kind], {**raw, **text}, file)
        return skeletons(model), notes
    found = {name: text[key] for name in NAMES if (key := _key(name, text)) is not None}
    sizes = _llama(found, text, str(file))
    note = f"{file}: model_type {kind!r} is not known to transformers: planned as a Llama of its sizes"
    return functools.partial(skeleton_of, "llama", **sizes), [note]


def stored_as(model: str | Mapping[str, int]) -> tuple[str | None, str] | None:
    """What the files of a model are: quantised how, and the type of the rest; None where they do not say, as of a known model."""
    if not isinstance(model, str) or not _has_config(model):
        return None
    folder = config_folder(model)
    if read_json(folder / "config.json").get("model_type") not in CONFIG_MAPPING:
        return None
    config, quantization = read_config(folder)
    return quantization, dtype_of(config)


def _has_config(model: str) -> bool:
    """Whether a name is that of a folder or a hub id."""
    known = model in MODELS and not Path(model).exists()
    return not (known or model == EMBEDDED or model.endswith(".gguf"))


def shape_of(text: str) -> dict[str, int]:
    """Sizes from "layers=32,hidden=4096,...".

    Raises:
        VeneerError: parts that are no such pair of a known name and a whole number; all at once.
    """
    problems, found = [], {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in NAMES:
            problems.append(
                f"shape: found {part.strip()!r}, expected {', '.join(NAMES)} as name=number; {nearest(name, list(NAMES))}"
            )
        elif not value.removeprefix("-").isdecimal():
            problems.append(f"shape: {name}: found {value!r}, expected a whole number")
        else:
            found[name] = int(value)
    if problems:
        raise VeneerError(problems)
    return found


def shape_text(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={value}" for name, value in sizes.items())


def _llama(found: dict[str, Any], raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Llama's settings of sizes by our names."""
    problems = [
        f"{where}: {_called(name)} is missing" for name in NAMES if found.get(name) is None and name not in OPTIONAL
    ]
    problems += [f"{where}: found {name}, expected {', '.join(NAMES)}" for name in found.keys() - NAMES.keys()]
    problems += [
        f"{where}: {_called(name)}: {problem}"
        for name, value in found.items()
        if name in NAMES and value is not None and (problem := _not_a_size(value, NAMES[name][2]))
    ]
    if not problems:
        heads, kv_heads = found["heads"], found.get("kv_heads") or found["heads"]
        width = found.get("head_dim") or found["hidden"] // heads
        if found.get("head_dim") is None and found["hidden"] % heads:
            problems.append(f"{where}: hidden: found {found['hidden']}, expected a multiple of heads ({heads})")
        elif width % 2:
            problems.append(
                f"{where}: head_dim: found {width}, expected an even number: positions turn pairs of numbers"
            )
        if heads % kv_heads:
            problems.append(f"{where}: kv_heads: found {kv_heads}, expected a divisor of heads ({heads})")
    if problems:
        raise VeneerError(
            problems, hint="for example layers=32,hidden=4096,heads=32,kv_heads=8,intermediate=14336,vocab=128256"
        )
    sizes = {NAMES[name][0]: value for name, value in found.items() if value is not None}
    sizes.setdefault("num_key_value_heads", found["heads"])
    return {**sizes, "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False))}


def _require_sizes(kind: Any, raw: dict[str, Any], file: Path) -> list[str]:
    """Raise VeneerError for sizes of a known architecture that cannot be; says which are transformers' own, being missing."""
    problems, notes = [], []
    values: dict[str, Any] = {}
    for ours, (name, _, most) in NAMES.items():
        key = getattr(kind, "attribute_map", {}).get(name, name)
        value = values[ours] = raw.get(key, raw.get(name))
        if value is not None and not isinstance(value, list) and (problem := _not_a_size(value, most)):
            problems.append(f"{file}: {key}: {problem}")
        elif value is None and ours in ("layers", "hidden", "heads", "vocab"):
            if key in raw or name in raw:
                problems.append(f"{file}: {key}: found null, expected a whole number from 1")
            else:
                notes.append(f"{file}: {key} is missing: transformers' own for {kind.model_type} is taken")
    heads, kv_heads = values["heads"], values["kv_heads"]
    if not problems and isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        problems.append(f"{file}: num_key_value_heads: found {kv_heads}, expected a divisor of the heads ({heads})")
    if problems:
        raise VeneerError(problems)
    return notes


def _key(name: str, raw: dict[str, Any]) -> str | None:
    """What a config calls a size."""
    return next((key for key in (NAMES[name][0], *NAMES[name][1]) if key in raw), None)


def _called(name: str) -> str:
    return f"{name} ({NAMES[name][0]})"


def _not_a_size(value: Any, most: int) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
        return None
    return f"found {value!r}, expected a whole number from 1 to {most:,}"
