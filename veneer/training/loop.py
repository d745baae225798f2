"""The training loop: one for a script and for the command line.

result = train(model, tokenizer, "data.jsonl", TrainConfig(epochs=2), out="runs/first")
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.attach import count_parameters
from veneer.config import TOKEN_BUDGET, DataConfig, Method, TrainConfig
from veneer.errors import RefusedError, VeneerError
from veneer.machine import current_bytes, peak_bytes, release_memory, reset_peak
from veneer.models.fuse import batch_loss, set_recompute
from veneer.ops import arena
from veneer.ops.blocks import Recompute
from veneer.optim.schedule import default_learning_rate, lr_factor
from veneer.quant.linear import quantized_layers
from veneer.storage import atomic_file, require_disk_space, require_empty_folder
from veneer.training.checkpoint import checkpoint_bytes, newest_checkpoint, restore, save_checkpoint
from veneer.training.data import Sample, prepare_data
from veneer.training.packing import Order, collate_packed, collate_padded, pack
from veneer.training.progress import Metrics, Progress, drop_metrics_after, number
from veneer.training.weights import AdapterWeights, FullWeights, trained_weights

START_TOKENS = 16_384  # that EVA looks at, in whole rows
LOOKED_AT = 2_000  # rows, for the size of the largest batch before a run
NAN_LIMIT = 3  # steps in a row without a finite loss and gradient before a run gives up
# Settings that a resumed run may change. Rows a step are compared whole, so a step may be cut in other micro-batches.
MAY_CHANGE = {
    "epochs", "max_steps", "batch_size", "grad_accumulation", "recompute", "eval_every", "early_stopping",
    "save_every", "keep_last", "log_every", "out",
}  # fmt: skip


def train(
    model: Any,
    tokenizer: Any,
    data: Any,
    config: TrainConfig | None = None,
    *,
    method: Method = "lora",
    out: str | Path | None = None,
    data_config: DataConfig | None = None,
    recipe: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the active adapter of `model` and write it to `out`/adapter, or all of `model`, written to `out`/model.

    Args:
        data: a file, files, or rows (see `veneer.training.rows.read_rows`); left to `data_config` when None.
        method: "lora" trains the active adapter; "full" every weight of a 16- or 32-bit model without adapters, with
            AdamW on fp32 masters.
        recipe: text kept beside the run as recipe.yaml.
        resume: go on from the newest whole checkpoint in `out`, at the same step with the same next batch.

    A fresh start seeds torch's global generator with `config.seed`.

    Returns: out, adapter, model, steps, train_loss, eval_loss, tokens_per_second, peak_bytes, seconds and more.

    Raises:
        VeneerError: nothing to train, bad data, `out` not empty, no finite loss 3 times in a row, a step that gives some
            trained weight no gradient.
        RefusedError: the checkpoint to resume from is of other settings or data: the run would not be the one it was.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint was written first.
    """
    config = config or TrainConfig()
    folder = out or config.out
    if folder is None:
        raise VeneerError("no output folder", hint="give out=..., or train.out in the recipe")
    return _Run(model, tokenizer, data, config, method, Path(folder), data_config, recipe, resume, progress).run()


