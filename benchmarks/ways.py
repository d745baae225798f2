"""ways: what becomes of a QLoRA fine-tune when it is merged: onto the 16-bit base, onto the 4-bit one, and back into 4 bits.

python -m benchmarks.run ways --rounds 1       the demo's task and recipe; nothing is timed

The reference is the 4-bit base with the adapter beside it. Of every way: KL of its answers' logits from the reference on
text, what is lost of the update in the weights, and the exact match on new sentences and templates, as a share of what the
fine-tune gained. Wanted: the 4-bit merge with a residual adapter of rank 16 keeps 95% of the gain.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.plan import Benchmark, Cell, Options, Record, Result, Results, Table

TRAINED, BASE = "4-bit base + adapter", "4-bit base alone"
WAYS: dict[str, dict[str, Any]] = {
    BASE: {"way": "base"},
    TRAINED: {"way": "trained"},
    "merged onto the 16-bit base": {"way": "merge", "onto": None},
    "merged onto the 4-bit base, decoded": {"way": "merge", "onto": "nf4"},
    "the latter in 4 bits again": {"way": "requantize", "rank": 0},
    "in 4 bits, residual rank 4": {"way": "requantize", "rank": 4},
    "in 4 bits, residual rank 8": {"way": "requantize", "rank": 8},
    "in 4 bits, residual rank 16": {"way": "requantize", "rank": 16},
    "16-bit merge in 4 bits": {"way": "requantize", "rank": 0, "decoded": False},
    "16-bit merge in 4 bits, residual rank 16": {"way": "requantize", "rank": 16, "decoded": False},
}
WANTED, SHARE = "in 4 bits, residual rank 16", 0.95
ROWS, ASKED = 2400, 200  # to learn from, and to answer of each kind; as the demo
SMALL = (12, 4)
CELLS = tuple(Cell(name, "benchmarks.ways:measure", given, once=True) for name, given in WAYS.items())


def trained(options: Options) -> tuple[Path, Path]:
    """The demo's data and the adapter trained on it, made once."""
    import veneer
    from veneer.config import read_recipe
    from veneer.demo_data import build_demo_data, write_demo_data

    work = Path(options.work) / "ways"
    adapter, data = work / "run" / "adapter", work / "data"
    if not adapter.exists():
        rows, asked = (ROWS, ASKED) if options.length >= Options.length else SMALL
        shutil.rmtree(work, ignore_errors=True)
        paths = write_demo_data(data, build_demo_data(0, rows, asked))
        recipe = read_recipe("demo", [f"data.train={paths['train']}", f"train.out={work / 'run'}"])
        model, tokenizer = veneer.load(options.model, quantize=recipe.quantize)
        veneer.attach(model, recipe.lora, seed=0)
        veneer.train(model, tokenizer, None, recipe.train, data_config=recipe.data)
    return adapter, data


def measure(options: Options, way: str, **how: Any) -> Record:
    """exact_match over both kinds of new rows, kl and top1 from the reference, megabytes of the folder, the report's errors."""
    from safetensors.torch import load_file, save_file

    import veneer
    from veneer.demo_data import SYSTEM
    from veneer.evaluation import divergence, evaluate, text_logits
    from veneer.models.merging import merge_files
    from veneer.models.requantize import RESIDUAL, merge_quantized
    from veneer.training.rows import read_rows

    adapter, data = trained(options)
    out, saved = Path(options.work) / "ways" / "merged", Path(options.work) / "ways" / "reference.safetensors"
    shutil.rmtree(out, ignore_errors=True)
    record: Record = {"error": None, "ways": None, "megabytes": None}
    if way == "merge":
        merge_files(options.model, [adapter], out, onto=how["onto"])
    elif way == "requantize":
        report = merge_quantized(options.model, adapter, out, rank=how["rank"], decoded=how.get("decoded", True))
        record |= {"error": report["error"], "ways": report["ways"]}
    model, tokenizer = veneer.load(out if out.exists() else options.model, quantize=None if out.exists() else "nf4")
    if way == "trained":
        veneer.load_adapter(model, adapter)
    elif (out / RESIDUAL).is_dir():
        veneer.load_adapter(model, out / RESIDUAL)
    if out.exists():
        record["megabytes"] = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e6
    logits = text_logits(model, tokenizer)
    if way == "trained" or not saved.exists():
        reference = model
        if way != "trained":
            reference, _ = veneer.load(options.model, quantize="nf4")
            veneer.load_adapter(reference, adapter)
        save_file({str(n): one.contiguous() for n, one in enumerate(text_logits(reference, tokenizer))}, saved)
    there = load_file(saved)
    record |= divergence([there[str(n)] for n in range(len(there))], logits)
    rows = [row for kind in ("unseen_sentences", "unseen_templates") for row in read_rows(data / f"{kind}.jsonl").rows]
    record["exact_match"] = evaluate(model, tokenizer, rows, system=SYSTEM, max_new_tokens=64)["exact_match"]
    record["rows"] = len(rows)
    shutil.rmtree(out, ignore_errors=True)
    return record


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    table = Table("ways: a QLoRA fine-tune merged", [])
    base, best = (results[name].records[0] if results[name].records else None for name in (BASE, TRAINED))
    for name, result in results.items():
        row: dict[str, str | None] = {
            "way": name,
            **dict.fromkeys(
                ("MB of weights", "lost of the update", "with the residual", "KL from the reference, nats",
                 "same likeliest token", "exact match", "of the gain")
            ),
        }  # fmt: skip
        table.rows.append(row)
        if not result.records:
            row["exact match"] = result.problem
            continue
        record = result.records[0]
        row["MB of weights"] = None if record["megabytes"] is None else f"{record['megabytes']:.0f}"
        if record["error"]:
            row["lost of the update"] = f"{100 * record['error']['without residual']:.1f}%"
            if WAYS[name]["rank"]:
                row["with the residual"] = f"{100 * record['error']['with residual']:.2g}%"
        row["KL from the reference, nats"] = f"{record['kl']:.2g}"
        row["same likeliest token"] = f"{100 * record['top1_agreement']:.1f}%"
        row["exact match"] = f"{100 * record['exact_match']:.1f}%"
        if base is None or best is None or name in (BASE, TRAINED):
            continue
        gain = best["exact_match"] - base["exact_match"]
        share = (record["exact_match"] - base["exact_match"]) / gain if gain > 0 else float("nan")
        row["of the gain"] = f"{100 * share:.0f}%"
        if name == WANTED and options.length >= Options.length and not share >= SHARE:
            table.notes.append(f"NOT MET: {name}: {row['of the gain']} of the gain, wanted {100 * SHARE:.0f}%")
    if best is not None:
        table.notes.append(f"exact match over {best['rows']} rows; text: {best['tokens']} tokens of chat and prose")
    return [table]


BENCHMARK = Benchmark("ways", "a QLoRA fine-tune merged", "ways", CELLS, report)
