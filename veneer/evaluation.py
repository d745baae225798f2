"""How good a model is on rows: loss, perplexity, exact match, JSON-field match."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from veneer.inference.generate import generate_greedy
from veneer.training.data import encode_prompt, encode_rows
from veneer.training.loop import evaluation_loss
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


@torch.no_grad()
def compare_logits(model: Any, tokenizer: Any, change: Callable[[], Any]) -> dict[str, Any]:
    """Logits of `model` on three fixed prompts before and after `change` (a merge in place): how far apart they are."""
    texts = (
        "Turn on the lights in the kitchen.",
        "Explain in two sentences why the sky is blue.",
        "List three primes.",
    )
    device = next(model.parameters()).device
    prompts = [torch.tensor([encode_prompt([{"role": "user", "content": t}], tokenizer)], device=device) for t in texts]
    before = [model(input_ids=prompt).logits.float() for prompt in prompts]
    change()
    pairs = [(logits, model(input_ids=prompt).logits.float()) for logits, prompt in zip(before, prompts, strict=True)]
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs])
    return {
        "max_logit_difference": max(float((a - b).abs().max()) for a, b in pairs),
        "top1_agreement": float(same.float().mean()),
        "tokens": int(same.numel()),
    }
