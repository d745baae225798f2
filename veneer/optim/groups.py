"""Which parameters learn at which rate."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(parameters: dict[str, nn.Parameter], lora_plus: float | None = None) -> list[dict[str, Any]]:
    """Groups for an optimizer; each has a `factor` that the learning rate is multiplied by.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns `lora_plus` times as fast as A, because at the width of today's
    models a B that starts at zero moves too slowly at A's rate. Everything else learns at A's rate.

    Args:
        parameters: by name, factors as `<layer>.lora_A.weight` and `<layer>.lora_B.weight` (or lora_embedding_A, _B).
    """
    if lora_plus is None:
        return [{"params": list(parameters.values()), "factor": 1.0}]
    fast = {name for name in parameters if name.endswith((".lora_B.weight", ".lora_embedding_B"))}
    groups = [
        {"params": [p for name, p in parameters.items() if (name in fast) == quick], "factor": factor}
        for quick, factor in ((False, 1.0), (True, lora_plus))
    ]
    return [group for group in groups if group["params"]]
