"""One real batch through the real model before a run: the start against the base, gradients, and a saved adapter read again.

Nothing of the model is changed by it: factors that are moved for a moment, gradients, modes and random states are put back.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.attach import (
    active_adapter,
    adapter_parameters,
    adapters,
    lora_layers,
    remove_adapter,
    set_adapter,
)
from veneer.adapters.files import load_adapter, save_adapter
from veneer.adapters.lora import LoraEmbedding, LoraLayer
from veneer.config import IGNORED, TOKEN_BUDGET, Method, TrainConfig
from veneer.errors import VeneerError
from veneer.models.fuse import batch_loss, set_recompute
from veneer.ops import all_finite, arena
from veneer.quant.linear import quantized_layers
from veneer.training.advice import Finding
from veneer.training.batches import batches
from veneer.training.data import Sample
from veneer.training.packing import Order
from veneer.training.progress import number

CHECKED_TOKENS = 256  # of the batch: enough to reach every layer, soon done
MOVED = 0.02  # standard deviation of what is added to B (an embedding's A, AdaLoRA's E) for a moment
TOLERANCE = 1e-3  # of the largest logit, that two ways to the same logits may differ by; times 16 in 16 bits
HIGH_LOSS = 1.25  # times that of guessing: a model that knows nothing is at 1
LISTED = 4  # names


def try_batch(
    model: Any,
    tokenizer: Any,
    samples: list[Sample],
    config: TrainConfig,
    method: Method,
    *,
    packing: bool,
    reload: bool,
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings and facts. samples: all; CHECKED_TOKENS of the run's first batch go through the model.

    Args:
        packing: whether the run packs rows. reload: also save the adapter to a temporary folder and load it again.
    """
    facts: dict[str, Any] = {}
    found = [*_impossible(model, samples), *([] if method == "full" else _wrong_state(model))]
    if any(finding.severity == "error" for finding in found):
        return found, facts
    rows = _first_rows(samples, config)
    if not rows:
        return found, facts
    batch = next(batches(rows, packing, tokenizer, TOKEN_BUDGET, next(model.parameters()).device))
    facts["rows"], facts["tokens"] = len(rows), sum(len(row.input_ids) for row in rows)
    facts["learned"] = sum(row.supervised for row in rows)
    with _untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what attach warned of
        set_recompute(model, config.recompute)
        if method == "full":
            found += _loss(_logits(model, batch), batch, facts)
            if any(finding.severity == "error" for finding in found):
                return found, facts
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            return [*found, *_gradients(model, batch, dict(model.named_parameters()), facts)], facts
        name = active_adapter(model)
        assert name is not None
        found += _start(model, batch, name, facts)
        if any(finding.severity == "error" for finding in found):
            return found, facts
        # B is zero at the start, and A's gradient with it, in a sound run too. Off zero each factor must have one.
        with _moved(_last_factors(model, name)):
            found += _gradients(model, batch, adapter_parameters(model, name), facts)
            if reload:
                found += _reload(model, batch, name, facts)
    return found, facts


def _first_rows(samples: list[Sample], config: TrainConfig) -> list[Sample]:
    """Of the run's first batch: whole rows, or the end of a long one, where something is learned there."""
    chosen: list[Sample] = []
    for i in Order(len(samples), config.batch_size, config.seed).step(0):
        ids, labels = samples[i].input_ids[-CHECKED_TOKENS:], samples[i].labels[-CHECKED_TOKENS:]
        if sum(len(sample.input_ids) for sample in chosen) + len(ids) > CHECKED_TOKENS:
            break
        chosen.append(Sample(ids, [IGNORED, *labels[1:]]))
    return [sample for sample in chosen if sample.supervised]


def _impossible(model: Any, samples: list[Sample]) -> Iterator[Finding]:
    """Rows that the model cannot take."""
    size = model.get_input_embeddings().weight.shape[0]
    highest = max(max(sample.input_ids) for sample in samples)
    if highest >= size:
        yield Finding(
            "error",
            "vocabulary",
            f"token id {highest:,} is in the rows, but the model has {size:,} embeddings",
            "take the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer)) and train lora.tokens",
        )
    yield from _too_long(model, max(len(sample.input_ids) for sample in samples))


