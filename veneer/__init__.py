"""Veneer: LoRA and QLoRA on the machine people have. The public names, nothing else.

Each name is imported when it is first used: `veneer --help` must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.adapters.attach import (
        active_adapter,
        attach,
        count_parameters,
        list_adapters,
        remove_adapter,
        set_adapter,
        unmerge,
    )
    from veneer.adapters.combine import combine
    from veneer.adapters.files import load_adapter, save_adapter
    from veneer.adapters.merge import hot_merge, merge
    from veneer.adapters.reference import adapter_checkpoints, adapter_off, base_model
    from veneer.config import DataConfig, LoraConfig, Recipe, TrainConfig
    from veneer.errors import RefusedError, VeneerError
    from veneer.evaluation import evaluate
    from veneer.models.load import load, save_model
    from veneer.planning.plan import plan
    from veneer.training.loop import train
    from veneer.training.preflight import preflight

__version__ = "0.1.0"
__all__ = [
    "DataConfig",
    "LoraConfig",
    "Recipe",
    "RefusedError",
    "TrainConfig",
    "VeneerError",
    "active_adapter",
    "adapter_checkpoints",
    "adapter_off",
    "attach",
    "base_model",
    "combine",
    "count_parameters",
    "evaluate",
    "hot_merge",
    "list_adapters",
    "load",
    "load_adapter",
    "merge",
    "plan",
    "preflight",
    "remove_adapter",
    "save_adapter",
    "save_model",
    "set_adapter",
    "train",
    "unmerge",
]
_HOMES = {
    "veneer.adapters.attach": (
        "active_adapter",
        "attach",
        "count_parameters",
        "list_adapters",
        "remove_adapter",
        "set_adapter",
        "unmerge",
    ),
    "veneer.adapters.combine": ("combine",),
    "veneer.adapters.files": ("load_adapter", "save_adapter"),
    "veneer.adapters.merge": ("hot_merge", "merge"),
    "veneer.adapters.reference": ("adapter_checkpoints", "adapter_off", "base_model"),
    "veneer.config": ("DataConfig", "LoraConfig", "Recipe", "TrainConfig"),
    "veneer.errors": ("RefusedError", "VeneerError"),
    "veneer.evaluation": ("evaluate",),
    "veneer.models.load": ("load", "save_model"),
    "veneer.planning.plan": ("plan",),
    "veneer.training.loop": ("train",),
    "veneer.training.preflight": ("preflight",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
