"""Which samples make a step, and how they become tensors: packed without padding, or padded.

The order is a function of (seed, epoch) alone, so a resumed run asks for step k and gets the same batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from veneer.config import IGNORED, ROUND_TO, TOKEN_BUDGET, TrainConfig, pass_budget
from veneer.training.data import Sample


@dataclass(frozen=True)
class Order:
    """The samples of every optimizer step. The last step of an epoch may be smaller; no sample is left out."""

    count: int
    per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.count / self.per_step)

    def steps(self, config: TrainConfig) -> tuple[int, int]:
        """Of a whole run, and how many of them warm up."""
        steps = max(1, math.ceil(config.epochs * self.steps_per_epoch))
        steps = steps if config.max_steps is None else min(steps, config.max_steps)
        return steps, math.ceil(0.03 * steps) if config.warmup_steps is None else config.warmup_steps

    def step(self, number: int) -> list[int]:
        """Indices of the samples of step `number` (the first is 0)."""
        epoch, position = divmod(number, self.steps_per_epoch)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.count, generator=generator)
        return [int(i) for i in order[position * self.per_step : (position + 1) * self.per_step]]


def pack(samples: Sequence[Sample], budget: int = TOKEN_BUDGET) -> list[list[Sample]]:
    """Put samples into as few sequences of at most `budget` tokens as first-fit, longest first, finds."""
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda s: -len(s.input_ids)):
        size = len(sample.input_ids)
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            bins.append([sample])
            room.append(budget - size)
        else:
            bins[place].append(sample)
            room[place] -= size
    return bins


def passes(samples: Sequence[Sample], batch_size: int, packing: bool, max_length: int) -> Iterator[list[Sample]]:
    """The samples of each forward pass of a step."""
    for start in range(0, len(samples), batch_size):
        some = list(samples[start : start + batch_size])
        yield from pack(some, pass_budget(max_length)) if packing else [some]


def computed(samples: Sequence[Sample], packing: bool) -> int:
    """Tokens of a pass with its padding."""
    sizes = [len(sample.input_ids) for sample in samples]
    return -(-sum(sizes) // ROUND_TO) * ROUND_TO if packing else max(sizes) * len(sizes)


def collate_packed(samples: Sequence[Sample], pad_id: int = 0) -> dict[str, Any]:
    """One sequence (1, T) of samples isolated from one another: position ids restart, `cu_seq_lens` say where.

    The names are those of transformers' padding-free batches. The first label of each sample is IGNORED.
    T is rounded up to a multiple of ROUND_TO by one more sample of padding, of which nothing is learned.
    """
    missing = -sum(len(sample.input_ids) for sample in samples) % ROUND_TO
    if missing:
        samples = [*samples, Sample([pad_id] * missing, [IGNORED] * missing)]
    lengths = [len(sample.input_ids) for sample in samples]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.tensor([[i for sample in samples for i in sample.input_ids]]),
        "labels": torch.tensor([[i for sample in samples for i in (IGNORED, *sample.labels[1:])]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def collate_padded(samples: Sequence[Sample], pad_id: int) -> dict[str, Any]:
    """A batch (B, longest), padded on the right. Masks come from lengths: EOS may be the padding id and is still learned."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = torch.full((len(samples), longest), pad_id)
    labels = torch.full((len(samples), longest), IGNORED)
    mask = torch.zeros((len(samples), longest), dtype=torch.long)
    for row, sample in enumerate(samples):
        size = len(sample.input_ids)
        ids[row, :size] = torch.tensor(sample.input_ids)
        labels[row, :size] = torch.tensor([IGNORED, *sample.labels[1:]])
        mask[row, :size] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
