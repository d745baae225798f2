"""Learning rates: the schedule over the steps, and a starting value from the model's width."""

from __future__ import annotations

import math


def lr_factor(step: int, total: int, warmup: int, schedule: str = "cosine", floor: float = 0.0) -> float:
    """The share of the peak learning rate used by optimizer step `step` (the first is 0) of `total`.

    Linear warm-up over `warmup` steps, never zero; then cosine or linear down to `floor`, or constant.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return floor + (1 - floor) * share


def default_learning_rate(hidden_size: int, method: str = "lora") -> float:
    """5e-5 * (2000 / hidden)^0.78 for full fine-tuning, ten times that for LoRA, by width.

    From "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025): for LoRA 1.3e-3 at hidden 576, 2.9e-4 at 4096.
    """
    return (5e-5 if method == "full" else 5e-4) * (2000 / hidden_size) ** 0.78