def _too_long(model: Any, longest: int) -> Iterator[Finding]:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or longest <= most:
        return
    words = model.get_input_embeddings()
    tables = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not words}
    fixed = any(most <= size < most + 8 for size in tables)  # learned positions; some keep a few more rows
    yield Finding(
        "error" if fixed else "warning",
        "too-long",
        f"the longest row has {longest:,} tokens, the model {'has' if fixed else 'was trained on'} {most:,} positions",
        f"set data.max_length to {most:,}",
    )


def _wrong_state(model: Any) -> Iterator[Finding]:
    """What an adapter cannot be trained in, or not well."""
    if active_adapter(model) is None:
        advice = "veneer.attach(model, LoraConfig(...)) first"
        yield Finding("error", "no-adapter", "the model has no active adapter to train", advice)
    if model.__dict__.get("veneer_merged"):
        yield Finding(
            "error",
            "merged",
            "the adapter is merged into the weights: training would change nothing that is computed",
            "veneer.unmerge(model) first",
        )
    dropout = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, LoraLayer)
        and (
            (isinstance(module, nn.modules.dropout._DropoutNd) and module.p)
            or any("dropout" in key and isinstance(value, float) and value for key, value in vars(module).items())
        )
    ]
    if dropout:
        yield Finding(
            "warning",
            "base-dropout",
            f"dropout is on in {len(dropout)} modules of the frozen base ({_listed(dropout)})",
            "veneer.train sets it to 0; in another loop set it to 0, or the base to eval mode",
        )


def _start(model: Any, batch: dict[str, Any], name: str, facts: dict[str, Any]) -> Iterator[Finding]:
    """Whether the adapted model is the base at step 0."""
    adapted = _logits(model, batch)
    set_adapter(model, None)
    base = _logits(model, batch)
    set_adapter(model, name)
    apart, facts["start"] = _apart(adapted, base)
    yield from _loss(adapted, batch, facts)
    if isinstance(facts["loss"], str):  # NaN or Inf
        return
    own_base = any(name in layer.bases for layer in lora_layers(model).values())
    if own_base and quantized_layers(model):
        facts["start"]["note"] = f"with init {adapters(model)[name].config.init} it starts nearer to the 16-bit base"
    elif not own_base and any(bool(factor.any()) for factor in _last_factors(model, name).values()):
        found = "the adapter is not at its start: it goes on from what it has learned"
        yield Finding("note", "trained-before", found, "attach a new one to begin anew")
    elif not apart <= _tolerance(model, own_base):
        yield Finding(
            "error",
            "start-differs",
            f"at step 0 the adapted model's logits are {apart:.2g} of the largest away from the base's",
            "an adapter starts as nothing: some layer does not compute what it stands for",
        )


def _loss(logits: Tensor, batch: dict[str, Any], facts: dict[str, Any]) -> Iterator[Finding]:
    """Whether the loss before any training is that of a model which knows this language."""
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORED
    loss = float(F.cross_entropy(logits[:, :-1][learned].float(), labels[learned]))
    facts["loss"] = number(loss)
    if not math.isfinite(loss):
        yield Finding(
            "error",
            "not-finite",
            f"the loss of the first batch is {loss} before any training",
            "the base's weights are damaged, or its type is too narrow: load it in bfloat16 or float32",
        )
    elif loss > HIGH_LOSS * (guessing := math.log(logits.shape[-1])):
        yield Finding(
            "warning",
            "high-loss",
            f"the loss of the first batch is {loss:.2f}, that of guessing {guessing:.2f}",
            "see whether tokenizer and model belong together, and whether the rows are what they should be",
        )


def _last_factors(model: Any, name: str) -> dict[str, nn.Parameter]:
    """What is zero at the start and makes the update zero: every B, AdaLoRA's E, an embedding's A."""
    found = {}
    for path, layer in lora_layers(model).items():
        if name in layer.lora_A:
            parts = layer.parameters_of(name)
            key = "lora_E" if "lora_E" in parts else layer.KEYS[0 if isinstance(layer, LoraEmbedding) else 1]
            found[f"{path}.{key}"] = parts[key]
    return found


def _apart(found: Tensor, reference: Tensor) -> tuple[float, dict[str, Any]]:
    """How far logits are from others, of the largest of these; and the same for the facts."""
    difference, largest = float((found - reference).abs().max()), float(reference.abs().max())
    relative = difference / max(largest, 1e-30)
    equal = torch.equal(found, reference)
    return relative, {"equal": equal, "relative": number(relative), "largest_difference": number(difference)}


