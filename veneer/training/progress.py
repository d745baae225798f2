"""What a run tells while it trains: one line on the terminal, metrics.jsonl, speed.jsonl, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from veneer.errors import VeneerError
from veneer.machine import current_bytes
from veneer.storage import atomic_file, fsync


class Progress:
    """One line on stderr: rewritten in place on a terminal, every 10 seconds otherwise."""

    def __init__(self, on: bool, steps: int, device: torch.device | None = None) -> None:
        self.on, self.steps, self.device, self.live = on, steps, device, sys.stderr.isatty()
        self.started, self.shown, self.first, self.pending = time.monotonic(), 0.0, 0, False

    def line(self, text: str) -> None:
        if self.on:
            self._print(("\n" if self.pending else "") + text + "\n")
            self.pending = False

    def _print(self, text: str) -> None:
        """Where nobody listens any more (a closed pipe) the run goes on in silence."""
        try:
            print(text, file=sys.stderr, end="", flush=True)
        except OSError:
            self.on = False

    def step(self, done: int, row: dict[str, Any], tokens_per_second: float) -> None:
        self.first = self.first or done - 1
        now = time.monotonic()
        if not self.on or (not self.live and now - self.shown < 10 and done < self.steps and "eval_loss" not in row):
            return
        self.shown = now
        left = (now - self.started) / max(1, done - self.first) * (self.steps - done)
        text = (
            f"step {done}/{self.steps}  loss {shown(row['loss'])}  lr {row['learning_rate']:.2e}  {tokens_per_second:,.0f} tok/s  "
            f"{current_bytes(self.device) / 1e9:.1f} GB  {left / 60:.1f} min left"
        )
        text += f"  held-out loss {shown(row['eval_loss'])}" if "eval_loss" in row else ""
        keep = not self.live or "eval_loss" in row or done == self.steps
        self._print((f"\r\x1b[K{text}" if self.live else text) + ("\n" if keep else ""))
        self.pending = not keep


def counter(what: str) -> Callable[[int, int], None]:
    """A call for each of so many things done: one line on stderr about anything that takes longer than 2 s."""
    began, live, last = 0.0, sys.stderr.isatty(), 0.0

    def progress(done: int, total: int) -> None:
        nonlocal began, last
        now = time.monotonic()
        began = began or now  # at the first: what came before it was other work
        if now - began < 2 or (now - last < (0.2 if live else 10) and not (last and done == total)):
            return
        last = now
        text = f"{done:,} of {total:,} {what}, {(now - began) / max(1, done - 1) * (total - done):,.0f} s left"
        print(
            f"\r\x1b[K{text}" if live else text,
            file=sys.stderr,
            end="\n" if done == total or not live else "",
            flush=True,
        )

    return progress


METRICS, SPEED = "metrics.jsonl", "speed.jsonl"


class Metrics:
    """A line a step, and the same curves for TensorBoard when it is installed.

    `out`/metrics.jsonl has what is the same each time a run is made, so that runs can be compared byte by byte;
    `out`/speed.jsonl what is not: seconds, tokens per second, memory.
    """

    def __init__(self, out: Path, done: int = 0) -> None:
        self.out = out
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)

    def write(self, row: dict[str, Any], speed: dict[str, Any]) -> None:
        _append(self.out / METRICS, row)
        _append(self.out / SPEED, {"step": row["step"], **speed})
        if self.board is not None:
            for key in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "eval_loss"):
                if isinstance(value := {**row, **speed}.get(key), float):
                    self.board.add_scalar(key, value, row["step"])

    def event(self, row: dict[str, Any]) -> None:
        """The run went back to step `step`, for the `event`-th time."""
        _append(self.out / METRICS, row)

    def sync(self) -> None:
        """What was written is on the disk: before a checkpoint that counts on it."""
        if (path := self.out / METRICS).is_file():
            with _disk(path):
                fsync(path)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VeneerError(
            f"{path} could not be written: {error.strerror}", hint="free some space; then --resume"
        ) from error


def _append(path: Path, row: dict[str, Any]) -> None:
    with _disk(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def drop_metrics_after(out: Path, step: int, events: int = 0) -> None:
    """A killed run may have logged steps, and events, that its last checkpoint does not hold: they will be logged again."""
    for path in (out / METRICS, out / SPEED):
        if not path.is_file():
            continue
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= step and row.get("event", 0) <= events:
                    lines.append(line)
            except (ValueError, KeyError):
                continue  # cut off in the middle of a line
        with _disk(path), atomic_file(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def number(value: float) -> float | str:
    """For JSON, which has no NaN and no Inf."""
    return value if math.isfinite(value) else str(value)


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"
