"""How good a model is on rows: loss, perplexity, exact match, JSON-field match."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from veneer.inference.generate import generate_greedy
from veneer.training.batches import evaluation_loss
from veneer.training.data import encode_prompt, encode_rows
from veneer.training.rows import Row


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    *,
    system: str | None = None,
    max_length: int = 1024,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    generate: bool = True,
    progress: str = "answering",
) -> dict[str, Any]:
    """Measure `model` on rows: mean loss over the answers' tokens, perplexity, and greedy answers compared.

    exact_match: share of answers equal to the row's, outer white space ignored.
    json_match: mean share of equal fields over rows whose answer is a JSON object; None without such rows.
    truncated: conversations longer than `max_length`, which lost the start of their prompt.

    Raises:
        VeneerError: the chat template refuses a row; lists them all.
    """
    encoded = encode_rows(rows, tokenizer, max_length=max_length, system=system, strict=True)
    packing = "attention" in getattr(model, "veneer_parts", ())
    model.eval()
    measured = evaluation_loss(model, encoded.samples, packing, tokenizer)
    result: dict[str, Any] = {
        "rows": len(rows),
        "truncated": encoded.truncated,
        "loss": measured["loss"],
        "perplexity": math.exp(min(measured["loss"], 700)),
        "supervised_tokens": int(measured["tokens"]),
        "exact_match": None,
        "json_match": None,
        "answers": [],
    }
    asked = [row for row in rows if row.messages]
    if generate and asked:
        prompts = [encode_prompt(row.prompt, tokenizer, system)[-max_length:] for row in asked]
        answers = generate_greedy(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )
        wanted = [row.completion.strip() for row in asked]
        result["exact_match"] = sum(a == w for a, w in zip(answers, wanted, strict=True)) / len(asked)
        fields = [json_match(a, w) for a, w in zip(answers, wanted, strict=True)]
        scored = [share for share in fields if share is not None]
        result["json_match"] = sum(scored) / len(scored) if scored else None
        result["answers"] = answers
    return result


def json_match(answer: str, wanted: str) -> float | None:
    """The share of fields (of either object) that both have with the same value; None when `wanted` is no JSON object."""
    try:
        expected = json.loads(wanted)
    except ValueError:
        return None
    if not isinstance(expected, dict):
        return None
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    names = expected.keys() | found.keys()
    same = sum(name in expected and name in found and expected[name] == found[name] for name in names)
    return same / len(names) if names else 1.0


# What merged models are compared on where nothing is given: questions as in a chat, and plain prose.
QUESTIONS = (
    "Turn on the lights in the kitchen.",
    "Explain in two sentences why the sky is blue.",
    "List three primes.",
)
PROSE = (
    "The harbour was quiet before sunrise. Two boats lay at the stone pier, their ropes stiff with salt, and behind the "
    "market hall somebody was already sweeping the street.",
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface. That is why rice takes "
    "longer there, and why recipes for high places ask for more time.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / len(values)\n",
)
LONGEST, MOST = 512, 2048  # tokens of a text, and of all: each has a logit for every token there is


@torch.no_grad()
def text_logits(model: Any, tokenizer: Any, texts: list[str] | None = None) -> list[torch.Tensor]:
    """fp32 logits (tokens, vocabulary) of each text, on the CPU; left out: of `QUESTIONS` and `PROSE`."""
    if texts is None:
        ids = [encode_prompt([{"role": "user", "content": text}], tokenizer) for text in QUESTIONS]
        texts = list(PROSE)
    else:
        ids = []
    ids += [tokenizer(text)["input_ids"] for text in texts]
    device, kept, left = next(model.parameters()).device, [], MOST
    for one in ids:
        if cut := one[: min(LONGEST, left)]:
            kept.append(torch.tensor([cut], device=device))
            left -= len(cut)
    return [model(input_ids=one, use_cache=False).logits[0].float().cpu() for one in kept]


def divergence(reference: list[torch.Tensor], found: list[torch.Tensor]) -> dict[str, Any]:
    """How far another model's logits are from the reference's, on the same texts.

    kl: mean over positions of KL(reference || other), in nats; top1_agreement: share of positions with the same likeliest
    token; max_logit_difference; tokens: positions.
    """
    kl = [
        (a.log_softmax(-1).exp() * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
        for a, b in zip(reference, found, strict=True)
    ]
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(reference, found, strict=True)])
    return {
        "kl": float(torch.cat(kl).double().mean()),
        "top1_agreement": float(same.double().mean()),
        "max_logit_difference": max(float((a - b).abs().max()) for a, b in zip(reference, found, strict=True)),
        "tokens": int(same.numel()),
    }


def compare_logits(model: Any, tokenizer: Any, change: Callable[[], Any]) -> dict[str, Any]:
    """The `divergence` of `model` after `change` (a merge in place) from what it was."""
    before = text_logits(model, tokenizer)
    change()
    return divergence(before, text_logits(model, tokenizer))
