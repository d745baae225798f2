"""Veneer: LoRA and QLoRA on the machine people have. The public names, nothing else."""

from veneer.adapters.attach import attach, count_parameters, remove_adapter, set_adapter
from veneer.adapters.files import load_adapter, save_adapter
from veneer.adapters.merge import merge
from veneer.config import DataConfig, LoraConfig, Recipe, TrainConfig
from veneer.errors import RefusedError, VeneerError
from veneer.evaluation import evaluate
from veneer.models.load import load, save_model
from veneer.training.loop import train

__version__ = "0.1.0"
__all__ = [
    "DataConfig",
    "LoraConfig",
    "Recipe",
    "RefusedError",
    "TrainConfig",
    "VeneerError",
    "attach",
    "count_parameters",
    "evaluate",
    "load",
    "load_adapter",
    "merge",
    "remove_adapter",
    "save_adapter",
    "save_model",
    "set_adapter",
    "train",
]
