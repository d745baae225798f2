"""Rows as they go through a model: a step's batches, the first ones for a start, the largest, and those of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.config import EVALUATED, TOKEN_BUDGET, DataConfig, TrainConfig
from veneer.models.fuse import batch_loss
from veneer.training.data import Sample, prepare_data
from veneer.training.packing import Order, collate_packed, collate_padded, pack, passes

START_TOKENS = 16_384  # that EVA looks at, in whole rows
LOOKED_AT = 2_000  # rows, for the size of the largest batch before a run


def batches(
    samples: list[Sample], packing: bool, tokenizer: Any, budget: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Samples as model inputs: packed sequences of at most `budget` tokens, or one padded batch."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    made = [collate_packed(group) for group in pack(samples, budget)] if packing else [collate_padded(samples, pad)]
    for batch in made:
        yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def start_batches(model: Any, tokenizer: Any, config: DataConfig, seed: int) -> list[dict[str, Any]]:
    """For `attach(..., data=...)` with init eva: the first rows that a run of this seed trains on, as batches."""
    samples = prepare_data(None, config, tokenizer, seed)[0].samples
    packing = config.packing and "attention" in getattr(model, "veneer_parts", ())
    rows: list[Sample] = []
    for i in Order(len(samples), len(samples), seed).step(0):
        if sum(len(row.input_ids) for row in rows) >= START_TOKENS:
            break
        rows.append(samples[i])
    device = next(model.parameters()).device
    size = len(rows) if packing else EVALUATED
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [b for group in groups for b in batches(group, packing, tokenizer, TOKEN_BUDGET, device)]


class LargestPass(NamedTuple):
    """Tokens of each row of the largest forward pass, padding included; the most passes of a step; tokens of the longest row
    that is held out, 0 where none is."""

    rows: tuple[int, ...]
    passes: int
    held_out: int


def largest_pass(tokenizer: Any, data: DataConfig, config: TrainConfig, packs: bool, steps: int = 200) -> LargestPass:
    """Of the first steps of a run, for the planner: only the first LOOKED_AT rows are read.

    packs: whether the model's attention takes packed rows.
    """
    limit = min(data.limit or LOOKED_AT, LOOKED_AT)
    limited = data.model_copy(update={"limit": limit})
    train_set, eval_set, _ = prepare_data(None, limited, tokenizer, config.seed)
    samples, packing = train_set.samples, packs and data.packing
    order = Order(len(samples), config.batch_size * config.grad_accumulation, config.seed)
    largest: tuple[int, ...] = ()
    most = 1
    for step in range(min(steps, order.steps_per_epoch)):
        groups = [*passes([samples[i] for i in order.step(step)], config.batch_size, packing, data.max_length)]
        most = max(most, len(groups))
        for group in groups:
            sizes = [len(sample.input_ids) for sample in group]
            largest = max(largest, tuple(sizes if packing else [max(sizes)] * len(sizes)), key=sum)
    held_out = max((len(sample.input_ids) for sample in eval_set.samples), default=0) if eval_set is not None else 0
    return LargestPass(largest, most, held_out)


@torch.no_grad()
def evaluation_loss(model: Any, samples: list[Sample], packing: bool, tokenizer: Any) -> dict[str, float]:
    """Mean cross-entropy over learned tokens, and how many there are."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for start in range(0, len(samples), EVALUATED):
        rows = samples[start : start + EVALUATED]
        for batch in batches(rows, packing, tokenizer, TOKEN_BUDGET, device):
            total += float(batch_loss(model, batch, 1))
        tokens += sum(sample.supervised for sample in rows)
    return {"loss": total / tokens, "tokens": tokens}
