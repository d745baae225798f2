"""What a fine-tune takes of memory, from the model's config alone: by part, by phase, before anything is loaded.

A training step is not described a second time here: its own code runs on tensors without memory (`ops.dry_run`). What
is added by hand is what no step allocates: loading, the optimizer, the libraries' own needs.

Sizes are bytes over those of a process that has imported the library.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.adapters.attach import attach
from veneer.config import ROUND_TO, TOKEN_BUDGET, LoraConfig, Method, Quantization
from veneer.errors import VeneerError
from veneer.models.fuse import batch_loss, fuse, set_recompute
from veneer.ops.blocks import Recompute
from veneer.ops.dry_run import DryRun
from veneer.quant.linear import quantize_model, quantized_layers

ADAM = 8  # bytes a trained parameter: two moments in fp32
FP32 = 4
SECOND_BASE = ("pissa", "loftq")
# What libraries and malloc keep, over import; fitted to 21 runs of five models (C12), the same for all models and methods.
LIBRARIES, A_TOKEN, TOKENS = (
    50_000_000,
    25_000,
    2048,
)  # in training: the first, and the second for each of so many tokens
LOADED, LOADED_QUANTIZED = 82_000_000, 32_000_000  # after loading; a quantised base's loader gives free memory back


class Run(NamedTuple):
    """What decides the memory of a fine-tune, besides the model. seq_len: tokens of the longest row; rows: tokens of all rows
    of the largest forward pass, where they are known (left out: as many of the longest as there can be)."""

    method: Method = "lora"
    quantize: Quantization | None = None
    double_quant: bool = True
    dtype: torch.dtype = torch.bfloat16
    lora: LoraConfig = LoraConfig()
    batch_size: int = 1
    seq_len: int = 2048
    grad_accumulation: int = 1
    recompute: Recompute = "none"
    packing: bool = True
    rows: tuple[int, ...] = ()

    def asked(self) -> dict[str, Any]:
        """The same by the names that a user knows, for JSON."""
        lora = self.method == "lora"
        return {
            "method": "qlora" if lora and self.quantize else self.method, "quantize": self.quantize,
            "dtype": str(self.dtype).removeprefix("torch."), "rank": self.lora.r if lora else None,
            "targets": self.lora.targets if lora else None, "batch_size": self.batch_size, "seq_len": self.seq_len,
            "grad_accumulation": self.grad_accumulation, "recompute": self.recompute, "packing": self.packing,
        }  # fmt: skip


class Estimate(NamedTuple):
    """Bytes by phase, and by part at the peak of training; about: what was planned for."""

    phases: dict[str, int]
    parts: dict[str, int]
    about: dict[str, Any]

    @property
    def peak(self) -> int:
        return max(self.phases.values())


class Weights(NamedTuple):
    """Bytes of a model as training has it: dense weights, 4- and 8-bit codes and their constants, the adapter; how many numbers
    are trained; the largest tensor of the base in 16 bits."""

    dense: int
    codes: int
    constants: int
    adapter: int
    trained: int
    largest: int

    @property
    def base(self) -> int:
        return self.dense + self.codes + self.constants


class Step(NamedTuple):
    """Bytes of one optimizer step over the weights: kept from the forward pass for the backward pass; what the head takes
    more; gradients at the end; all at the worst moment; and the tokens of a pass."""

    activations: int
    head: int
    gradients: int
    peak: int
    tokens: int


def prepared(skeleton: Any, run: Run) -> Any:
    """A skeleton as training has it, still without memory."""
    model = skeleton.to(run.dtype)
    with torch.device("meta"):
        if run.quantize is not None:
            quantize_model(model, run.quantize, double_quant=run.double_quant, compute_dtype=run.dtype)
        fuse(model)
        if run.method == "lora":
            with warnings.catch_warnings():  # who attaches it in earnest is told
                warnings.simplefilter("ignore")
                attach(model, run.lora if run.lora.init != "eva" else run.lora.model_copy(update={"init": "kaiming"}))
        else:
            model.requires_grad_(True)
    if not set_recompute(model, run.recompute) and run.recompute != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def weights_of(model: Any, run: Run) -> Weights:
    """Of a prepared skeleton."""
    layers = quantized_layers(model).values()
    codes = sum(layer.weight.nbytes for layer in layers)
    constants = sum(buffer.nbytes for layer in layers for buffer in layer.buffers()) - codes
    parameters = list(model.parameters())  # a tied one is there once
    trained = [p for p in parameters if p.requires_grad]
    adapter = sum(p.nbytes for p in trained) if run.method == "lora" else 0
    dense = sum(p.nbytes for p in parameters) - adapter
    matrices = [m.in_features * m.out_features for m in layers] + [p.numel() for p in parameters if not p.requires_grad]
    largest = max(matrices, default=0) * run.dtype.itemsize
    return Weights(dense, codes, constants, adapter, sum(p.numel() for p in trained), largest)


def dry_step(model: Any, run: Run, *, cpu: bool = True) -> Step:
    """One optimizer step of a prepared skeleton with the largest batches there can be."""
    parameters = list(model.parameters())
    batch, passes = _batch(run, "attention" in model.veneer_parts)
    marks: list[int] = []
    books = DryRun([*parameters, *model.buffers()], cpu=cpu)
    hooks = [model.get_decoder().register_forward_hook(lambda *_: marks.append(books.live))]
    if run.method == "full":  # the masters have the sums
        hooks += [parameter.register_post_accumulate_grad_hook(_let_go) for parameter in parameters]
    try:
        with books:
            for _ in range(min(passes, 2)):  # of the second on, gradients are there from the start
                loss = batch_loss(model, batch, 1)
                forward = books.peak
                torch.autograd.backward(loss)
                del loss
    finally:
        for hook in hooks:
            hook.remove()
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    model.zero_grad(set_to_none=True)
    tokens = batch["input_ids"].numel()
    return Step(marks[0], max(0, forward - marks[-1]), gradients, books.peak, tokens)


def _let_go(weight: Tensor) -> None:
    weight.grad = None


def _batch(run: Run, packs: bool) -> tuple[dict[str, Any], int]:
    """The largest inputs that a forward pass gets, as `training.packing` makes them: of rows of the full length; and how many
    passes a step has."""
    rows = list(run.rows) or [run.seq_len] * run.batch_size
    if run.packing and packs:
        rows = rows if run.rows else rows[: max(1, max(TOKEN_BUDGET, run.seq_len) // run.seq_len)]
    passes = run.grad_accumulation if run.rows else run.grad_accumulation * -(-run.batch_size // len(rows))
    if run.packing and packs and (missing := -sum(rows) % ROUND_TO):
        rows.append(missing)
    shape = (1, sum(rows)) if packs else (run.batch_size, run.seq_len)
    batch = {
        key: torch.empty(shape, dtype=torch.long, device="meta") for key in ("input_ids", "labels", "position_ids")
    }
    if packs:  # padded rows lie in memory as packed ones do
        starts = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
        batch |= {
            "attention_mask": torch.empty((1, 1, 1, 1), device="meta"),  # of four dimensions: nobody looks into it
            "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(rows), "max_length_k": max(rows),
        }  # fmt: skip
    return batch, passes


def estimate(skeleton: Any, run: Run) -> Estimate:
    """Of a skeleton, which is changed.

    Raises:
        VeneerError: a start that keeps a second base, which is not planned.
    """
    if run.method == "lora" and run.lora.init in SECOND_BASE:
        raise VeneerError(f"lora.init: found {run.lora.init}, which keeps a second base: its memory is not planned")
    architecture, count = type(skeleton).__name__, sum(p.numel() for p in skeleton.parameters())
    model = prepared(skeleton, run)
    weights, step = weights_of(model, run), dry_step(model, run)
    masters = run.method == "full" and run.dtype != torch.float32
    inside = step.peak - step.gradients
    activations = min(step.activations, inside)
    logits = min(step.head, inside - activations)
    parts = {
        "weights": weights.dense + weights.codes,
        "quantisation constants": weights.constants,
        "adapter": weights.adapter,
        "masters": FP32 * weights.trained if masters else 0,
        "gradients": FP32 * weights.trained if masters else step.gradients,
        "optimizer": ADAM * weights.trained,
        "activations": activations,
        "logits": logits,
        "scratch": inside - activations - logits,
        "libraries": LIBRARIES + A_TOKEN * min(step.tokens, TOKENS),
    }
    phases = {"load": _load(weights, run), "train": sum(parts.values())}
    about = {"architecture": architecture, "parameters": count, "trainable_parameters": weights.trained}
    return Estimate(phases, parts, about)


def _load(weights: Weights, run: Run) -> int:
    """At the worst moment of loading from files in the type that is asked for."""
    if run.quantize is None:  # mapped: read when they are used
        return LOADED
    return weights.base + weights.largest + LOADED_QUANTIZED  # one after the other is read from the file
