"""Greedy and sampled generation for evaluation and chat, on transformers' own generate."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer


@torch.no_grad()
def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    progress: str = "",
) -> list[str]:
    """The greedy answer to each prompt (token ids), in order; special tokens left out.

    Prompts of like length share a batch, padded on the left and masked by length, never by token id.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    answers = [""] * len(prompts)
    started, live = time.monotonic(), bool(progress) and sys.stderr.isatty()
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        longest = max(len(prompts[i]) for i in group)
        ids = torch.full((len(group), longest), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(group):
            size = len(prompts[i])
            ids[row, longest - size :] = torch.tensor(prompts[i])
            mask[row, longest - size :] = 1
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        for row, i in enumerate(group):
            answers[i] = tokenizer.decode(out[row, longest:], skip_special_tokens=True).strip()
        if live and time.monotonic() - started > 2:
            print(f"\r\x1b[K{progress} {start + len(group)}/{len(order)}", file=sys.stderr, end="", flush=True)
    if progress and time.monotonic() - started > 2:
        print("" if live else f"{progress} {len(order)}/{len(order)}", file=sys.stderr, flush=True)
    return answers


def stream_answer(
    model: Any, tokenizer: Any, prompt: list[int], *, max_new_tokens: int, temperature: float = 0.0
) -> Any:
    """Yield the pieces of one answer as they are made. temperature 0: greedy."""
    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    failure: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                **sampling,
            )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]
