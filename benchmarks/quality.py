"""How good are the methods? Full fine-tuning, LoRA of many kinds and QLoRA, trained on the same rows, asked the same.

python -m benchmarks.quality                       the demo's task: home commands to JSON (about an hour on 2 cores)
python -m benchmarks.quality --data .../banking77  and a second one: a folder of BANKING77 or CLINC150 (about an hour)
python -m benchmarks.quality --report docs         tables and plots (extra `report`) of what is there; nothing is run
python -m benchmarks.quality --quick               tiny sizes: shows that it runs, the figures mean nothing

Each cell runs in a process of its own and becomes a file in OUT; one that is there is not measured again, so a run that
was stopped goes on where it was. Exit code 1: a cell failed. What is asked was never trained on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.plan import Record

ROOT = Path(__file__).parent.parent
THREADS = "2"


@dataclass(frozen=True)
class Cell:
    """One way to train. lora: `LoraConfig`'s arguments, None: full fine-tuning; rate: times the method's learning rate."""

    name: str
    lora: dict[str, Any] | None
    quantize: str | None = None
    seeds: int = 1
    rate: float = 1.0
    train: dict[str, Any] = field(default_factory=dict)  # more of `TrainConfig`'s arguments

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.+]+", "-", self.name.lower())

    def known(self) -> bool:
        """Whether this version of veneer has all of these settings."""
        from veneer.config import LoraConfig, TrainConfig

        return set(self.lora or {}) <= set(LoraConfig.model_fields) and set(self.train) <= set(TrainConfig.model_fields)


def lora(name: str, *, quantize: str | None = None, seeds: int = 1, rate: float = 1.0, **settings: Any) -> Cell:
    """LoRA r 16, alpha 32 on all linears, but for `settings`. alpha follows a changed rank: the scaling stays 2."""
    settings = {"r": 16, "targets": "all-linear", **settings}
    return Cell(name, {"alpha": 2 * settings["r"], **settings}, quantize, seeds, rate)


FULL, BASE, QLORA = "full", "LoRA r16", "QLoRA r16"
QV = ["q_proj", "v_proj"]
SCALINGS = (0.25, 0.5, 1, 4, 8)
CELLS = (
    Cell(FULL, None, seeds=3),
    lora(BASE, seeds=3),
    lora(QLORA, quantize="nf4", seeds=3),
    *(lora(f"LoRA r{r}", r=r) for r in (1, 4, 8, 64)),
    lora("LoRA r64, alpha 32", r=64, alpha=32),
    lora("rsLoRA r64, alpha 32", r=64, alpha=32, rslora=True),
    lora("DoRA r16", dora=True),
    replace(lora("LoRA+ r16"), train={"lora_plus": 16}),
    lora("AdaLoRA r16", adalora=True),
    lora("AdaLoRA r16, rate x2", rate=2, adalora=True),
    lora("qv", targets=QV),
    lora("attention", targets="attention"),
    lora("mlp", targets="mlp"),
    lora("attention r42", r=42, targets="attention"),  # as many parameters as r 16 on all linears
    *(lora(f"scaling {scaling:g}", alpha=16 * scaling) for scaling in SCALINGS),
    # is the yardstick at its best, and LoRA?
    *(Cell(f"full, rate x{x:g}", None, rate=x) for x in (0.5, 2)),
    *(lora(f"LoRA r16, rate x{x:g}", rate=x) for x in (0.5, 2)),
)


@dataclass(frozen=True)
class Options:
    """Sizes and settings all cells share; they are part of each cell's file."""

    model: str = "smollm2"
    batch: int = 16
    warmup: int = 10
    lora_rate: float = 2e-3
    full_rate: float = 2e-4
    home: tuple[int, int] = (1200, 150)  # rows to train on, rows of each of two kinds to ask
    other: tuple[int, int] = (1000, 200)
    answer_batch: int = 64


QUICK: dict[str, Any] = {"batch": 4, "warmup": 1, "home": (16, 8), "other": (16, 6)}


@dataclass(frozen=True)
class Task:
    """Rows of prompt and completion: `train` and one or more sets of rows that are asked."""

    name: str
    title: str
    system: str
    max_new_tokens: int
    train: list[dict[str, str]]
    asked: dict[str, list[dict[str, str]]]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in {"train": self.train, **self.asked}.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def home_task(options: Options) -> Task:
    from veneer.demo_data import SYSTEM, build_demo_data

    data = build_demo_data(0, *options.home)
    asked = {"sentences": data.unseen_sentences, "templates": data.unseen_templates}
    return Task("home", "home commands to JSON", SYSTEM, 64, data.train, asked)