class _Run:
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: Any,
        config: TrainConfig,
        method: Method,
        out: Path,
        data_config: DataConfig | None,
        recipe: str | None,
        resume: bool,
        progress: bool,
    ) -> None:
        self.model, self.tokenizer, self.config, self.out, self.progress = model, tokenizer, config, out, progress
        self.checkpoints = out / "checkpoints"
        if not (resume and self.checkpoints.is_dir()):
            require_new_run(out)
        self.weights = trained_weights(method, model, tokenizer)
        self.parameters = self.weights.parameters
        self.data = data_config or DataConfig(train="-")
        self.train_set, self.eval_set, self.notes = prepare_data(data, self.data, tokenizer, config.seed)
        self.packing = self.data.packing and "attention" in getattr(model, "veneer_parts", ())
        if self.data.packing and not self.packing:
            self.notes.append("packing is off: this model's attention does not support isolated packed rows")
        self.device = next(model.parameters()).device
        self.order = Order(len(self.train_set.samples), config.batch_size * config.grad_accumulation, config.seed)
        self.steps = self.order.steps(config.epochs, config.max_steps)
        self.weights.begin(self.steps)
        self.warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(0.03 * self.steps)
        self.peak_lr = (
            default_learning_rate(model.config.get_text_config().hidden_size, method)
            if config.learning_rate == "auto"
            else float(config.learning_rate)
        )
        fused = True if self.device.type == "cpu" else None  # one pass, no temporary tensors; torch's choice elsewhere
        self.optimizer = torch.optim.AdamW(
            self.weights.groups(config),
            lr=self.peak_lr,
            betas=config.betas,
            eps=config.epsilon,
            fused=fused,
        )
        self.done = 0
        self.state: dict[str, Any] = {
            "settings": self._settings(), "steps": self.steps, "tokens": 0, "seconds": 0.0, "loss_sum": 0.0,
            "loss_steps": 0, "skipped": 0, "eval_loss": None, "best_loss": None, "bad_evaluations": 0,
        }  # fmt: skip
        # one more of each kind while the newest is written
        count = config.keep_last + 1 + (0 if config.early_stopping is None else 2)
        keep = count * checkpoint_bytes(self.weights) + self.weights.output_bytes()
        require_disk_space(out, keep, f"{count} checkpoints and the {self.weights.what}")
        if not (resume and self._resume()):
            torch.manual_seed(config.seed)  # dropout
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if recipe is not None:
            with atomic_file(out / "recipe.yaml") as temporary:
                temporary.write_text(recipe, encoding="utf-8")
        self.metrics = Metrics(out)

    def run(self) -> dict[str, Any]:
        config, state = self.config, self.state
        self._start()
        started, before = time.monotonic(), state["seconds"]
        bad_steps, stopped = 0, self._stopped()
        say = Progress(self.progress, self.steps, self.device)
        with _training(self.model, self.weights, config.recompute), _stop_signals() as stop:
            while self.done < self.steps and not stopped:
                began = time.monotonic()
                row = self._step()
                self.done += 1
                state["seconds"] = before + time.monotonic() - started
                row["tokens_per_second"] = round(row["tokens"] / (time.monotonic() - began), 1)
                if row["applied"]:
                    bad_steps = 0
                    state["loss_sum"] += row["loss"]
                    state["loss_steps"] += 1
                    state["tokens"] += row["tokens"]
                else:
                    bad_steps += 1
                    state["skipped"] += 1
                if self._evaluation_due():
                    state["eval_loss"] = self._evaluate()
                    row["eval_loss"] = number(state["eval_loss"])
                    self._keep_best(state["eval_loss"])
                    stopped = self._stopped()
                if self._log_due(row):
                    memory, seconds = current_bytes(self.device), round(state["seconds"], 3)
                    self.metrics.write({**row, "memory_bytes": memory, "seconds": seconds})
                say.step(self.done, row)
                if bad_steps == NAN_LIMIT:
                    raise VeneerError(
                        f"step {self.done}: no finite loss and gradient in {NAN_LIMIT} steps in a row; none of them was applied",
                        hint=f"lower train.learning_rate (it was {self.peak_lr:g}; try a half), or look at the rows of these steps",
                    )
                if stop.is_set():
                    self._checkpoint()
                    say.line(f"stopped at step {self.done}; go on with --resume")
                    raise KeyboardInterrupt
                if self.done % config.save_every == 0 and self.done < self.steps and not stopped:
                    self._checkpoint()
        self._checkpoint()
        if config.early_stopping is not None and (best := newest_checkpoint(self.checkpoints / "best")) is not None:
            restore(best[1], self.weights, self.optimizer)
            self.weights.changed()
            state["eval_loss"] = best[0]["best_loss"]
        written = self.weights.save(self.out)
        self.metrics.close()
        return {
            "out": str(self.out),
            **written,
            "steps": self.done,
            "train_loss": state["loss_sum"] / max(1, state["loss_steps"]),
            "eval_loss": state["eval_loss"],
            "tokens_per_second": state["tokens"] / max(1e-9, state["seconds"]),
            "peak_bytes": peak_bytes(self.device),
            "seconds": state["seconds"],
            "skipped_steps": state["skipped"],
            "stopped_early": stopped,
            "learning_rate": self.peak_lr,
            "trainable_parameters": count_parameters(self.model).trainable,
            "rows": len(self.train_set.samples),
            "notes": self.notes,
        }

    # ---- one step ---------------------------------------------------------------------------------------------

    def _step(self) -> dict[str, Any]:
        lr = self.peak_lr * lr_factor(
            self.done, self.steps, self.warmup, self.config.schedule, self.config.min_lr_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        samples = [self.train_set.samples[i] for i in self.order.step(self.done)]
        # One divisor for the whole step: however it is cut into micro-batches, every learned token weighs the same.
        items = sum(sample.supervised for sample in samples)
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for batch in self._batches(samples, self.config.batch_size):
            part = batch_loss(self.model, batch, items)
            part.backward()  # type: ignore[no-untyped-call]
            parts.append(part.detach())
        loss = sum(float(part) for part in parts)  # read last: a GPU goes on with the next batch meanwhile
        without = [name for name, p in self.parameters.items() if p.grad is None]
        if without:
            raise VeneerError(
                f"{len(without)} of {len(self.parameters)} {self.weights.what} received no gradient: {', '.join(without[:4])}",
                hint="the model does not use these layers on such data, or this is a fault of its code or of ours; "
                + self.weights.no_gradient,
            )
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        finite = math.isfinite(loss) and bool(torch.isfinite(norm))
        if finite:
            if self.config.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
            self.optimizer.step()
            self.weights.changed()
        return {
            "step": self.done + 1,
            "loss": number(loss),
            "grad_norm": number(float(norm)),
            "learning_rate": lr,
            "tokens": sum(len(sample.input_ids) for sample in samples),
            "supervised_tokens": items,
            "applied": finite,
            **({} if finite else {"note": "loss or gradient was not finite: this step was not applied"}),
        }

    def _batches(self, samples: list[Sample], size: int) -> Iterator[dict[str, Any]]:
        for start in range(0, len(samples), size):
            rows = samples[start : start + size]
            yield from batches(rows, self.packing, self.tokenizer, max(TOKEN_BUDGET, self.data.max_length), self.device)

    # ---- around the steps ---------------------------------------------------------------------------------------

    def _start(self) -> None:
        release_memory()
        reset_peak(self.device)
        say = Progress(self.progress, self.steps, self.device)
        say.line(f"{count_parameters(self.model)}; {len(self.train_set.samples):,} rows, {self.steps:,} steps")
        for note in self.notes:
            say.line(f"note: {note}")

    def _settings(self) -> dict[str, Any]:
        """All that changes the numbers of a run, by the name the user knows; equal again after JSON."""
        train = self.config.model_dump(mode="json", exclude=MAY_CHANGE)
        layers = list(quantized_layers(self.model).values())
        return {
            "model": self.model.name_or_path,
            "quantize": layers[0].kind if layers else None,
            "double_quant": layers[0].double_quant if layers else None,
            "dtype": str(self.model.dtype),
            "device": self.device.type,
            "training data (sha256)": self.train_set.fingerprint(),
            "rows a step": self.order.per_step,
            **self.weights.settings(),
            **{f"train.{key}": value for key, value in train.items()},
        }

    def _resume(self) -> bool:
        """Put the newest checkpoint back; False when there is none yet. Nothing on disk changes if it is refused."""
        found = newest_checkpoint(self.checkpoints)
        if found is None:
            self.notes.append("nothing to resume: no checkpoint yet, starting at step 0")
            drop_metrics_after(self.out, 0)
            return False
        state, tensors, problems = found
        self.notes += [f"skipped a damaged checkpoint: {problem}" for problem in problems]
        saved, current = state.get("settings", {}), self.state["settings"]
        differs = [
            f"{key}: the checkpoint has {saved.get(key)!r}, this run {value!r}"
            for key, value in current.items()
            if saved.get(key) != value
        ]
        if differs:
            raise RefusedError(differs, hint="--resume needs the recipe and the data of the first start")
        restore(tensors, self.weights, self.optimizer)
        self.weights.changed()
        self.done = int(state["step"])
        if state["steps"] != self.steps:
            self.notes.append(f"{self.steps} steps instead of {state['steps']}: the learning rate follows the new end")
        self.state = {**state, "steps": self.steps}
        drop_metrics_after(self.out, self.done)
        self.notes.append(f"resumed after step {self.done}")
        return True

    def _checkpoint(self) -> None:
        save_checkpoint(self.checkpoints, self.done, self.weights, self.optimizer, self.state, self.config.keep_last)

    def _evaluation_due(self) -> bool:
        if self.eval_set is None:
            return False
        every = self.config.eval_every or self.order.steps_per_epoch
        return self.done % every == 0 or self.done == self.steps

    def _log_due(self, row: dict[str, Any]) -> bool:
        """Every `log_every` steps; the last step, one that was evaluated and one that was not applied always."""
        due = self.done % self.config.log_every == 0 or self.done == self.steps
        return due or "eval_loss" in row or not row["applied"]

    def _evaluate(self) -> float:
        assert self.eval_set is not None
        self.model.eval()
        try:
            return evaluation_loss(self.model, self.eval_set.samples, self.packing, self.tokenizer)["loss"]
        finally:
            self.model.train()

    def _keep_best(self, loss: float) -> None:
        state = self.state
        if math.isfinite(loss) and (state["best_loss"] is None or loss < state["best_loss"]):
            state["best_loss"], state["bad_evaluations"] = loss, 0
            if self.config.early_stopping is not None:
                save_checkpoint(self.checkpoints / "best", self.done, self.weights, self.optimizer, state, 1)
        else:
            state["bad_evaluations"] += 1

    def _stopped(self) -> bool:
        patience = self.config.early_stopping
        return patience is not None and self.state["bad_evaluations"] >= patience


def require_new_run(out: Path) -> None:
    """Raise VeneerError when `out` cannot become a run's folder; one that holds a run can be gone on with."""
    there = (out / "checkpoints").is_dir()
    require_empty_folder(out, instead="--resume goes on with the run in it; else " if there else "")


def batches(
    samples: list[Sample], packing: bool, tokenizer: Any, budget: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Samples as model inputs: packed sequences of at most `budget` tokens, or one padded batch."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    made = [collate_packed(group) for group in pack(samples, budget)] if packing else [collate_padded(samples, pad)]
    for batch in made:
        yield {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def start_batches(model: Any, tokenizer: Any, config: DataConfig, seed: int) -> list[dict[str, Any]]:
    """For `attach(..., data=...)` with init eva: the first rows that a run of this seed trains on, as batches."""
    samples = prepare_data(None, config, tokenizer, seed)[0].samples
    packing = config.packing and "attention" in getattr(model, "veneer_parts", ())
    rows: list[Sample] = []
    for i in Order(len(samples), len(samples), seed).step(0):
        if sum(len(row.input_ids) for row in rows) >= START_TOKENS:
            break
        rows.append(samples[i])
    device = next(model.parameters()).device
    size = len(rows) if packing else 16
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [b for group in groups for b in batches(group, packing, tokenizer, TOKEN_BUDGET, device)]


def largest_pass(
    tokenizer: Any, data: DataConfig, config: TrainConfig, packs: bool, steps: int = 200
) -> tuple[tuple[int, ...], int]:
    """Tokens of each row of the largest forward pass in the first steps of a run, and the most passes of a step.

    packs: whether the model's attention takes packed rows. For the planner: only the first LOOKED_AT rows are read.
    """
    limit = min(data.limit or LOOKED_AT, LOOKED_AT)
    samples = prepare_data(None, data.model_copy(update={"limit": limit}), tokenizer, config.seed)[0].samples
    order = Order(len(samples), config.batch_size * config.grad_accumulation, config.seed)
    largest: tuple[int, ...] = ()
    most = 1
    for step in range(min(steps, order.steps_per_epoch)):
        rows, passes = order.step(step), 0
        for start in range(0, len(rows), config.batch_size):
            some = [samples[i] for i in rows[start : start + config.batch_size]]
            groups = pack(some, max(TOKEN_BUDGET, data.max_length)) if packs and data.packing else [some]
            passes += len(groups)
            for group in groups:
                sizes = [len(sample.input_ids) for sample in group]
                sizes = sizes if packs and data.packing else [max(sizes)] * len(sizes)
                largest = max(largest, tuple(sizes), key=sum)
        most = max(most, passes)
    return largest, most


@torch.no_grad()
def evaluation_loss(model: Any, samples: list[Sample], packing: bool, tokenizer: Any) -> dict[str, float]:
    """Mean cross-entropy over learned tokens, and how many there are."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for start in range(0, len(samples), 16):
        rows = samples[start : start + 16]
        for batch in batches(rows, packing, tokenizer, TOKEN_BUDGET, device):
            total += float(batch_loss(model, batch, 1))
        tokens += sum(sample.supervised for sample in rows)
    return {"loss": total / tokens, "tokens": tokens}


@contextmanager
def _training(model: nn.Module, weights: AdapterWeights | FullWeights, recompute: Recompute) -> Iterator[None]:
    checkpointing = not set_recompute(model, recompute) and recompute != "none"
    if checkpointing:  # no layers of ours: transformers' own, of whole layers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    model.train()
    try:
        with weights.training():
            yield
    finally:
        model.eval()
        set_recompute(model, "none")
        arena.release()
        if checkpointing:
            model.gradient_checkpointing_disable()  # type: ignore[operator]


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set the event on Ctrl-C and SIGTERM, so that the step in progress is finished first."""
    event = threading.Event()
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.signal(number, lambda *_: event.set())
                stack.callback(signal.signal, number, previous)
        yield event
