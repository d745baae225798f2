"""The inputs every contender shares, made once in a process of its own: adapter, token blocks, chat rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.plan import Options, Record

INSTRUCTION = "Turn this home command into JSON."


def prepare(options: Options) -> Record:
    """Write into the work folder:

    adapter/               veneer's, in PEFT's files, B small and not zero, so that every gradient is there at step 0
    blocks.safetensors     input_ids (steps, rows, length): chat text, end to end; every token is learned
    train.jsonl, validation.jsonl   rows of Alpaca form
    chat.json              the same rows as token ids and labels; train in the order in which veneer's loop takes them
    """
    import torch
    from safetensors.torch import save_file

    import veneer
    from veneer.models.load import resolve
    from veneer.training.data import encode_rows, read_rows
    from veneer.training.packing import Order

    work = Path(options.work)
    model, tokenizer = veneer.load(options.model, fused=False)
    veneer.attach(model, veneer.LoraConfig(r=options.rank, alpha=options.alpha, targets="all-linear"), seed=0)
    set_factors(model)
    veneer.save_adapter(model, work / "adapter")

    found, samples = [], []
    for row in usable_rows(options):
        encoded = encode_rows(read_rows([row]).rows, tokenizer, max_length=1 << 16).samples
        if len(encoded) == 1 and len(encoded[0].input_ids) <= options.sft_length:
            found.append(row)
            samples.append(encoded[0])
        if len(found) == options.sft_rows + options.sft_validation:
            break
    count = len(found) - options.sft_validation
    if count < options.batch:
        raise SystemExit(f"{options.data}: found {len(found)} rows of at most {options.sft_length} tokens: too few")
    for name, part in (("train", slice(0, count)), ("validation", slice(count, None))):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found[part]), encoding="utf-8")
    order = Order(count, options.batch, 0)
    places = [place for step in range(order.steps_per_epoch) for place in order.step(step)]
    chat = {"train": [samples[i] for i in places], "validation": samples[count:]}
    (work / "chat.json").write_text(
        json.dumps({name: [[s.input_ids, s.labels] for s in part] for name, part in chat.items()}), encoding="utf-8"
    )

    steps = options.warmup + options.steps
    wanted = steps * options.rows * options.length
    tokens = [token for sample in samples for token in sample.input_ids]
    tokens = (tokens * (wanted // len(tokens) + 1))[:wanted]
    save_file(
        {"input_ids": torch.tensor(tokens).view(steps, options.rows, options.length)}, work / "blocks.safetensors"
    )
    lengths = [len(sample.input_ids) for sample in samples]
    return {
        "model": str(resolve(options.model)),
        "data": os.path.relpath(options.data)
        if options.data
        else "home commands as Alpaca rows (home-assistant-intents)",
        "train rows": count,
        "train tokens": sum(lengths[:count]),
        "supervised tokens": sum(sample.supervised for sample in samples[:count]),
        "longest row": max(lengths),
    }


def set_factors(model: Any, name: str = "default") -> None:
    """B small and not zero, always the same."""
    import torch

    from veneer.adapters.attach import adapter_parameters

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, name).items():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def chat(options: Options, part: str) -> list[Any]:
    """The rows of chat.json as veneer's samples."""
    from veneer.training.data import Sample

    return [Sample(ids, labels) for ids, labels in json.loads((Path(options.work) / "chat.json").read_text())[part]]


def usable_rows(options: Options) -> list[dict[str, Any]]:
    """Rows of Alpaca form. Left out: marked as not usable (a `status` other than "ok"), without an output."""
    if options.data is not None:
        text = Path(options.data).read_text(encoding="utf-8")
        rows = json.loads(text) if options.data.endswith(".json") else [json.loads(x) for x in text.splitlines() if x]
        kept = ("instruction", "input", "output")
        usable = [row for row in rows if row.get("status", "ok") == "ok" and str(row.get("output", "")).strip()]
        return [{key: row.get(key, "") for key in kept} for row in usable]
    from veneer.demo_data import build_demo_data

    made = build_demo_data(train_rows=4 * (options.sft_rows + options.sft_validation), test_rows=1).train
    return [{"instruction": INSTRUCTION, "input": row["prompt"], "output": row["completion"]} for row in made]