def intent_task(folder: Path, options: Options) -> Task:
    """BANKING77 (train.csv, test.csv: text, category) or CLINC150 (data_full.json: train, test): a sample of each."""
    if (folder / "train.csv").is_file() and (folder / "test.csv").is_file():
        name, title, system = (
            "banking77",
            "BANKING77, customers' messages to intents",
            "Bank customer's message to intent.",
        )
        parts = [
            [(row["text"], row["category"]) for row in csv.DictReader(file.open(encoding="utf-8", newline=""))]
            for file in (folder / "train.csv", folder / "test.csv")
        ]
    elif (folder / "data_full.json").is_file():
        name, title, system = "clinc150", "CLINC150, requests to intents", "Request to intent."
        values = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
        parts = [[(text, intent) for text, intent in values[part]] for part in ("train", "test")]
    else:
        raise SystemExit(f"{folder}: found neither train.csv and test.csv (BANKING77) nor data_full.json (CLINC150)")
    rows = [
        [{"prompt": text.strip(), "completion": intent} for text, intent in random.Random(0).sample(part, len(part))]
        for part in parts
    ]
    return Task(name, title, system, 24, rows[0][: options.other[0]], {"messages": rows[1][: options.other[1]]})


# ---- one cell, in a process of its own -----------------------------------------------------------------------------


def measure(options: Options, cell: Cell, seed: int, task: dict[str, Any], work: str) -> Record:
    """Train as `cell` says on the task's rows in `work` and ask the model. A run without a finite loss is a result too.

    loss and exact match by kind of row asked, `correct` of each row ("0110..."), peak memory over import while training,
    seconds of the steps, bytes of the files a user would keep.
    """
    import veneer
    from benchmarks.measure import Memory
    from benchmarks.training import imports
    from veneer.evaluation import evaluate
    from veneer.training.rows import read_rows

    imports("veneer")
    memory = Memory()
    folder, out = Path(work), Path(work) / f"run-{os.getpid()}"
    model, tokenizer = veneer.load(options.model, quantize=cell.quantize)  # type: ignore[arg-type]
    method: Literal["lora", "full"] = "full" if cell.lora is None else "lora"
    if cell.lora is not None:
        veneer.attach(model, veneer.LoraConfig(**cell.lora), seed=seed)
    rate = cell.rate * (options.full_rate if cell.lora is None else options.lora_rate)
    settings = {
        "epochs": 1, "batch_size": options.batch, "learning_rate": rate, "warmup_steps": options.warmup, "seed": seed,
        "save_every": 1 << 30, "keep_last": 1, **cell.train,
    }  # fmt: skip
    data = veneer.DataConfig(train=str(folder / "train.jsonl"), system=task["system"], max_length=256)
    memory.restart()
    record: Record = {"learning_rate": rate, "trainable": veneer.count_parameters(model).trainable}
    try:
        result = veneer.train(
            model, tokenizer, None, veneer.TrainConfig(**settings), method=method, out=out, data_config=data,
            progress=False,
        )  # fmt: skip
        record |= {"peak_bytes": max(memory.before, memory.since()), "trainable": result["trainable_parameters"]}
        record |= {key: result[key] for key in ("steps", "seconds", "train_loss", "tokens_per_second")}
        written = Path(result["adapter"] or result["model"])
        record["bytes"] = sum(file.stat().st_size for file in written.iterdir() if file.suffix == ".safetensors")
        record |= _course(out)
    except veneer.VeneerError as error:
        if "no finite loss" not in str(error):
            raise
        return {**record, "diverged": error.problems[0]}
    finally:
        shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    for name in task["asked"]:
        rows = read_rows(folder / f"{name}.jsonl").rows
        found = evaluate(
            model, tokenizer, rows, system=task["system"], max_new_tokens=task["max_new_tokens"],
            batch_size=options.answer_batch, progress="",
        )  # fmt: skip
        right = [answer == row.completion.strip() for answer, row in zip(found["answers"], rows, strict=True)]
        record.setdefault("asked", {})[name] = {
            "exact_match": found["exact_match"], "loss": found["loss"], "tokens": found["supervised_tokens"],
            "correct": "".join("01"[hit] for hit in right),
        }  # fmt: skip
    return {**record, "asking_seconds": time.monotonic() - began}


def _course(out: Path) -> Record:
    """How the training went: losses at both ends, and what a learning rate or scaling that is too high does."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in log if "event" not in row]
    norms = [row["grad_norm"] for row in log if "event" not in row]
    tail = losses[-10:]
    return {
        "first_loss": losses[0],
        "last_loss": sum(tail) / len(tail),
        "largest_loss": max(losses),
        "largest_gradient": max(norms),
        "not_applied": len(log) - len(losses),
    }


# ---- the runner ------------------------------------------------------------------------------------------------------


def jobs(cells: Sequence[Cell], tasks: Sequence[str], seeds: int) -> Iterator[tuple[int, str, Cell]]:
    """All first seeds first: a run that is stopped early has one figure of everything."""
    for seed in range(max(cell.seeds for cell in cells)):
        for task in tasks:
            yield from ((seed, task, cell) for cell in cells if seed < min(cell.seeds, seeds))


def cell_file(out: Path, task: str, cell: Cell, seed: int) -> Path:
    return out / task / f"{cell.slug}-s{seed}.json"


def settings_of(options: Options, cell: Cell, seed: int, task: str) -> dict[str, Any]:
    """What a cell's file must have been made with, as JSON gives it back: all that can change its figures."""
    what = {key: value for key, value in asdict(cell).items() if key != "seeds"}
    sizes = asdict(options)
    sizes.pop("other" if task == "home" else "home")
    return json.loads(json.dumps({"options": sizes, "cell": what, "seed": seed}))  # type: ignore[no-any-return]