def _tolerance(model: Any, own_base: bool = False) -> float:
    """Of the largest logit. own_base: weights that were taken apart and rounded."""
    return TOLERANCE * (1 if model.dtype == torch.float32 else 16) * (4 if own_base else 1)


def _gradients(
    model: Any, batch: dict[str, Any], trained: dict[str, nn.Parameter], facts: dict[str, Any]
) -> Iterator[Finding]:
    """One forward and backward in train mode."""
    model.train()
    loss = batch_loss(model, batch, max(1, facts["learned"]))
    loss.backward()  # type: ignore[no-untyped-call]
    own = {id(parameter) for parameter in trained.values()}
    missing = [key for key, p in trained.items() if p.grad is None]
    wrong = [key for key, p in trained.items() if p.grad is not None and not all_finite(p.grad)]
    # Rows of an embedding may be of tokens that are not in this batch, so only factors count.
    zero = [key for key, p in trained.items() if ".lora_" in key and p.grad is not None and not bool(p.grad.any())]
    base = [key for key, p in model.named_parameters() if id(p) not in own and p.requires_grad]
    facts["gradients"] = {
        "trained": len(trained), "none": len(missing), "zero": len(zero), "not_finite": len(wrong), "of_the_base": len(base),
    }  # fmt: skip
    if missing:
        yield Finding(
            "error",
            "no-gradient",
            f"{len(missing)} of {len(trained)} trained weights get no gradient: {_listed(missing)}",
            "the model does not use these layers on such rows: leave them out of lora.targets",
        )
    if wrong or not math.isfinite(float(loss.detach())):
        yield Finding(
            "error",
            "not-finite",
            f"gradients of {len(wrong)} of {len(trained)} trained weights hold NaN or Inf (loss {float(loss.detach()):.4g}): "
            + _listed(wrong),
            "lower lora.alpha, take dtype bfloat16 or float32, or see whether the base's weights are damaged",
        )
    elif zero:
        yield Finding(
            "warning",
            "zero-gradient",
            f"the gradients of {len(zero)} of {len(trained)} trained weights are all zero: {_listed(zero)}",
            "they learn nothing from such rows: leave them out of lora.targets",
        )
    if base:
        yield Finding(
            "error",
            "base-gradient",
            f"{len(base)} weights of the base are not frozen: {_listed(base)}",
            "what is to be trained in full belongs into lora.modules_to_save",
        )


def _reload(model: Any, batch: dict[str, Any], name: str, facts: dict[str, Any]) -> Iterator[Finding]:
    """Whether the adapter, saved and loaded again, gives the same logits."""
    own_base = any(name in layer.bases for layer in lora_layers(model).values())
    if own_base and quantized_layers(model):
        init = adapters(model)[name].config.init
        facts["reload"] = {"note": f"not tried: with init {init} it is saved for the 16-bit base"}
        return
    before = _logits(model, batch)
    other = next(f"reload-{n}" for n in range(len(adapters(model)) + 1) if f"reload-{n}" not in adapters(model))
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, Path(folder) / "adapter", name)
            load_adapter(model, Path(folder) / "adapter", other)
        apart, facts["reload"] = _apart(_logits(model, batch), before)
    except (VeneerError, OSError) as error:
        found = f"the adapter cannot be saved and loaded again: {str(error).splitlines()[0]}"
        yield Finding("error", "reload", found, "mend what it names, or change the lora settings it speaks of")
        return
    finally:
        if other in adapters(model):
            remove_adapter(model, other)
        set_adapter(model, name)
    if not apart <= _tolerance(model, own_base):
        yield Finding(
            "error",
            "reload",
            f"saved and loaded again the adapter's logits are {apart:.2g} of the largest away from what they were",
            "its file would not hold what is trained",
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Any]) -> Tensor:
    model.eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]


@contextmanager
def _moved(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Parameters a little off where they are; bit for bit back afterwards."""
    kept = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_((MOVED * torch.randn(parameter.shape, generator=generator)).to(parameter))
        yield
    finally:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(kept[key])


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Whatever happens inside: random states, modes, gradients and what requires one are as before."""
    cpu, gpu = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        set_recompute(model, "none")
        for parameter, wanted, gradient in parameters:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)
        arena.release()
