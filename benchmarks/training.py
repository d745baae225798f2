"""Training steps of LoRA and QLoRA, the same for every contender: model, adapter, batches, AdamW, clipping, clock.

C1, C2, C3 and follow are made of `steps`; C5 takes its models from here.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import chat
from benchmarks.measure import Memory
from benchmarks.plan import Cell, Options, Record

LEARN = "benchmarks.training:steps"
FLOP_A_TOKEN = 0.6e9  # a LoRA step on SmolLM2-135M: forward 287 MFLOP, backward without the base's own gradients


def step_cell(name: str, by: str, base: str = "bf16", recompute: str = "none", **more: Any) -> Cell:
    """A cell of `steps`; `more`: data, and `once` of the cell."""
    once = more.pop("once", False)
    needs = (("peft", "bitsandbytes") if "nf4" in base else ("peft",)) if by == "peft" else ()
    return Cell(name, LEARN, {"by": by, "base": base, "recompute": recompute, **more}, needs, once)


def steps(options: Options, by: str, base: str, recompute: str, data: str = "blocks") -> Record:
    """Forward, backward, clipping to norm 1 and AdamW (fused, as transformers' Trainer has it) on fixed batches.

    Args:
        by: "veneer" or "peft". base: "bf16", "fp32", "nf4" (double quantised, computing in bf16) or "nf4 fp32".
        recompute: "none"; veneer: "mlp" or "full"; PEFT: "full" is transformers' gradient checkpointing.
        data: "blocks" (rows x length, all learned) or "chat" (rows of C5, padded for PEFT, packed for veneer).

    Returns: seconds of each timed step, tokens a step, losses and gradient norms of all steps, peaks of memory.
    """
    imports(by, base)
    batches = list(_batches(options, by, data))
    memory = Memory()
    began = time.perf_counter()
    model, loss_of = adapted_model(options, by, base, recompute)
    loaded = time.perf_counter() - began
    memory.restart()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0, fused=True)
    losses, norms, seconds = [], [], []
    for parts, items in batches:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for part in parts:
            found = loss_of(model, part, items)
            found.backward()
            loss += float(found.detach())
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        losses.append(loss)
        norms.append(float(norm))
    return {
        "step_seconds": seconds[options.warmup :],
        "tokens": options.rows * options.length,
        "losses": losses,
        "grad_norms": norms,
        "peak_bytes": max(memory.before, memory.since()),
        "steps_peak_bytes": memory.since(),
        "load_seconds": loaded,
        "trainable": sum(p.numel() for p in parameters),
    }


def tokens_per_second(record: Record) -> float:
    """Of the median timed step."""
    times = sorted(record["step_seconds"])
    return float(record["tokens"] / times[len(times) // 2])


def imports(by: str, base: str = "bf16") -> None:
    """All that a contender needs, so that memory can be counted from after it."""
    names = ["transformers.models.llama.modeling_llama"]
    if by == "veneer":
        names += ["veneer.adapters.files", "veneer.models.load", "veneer.training.loop"]
    else:
        names += ["peft"] + (["bitsandbytes", "transformers.integrations.bitsandbytes"] if "nf4" in base else [])
    for name in names:
        importlib.import_module(name)


def adapted_model(options: Options, by: str, base: str, recompute: str = "none") -> tuple[Any, Callable[..., Any]]:
    """The model with the shared adapter on it, ready to train, and loss(model, batch, items)."""
    return (_veneer if by == "veneer" else _peft)(options, base, recompute)


def model_folder(options: Options) -> str:
    """The safetensors folder of the model, the same for all."""
    return str(json.loads((Path(options.work) / "prepare.json").read_text())["model"])


def _veneer(options: Options, base: str, recompute: Any) -> tuple[Any, Callable[..., Any]]:
    import veneer
    from veneer.models.fuse import batch_loss, set_recompute

    model, _ = veneer.load(
        options.model, quantize="nf4" if "nf4" in base else None, dtype="float32" if "fp32" in base else "bfloat16"
    )
    veneer.load_adapter(model, Path(options.work) / "adapter")
    assert set_recompute(model, recompute), "no fused layers"
    return model.train(), batch_loss


def _peft(options: Options, base: str, recompute: str) -> tuple[Any, Callable[..., Any]]:
    """As PEFT's guides do it, with what helps it: no key-value cache; norms and head of a 4-bit base left in bf16.

    In train mode, where bitsandbytes keeps its layout for training.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = model_folder(options)
    kwargs: dict[str, Any] = {"dtype": torch.float32 if "fp32" in base else torch.bfloat16}
    if "nf4" in base:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kwargs["dtype"],
        )
    AutoTokenizer.from_pretrained(folder)  # as veneer.load does
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    model.config.use_cache = False
    model = PeftModel.from_pretrained(model, str(Path(options.work) / "adapter"), is_trainable=True)
    if recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(), lambda model, batch, items: model(**batch).loss


def blocks(options: Options, count: int) -> Iterable[torch.Tensor]:
    """The input ids (rows, length) of so many steps; from the first again where there are no more."""
    from safetensors.torch import load_file

    found = load_file(Path(options.work) / "blocks.safetensors")["input_ids"]
    return (found[step % len(found)] for step in range(count))


def _batches(options: Options, by: str, data: str) -> Iterable[tuple[list[dict[str, Any]], int]]:
    """The steps' batches, each in one or more parts, and the number of learned tokens of a step."""
    if data == "blocks":
        for ids in blocks(options, options.warmup + options.steps):
            yield [{"input_ids": ids, "labels": ids.clone()}], ids[:, 1:].numel()
        return
    from veneer.training.packing import collate_packed, collate_padded, pack

    samples = chat(options, "train")
    for step in range(options.follow_steps):
        rows = samples[step * options.follow_batch % len(samples) :][: options.follow_batch]
        items = sum(row.supervised for row in rows)
        parts = [collate_packed(group) for group in pack(rows)] if by == "veneer" else [collate_padded(rows, 0)]
        yield parts, items
