"""Adapters and merged models as GGUF files, as llama.cpp reads them, and a Modelfile for Ollama.

llama.cpp has names of its own for tensors, and for the Llama family another order of the rows of q and k (its rotary
embedding turns neighbours, transformers' turns halves). An adapter's scale there is alpha over the rank of each tensor, with
one alpha: the true scale of every layer is folded into B.

A model is written after a GGUF of its base, whose metadata (tokenizer, sizes, template) it takes over, and every tensor of
the base is first compared with that file: a wrong name or order would be seen there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from veneer.adapters.peft_format import AdapterFile
from veneer.errors import RefusedError, VeneerError
from veneer.models.gguf_check import check_gguf
from veneer.models.load import read_config, weight_files
from veneer.storage import TensorFile, atomic_file

TYPES = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


class Family(NamedTuple):
    """An architecture of llama.cpp: which of transformers' it is, and whether q and k lie in its order of rows."""

    arch: gguf.MODEL_ARCH
    turned: bool


FAMILIES = {  # by transformers' model_type; others need changes of weights that are not written here
    "llama": Family(gguf.MODEL_ARCH.LLAMA, True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, False),
}
OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
HALF_LIMIT = 65_504
ALIKE = 0.98  # least cosine of a base tensor with that of a GGUF of the same model, in 4 bits or more


