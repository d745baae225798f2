"""What a fine-tune takes of memory, from the model's config alone: by part, by phase, before anything is loaded.

A training step is not described a second time here: its own code runs on tensors without memory (`ops.dry_run`). What
is added by hand is what no step allocates: loading, the optimizer, the libraries' own needs.

Sizes are bytes over those of a process that has imported the library.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from veneer.adapters.attach import attach, lora_layers
from veneer.adapters.starts import OF_WEIGHTS
from veneer.config import EVALUATED, ROUND_TO, TOKEN_BUDGET, LoraConfig, Method, Quantization, pass_budget
from veneer.errors import VeneerError
from veneer.models.fuse import batch_loss, fuse, set_recompute
from veneer.ops import native
from veneer.ops.blocks import Recompute
from veneer.ops.cross_entropy import OURS
from veneer.ops.dry_run import DryRun
from veneer.quant.linear import QuantizedLinear, quantize_model, quantized_layers

ADAM = 8  # bytes a trained parameter: two moments in fp32
FP32 = 4
SVD = 8  # tensors of a layer's size in fp32 that a start of weights (PiSSA, LoftQ) makes of it
# In segments of torch's allocator: cuBLAS' own, of the thread that goes forward and the one that goes back. Of Hopper; before it 8 MB.
WORKSPACES = 2 * (32 << 20)
COMPARED = 300  # tokens of the texts that a merged model is compared on
# What libraries and malloc keep, over import: in training at all, and for each of so many tokens. Fitted, with bf16 instructions
# (an Intel processor) and without (an AMD one): the same for all models and methods (C12).
LIBRARIES, A_TOKEN, TOKENS = {True: 50_000_000, False: 42_000_000}, {True: 25_000, False: 10_000}, 2048
LOADED, LOADED_QUANTIZED = 82_000_000, 32_000_000  # after loading; a quantised base's loader gives free memory back


class Run(NamedTuple):
    """What decides the memory of a fine-tune, besides the model. seq_len: tokens of the longest row. Where the data is known,
    rows: tokens of all rows of the largest forward pass, passes: of the largest step, held_out: tokens of the longest row that
    is held out (left out: as many passes, of as many of the longest rows, as there can be). stored: the type of the weights in
    their files (left out: that which is asked for)."""

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
    evaluate: bool = True
    rows: tuple[int, ...] = ()
    passes: int | None = None
    held_out: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    stored: torch.dtype | None = None
    guard: bool = True

    def asked(self) -> dict[str, Any]:
        """The same by the names that a user knows, for JSON."""
        lora = self.method == "lora"
        return {
            "method": "qlora" if lora and self.quantize else self.method, "quantize": self.quantize,
            "device": self.device, "dtype": str(self.dtype).removeprefix("torch."), "rank": self.lora.r if lora else None,
            "targets": self.lora.targets if lora else None, "batch_size": self.batch_size, "seq_len": self.seq_len,
            "grad_accumulation": self.grad_accumulation, "recompute": self.recompute, "packing": self.packing,
        }  # fmt: skip


class Estimate(NamedTuple):
    """Bytes by phase, and by part at the peak of training; about: what was planned for. On a GPU these are the GPU's, and
    `host` has the phases in main memory. Merging, which is no part of the run, is always in main memory."""

    phases: dict[str, int]
    parts: dict[str, int]
    about: dict[str, Any]
    host: dict[str, int]

    @property
    def peak(self) -> int:
        return _most(self.phases)

    @property
    def host_peak(self) -> int:
        return _most(self.host)


def _most(phases: dict[str, int]) -> int:
    return max((size for phase, size in phases.items() if phase != "merge"), default=0)


class Weights(NamedTuple):
    """Bytes of a model as training has it: dense weights, 4- and 8-bit codes and their constants, the adapter, what PiSSA or
    LoftQ keep beside the base; how many numbers are trained, and of these are in 16 bits; are in the base, and in its largest
    tensor and in its largest that is adapted."""

    dense: int
    codes: int
    constants: int
    adapter: int
    second_base: int
    trained: int
    rounded: int
    parameters: int
    largest: int
    adapted: int

    @property
    def base(self) -> int:
        return self.dense + self.codes + self.constants


class Step(NamedTuple):
    """Bytes of training over what is there between its steps: kept from a forward pass for its backward pass; what the head takes
    more; gradients at the end; all at the worst moment; the worst moment of an evaluation after it; what stays after that.
    tokens, evaluated: of a pass of each. On a GPU also `fragments`, which lie in segments of torch's allocator and in no tensor,
    at the end of training and of the evaluation; and `loaded`, the segments before."""

    activations: int
    head: int
    gradients: int
    peak: int
    evaluation: int
    kept: int
    tokens: int
    evaluated: int
    fragments: tuple[int, int] = (0, 0)
    loaded: int = 0


def prepared(skeleton: Any, run: Run) -> Any:
    """A skeleton as training has it, still without memory."""
    model = skeleton.to(run.dtype)
    with torch.device("meta"):
        if run.quantize is not None:
            quantize_model(model, run.quantize, double_quant=run.double_quant, compute_dtype=run.dtype)
        fuse(model)
        if run.method == "lora":
            known = run.lora.init in (*OF_WEIGHTS, "eva")  # these look at weights or data: the same layers and ranks
            with warnings.catch_warnings():  # who attaches it in earnest is told
                warnings.simplefilter("ignore")
                attach(model, run.lora.model_copy(update={"init": "kaiming"}) if known else run.lora)
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
    matrices = [m.in_features * m.out_features for m in layers] + [p.numel() for p in parameters]
    count = sum(m.in_features * m.out_features for m in layers) + sum(p.numel() for p in parameters)
    count -= sum(p.numel() for p in trained) if run.method == "lora" else 0
    second = _second_base(model, run) + adapter if _has_second_base(run) else 0  # and the factors as they began
    numbers, small = (sum(p.numel() for p in some) for some in (trained, rounded(trained)))
    adapted = max((math.prod(layer.sides) for layer in lora_layers(model).values()), default=0)
    return Weights(dense, codes, constants, adapter, second, numbers, small, count, max(matrices, default=0), adapted)


def rounded(parameters: Iterable[Any]) -> list[Any]:
    """Those that are trained in 16 bits: each has an fp32 master, which has the sum of its gradients too."""
    return [p for p in parameters if p.requires_grad and p.dtype != torch.float32]


def _has_second_base(run: Run) -> bool:
    of_loftq = run.lora.init == "loftq" and run.lora.loftq_iterations > 1  # after one it is the base
    return run.method == "lora" and (run.lora.init == "pissa" or of_loftq)


def _second_base(model: Any, run: Run) -> int:
    """Bytes of the bases that stand under the adapted layers."""
    bases = [layer.base_layer for layer in lora_layers(model).values()]
    return sum(
        sum(buffer.nbytes for buffer in base.buffers()) if isinstance(base, QuantizedLinear) else base.weight.nbytes
        for base in bases
    )


def dry_step(model: Any, run: Run) -> Step:
    """Training of a prepared skeleton with the largest batches there can be, then an evaluation.

    On the CPU one optimizer step, whose own work takes no memory but its state's; on a GPU two, the first makes that state.
    """
    cpu, packs = run.device == "cpu", "attention" in model.veneer_parts
    parameters = list(model.parameters())
    rows, passes = rows_of(run, packs)
    books = DryRun([*parameters, *model.buffers()], cpu=cpu)
    loaded, there = books.blocks.reserved, books.live
    sizes: list[int] = []

    def decoded(*_: Any) -> None:
        sizes.append(books.live - there)
        books.restart()

    def forward(rows: list[int]) -> Tensor:
        loss = batch_loss(model, _inputs(run, rows, packs), 1)
        if len(sizes) == 1:
            sizes.append(books.lately - there - sizes[0])
        return loss

    hooks: list[Any] = []
    try:
        with books:
            optimizer = None if cpu else Optimizer(parameters, foreach=True)
            taken = _let_go if optimizer is None else optimizer.add
            hooks += [parameter.register_post_accumulate_grad_hook(taken) for parameter in rounded(parameters)]
            if optimizer is not None:
                torch.autograd.backward(forward(rows))
                optimizer.step()
                optimizer.adam.zero_grad()
                there = books.live
            hooks.append(model.get_decoder().register_forward_hook(decoded))
            for _ in range(min(passes, 2)):  # of the second on, gradients are there from the start
                torch.autograd.backward(forward(rows))
            gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
            if optimizer is not None:
                optimizer.step()
            peak, segments = books.peak, books.blocks.reserved
            books.restart()
            held_out = _evaluated(run, packs) if run.evaluate else rows
            if run.evaluate:
                with torch.no_grad():
                    forward(held_out)
            kept = books.places.high + books.beside
    finally:
        for hook in hooks:
            hook.remove()
    model.zero_grad(set_to_none=True)
    evaluation, tokens = books.lately, (_tokens(run, rows, packs), _tokens(run, held_out, packs))
    fragments = (0, 0) if cpu else (segments - peak, books.blocks.reserved - evaluation)
    return Step(
        sizes[0], sizes[1], gradients, peak - there, evaluation - there, kept - there, *tokens, fragments, loaded
    )


def _let_go(weight: Tensor) -> None:
    weight.grad = None


class Optimizer:
    """What training makes around the passes: fp32 masters of 16-bit weights, sums of their gradients, AdamW. On a GPU torch takes
    many tensors in one call, and makes new ones in it; `foreach` does so anywhere."""

    def __init__(self, parameters: list[Any], *, foreach: bool) -> None:
        trained = [p for p in parameters if p.requires_grad]
        self.masters = {p: p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float()) for p in trained}
        self.adam = torch.optim.AdamW(self.masters.values(), foreach=foreach, fused=None if foreach else True)
        self.sums: dict[Any, Tensor] = {}

    def add(self, weight: Tensor) -> None:
        """A gradient goes to its master, whose memory for the sum is kept."""
        master = self.masters[weight]
        if master.grad is not None:
            master.grad.add_(weight.grad)
        else:
            if master not in self.sums:
                self.sums[master] = torch.empty_like(master)
            master.grad = self.sums[master].copy_(weight.grad)
        weight.grad = None

    def step(self) -> None:
        """The step itself; the gradients are still there."""
        masters = [master for master in self.masters.values() if master.grad is not None]
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters])
        torch.nn.utils.clip_grads_with_norm_(masters, 1.0, norm)
        self.adam.step()
        with torch.no_grad():
            for weight, master in self.masters.items():
                if weight is not master:
                    weight.copy_(master)


def rows_of(run: Run, packs: bool) -> tuple[list[int], int]:
    """Tokens of the rows of the largest forward pass, as `training.packing` makes it, and how many passes a step has."""
    rows = list(run.rows) or [run.seq_len] * run.batch_size
    if run.packing and packs and not run.rows:
        rows = rows[: max(1, pass_budget(run.seq_len) // run.seq_len)]
    return rows, run.passes or run.grad_accumulation * -(-run.batch_size // len(rows))


def _evaluated(run: Run, packs: bool) -> list[int]:
    """Tokens of the rows of a forward pass of evaluation: up to EVALUATED rows, packed ones in a sequence."""
    longest = run.held_out or max(run.rows, default=run.seq_len)
    return [longest] * min(EVALUATED, max(1, TOKEN_BUDGET // longest) if run.packing and packs else EVALUATED)


def _tokens(run: Run, rows: list[int], packs: bool) -> int:
    return sum(rows) + (-sum(rows) % ROUND_TO if run.packing and packs else 0)


def layout(run: Run, rows: list[int], packs: bool) -> tuple[list[int], tuple[int, int], dict[str, Any]]:
    """How rows lie in a pass: all of them, one of padding among them, the shape of the ids, and where rows begin if it is one
    sequence. Padded rows lie in the native kernels' memory as packed ones do."""
    if run.packing and packs and (missing := -sum(rows) % ROUND_TO):
        rows = [*rows, missing]
    if not packs or not (run.packing or run.device == "cpu"):
        return rows, (len(rows), max(rows)), {}
    starts = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    ends = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": max(rows), "max_length_k": max(rows)}
    return rows, (1, sum(rows)), ends


