"""`veneer demo`: the whole life of an adapter on the embedded model, measured as it goes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from veneer.adapters.attach import attach, count_parameters
from veneer.adapters.merge import merge
from veneer.config import read_recipe, write_recipe
from veneer.demo_data import SYSTEM, build_demo_data, write_demo_data
from veneer.evaluation import compare_logits, evaluate
from veneer.models.load import load, save_model
from veneer.storage import require_empty_folder
from veneer.training.loop import train
from veneer.training.rows import read_rows

MERGE_ROWS = 32  # of the new sentences, answered by the merged model too
SHOWN = 4  # answers printed before and after
MAX_NEW_TOKENS = 64  # the longest answer has fewer
BEFORE_ROWS = 32  # of each kind: the base model scores about 0 and rambles to the limit, so fewer rows will do


def run_demo(out: str | Path, *, train_rows: int = 2400, test_rows: int = 200) -> dict[str, Any]:
    """Load, look, train, look again, save, merge, check; returns every figure it printed."""
    started = time.monotonic()
    out = Path(out)
    require_empty_folder(out)
    _say("Task: a spoken home command becomes a JSON intent, the job of a local voice assistant.\n")
    data = build_demo_data(0, train_rows, test_rows)
    paths = write_demo_data(out / "data", data)
    _say(
        f"data: {len(data.train):,} commands to learn from, {len(data.unseen_sentences)} new sentences of known templates,"
    )
    _say(f"      {len(data.unseen_templates)} sentences of templates never seen (in {out / 'data'})")
    recipe = read_recipe(
        "demo",
        [f"data.train={paths['train']}", f"train.out={out / 'run'}"],
    )
    model, tokenizer = load(
        recipe.model, quantize=recipe.quantize, double_quant=recipe.double_quant, dtype=recipe.dtype
    )
    tests = {name: read_rows(paths[name]).rows for name in ("unseen_sentences", "unseen_templates")}
    result: dict[str, Any] = {"out": str(out)}
    how: dict[str, Any] = {"system": SYSTEM, "max_new_tokens": MAX_NEW_TOKENS}

    _say("\nBefore training (SmolLM2-135M-Instruct in 4 bits):")
    before = {name: evaluate(model, tokenizer, rows[:BEFORE_ROWS], **how) for name, rows in tests.items()}
    _show(tests["unseen_sentences"], before["unseen_sentences"]["answers"])

    attach(model, recipe.lora, seed=recipe.train.seed)
    counted = count_parameters(model)
    _say(f"\nTraining QLoRA, rank {recipe.lora.r} on all linears: {counted}")
    trained = train(model, tokenizer, None, recipe.train, data_config=recipe.data, recipe=write_recipe(recipe))

    _say("\nAfter training:")
    after = {name: evaluate(model, tokenizer, rows, **how) for name, rows in tests.items()}
    _show(tests["unseen_sentences"], after["unseen_sentences"]["answers"])

    adapter = Path(trained["adapter"])
    difference = compare_logits(model, tokenizer, lambda: merge(model))
    merged = save_model(model, tokenizer, out / "merged")
    again, _ = load(str(merged))
    checked = tests["unseen_sentences"][:MERGE_ROWS]
    check = evaluate(again, tokenizer, checked, **how)
    unmerged = after["unseen_sentences"]["answers"][:MERGE_ROWS]
    result |= {
        "rows_before": {name: before[name]["rows"] for name in tests},
        "rows": {name: after[name]["rows"] for name in tests},
        "exact_match_before": {name: before[name]["exact_match"] for name in tests},
        "exact_match": {name: after[name]["exact_match"] for name in tests},
        "json_match": {name: after[name]["json_match"] for name in tests},
        "trainable_parameters": counted.trainable,
        "adapter": str(adapter),
        "adapter_bytes": sum(file.stat().st_size for file in adapter.iterdir()),
        "train_seconds": trained["seconds"],
        "tokens_per_second": trained["tokens_per_second"],
        "peak_bytes": trained["peak_bytes"],
        "merged": str(merged),
        "merge": difference,
        "merged_exact_match": check["exact_match"],
        "unmerged_exact_match": sum(a == r.completion for a, r in zip(unmerged, checked, strict=True)) / len(checked),
        "seconds": time.monotonic() - started,
    }
    _report(result)
    return result


def _report(result: dict[str, Any]) -> None:
    before, after = result["exact_match_before"], result["exact_match"]
    _say("\nexact match                       before              after")
    for name, title in (
        ("unseen_sentences", "new sentences, known templates"),
        ("unseen_templates", "templates never seen"),
    ):
        columns = [
            f"{100 * share[name]:6.1f}% of {rows[name]:3} rows"
            for share, rows in ((before, result["rows_before"]), (after, result["rows"]))
        ]
        _say(f"  {title:30} {'  '.join(columns)}")
    _say(f"trained {result['trainable_parameters']:,} parameters, adapter {result['adapter_bytes'] / 1e6:.1f} MB")
    _say(
        f"training {result['train_seconds']:.0f} s at {result['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {result['peak_bytes'] / 1e9:.1f} GB; the whole demo {result['seconds']:.0f} s"
    )
    merge_ = result["merge"]
    _say(
        f"merged into a plain 16-bit model: largest logit difference {merge_['max_logit_difference']:.3g}, same likeliest "
        f"token at {100 * merge_['top1_agreement']:.0f}% of {merge_['tokens']} positions; "
        f"on {MERGE_ROWS} of the new sentences {100 * result['merged_exact_match']:.0f}% exact, "
        f"unmerged {100 * result['unmerged_exact_match']:.0f}%"
    )
    _say(
        f"\nNow you:\n  veneer chat smollm2 --quantize nf4 --adapter {result['adapter']} --system '{SYSTEM}' --single\n"
        f"  veneer chat {result['merged']} --system '{SYSTEM}' --single\n"
        "  veneer train quick --set data.train=yours.jsonl --set train.out=runs/mine     (rows with prompt and completion)"
    )


def _show(rows: list[Any], answers: list[str]) -> None:
    for row, answer in list(zip(rows, answers, strict=False))[:SHOWN]:
        _say(f"  > {row.prompt[-1]['content']}")
        _say(f"    {' '.join(answer.split())[:110] or '(nothing)'}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
