"""The training loop: one for a script and for the command line.

result = train(model, tokenizer, "data.jsonl", TrainConfig(epochs=2), out="runs/first")
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.attach import count_parameters
from veneer.config import IGNORED, DataConfig, Method, Recipe, TrainConfig, pass_budget
from veneer.errors import RefusedError, VeneerError
from veneer.machine import current_bytes, peak_bytes, release_memory, reset_peak
from veneer.models.fuse import batch_loss, set_recompute
from veneer.ops import arena
from veneer.ops.blocks import Recompute
from veneer.optim.schedule import default_learning_rate, lr_factor
from veneer.quant.linear import quantized_layers
from veneer.storage import (
    atomic_file,
    lock_folder,
    remove_leftovers,
    require_disk_space,
    require_empty_folder,
)
from veneer.training import guard as guards
from veneer.training.batches import batches, evaluation_loss
from veneer.training.checkpoint import (
    captured,
    checkpoint_bytes,
    newest_checkpoint,
    part,
    random_states,
    restore,
    save_checkpoint,
    set_random_states,
)
from veneer.training.data import Sample, prepare_data
from veneer.training.guard import Gradients, Guard
from veneer.training.packing import Order
from veneer.training.progress import Metrics, Progress, drop_metrics_after, number
from veneer.training.signals import StopNow, StopSignals
from veneer.training.weights import AdapterWeights, FullWeights, trained_weights

GOOD_EVERY = 10  # steps between points that a run can go back to
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

    Returns: out, adapter, model, steps, train_loss, eval_loss, tokens_per_second, peak_bytes, seconds, findings (what the
        guards saw: code, step, what, advice) and more.

    Raises:
        VeneerError: nothing to train, bad data, `out` not empty, a loss that is not good however often the run goes back
            (`veneer.training.guard`), a step that gives some trained weight no gradient, a full disk.
        RefusedError: the checkpoint to resume from is of other settings or data, or beyond the end of this run: it would not
            be the run it was.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written first.
        SystemExit: SIGTERM, with exit code 143; likewise, within 10 seconds.
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
        self.steps, self.warmup = self.order.steps(config)
        self.weights.begin(self.steps)
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
        self.lock: int | None = None
        self.losses: list[Tensor] = []  # of the batches of the step that is under way
        self.guard = Guard(self.steps, config.guard, math.log(model.get_input_embeddings().weight.shape[0]))
        self.good: tuple[dict[str, Any], dict[str, Tensor]] | None = None  # state and tensors to go back to
        self.saved: int | None = None  # the step of the newest checkpoint
        self.pace = 0.0  # seconds a byte of the last checkpoint that was written
        self.finished = False  # nothing more is to be saved
        self.gradients = Gradients(self.parameters)
        self.keeps_best = config.early_stopping is not None or (config.guard and self.weights.small)
        self.state: dict[str, Any] = {
            "settings": self._settings(), "steps": self.steps, "tokens": 0, "seconds": 0.0, "loss_sum": 0.0,
            "loss_steps": 0, "skipped": 0, "eval_loss": None, "eval_losses": [], "best_loss": None, "bad_evaluations": 0,
            "overfits": False, "findings": [], "general_loss": None, "pending": None,
            "held_out": None if self.eval_set is None else self.eval_set.fingerprint(),
        }  # fmt: skip
        require_disk(out, self.weights, config, self.eval_set is not None)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.checkpoints)
        try:
            if not (resume and self._resume()):
                torch.manual_seed(config.seed)  # dropout
            for folder in (out, self.checkpoints, self.checkpoints / "best"):
                remove_leftovers(folder)
            if recipe is not None:
                with atomic_file(out / "recipe.yaml") as temporary:
                    temporary.write_text(recipe, encoding="utf-8")
            self.metrics = Metrics(out, self.done)
        except BaseException as error:
            self._unlock()
            if isinstance(error, OSError):
                raise VeneerError(f"{out} could not be written: {error.strerror or error}") from error
            raise

    def _unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def run(self) -> dict[str, Any]:
        try:
            return self._run()
        finally:
            self._unlock()

    def _run(self) -> dict[str, Any]:
        say = self._start()
        started, before = time.monotonic(), self.state["seconds"]
        with _training(self.model, self.weights, self.config.recompute), StopSignals(self._saving) as stop:
            try:
                if self.config.guard and self.state["general_loss"] is None:
                    with stop.breakable():
                        before_it = self._general_loss()
                    if before_it is not None and math.isfinite(before_it):
                        self.state["general_loss"] = before_it
                while True:
                    if self.state["pending"] is not None:
                        self._conclude(say, stop)
                    if self.done >= self.steps or self._stopped():
                        break
                    began = time.monotonic()
                    row = self._step(stop)
                    now = time.monotonic()
                    self.state["seconds"] = before + now - started
                    if row["applied"]:
                        self.state["loss_sum"] += row["loss"]
                        self.state["loss_steps"] += 1
                        self.state["tokens"] += row["tokens"]
                        self.state["pending"] = {
                            "row": row,
                            "tokens_per_second": round(row["tokens"] / (now - began), 1),
                        }
                    else:
                        self._go_back(row, say)
                self._checkpoint()
                result = self._finish(say, stop)
                if stop.asked:
                    say.line("asked to stop, but all was done")
                    stop.leave()
                return result
            except StopNow:
                if not self.finished:
                    self._checkpoint(interrupted=True)
                more = f" and {len(self.losses)} batches" if self.losses else ""
                say.line(f"stopped after step {self.done}{more}; go on with --resume")
                stop.leave()
                raise

    def _conclude(self, say: Progress, stop: StopSignals) -> None:
        """What comes after a step: evaluate where that is due, look, tell. If it is broken off a resumed run does it again."""
        state, config = self.state, self.config
        row = dict(state["pending"]["row"])
        if self._evaluation_due():
            with stop.breakable():
                loss = self._evaluate()
            row["eval_loss"] = number(loss)
            state["eval_loss"] = loss
        speed = {"tokens_per_second": state["pending"]["tokens_per_second"], "seconds": round(state["seconds"], 3)}
        state["pending"] = None
        if "eval_loss" in row:
            self._keep_best(state["eval_loss"], say)
        if config.guard and self.done == min(guards.WATCHED, self.steps) > 1:  # B was zero in the first step
            self._found(self.gradients.found(self.done), say)
        if self._log_due(row):
            self.metrics.write(row, {**speed, "memory_bytes": current_bytes(self.device)})
        say.step(self.done, row, speed["tokens_per_second"])
        if self.done % config.save_every == 0:
            self._look_at_scale(say)

    def _finish(self, say: Progress, stop: StopSignals) -> dict[str, Any]:
        state, self.finished = self.state, True
        if self._stopped():
            self._take_best(say)
        self._look_at_scale(say)
        general = None
        if state["general_loss"] is not None:
            with stop.breakable():
                general = self._general_loss()
        if general is not None and state["general_loss"] is not None:
            self._found(guards.forgetting(state["general_loss"], general, self.done), say)
        written = self.weights.save(self.out)
        self.metrics.close()
        return {
            "out": str(self.out),
            **written,
            "steps": self.done,
            "train_loss": state["loss_sum"] / max(1, state["loss_steps"]),
            "eval_loss": None if state["eval_loss"] is None else number(state["eval_loss"]),
            "general_loss": None if general is None else {"before": state["general_loss"], "after": number(general)},
            "tokens_per_second": state["tokens"] / max(1e-9, state["seconds"]),
            "peak_bytes": peak_bytes(self.device),
            "seconds": state["seconds"],
            "skipped_steps": state["skipped"],
            "stopped_early": self._stopped(),
            "findings": state["findings"],
            "learning_rate": self.peak_lr,
            "trainable_parameters": count_parameters(self.model).trainable,
            "rows": len(self.train_set.samples),
            "notes": self.notes,
        }

    def _take_best(self, say: Progress) -> None:
        """The weights with the lowest held-out loss, at the end of a run that stopped early."""
        say.line(f"stopped early after step {self.done}: the held-out loss does not get better")
        try:
            best = newest_checkpoint(self.checkpoints / "best")
        except VeneerError as error:
            self.notes += [
                f"the best weights are lost, these are the last ones: {problem}" for problem in error.problems
            ]
            say.line(f"note: {self.notes[-1]}")
            return
        if best is not None:
            restore(best[1], self.weights, self.optimizer)
            self.weights.changed()
            self.state["eval_loss"] = best[0]["best_loss"]
            say.line(f"the best weights are those of step {best[0]['step']}, held-out loss {best[0]['best_loss']:.4f}")

    # ---- one step ---------------------------------------------------------------------------------------------

    def _step(self, stop: StopSignals) -> dict[str, Any]:
        """One step. A loss or gradient that is not as it should be is not applied: the row says which fault it is.

        Raises:
            StopNow: a signal asks to stop; `losses` says after how many batches of the step.
        """
        lr = self.guard.scale * self.peak_lr
        lr *= lr_factor(self.done, self.steps, self.warmup, self.config.schedule, self.config.min_lr_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        samples = [self.train_set.samples[i] for i in self.order.step(self.guard.data_step(self.done))]
        # One divisor for the whole step: however it is cut into micro-batches, every learned token weighs the same.
        items = sum(sample.supervised for sample in samples)
        if not self.losses:
            self.optimizer.zero_grad(set_to_none=True)
            self.began = random_states(self.device)
        self._forward_and_backward(samples, items, stop)
        if stop.asked:  # before more is written than one checkpoint
            raise StopNow
        loss = sum(float(part) for part in self.losses)  # read last: a GPU goes on with the next batch meanwhile
        self.losses = []
        without = [name for name, p in self.parameters.items() if p.grad is None]
        if without:
            raise VeneerError(
                f"{len(without)} of {len(self.parameters)} {self.weights.what} received no gradient: {', '.join(without[:4])}",
                hint="the model does not use these layers on such data, or this is a fault of its code or of ours; "
                + self.weights.no_gradient,
            )
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        fault = self.guard.judge(loss, float(norm))
        if fault is None:
            self._keep_point()
            if self.done < guards.WATCHED:
                self.gradients.see(self.parameters)
            if self.config.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
            self.optimizer.step()
            self.weights.changed()
            self.guard.passed(self.done, loss)
            self.done += 1
        return {
            "step": self.done + (fault is not None),
            "loss": number(loss),
            "grad_norm": number(float(norm)),
            "learning_rate": lr,
            "tokens": sum(len(sample.input_ids) for sample in samples),
            "supervised_tokens": items,
            "applied": fault is None,
            **({} if fault is None else {"fault": fault}),
        }

    def _forward_and_backward(self, samples: list[Sample], items: int, stop: StopSignals) -> None:
        """Add up the gradients of a step, from the batch after those already in `losses`."""
        there = len(self.losses)
        for at, batch in enumerate(self._batches(samples, self.config.batch_size)):
            if at < there:
                continue
            if stop.asked:
                raise StopNow
            try:
                with stop.breakable():
                    part = batch_loss(self.model, batch, items)
                    part.backward()  # type: ignore[no-untyped-call]
            except torch.OutOfMemoryError as error:
                raise VeneerError(
                    f"step {self.done + 1}: out of memory: {str(error).splitlines()[0]}",
                    hint="--resume with a smaller train.batch_size (and more train.grad_accumulation), or train.recompute: full",
                ) from error
            except StopNow:  # the gradients are of half a batch: the step has to begin again
                self.losses = []
                self.optimizer.zero_grad(set_to_none=True)
                set_random_states(self.began, self.device)
                raise
            self.losses.append(part.detach())

    def _keep_point(self) -> None:
        """Before the update of every GOOD_EVERY-th step, and where a checkpoint is due: the loss has just shown that what is
        trained is good, so this is what can be gone back to."""
        first = self.done == 0 and self.config.guard and not self.weights.small  # there is no copy in memory
        due = first or (self.done % self.config.save_every == 0 and self.done > 0)
        if not due and self.done % GOOD_EVERY:
            return
        if due and self.saved != self.done:
            self._checkpoint(random=self.began, good=False)
            self.saved = self.done
        if self.config.guard and self.weights.small:
            old = {} if self.good is None else self.good[1]  # written over: there is never a second copy
            tensors = {
                name: old[name].copy_(x) if name in old and old[name].shape == x.shape else x.clone()
                for name, x in captured(self.weights, self.optimizer).items()
            }
            self.good = (self._position(), tensors | self.began)

    def _position(self) -> dict[str, Any]:
        """The run's state as it is put away: nothing in it changes any more."""
        return copy.deepcopy({**self.state, "step": self.done, "guard": self.guard.state()})

    def _go_back(self, row: dict[str, Any], say: Progress) -> None:
        """Put the last good point back, without the batch of the step that was not good."""
        good = self.good
        if good is None and (found := newest_checkpoint(self.checkpoints, interrupted=False)) is not None:
            good = (found[0], found[1])
        to = self.done if good is None or not self.config.guard else int(good[0]["step"])
        event = self.guard.back(row["fault"], self.done, to, float(row["loss"]), float(row["grad_norm"]))
        decided = self.guard.state()
        if to < self.done and good is not None:
            restore(good[1], self.weights, self.optimizer)
            self.weights.changed()
            kept = {key: self.state[key] for key in ("seconds", "findings", "skipped")}
            self.state = {**_run_state(copy.deepcopy(good[0])), **kept}
            decided["losses"] = good[0]["guard"]["losses"]
        else:
            set_random_states(self.began, self.device)
        self.guard.load(decided)
        self.done = to
        self.state["skipped"] += 1
        drop_metrics_after(self.out, to, len(self.guard.events) - 1)
        self.metrics.event({**event, "step": to, "found_at": event["step"], "event": len(self.guard.events)})
        self._found(event, say)

    def _batches(self, samples: list[Sample], size: int) -> Iterator[dict[str, Any]]:
        for start in range(0, len(samples), size):
            rows = samples[start : start + size]
            yield from batches(rows, self.packing, self.tokenizer, pass_budget(self.data.max_length), self.device)

    # ---- around the steps ---------------------------------------------------------------------------------------

    def _start(self) -> Progress:
        release_memory()
        reset_peak(self.device)
        say = Progress(self.progress, self.steps, self.device)
        say.line(f"{count_parameters(self.model)}; {len(self.train_set.samples):,} rows, {self.steps:,} steps")
        for note in self.notes:
            say.line(f"note: {note}")
        return say

    def _found(self, finding: dict[str, Any] | None, say: Progress) -> None:
        """Tell what a guard saw, once for each kind and step, and keep it for the report."""
        if finding is not None and finding not in self.state["findings"]:
            self.state["findings"] = [*self.state["findings"], finding]
            say.line(f"{finding['code']}: step {finding['step']}: {finding['what']}; {finding['advice']}")

    def _look_at_scale(self, say: Progress) -> None:
        if self.config.guard and not any(x["code"] == "exploding-scale" for x in self.state["findings"]):
            self._found(guards.exploding(self.weights.shares(), self.done), say)

    def _general_loss(self) -> float | None:
        """Mean loss a token on general text; None for a tokenizer that makes nothing of it."""
        texts = [self.tokenizer(text)["input_ids"] for text in guards.GENERAL_TEXT]
        samples = [Sample(ids, [IGNORED, *ids[1:]]) for ids in texts if len(ids) > 1]
        if not samples:
            return None
        training = self.model.training
        self.model.eval()
        found = evaluation_loss(self.model, samples, self.packing, self.tokenizer)["loss"]
        self.model.train(training)
        return found

    def _settings(self) -> dict[str, Any]:
        """All that changes the numbers of a run, by the name the user knows; equal again after JSON."""
        train = self.config.model_dump(mode="json", exclude=MAY_CHANGE)
        layers = list(quantized_layers(self.model).values())
        return {
            "model": os.path.realpath(name) if os.path.isdir(name := self.model.name_or_path) else name,
            "base (sha256 of the beginning of each tensor)": self.weights.base_fingerprint(),
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
        if int(state["step"]) > self.steps:
            raise RefusedError(
                f"the checkpoint is from after step {state['step']}, but this run ends with step {self.steps}",
                hint="raise train.epochs or train.max_steps, or start a new run in another folder",
            )
        restore(tensors, self.weights, self.optimizer)
        self.weights.changed()
        self.done = int(state["step"])
        self.guard.load(state["guard"])
        self._resume_within_a_step(state, tensors)
        if state["good"] is not None:
            self.good = (state["good"], part(tensors, "good"))
        if state["steps"] != self.steps:
            self.notes.append(f"{self.steps} steps instead of {state['steps']}: the learning rate follows the new end")
        self.gradients.silent = set(state["silent"])
        held_out = self.state["held_out"]
        self.state = {**_run_state(state), "steps": self.steps}
        if state.get("held_out") != held_out:
            self.notes.append(
                "other rows are held out than before: their losses are not compared with the earlier ones"
            )
            self.state |= {
                "held_out": held_out,
                "eval_losses": [],
                "best_loss": None,
                "bad_evaluations": 0,
                "overfits": False,
            }
        self.saved = None if state["interrupted"] else self.done
        drop_metrics_after(self.out, self.done, len(self.guard.events))
        self.notes.append(f"resumed after step {self.done}" + (f" and {len(self.losses)} batches" * bool(self.losses)))
        return True

    def _resume_within_a_step(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The batches that are already in the gradients count where they are cut as they were; else the step begins anew."""
        if not state["losses"]:
            return
        self.began = part(tensors, "began")
        if state["cut"] == self._cut():
            self.losses = [torch.tensor(loss, dtype=torch.float64) for loss in state["losses"]]
        else:
            self.optimizer.zero_grad(set_to_none=True)
            set_random_states(self.began, self.device)

    def _cut(self) -> list[Any]:
        """What decides how a step is cut into batches."""
        return [self.config.batch_size, self.packing, pass_budget(self.data.max_length)]

    def _checkpoint(
        self,
        folder: Path | None = None,
        keep_last: int | None = None,
        *,
        random: dict[str, Tensor] | None = None,
        good: bool = True,
        interrupted: bool = False,
    ) -> None:
        """Write all that a run needs to go on as if it had not stopped, also in the middle of a step.

        Args:
            random: the random states, where they are not the present ones.
            good: also write the point to go back to; False: this is one.
            interrupted: it is none, and a full fine-tune's newest one is kept beside it.
        """
        self.metrics.sync()
        tensors = captured(self.weights, self.optimizer) | (random or random_states(self.device))
        if self.losses:
            tensors |= {f"gradient/{name}": p.grad for name, p in self.parameters.items() if p.grad is not None}
            tensors |= {f"began/{name}": x for name, x in self.began.items()}
        state = self._position() | {
            "losses": [float(loss) for loss in self.losses], "cut": self._cut(), "good": None,
            "silent": sorted(self.gradients.silent), "interrupted": interrupted,
        }  # fmt: skip
        if good and self.good is not None and self.done < self.steps:
            state["good"] = self.good[0]
            tensors |= {f"good/{name}": x for name, x in self.good[1].items()}
        keep = self.config.keep_last if keep_last is None else keep_last
        spare = interrupted and not self.weights.small
        began = time.monotonic()
        save_checkpoint(
            folder or self.checkpoints, self.done, tensors, state, keep, batches=len(self.losses), spare=spare
        )

        self.pace = (time.monotonic() - began) / max(1 << 20, sum(tensor.nbytes for tensor in tensors.values()))

    def _saving(self) -> float:
        """Seconds that a checkpoint will take, at most: the first one is small, and a disk takes small ones faster."""
        return 1.5 * self.pace * checkpoint_bytes(self.weights)

    def _evaluation_due(self) -> bool:
        if self.eval_set is None:
            return False
        every = self.config.eval_every or self.order.steps_per_epoch
        return self.done % every == 0 or self.done == self.steps

    def _log_due(self, row: dict[str, Any]) -> bool:
        """Every `log_every` steps; the last step and one that was evaluated always."""
        due = self.done % self.config.log_every == 0 or self.done == self.steps
        return due or "eval_loss" in row

    def _evaluate(self) -> float:
        assert self.eval_set is not None
        self.model.eval()
        try:
            return evaluation_loss(self.model, self.eval_set.samples, self.packing, self.tokenizer)["loss"]
        finally:
            self.model.train()

    def _keep_best(self, loss: float, say: Progress) -> None:
        state = self.state
        state["eval_losses"] = [*state["eval_losses"], loss]
        if math.isfinite(loss) and (state["best_loss"] is None or loss < state["best_loss"]):
            state["best_loss"], state["bad_evaluations"] = loss, 0
            if self.keeps_best:
                self._checkpoint(self.checkpoints / "best", 1, good=False)
        else:
            state["bad_evaluations"] += 1
        rising = guards.overfitting(state["eval_losses"], self.done) if self.config.guard else None
        if rising is not None:
            self._found(rising, say)
            state["overfits"] = self.keeps_best

    def _stopped(self) -> bool:
        """Whether the run ends before its last step: the held-out loss does not get better, or rises."""
        patience = self.config.early_stopping
        return self.state["overfits"] or (patience is not None and self.state["bad_evaluations"] >= patience)


def _run_state(state: dict[str, Any]) -> dict[str, Any]:
    """What the loop counts, of a checkpoint's state."""
    own = ("step", "batches", "format", "guard", "good", "losses", "cut", "silent", "interrupted")
    return {key: value for key, value in state.items() if key not in own}


def require_disk(out: Path, weights: AdapterWeights | FullWeights, config: TrainConfig, held_out: bool) -> None:
    """Raise VeneerError when the disk has no room for a run's checkpoints and result; what is there already counts."""
    best = held_out and (config.early_stopping is not None or (config.guard and weights.small))
    count = config.keep_last + 1 + 2 * best  # one more of each kind while the newest is written
    needed = (count - 1) * checkpoint_bytes(weights) + checkpoint_bytes(weights, within_a_step=True)
    needed += weights.output_bytes()
    there = sum(file.stat().st_size for file in (out / "checkpoints").rglob("*.safetensors"))
    require_disk_space(out, max(0, needed - there), f"{count} checkpoints and the {weights.what}")


def require_trainable(model: Any, tokenizer: Any, recipe: Recipe, rows: int) -> None:
    """What `train` would refuse of a model with its adapter, a recipe and so many rows, besides what `preflight` finds.

    Raises:
        VeneerError: it is in no state to be trained, the adapter is for another number of steps, the disk is too small.
    """
    config = recipe.train
    weights = trained_weights(recipe.method, model, tokenizer)
    weights.begin(Order(rows, config.batch_size * config.grad_accumulation, config.seed).steps(config)[0])
    if config.out is not None:
        require_disk(Path(config.out), weights, config, recipe.data.eval is not None)


def require_new_run(out: Path) -> None:
    """Raise VeneerError when `out` cannot become a run's folder; one that holds a run can be gone on with."""
    there = (out / "checkpoints").is_dir()
    require_empty_folder(out, instead="--resume goes on with the run in it; else " if there else "")


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