def _inputs(run: Run, rows: list[int], packs: bool) -> dict[str, Any]:
    """A model's inputs of such rows: packed, or padded to the longest."""
    rows, shape, ends = layout(run, rows, packs)
    names = ("input_ids", "labels", "position_ids")
    batch: dict[str, Any] = {key: torch.empty(shape, dtype=torch.long, device="meta") for key in names}
    if packs:
        # Of four dimensions: nobody looks into it. transformers makes it of several packed rows, with a place for each score.
        side = sum(rows) if run.packing and len(rows) > 1 else 1
        batch["attention_mask"] = torch.empty((1, 1, side, side), dtype=torch.bool, device="meta")
    return batch | ends


class CannotPlanError(VeneerError):
    """A model whose step does not go through without numbers, as where it decides by them what to do."""


def estimate(skeleton: Any, run: Run) -> Estimate:
    """Of a skeleton, which is changed.

    Raises:
        VeneerError: the adapter's settings do not fit the model.
        CannotPlanError: the model's code cannot run without memory.
    """
    architecture = type(skeleton).__name__
    model = prepared(skeleton, run)
    try:
        weights, step = weights_of(model, run), dry_step(model, run)
    except VeneerError:
        raise
    except Exception as error:  # whatever a model's own code stumbles over
        why = (str(error).splitlines() or [""])[0]
        raise CannotPlanError(
            f"the memory of a {architecture} cannot be planned: {type(error).__name__}: {why}",
            hint="its code looks at numbers while it runs; veneer train starts without a plan: begin with a small batch",
        ) from error
    masters = FP32 * weights.rounded
    inside = step.peak - step.gradients
    activations = min(step.activations, inside)
    logits = min(step.head, inside - activations)
    parts = {
        "weights": weights.dense + weights.codes,
        "quantisation constants": weights.constants,
        "adapter": weights.adapter,
        "second base": weights.second_base,
        "masters": masters,
        "gradients": masters + step.gradients,
        "optimizer": ADAM * weights.trained,
        "point to go back to": (FP32 + ADAM) * weights.trained if run.guard and run.method == "lora" else 0,
        "activations": activations,
        "logits": logits,
        "scratch": inside - activations - logits,
        "fragmentation": step.fragments[0],
        "libraries": _libraries(weights, step, run) if run.device == "cpu" else WORKSPACES,
    }
    about = {"architecture": architecture, "parameters": weights.parameters, "trainable_parameters": weights.trained}
    train = sum(parts.values())
    between = train - inside - step.fragments[0] - step.gradients  # what is there between steps
    evaluate = between + step.evaluation + step.fragments[1]
    merge = _merge(model, run, weights)
    if run.device == "cuda":  # segments stay, and saving takes a tensor at a time to main memory
        phases = {"load": step.loaded, "train": train, "evaluate": evaluate, "save": evaluate}
        return Estimate(_of(run, phases), parts, about, _of(run, {**_host(weights, run), "merge": merge}))
    if step.evaluated != step.tokens:  # the forward pass's kernels for matrices of other shapes
        evaluate += A_TOKEN[_onednn()] // 2 * min(step.evaluated, TOKENS)
    phases = {
        "load": _load(weights, run),
        "train": train,
        "evaluate": evaluate,
        "save": between + step.kept,
        "merge": merge,
    }
    return Estimate(_of(run, phases), parts, about, {})