def run_cells(
    options: Options, cells: Sequence[Cell], tasks: Sequence[Task], out: Path, seeds: int, limit: float
) -> list[str]:
    """Measure what is not there yet; returns what failed.

    Raises:
        SystemExit: files there are of other settings, all of them listed.
    """
    from veneer.storage import write_json

    facts = {
        task.name: {"system": task.system, "max_new_tokens": task.max_new_tokens, "asked": [*task.asked]}
        for task in tasks
    }
    wanted = list(jobs(cells, list(facts), seeds))
    files = [cell_file(out, task, cell, seed) for seed, task, cell in wanted]
    other = [
        f"{file}: made with other settings"
        for file, (seed, task, cell) in zip(files, wanted, strict=True)
        if file.is_file() and json.loads(file.read_text())["settings"] != settings_of(options, cell, seed, task)
    ]
    if other:
        raise SystemExit("\n".join([*other, "give another --out, or remove them"]))
    for task in tasks:
        task.write(out / task.name / "data")
        write_json(out / task.name / "task.json", {"title": task.title, "train": len(task.train)} | facts[task.name])
    failed, todo = [], [job for job, file in zip(wanted, files, strict=True) if not file.is_file()]
    began = time.monotonic()
    for number, (seed, name, cell) in enumerate(todo):
        left = (time.monotonic() - began) / number * (len(todo) - number) / 60 if number else 0.0
        say(f"{number + 1}/{len(todo)}{f', {left:.0f} min left' if number else ''}: {name}, {cell.name}, seed {seed}")
        started = time.monotonic()
        record = _process(options, cell, seed, facts[name], out / name / "data", limit)
        if isinstance(record, str):
            failed.append(f"{name}, {cell.name}, seed {seed}: {record}")
            say(f"  failed: {record}")
            continue
        record["all_seconds"] = time.monotonic() - started
        write_json(
            cell_file(out, name, cell, seed),
            {"settings": settings_of(options, cell, seed, name), "machine": _machine(), **record},
        )
    return failed


def _process(options: Options, cell: Cell, seed: int, task: dict[str, Any], work: Path, limit: float) -> Record | str:
    given = {"options": asdict(options), "cell": asdict(cell), "seed": seed, "task": task, "work": str(work)}
    threads = {f"{name}_NUM_THREADS": THREADS for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = work / "record.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.quality", "--child", json.dumps(given)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=limit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    if done.returncode != 0 or not result.is_file():
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        print(done.stdout[-4000:], file=sys.stderr)
        return f"exit {done.returncode}: {lines[-1] if lines else 'no output'}"
    return json.loads(result.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _child(text: str) -> None:
    import warnings

    warnings.filterwarnings("ignore")
    given = json.loads(text)
    sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given["options"].items()}
    options = Options(**sizes)
    record = measure(options, Cell(**given["cell"]), given["seed"], given["task"], given["work"])
    (Path(given["work"]) / "record.json").write_text(json.dumps(record), encoding="utf-8")


def _machine() -> str:
    from benchmarks.run import machine_line

    return machine_line()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, help="a folder of BANKING77 or CLINC150: a second task")
    parser.add_argument("--out", type=Path, help="folder of the cells' files (runs/quality; quick: runs/quality-quick)")
    parser.add_argument("--only", help="a regex: only cells whose names it finds")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many")
    parser.add_argument("--limit", type=float, default=3600, help="seconds a cell may take")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one seed: the figures mean nothing")
    parser.add_argument(
        "--report", type=Path, help="write methods.md and plots there from what is measured; run nothing"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        _child(given.child)
        return 0
    from benchmarks.quality_report import write_report

    out = (given.out or ROOT / "runs" / ("quality-quick" if given.quick else "quality")).absolute()
    if given.report:
        say(f"written: {', '.join(map(str, write_report(out, given.report)))}")
        return 0
    options = replace(Options(model=given.model), **(QUICK if given.quick else {}))
    cells = [cell for cell in CELLS if cell.known() and (not given.only or re.search(given.only, cell.name))]
    if left := [cell.name for cell in CELLS if not cell.known()]:
        say(f"left out, this version does not know their settings: {', '.join(left)}")
    if not cells:
        raise SystemExit(f"--only {given.only}: found no cell; there are {', '.join(cell.name for cell in CELLS)}")
    tasks = [home_task(options), *([intent_task(given.data, options)] if given.data else [])]
    failed = run_cells(options, cells, tasks, out, 1 if given.quick else given.seeds, given.limit)
    say(f"written: {', '.join(map(str, write_report(out, out)))}")
    for line in failed:
        say(f"failed: {line}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
