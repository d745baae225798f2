"""C5: a whole fine-tune on chat rows of Alpaca form, batch 8, one epoch: useful tokens a second, seconds to a loss.

python -m benchmarks.run c5 --data rows.jsonl      without --data: home commands as Alpaca rows

TRL's SFTTrainer trains PEFT's model from the same adapter on the same token ids and masks in the same order, with its
defaults (bf16, gradient checkpointing), without checkpointing, and packed (1024 tokens a step, about 8 rows). Useful:
prompt and answer tokens of the rows, no padding. Evaluation is not in the clock.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.plan import Benchmark, Cell, Figure, Options, Record, Result, Results, Table, difference, ratio

VENEER, DEFAULT = "veneer.train", "TRL default"
TRL = {
    DEFAULT: {},
    "TRL without checkpointing": {"gradient_checkpointing": False},
    "TRL packed": {
        "gradient_checkpointing": False, "packing": True, "max_length": 1024, "per_device_train_batch_size": 1,
    },
}  # fmt: skip
CELLS = (
    Cell(VENEER, "benchmarks.c5_sft:by_veneer"),
    *(Cell(n, "benchmarks.c5_sft:by_trl", {"settings": s}, ("trl", "peft")) for n, s in TRL.items()),
)
STEP_TOLERANCE, FINAL_TOLERANCE = 0.02, 0.01
EVALUATE = 2  # steps between veneer's evaluations


def by_veneer(options: Options) -> Record:
    from transformers import AutoTokenizer

    import veneer
    from benchmarks.measure import Memory
    from benchmarks.training import adapted_model, imports, model_folder

    imports("veneer")
    memory = Memory()
    model, _ = adapted_model(options, "veneer", "bf16")
    tokenizer = AutoTokenizer.from_pretrained(model_folder(options))
    work = Path(options.work)
    out = work / f"c5-{time.time_ns()}"
    data = veneer.DataConfig(train=str(work / "train.jsonl"), eval=str(work / "validation.jsonl"))
    train = veneer.TrainConfig(
        batch_size=options.batch, learning_rate=options.learning_rate, schedule="linear", warmup_steps=0,
        eval_every=EVALUATE, seed=0,
    )  # fmt: skip
    memory.restart()
    result = veneer.train(model, tokenizer, None, train, out=out, data_config=data, progress=False)
    log, speed = (
        [json.loads(line) for line in (out / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "speed.jsonl")
    )
    clock, reached = 0.0, []
    for row, fast in zip(log, speed, strict=True):
        clock += row["tokens"] / fast["tokens_per_second"]
        if "eval_loss" in row:
            reached.append([clock, row["eval_loss"]])
    return {
        "tokens": sum(row["tokens"] for row in log),
        "seconds": clock,
        "losses": [row["loss"] for row in log],
        "final": result["eval_loss"],
        "reached": reached,
        "peak_bytes": max(memory.before, memory.since()),
    }


def by_trl(options: Options, settings: dict[str, Any]) -> Record:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from benchmarks.data import chat
    from benchmarks.measure import Memory
    from benchmarks.training import adapted_model, imports, model_folder
    from veneer.config import IGNORED
    from veneer.training.batches import evaluation_loss

    imports("peft")
    memory = Memory()
    samples = chat(options, "train")
    model, _ = adapted_model(options, "peft", "bf16")
    tokenizer = AutoTokenizer.from_pretrained(model_folder(options))
    rows = [
        {"input_ids": s.input_ids, "completion_mask": [int(label != IGNORED) for label in s.labels]} for s in samples
    ]
    arguments = {"per_device_train_batch_size": options.batch, **settings}
    config = SFTConfig(
        output_dir=str(Path(options.work) / "trl"), num_train_epochs=1, learning_rate=options.learning_rate, use_cpu=True,
        completion_only_loss=True, train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, **arguments,
    )  # fmt: skip
    clock = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]
    )
    trainer.train()
    peak = memory.over_import()
    log = [row for row in trainer.state.log_history if "loss" in row]
    trained: torch.nn.Module = trainer.model.eval()
    final = evaluation_loss(trained, chat(options, "validation"), False, tokenizer)["loss"]
    return {
        "tokens": sum(len(s.input_ids) for s in samples),
        "seconds": clock[1] - clock[0],
        "losses": [row["loss"] for row in log],
        "final": final,
        "peak_bytes": peak,
    }


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    note = (
        f"void when losses of steps differ by more than {STEP_TOLERANCE:.0%} from {DEFAULT} (TRL adds autocast to a bf16 "
        f"model and logs losses rounded), or the final validation loss by more than {FINAL_TOLERANCE:.0%}. Seconds to the "
        f"loss: until veneer's validation loss, seen every {EVALUATE} steps, is within 0.5% of the peer's final one"
    )
    table, ours = Table("C5 fine-tune on chat rows", [], [note]), results[VENEER]
    for name, result in results.items():
        row: dict[str, Any] = {
            "contender": name,
            "useful tok/s": result.problem,
            "seconds": None,
            "final validation loss": None,
        }
        row |= {
            "peak GB": None,
            "veneer's tok/s / this": None,
            "veneer's seconds to its loss": None,
            "ratio to loss": None,
        }
        table.rows.append(row)
        if not result.records:
            continue
        row["useful tok/s"] = result.figure(_speed)
        row["seconds"] = result.figure("seconds")
        row["final validation loss"] = f"{result.records[0]['final']:.4f}"
        row["peak GB"] = result.figure(lambda record: record["peak_bytes"] / 1e9)
        if result is ours or not ours.records:
            continue
        reason = _void(ours.records[0], result.records[0], name)
        if reason:
            table.notes.append(reason)
            row["veneer's tok/s / this"] = row["ratio to loss"] = "VOID"
            continue
        row["veneer's tok/s / this"] = ratio(ours.figure(_speed), result.figure(_speed))
        target = result.records[0]["final"] * 1.005
        reached = [_until(record, target) for record in ours.records]
        if None in reached:
            row["veneer's seconds to its loss"] = "not reached"
            continue
        row["veneer's seconds to its loss"] = to = Figure(seconds for seconds in reached if seconds is not None)
        row["ratio to loss"] = ratio(result.figure("seconds"), to)
    return [table]


def _speed(record: Record) -> float:
    return float(record["tokens"] / record["seconds"])


def _until(record: Record, target: float) -> float | None:
    return next((float(seconds) for seconds, loss in record["reached"] if loss <= target), None)


def _void(ours: Record, peer: Record, name: str) -> str | None:
    final = abs(ours["final"] - peer["final"]) / peer["final"]
    worse = ours["final"] > peer["final"] * (1 + FINAL_TOLERANCE)
    packed = len(ours["losses"]) != len(peer["losses"]) or "packed" in name  # other rows in a step
    steps = 0.0 if packed else difference(ours["losses"], peer["losses"])
    if worse or (not packed and final > FINAL_TOLERANCE) or steps > STEP_TOLERANCE:
        return f"VOID: {name}: losses of steps {steps:.2%}, final validation loss {final:.2%} apart"
    return None


BENCHMARK = Benchmark("c5", "fine-tune on chat rows", "c5", CELLS, report)
