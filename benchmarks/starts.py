"""starts: what PiSSA, LoftQ and EVA change before the first step and in the first sixty.

python -m benchmarks.run starts --data rows.json --rounds 1      nothing is timed; chat rows for the text

Before: how far the layers of a 4-bit model with its adapter are from the 16-bit weights, ||W - (Q + scaling B A)|| over that
of QLoRA, ||W - Q(W)||, in Frobenius and nuclear norm, the mean over all linears, as in the papers of PiSSA (Meng et al. 2024,
arXiv 2404.02948, table of quantisation errors) and LoftQ (Li et al. 2023, arXiv 2310.08659); and the loss of a text. Wanted:
below QLoRA. Then: the loss of new home commands after training on others, on a 16-bit and a 4-bit base, at one rate for all.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.data import usable_rows
from benchmarks.plan import Benchmark, Cell, Options, Record, Result, Results, Table

STARTS: dict[str, dict[str, Any]] = {
    "QLoRA": {},
    "PiSSA": {"init": "pissa"},
    "LoftQ, 1 iteration": {"init": "loftq"},
    "LoftQ, 5 iterations": {"init": "loftq", "loftq_iterations": 5},
}
TRAINED: dict[str, dict[str, Any]] = {
    "kaiming": {}, "EVA": {"init": "eva"}, "EVA, rho 1": {"init": "eva", "eva_rho": 1.0}, **dict([*STARTS.items()][1:]),
}  # fmt: skip
RANKS, BASES = (16, 64), (None, "nf4")
ERRORS = {f"{name}, r {r}": {"r": r, "start": start} for r in RANKS for name, start in STARTS.items()}
RUNS = {
    f"{quantize or '16-bit'}: {name}": {"quantize": quantize, "start": start}
    for quantize in BASES
    for name, start in TRAINED.items()
    if quantize or start.get("init") != "loftq"
}
CELLS = (
    *(Cell(name, "benchmarks.starts:measure_error", given, once=True) for name, given in ERRORS.items()),
    *(Cell(name, "benchmarks.starts:measure_run", given, once=True) for name, given in RUNS.items()),
)


def measure_error(options: Options, r: int, start: dict[str, Any]) -> Record:
    """The mean errors over the layers, QLoRA's beside them, and the loss of a text in blocks of options.length tokens."""
    import torch

    import veneer
    from veneer.adapters.attach import lora_layers
    from veneer.training.data import encode_rows, read_rows

    model, tokenizer = veneer.load(options.model, quantize="nf4")
    original, _ = veneer.load(options.model, fused=False)
    plain = {path: layer for path, layer in model.named_modules()}
    config = veneer.LoraConfig(r=r, alpha=2 * r, **start)
    rounded = {path: plain[path] for path in _targets(model)}
    veneer.attach(model, config, seed=0)
    errors: dict[str, list[float]] = {"frobenius": [], "nuclear": []}
    with torch.no_grad():
        for path, layer in lora_layers(model).items():
            weight = original.get_submodule(path).weight.float()
            ours, qlora = weight - layer.merged("default"), weight - rounded[path].dequantize(torch.float32)
            errors["frobenius"].append(float(ours.norm() / qlora.norm()))
            errors["nuclear"].append(nuclear_norm(ours) / nuclear_norm(qlora))
        tokens: list[int] = []
        for row in usable_rows(options):
            if len(tokens) >= max(1, options.text_blocks // 8) * options.length:
                break
            tokens += encode_rows(read_rows([row]).rows, tokenizer, max_length=1 << 16).samples[0].input_ids
        blocks = torch.tensor(tokens[: len(tokens) // options.length * options.length]).view(-1, options.length)
        losses = [float(model(input_ids=b[None], labels=b[None], skip_logits=True).loss) for b in blocks]
    return {**{name: statistics.mean(values) for name, values in errors.items()}, "loss": statistics.mean(losses),
            "worst": max(errors["frobenius"]), "tokens": blocks.numel()}  # fmt: skip


def nuclear_norm(error: Any) -> float:
    """The sum of the singular values of (out, in), from the eigenvalues of the smaller Gram matrix: an SVD takes ten times as long."""
    import torch

    x = error.double() if error.shape[0] <= error.shape[1] else error.double().T
    return float(torch.linalg.eigvalsh(x @ x.T).clamp(min=0).sqrt().sum())


def _targets(model: Any) -> list[str]:
    from veneer.adapters.targets import resolve_targets

    return resolve_targets(model, "all-linear")


def measure_run(options: Options, quantize: str | None, start: dict[str, Any]) -> Record:
    """3 * options.follow_steps steps of options.follow_batch rows: losses of the new sentences before, in between, after."""
    import veneer
    from veneer.demo_data import SYSTEM, build_demo_data, write_demo_data
    from veneer.training.batches import start_batches

    steps = 3 * options.follow_steps
    folder = Path(options.work) / f"starts-{quantize}-{'-'.join(map(str, start.values())) or 'kaiming'}"
    paths = write_demo_data(folder / "data", build_demo_data(0, steps * options.follow_batch, 100))
    model, tokenizer = veneer.load(options.model, quantize=quantize)  # type: ignore[arg-type]
    data = veneer.DataConfig(
        train=str(paths["train"]), eval=str(paths["unseen_sentences"]), system=SYSTEM, max_length=256
    )
    config = veneer.LoraConfig(r=options.rank, alpha=options.alpha, **start)
    rows = start_batches(model, tokenizer, data, 0) if config.init == "eva" else None
    veneer.attach(model, config, seed=0, data=rows)
    before = veneer.evaluate(
        model, tokenizer, veneer_rows(paths["unseen_sentences"]), system=SYSTEM, max_length=256, generate=False,
        progress="",
    )  # fmt: skip
    settings = veneer.TrainConfig(
        batch_size=options.follow_batch, learning_rate=2 * options.learning_rate, warmup_steps=options.follow_steps // 4,
        eval_every=max(1, steps // 3), save_every=1 << 30, keep_last=1, max_steps=steps, seed=0,
    )  # fmt: skip
    result = veneer.train(model, tokenizer, None, settings, out=folder / "run", data_config=data, progress=False)
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "held": [before["loss"], *(row["eval_loss"] for row in log if "eval_loss" in row)],
        "losses": [row["loss"] for row in log if "event" not in row],
        "trainable": result["trainable_parameters"],
        "steps": steps,
    }


def veneer_rows(path: Path) -> Any:
    from veneer.training.rows import read_rows

    return read_rows(path).rows


def report(results: Results, limits: Result, options: Options) -> list[Table]:
    errors = Table("starts: 4-bit error of the weights over QLoRA's, and the loss of a text before the first step", [])
    for name in ERRORS:
        if name not in results:
            continue
        result = results[name]
        row: dict[str, str | None] = {"nf4 base": name, "Frobenius norm": result.problem, "worst layer": None}
        row |= {"nuclear norm": None, "loss of the text": None}
        errors.rows.append(row)
        if not result.records:
            continue
        record = result.records[0]
        row |= {"Frobenius norm": f"{record['frobenius']:.4f}", "worst layer": f"{record['worst']:.4f}"}
        row |= {"nuclear norm": f"{record['nuclear']:.4f}", "loss of the text": f"{record['loss']:.4f}"}
        if not name.startswith("QLoRA") and record["frobenius"] >= 1:
            errors.notes.append(f"NOT MET: {name}: 4-bit error {record['frobenius']:.4f} of QLoRA's; wanted: below 1")
    runs = Table(
        f"starts: loss of new home commands, {3 * options.follow_steps} steps of {options.follow_batch} rows", []
    )
    for name in RUNS:
        if name not in results:
            continue
        result = results[name]
        row = {"base: start": name, "before": result.problem, "a third": None, "two thirds": None, "after": None}
        row |= {"trainable": None}
        runs.rows.append(row)
        if result.records:
            held = result.records[0]["held"]
            row |= dict(zip(("before", "a third", "two thirds", "after"), (f"{x:.4f}" for x in held), strict=False))
            row["trainable"] = f"{result.records[0]['trainable']:,}"
    return [errors, runs]


BENCHMARK = Benchmark("starts", "starts of an adapter", "starts", CELLS, report)