class Names:
    """llama.cpp's names and order of rows for one model.

    Raises:
        RefusedError: an architecture that is not among FAMILIES.
    """

    def __init__(self, config: Any) -> None:
        if config.model_type not in FAMILIES:
            raise RefusedError(
                f"llama.cpp: found the architecture {config.model_type}, expected {', '.join(FAMILIES)}",
                hint="merge it (veneer merge) and convert the result with llama.cpp's convert_hf_to_gguf.py",
            )
        self.family = FAMILIES[config.model_type]
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self._map = gguf.get_tensor_name_map(self.family.arch, config.num_hidden_layers)

    def of(self, key: str) -> str | None:
        """llama.cpp's name of a tensor of transformers' model, None: it has none."""
        return self._map.get_name(key, try_suffixes=(".weight", ".bias"))

    def turn(self, key: str, value: Tensor) -> Tensor:
        """The rows of a q or k matrix (of its B, or its bias) in llama.cpp's order."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(key.split(".")[-2] if "." in key else "")
        if not self.family.turned or heads is None:
            return value
        return value.view(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def unsupported(file: AdapterFile, tied: bool = False) -> list[str]:
    """What of an adapter llama.cpp cannot hold: it reads A and B of linears alone. tied: the head is the embeddings."""
    problems = [
        f"{layer}: its weight is the embeddings' too, and a GGUF has no tensor for it"
        for layer in file.factors
        if tied and layer.rpartition(".")[2] == "lm_head"
    ]
    if file.config.dora:
        problems.append("use_dora: llama.cpp has no DoRA")
    if file.replaced:
        problems.append(f"modules_to_save or bias: llama.cpp has no place for {', '.join(sorted(file.replaced)[:3])}")
    if file.tokens:
        problems.append("trainable_token_indices: llama.cpp has no place for rows of tokens")
    if any(one.bias is not None for one in file.factors.values()):
        problems.append("lora_bias: llama.cpp has no bias of B")
    for name, one in file.factors.items():
        if one.a.ndim > 2 or len(one.a) != one.r:
            problems.append(f"{name}: llama.cpp takes adapters of linear layers only")
        elif "lora_embedding" in file.keys[name]["a"]:
            problems.append(f"{name}: an adapter of embeddings, which llama.cpp reads otherwise")
    return problems


def write_adapter(file: AdapterFile, config: Any, path: str | Path, *, name: str = "adapter") -> dict[str, Any]:
    """An adapter as a GGUF file with fp32 factors: alpha is the rank, the true scale of each layer is in B.

    Raises:
        RefusedError: `unsupported` parts, or layers that llama.cpp has no name for.
    """
    names = Names(config)
    problems = unsupported(file)
    named = {layer: names.of(f"{layer}.weight") for layer in file.factors}
    problems += [f"{layer}: llama.cpp has no tensor of that name" for layer, other in named.items() if other is None]
    if problems:
        raise RefusedError(problems, hint="export a merged model instead: --merged --model MODEL")
    alpha = max(one.r for one in file.factors.values())
    made: dict[str, Tensor] = {}
    for layer, one in file.factors.items():
        b = one.b.double() * (one.scaling * one.r / alpha)
        made[f"{named[layer]}.lora_a"] = one.a.float()
        made[f"{named[layer]}.lora_b"] = names.turn(f"{layer}.weight", b).float()

    def about(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))

    plan = {key: (tuple(value.shape), gguf.GGMLQuantizationType.F32) for key, value in made.items()}
    _write(path, gguf.MODEL_ARCH_NAMES[names.family.arch], about, plan, lambda key: made[key].contiguous().numpy())
    return {"file": str(path), "alpha": alpha, "tensors": len(made)}


def require_dense(base: Path) -> None:
    """Raise RefusedError for a base that is stored quantised."""
    if (stored := read_config(base)[1]) is not None:
        raise RefusedError(
            f"{base} is stored in {stored}: it cannot be compared with a GGUF", hint="give the 16-bit base"
        )


def write_model(
    folder: str | Path, like: str | Path, path: str | Path, *, base: str | Path, kind: str = "f16"
) -> dict[str, Any]:
    """A 16-bit model folder as a GGUF file, with all metadata of `like`, a GGUF of the model that it was merged from.

    Args:
        base: that model's folder: each of its tensors must be that of `like`, up to quantisation.
        kind: "f16" or "q8_0", of the matrices; norms and biases are fp32.

    Raises:
        VeneerError: an unknown kind, or `like` is of another model: other tensors or shapes, or weights unlike these.
        RefusedError: an architecture that is not among FAMILIES; other quantised weights.
    """
    if kind not in TYPES:
        raise VeneerError(f"type: found {kind!r}, expected {', '.join(TYPES)}")
    folder, like = Path(folder), Path(like)
    config, quantization = read_config(folder)
    if quantization:
        raise RefusedError(f"{folder} is quantised to {quantization}", hint="merge it into 16 bits first")
    require_dense(Path(base))
    names = Names(config)
    check_gguf(like)
    reader = gguf.GGUFReader(like)
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    files = [TensorFile(file) for file in weight_files(folder)]
    originals = {key: file for file in map(TensorFile, weight_files(Path(base))) for key in file.tensors}
    named = {key: (names.of(key), file) for file in files for key in file.tensors}
    ours = {name: (file, key) for key, (name, file) in named.items() if name is not None}
    arch = gguf.MODEL_ARCH_NAMES[names.family.arch]
    found = str(reader.fields["general.architecture"].contents()) if "general.architecture" in reader.fields else "none"
    problems = [] if found == arch else [f"{like}: found the architecture {found}, expected {arch}"]
    problems += [f"{key}: llama.cpp has no name for it" for key, (name, _) in named.items() if name is None]
    extra = (
        {"output.weight"} if "output.weight" in ours and "output.weight" not in theirs else set()
    )  # a head of its own now
    problems += [
        f"{name}: in the model, not in {like}" for name in sorted(ours.keys() - theirs.keys() - extra - {None})
    ]
    computed = {"rope_freqs.weight"}
    problems += [f"{name}: in {like}, not in the model" for name in sorted(theirs.keys() - ours.keys() - computed)]
    if problems:
        raise VeneerError(problems, hint="expected a GGUF of the base model that this one was merged from")
    plan = {}
    for name in [*theirs, *sorted(extra)]:
        if name not in ours:  # computed from the config
            plan[name] = (tuple(theirs[name].data.shape), theirs[name].tensor_type)
            continue
        file, key = ours[name]
        shape = tuple(file.tensors[key][1])
        chosen = TYPES[kind] if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        if chosen == TYPES["q8_0"] and shape[-1] % 32:
            chosen = TYPES["f16"]
        plan[name] = (shape, chosen)

    def about(writer: gguf.GGUFWriter) -> None:
        for key, field in reader.fields.items():
            if key.startswith(("GGUF.", "split.")) or key in OWN_KEYS:
                continue
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def tensor(name: str) -> Any:
        if name not in ours:
            return np.array(theirs[name].data)
        file, key = ours[name]
        array = names.turn(key, file.read(key).float()).contiguous().numpy()
        if plan[name][1] == TYPES["f16"] and (largest := float(np.abs(array).max(initial=0))) > HALF_LIMIT:
            raise VeneerError(f"{key}: found {largest:,.0f}, f16 holds numbers up to {HALF_LIMIT:,}", hint="take q8_0")
        return array if plan[name][1] == gguf.GGMLQuantizationType.F32 else gguf.quantize(array, plan[name][1])

    unlike = []
    for name, (_, key) in ours.items():
        if name in theirs and key in originals:
            problem = _unlike(theirs[name], names.turn(key, originals[key].read(key).float()))
            unlike += [] if problem is None else [f"{key}: {problem}"]
    if unlike:
        raise VeneerError(unlike, hint=f"{like} is not of the base model that this one was merged from")
    _write(path, arch, about, plan, tensor)
    check_gguf(Path(path))
    return {"file": str(path), "type": kind, "tensors": len(plan), "bytes": os.path.getsize(path)}


def _unlike(theirs: Any, ours: Tensor) -> str | None:
    """Why a tensor of a GGUF cannot be the base of ours; None: it can."""
    values = torch.from_numpy(np.array(gguf.dequantize(theirs.data, theirs.tensor_type), dtype=np.float32))
    if values.shape != ours.shape:
        return f"found {tuple(values.shape)} there, expected {tuple(ours.shape)}"
    a, b = values.flatten().double(), ours.flatten().double()
    lengths = float(a.norm() * b.norm())
    cosine = float(a @ b) / lengths if lengths else 1.0
    if cosine < ALIKE:
        return f"found other weights there (cosine {cosine:.2f}, expected at least {ALIKE})"
    larger = float(a.norm() / b.norm()) if lengths else 1.0
    return None if abs(larger - 1) < 0.05 else f"found weights {larger:.2f} times as large there"


def _write(
    path: str | Path,
    arch: str,
    about: Callable[[Any], None],
    plan: dict[str, tuple[tuple[int, ...], Any]],
    tensors: Callable[[str], Any],
) -> None:
    """Write a GGUF one tensor at a time. plan: shape and type of each; tensors: makes one, as it is stored."""
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        try:
            about(writer)
            for name, (shape, kind) in plan.items():
                size = int(np.prod(shape)) // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
                stored = gguf.quant_shape_to_byte_shape(shape, kind) if kind == TYPES["q8_0"] else shape
                dtype = {TYPES["f16"]: np.float16, gguf.GGMLQuantizationType.F32: np.float32}.get(kind, np.uint8)
                writer.add_tensor_info(name, stored, np.dtype(dtype), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in plan:
                writer.write_tensor_data(tensors(name))
        finally:
            writer.close()


# ---- Ollama -----------------------------------------------------------------------------------------------------------


BY_HAND = "export for llama.cpp, and write the Modelfile's TEMPLATE by hand"


class Chat(NamedTuple):
    """A format of conversations: how transformers' template renders it, and the same in Ollama's template language."""

    render: Callable[[list[dict[str, str]]], str]
    template: str
    stop: str


def _chatml(messages: list[dict[str, str]]) -> str:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return f"{text}<|im_start|>assistant\n"


def _llama3(messages: list[dict[str, str]]) -> str:
    parts = [f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>" for m in messages]
    return "".join(parts) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


CHATS = {
    "ChatML": Chat(
        _chatml,
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "Llama 3": Chat(
        _llama3,
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}


def modelfile(tokenizer: Any, model: str, adapter: str | None = None, system: str | None = None) -> str:
    """A Modelfile whose template is the tokenizer's own: both render the same conversations to the same text.

    Args:
        model: what FROM names: a GGUF file beside it, or a model of Ollama's. adapter: a GGUF adapter beside it.
        system: a system message of its own; left out, the one that the tokenizer's template puts in by itself.

    Raises:
        RefusedError: the tokenizer's template is none of CHATS.
    """
    talk = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]  # fmt: skip

    def rendered(messages: list[dict[str, str]]) -> str:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # no template, or one that refuses a system message
            raise RefusedError(
                f"Ollama: the model's chat template cannot be compared: {' '.join(str(error).split())[:200]}",
                hint=BY_HAND,
            ) from None
        bos = tokenizer.bos_token
        return str(text.removeprefix(bos) if bos and not text.startswith("<|im_start|>") else text)

    for name, chat in CHATS.items():
        if rendered(talk) != chat.render(talk):
            continue
        alone = rendered(talk[1:2])
        default = None
        if alone != chat.render(talk[1:2]):  # it adds a system message where there is none
            before, _, after = chat.render([{"role": "system", "content": "\0"}, talk[1]]).partition("\0")
            if not (alone.startswith(before) and alone.endswith(after)):
                continue
            default = alone[len(before) : len(alone) - len(after)]
        said = system if system is not None else default
        if said and '"""' in said:
            raise VeneerError('the system message holds """, which would end it in a Modelfile')
        lines = [f"# conversations in {name}", f"FROM {model}"]
        lines += [f"ADAPTER {adapter}"] if adapter else []
        lines += [f'TEMPLATE """{chat.template}"""', f'PARAMETER stop "{chat.stop}"']
        lines += [f'SYSTEM """{said}"""'] if said else []
        return "\n".join(lines) + "\n"
    raise RefusedError(
        f"Ollama: the model's chat template is none of {', '.join(CHATS)}, so its Modelfile would not say the same",
        hint=BY_HAND,
    )