def _onednn() -> bool:
    """Whether torch's bf16 products are used, of the head: oneDNN builds a kernel for every shape."""
    return native.missing() is not None or native.isa() not in OURS


def _libraries(weights: Weights, step: Step, run: Run) -> int:
    """In full fine-tuning malloc keeps about one and a half of the largest weight more: fragments of gradients that came and went."""
    kept = weights.largest * run.dtype.itemsize * 3 // 2 if run.method == "full" else 0
    return LIBRARIES[_onednn()] + A_TOKEN[_onednn()] * min(step.tokens, TOKENS) + kept


def _of(run: Run, phases: dict[str, int]) -> dict[str, int]:
    """The phases that a run has."""
    idle = {"evaluate": not run.evaluate, "merge": run.method == "full"}
    return {phase: size for phase, size in phases.items() if not idle.get(phase)}


def _load(weights: Weights, run: Run) -> int:
    """Main memory at the worst moment of loading, and of making a start that looks at the weights."""
    dense, largest = weights.parameters * run.dtype.itemsize, weights.largest * run.dtype.itemsize
    mapped = 0 if run.stored in (None, run.dtype) else dense // run.dtype.itemsize * run.stored.itemsize
    if run.quantize is None:  # mapped: read when they are used; of another type: read, and made anew
        load = LOADED if not mapped else mapped + dense + LOADED
    elif mapped:
        load = mapped + dense + LOADED
    else:
        load = weights.base + largest + LOADED_QUANTIZED  # one after the other is read from the file
    if (
        run.method == "lora" and run.lora.init in OF_WEIGHTS
    ):  # the 16-bit weights of a quantised base are looked at again
        again = mapped if run.quantize is None else dense + mapped + LOADED_QUANTIZED
        start = weights.base + weights.second_base + again + SVD * FP32 * weights.adapted + LOADED
        return max(load, start)
    return load


def _merge(model: Any, run: Run, weights: Weights) -> int:
    """Main memory of `veneer merge`: the model before and after, one after the other, and their logits. An adapter that
    was trained on a quantised base is also merged onto the 16-bit one, in memory, to see which is nearer."""
    logits = COMPARED * model.get_output_embeddings().weight.shape[0] * FP32
    dense = weights.parameters * run.dtype.itemsize
    return LOADED + 3 * logits + (dense if run.quantize is None else 2 * dense + weights.base)


def _host(weights: Weights, run: Run) -> dict[str, int]:
    """Main memory of a run on a GPU, by phase."""
    read = weights.base if run.quantize is None else 0  # all of the files is read on its way to the GPU
    kept = weights.base if run.method == "full" else FP32 * weights.trained  # what is saved is copied back
    return {"load": read + _load(weights, run), "train": LOADED, "evaluate": LOADED, "save": LOADED + kept}
