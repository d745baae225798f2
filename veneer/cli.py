"""The command line: one function a verb. Parse, call, print; results on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from veneer.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED, VeneerError, printable

app = typer.Typer(
    help="Fine-tune language models with LoRA and QLoRA on the machine you have.",
    epilog="Exit codes: 0 done, 2 bad input, 3 refused because it would not fit or not be exact, 130 interrupted (Ctrl-C), 143 ended (SIGTERM).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, a hub id, or smollm2.")]
Quantize = Annotated[str | None, typer.Option(help="nf4, fp4 or int8: load the base in 4 or 8 bits.")]
Adapter = Annotated[Path | None, typer.Option(help="A folder with a LoRA adapter in PEFT's format.")]
System = Annotated[str | None, typer.Option(help="System message put before every conversation that has none.")]


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped one: quick, production, quality, demo.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. train.epochs=2; may be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in train.out.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse the run when any row is bad.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start it even if it is planned not to fit into memory.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Look at rows, settings and one batch before the first step.")] = True,
    as_json: Json = False,
) -> None:
    """Train an adapter, or with `method: full` every weight, as a recipe says."""
    from veneer.config import read_recipe, write_recipe

    settings = read_recipe(recipe, [*(set_ or []), *(["data.strict=true"] if strict else [])])
    if settings.train.out is None:
        raise VeneerError(
            "train.out is missing: where should the result go?", hint="for example --set train.out=runs/first"
        )
    import veneer
    from veneer.adapters.peft_format import base_quantization
    from veneer.planning.memory import CannotPlanError
    from veneer.report.check import load_for, require_sound
    from veneer.report.plan import LONG_RUN, duration, plan_recipe, size, while_training
    from veneer.training.loop import require_new_run
    from veneer.training.progress import shown
    from veneer.training.rows import require_readable

    if not resume:
        require_new_run(Path(settings.train.out))
    train_files = [settings.data.train] if isinstance(settings.data.train, str) else settings.data.train
    for file in [*train_files, *([settings.data.eval] if isinstance(settings.data.eval, str) else [])]:
        require_readable(Path(file))
    planned: dict[str, Any] = {}
    try:
        planned = plan_recipe(settings, force=force, time=LONG_RUN if check and not resume else False)
    except CannotPlanError as error:
        print(f"warning: {printable(error.problems[0])}", file=sys.stderr)
    if "seconds" in planned:
        needed, free = planned["peak_bytes"] + planned["process_bytes"], planned["budget_bytes"]
        print(f"planned: {size(needed)} of {size(free)} free, {duration(planned['seconds'])}", file=sys.stderr)
    model, tokenizer = load_for(settings)
    if check and not resume:  # a run that goes on was looked at when it began
        require_sound(settings, model, tokenizer, lambda text: print(f"warning: {printable(text)}", file=sys.stderr))
    result = veneer.train(
        model, tokenizer, None, settings.train, method=settings.method, data_config=settings.data, recipe=write_recipe(settings),
        resume=resume,
    )  # fmt: skip
    result["planned_bytes"] = while_training(planned) if planned else None
    result["planned_seconds"] = planned.get("seconds")
    if as_json:
        _print_json(result)
        return
    held = "" if result["eval_loss"] is None else f", held-out loss {shown(result['eval_loss'])}"
    hoped = "" if result["planned_seconds"] is None else f" (planned: {result['planned_seconds']:.0f} s)"
    print(
        f"{result['steps']} steps in {result['seconds']:.0f} s{hoped} ({result['tokens_per_second']:,.0f} tokens/s), "
        f"loss {result['train_loss']:.4f}{held}, peak memory {result['peak_bytes'] / 1e9:.2f} GB"
        + (f" (planned: {result['planned_bytes'] / 1e9:.2f} GB)" if planned else "")
    )
    if (general := result["general_loss"]) is not None and result["steps"]:
        print(f"loss on general text: {general['before']:.4f} before, {shown(general['after'])} after")
    full = result["model"] is not None
    chat = ["veneer", "chat", *([result["model"]] if full else [settings.model, "--adapter", result["adapter"]])]
    if settings.quantize and (
        full or base_quantization(result["adapter"])
    ):  # else it is for the 16-bit base, as PiSSA's
        chat += ["--quantize", settings.quantize]
    chat += ["--system", settings.data.system] if settings.data.system else []
    where = f"model: {result['model']}" if full else f"adapter: {result['adapter']}"
    print(f"{where}\ntry it:  {shlex.join(chat)}")


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="As of train: a YAML file, or a shipped one.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. train.epochs=2; may be repeated."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What would go wrong in a run, before step 1: rows, settings, memory, one batch. Exit code 2 when there are errors."""
    from veneer.config import read_recipe
    from veneer.report import check as report

    found = report.check_recipe(read_recipe(recipe, set_))
    if as_json:
        _print_json(found)
    else:
        print(report.describe(found, colours=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if found["errors"]:
        raise typer.Exit(EXIT_BAD_INPUT)


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="Rows: .jsonl, .json, .csv or .parquet.")],
    adapter: Adapter = None,
    quantize: Quantize = None,
    system: System = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column", metavar="OURS=THEIRS", help="What a column is, e.g. completion=label; may be repeated."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    max_length: Annotated[
        int, typer.Option(min=8, help="Tokens a row; longer ones lose the start of the prompt.")
    ] = 1024,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at once.")] = 32,
    generate: Annotated[bool, typer.Option(help="Also answer each row and compare.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse when any row is bad.")] = False,
    as_json: Json = False,
) -> None:
    """Loss, perplexity, exact match and JSON-field match on rows."""
    import veneer
    from veneer.training.rows import read_rows

    pairs = [pair.partition("=")[::2] for pair in columns or []]
    if not all(ours and theirs for ours, theirs in pairs):
        raise VeneerError(
            f"--column: found {', '.join(columns or [])}, expected OURS=THEIRS, as in --column completion=label"
        )
    rows = read_rows(data, columns=dict(pairs), limit=limit, strict=strict)
    for bad in rows.bad:
        print(f"bad row skipped: {bad}", file=sys.stderr)
    loaded, tokenizer = _load(model, adapter, quantize)
    result = veneer.evaluate(
        loaded,
        tokenizer,
        rows.rows,
        system=system,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        generate=generate,
    )
    result["bad_rows"] = len(rows.bad)
    if as_json:
        _print_json(result)
        return
    print(f"rows {result['rows']}   loss {result['loss']:.4f}   perplexity {result['perplexity']:.3f}")
    if result["truncated"]:
        print(f"truncated {result['truncated']}: longer than {max_length} tokens, they lost the start of their prompt")
    for key, name in (("exact_match", "exact match"), ("json_match", "JSON fields equal")):
        if result[key] is not None:
            print(f"{name} {100 * result[key]:.1f}%")


@app.command()
def chat(
    model: Model,
    adapter: Adapter = None,
    quantize: Quantize = None,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    single: Annotated[bool, typer.Option("--single", help="Forget each exchange before the next one.")] = False,
) -> None:
    """Talk with a model in the terminal. An empty line or Ctrl-D ends it."""
    from veneer.inference.generate import stream_answer
    from veneer.training.data import encode_prompt

    loaded, tokenizer = _load(model, adapter, quantize)
    turns: list[dict[str, str]] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not text:
            return
        turns = [*([] if single else turns), {"role": "user", "content": text}]
        answer = ""
        prompt = encode_prompt(turns, tokenizer, system)
        for piece in stream_answer(loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature):
            print(piece, end="", flush=True)
            answer += piece
        print(flush=True)
        turns.append({"role": "assistant", "content": answer})


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    kind: Annotated[str, typer.Option("--to", help="nf4, fp4 or int8.")] = "nf4",
    double_quant: Annotated[bool, typer.Option(help="The constants of 4-bit weights in 8 bits.")] = True,
    as_json: Json = False,
) -> None:
    """Write a model in 4 or 8 bits, as bitsandbytes does."""
    import veneer
    from veneer.models.load import describe_model
    from veneer.storage import require_empty_folder

    require_empty_folder(out)
    loaded, tokenizer = veneer.load(model, quantize=kind, double_quant=double_quant, fused=False)  # type: ignore[arg-type]
    veneer.save_model(loaded, tokenizer, out)
    _show(describe_model(out), as_json)


@app.command()
def merge(
    model: Model,
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER ...", help="Folders with LoRA adapters.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    onto: Annotated[
        str,
        typer.Option(help="16-bit, nf4, fp4 or int8: the base to merge onto. auto: the nearer to base and adapter."),
    ] = "auto",
    trained_on: Annotated[
        str | None, typer.Option(help="16-bit, nf4, fp4 or int8: the base in training, where the adapter does not say.")
    ] = None,
    requantize: Annotated[
        str | None, typer.Option(help="nf4, fp4 or int8: keep the model quantised, with a residual adapter beside it.")
    ] = None,
    residual_rank: Annotated[
        int | None,
        typer.Option(min=0, help="With --requantize: rank of the adapter for what that loses, else 16; 0: none."),
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare it with base and adapter on text before it is written.")] = True,
    text: Annotated[Path | None, typer.Option(help="Compare on this text file, a paragraph at a time.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="KL from base and adapter, in nats, above which nothing is written.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write it even above the tolerance.")] = False,
    as_json: Json = False,
) -> None:
    """Fold adapters into a model's weights, and prove what that changed."""
    from veneer.report import merge as report
    from veneer.training.progress import counter

    found = report.merge_model(
        model, adapters, out, onto=onto, trained_on=trained_on, requantize=requantize, residual_rank=residual_rank, check=check,
        tolerance=tolerance, force=force, texts=_paragraphs(text), progress=counter("tensors merged"),
    )  # fmt: skip
    if onto != "auto" and (trained := found["trained_on"]) not in (found["onto"], report.UNKNOWN):
        print(
            f"note: trained on the base in {trained}, merged onto {found['onto']}; --onto {trained} takes the one it was "
            "trained on",
            file=sys.stderr,
        )
    if as_json:
        _print_json(found)
    else:
        print(report.describe(found))


def _paragraphs(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VeneerError(f"--text {path}: {error}") from None
    found = [part.strip() for part in text.split("\n\n") if part.strip()][:64]
    if not found:
        raise VeneerError(f"--text {path}: found no text in it")
    return found


@app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER ...", help="Folders with LoRA adapters.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="linear (left out), cat, svd, ties, dare_linear, dare_ties, magnitude_prune or della."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="One for each adapter, as 0.7,0.3 or 1,-1. Left out: an average; of methods that elect signs, 1 each."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the result. Left out: what linear and cat need, else the largest there is.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="The lowest rank whose error is at most this share of each layer's update.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of each update that a pruning method keeps.")] = None,
    sign: Annotated[
        str | None, typer.Option(help="How signs are elected: total (the larger sum; left out) or frequency.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the methods that keep at random; left out: 0.")] = None,
    any_base: Annotated[bool, typer.Option("--any-base", help="Although they name different base models.")] = False,
    analyze: Annotated[
        bool, typer.Option("--analyze", help="Only compare them: can they be combined? Writes nothing.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="With --analyze: a heat map by layer, .png or .svg.")] = None,
    as_json: Json = False,
) -> None:
    """Make several adapters one, and say how near the result is to what the method means."""
    from veneer.adapters.combine import combine as combine_adapters
    from veneer.report import interference
    from veneer.training.progress import counter

    if plot is not None and not analyze:
        raise VeneerError("--plot: found without --analyze, expected both")
    if analyze:
        idle = {"--out": out, "--method": method, "--weights": weights, "--rank": rank, "--max-error": max_error,
                "--density": density, "--sign": sign, "--seed": seed, "--any-base": any_base or None}  # fmt: skip
        if given := [option for option, value in idle.items() if value is not None]:
            raise VeneerError(f"{', '.join(given)}: found with --analyze, which only compares and writes nothing")
        found = interference.analyze(adapters, counter("layers compared"))
        if plot is not None:
            found["plot"] = str(interference.plot(found, plot))
        if as_json:
            _print_json(found)
        else:
            print(interference.describe(found))
        return
    if out is None:
        raise VeneerError("--out: found none, expected the folder to write")
    report = combine_adapters(
        adapters, out, method=method or "linear", weights=_numbers(weights), rank=rank, max_error=max_error,
        density=density, sign=sign, seed=seed, any_base=any_base, progress=counter("layers combined"),  # type: ignore[arg-type]
    )  # fmt: skip
    if as_json:
        _print_json({"out": str(out), **report})
        return
    ranks = report["ranks"]
    print(
        f"{report['method']} of {len(report['adapters'])} adapters: {out}\n"
        f"{report['layers']} layers, rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}, "
        f"{report['parameters']:,} parameters\n"
        f"left out by the rank: {100 * report['error']:.2g}% of the update's norm (most in one layer: "
        f"{100 * report['largest_error']:.2g}%, {report['largest_error_at']})"
    )
    for note in report["notes"]:
        print(f"note: {note}")


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise VeneerError(f"--weights: found {text!r}, expected numbers with commas between, as 0.7,0.3") from None


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder with a LoRA adapter.")],
    consumer: Annotated[str, typer.Option("--for", help="peft, vllm, llama.cpp or ollama.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="The base: for llama.cpp and ollama, and to merge what cannot be an adapter.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="A merged model, although an adapter would do.")] = False,
    kind: Annotated[str | None, typer.Option("--type", help="Of a merged GGUF: f16 or q8_0; else f16.")] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="A GGUF of the base, for a merged GGUF's metadata or to stand beside in a Modelfile; else --model."
        ),
    ] = None,
    onto: Annotated[str, typer.Option(help="Of a merged model: as of veneer merge; so are those below.")] = "auto",
    trained_on: Annotated[
        str | None, typer.Option(help="16-bit, nf4, fp4 or int8: the base in training, where the adapter does not say.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare a merged model with base and adapter on text.")] = True,
    text: Annotated[Path | None, typer.Option(help="Compare on this text file, a paragraph at a time.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="KL from base and adapter, in nats, above which nothing is written.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write a merged model even above the tolerance.")] = False,
    system: Annotated[str | None, typer.Option(help="System message of a Modelfile.")] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter as another tool reads it, or a merged model where that tool cannot hold it."""
    from veneer.report import merge as report
    from veneer.report.export import export as write
    from veneer.training.progress import counter

    found = write(
        adapter, out, consumer, model=model, merged=merged, kind=kind, like=like, system=system, onto=onto,
        trained_on=trained_on, check=check, texts=_paragraphs(text), tolerance=tolerance, force=force, progress=counter("tensors merged"),
    )  # fmt: skip
    if as_json:
        _print_json(found)
        return
    for reason in found["reasons"]:
        print(f"merged into the base, because {reason}")
    if found["merge"] is not None:
        print(report.describe({"out": str(out), **found["merge"]}))
    print(f"{found['form']} for {consumer}: {out}  ({', '.join(found['files'])})")
    if consumer == "ollama":
        print(f"try it:  cd {shlex.quote(str(out))} && ollama create mine -f Modelfile && ollama run mine")


@app.command()
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="An adapter folder, a model folder, a .gguf file, or smollm2.")
    ],
    model: Annotated[
        str | None, typer.Option(help="An adapter's base, to compare the norms of its weights with.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="A line for every layer of an adapter.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw an adapter's spectra and norms: a .png or .svg file.")] = None,
    as_json: Json = False,
) -> None:
    """What an adapter or a model is; of an adapter also how large its update is and what rank was enough."""
    from veneer.adapters.peft_format import CONFIG_FILE
    from veneer.models.load import describe_model

    if not (Path(path) / CONFIG_FILE).is_file():
        if model is not None or plot is not None or layers:
            raise VeneerError(f"{path}: --model, --layers and --plot are for adapters, found no {CONFIG_FILE} there")
        _show(describe_model(path), as_json)
        return
    from veneer.report import adapter

    found = adapter.inspect_adapter(path, model)
    if plot is not None:
        found["plot"] = str(adapter.plot(found, plot))
    if as_json:
        _print_json(found)
    else:
        print(adapter.describe(found, every_layer=layers))


@app.command()
def ranks(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="As elsewhere (its config is enough), or one matrix as 4096x4096."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A known model's sizes instead: gpt3, llama-7b, ...")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Only this rank; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """How large adapters of a model would be, by rank and targets. Loads and downloads nothing."""
    from veneer.report import ranks as report

    table = report.rank_table(model, preset, tuple(rank) if rank else report.RANKS)
    if as_json:
        _print_json(table)
    else:
        print(report.describe(table))


@app.command()
def plan(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|RECIPE]",
            help="As elsewhere (its config is enough), a known one: llama3-8b, ..., or a .yaml recipe.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe's setting, as with train; may be repeated."),
    ] = None,
    method: Annotated[str, typer.Option(help="full, lora or qlora.")] = "qlora",
    batch_size: Annotated[int, typer.Option(help="Rows in one forward and backward.")] = 1,
    seq_len: Annotated[int, typer.Option(help="Tokens of the longest row.")] = 2048,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    targets: Annotated[
        str, typer.Option(help="attention, qv, mlp, all-linear, or names with commas between.")
    ] = "all-linear",
    quantize: Annotated[str, typer.Option(help="With qlora: nf4, fp4 or int8.")] = "nf4",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32: of what is not quantised.")] = "bfloat16",
    recompute: Annotated[str, typer.Option(help="none, mlp or full.")] = "none",
    accumulate: Annotated[int, typer.Option(help="Batches in one optimizer step.")] = 1,
    double_quant: Annotated[bool, typer.Option(help="The constants of quantised blocks are quantised too.")] = True,
    packing: Annotated[bool, typer.Option(help="Rows are packed into sequences, where the model takes them.")] = True,
    evaluate: Annotated[bool, typer.Option(help="Rows are held out and looked at between the steps.")] = True,
    guard: Annotated[bool, typer.Option(help="A copy of the adapter is kept to go back to.")] = True,
    shape: Annotated[
        str | None, typer.Option(help="A Llama of these sizes: layers=32,hidden=4096,heads=32,kv_heads=8,...")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: what the budget's machine or this one has.")
    ] = "auto",
    budget: Annotated[
        str | None, typer.Option(help="24GB, 24GiB, or a machine: rtx-4090, pc-16gb, ...; left out: what is free here.")
    ] = None,
    largest: Annotated[
        str | None, typer.Option(help="Also look for the largest batch (in one padded pass), length or rank that fits.")
    ] = None,
    time: Annotated[bool, typer.Option("--time", help="Measure how long a step takes here: some seconds.")] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Known models from 7B to 70B, each way, beside figures in circulation.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it: a .png or .svg file.")] = None,
    as_json: Json = False,
) -> None:
    """What a fine-tune would take of memory, and what to change if it does not fit. From the config alone: no weight is
    loaded or downloaded."""
    from veneer.planning import plan as planning
    from veneer.planning.shapes import shape_of
    from veneer.report import plan as report

    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    if sum((model is not None, shape is not None, matrix)) != 1:
        raise VeneerError("expected a MODEL, a recipe, --shape or --matrix, one of them")
    recipe = model is not None and model.endswith((".yaml", ".yml"))
    allowed = (
        {"model", "set_", "budget", "time", "plot", "as_json"}
        if recipe
        else {"matrix", "as_json", "seq_len", "batch_size", "rank"}
    )
    if set_ and not recipe:
        raise VeneerError("--set: changes a recipe, and none was given", hint="name a .yaml file, or use the options")
    if (recipe or matrix) and (idle := sorted(given - allowed)):
        options = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise VeneerError(f"{options}: of no use with {'a recipe, which says so itself' if recipe else '--matrix'}")
    if matrix:
        from veneer.report import plan_matrix
        from veneer.training.progress import counter

        table = plan_matrix.matrix(batch_size, seq_len, rank, counter("ways planned"))
        print(json.dumps(table) if as_json else plan_matrix.describe(table))
        return
    if recipe:
        from veneer.config import read_recipe

        found = report.plan_recipe(read_recipe(str(model), set_ or []), force=True, time=time, budget=budget)
    else:
        wanted: Any = targets.split(",") if "," in targets else targets
        found = planning.plan(
            shape_of(shape) if shape is not None else str(model), method=cast(Any, method), batch_size=batch_size,
            seq_len=seq_len, rank=rank, targets=wanted, quantize=cast(Any, quantize), dtype=cast(Any, dtype),
            recompute=cast(Any, recompute), grad_accumulation=accumulate, double_quant=double_quant, packing=packing,
            evaluate=evaluate, guard=guard, device=cast(Any, device), budget=budget, largest=largest, time=time,
        )  # fmt: skip
    if plot is not None:
        found["plot"] = str(report.plot(found, plot))
    if as_json:
        _print_json(found)
    else:
        print(report.describe(found))


@app.command()
def kernels(as_json: Json = False) -> None:
    """Which implementation of each operation runs here, and why."""
    from veneer import ops

    rows = ops.describe()
    if as_json:
        _print_json({"operations": rows})
        return
    for row in rows:
        print(f"{row['operation']:22} {row['chosen']:10} {row['reason']}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the data, the adapter and the merged model go.")] = Path("runs/demo"),
    rows: Annotated[int, typer.Option(min=64, help="Training rows.")] = 2400,
    tests: Annotated[int, typer.Option(min=8, help="Test rows of each kind.")] = 200,
    as_json: Json = False,
) -> None:
    """The whole life of an adapter on the embedded model, in minutes."""
    from veneer.demo import run_demo

    result = run_demo(out, train_rows=rows, test_rows=tests)
    if as_json:
        _print_json(result)


def _load(model: str, adapter: Path | None, quantize: str | None, option: str = "--quantize") -> tuple[Any, Any]:
    import veneer

    loaded, tokenizer = veneer.load(model, quantize=quantize)  # type: ignore[arg-type]
    if adapter is not None:
        from veneer.adapters.peft_format import base_quantization

        veneer.load_adapter(loaded, adapter)
        trained_on = base_quantization(adapter)
        if trained_on and loaded.veneer_quantization != trained_on:
            found = loaded.veneer_quantization or "16-bit"
            note = f"note: {adapter} was trained on the base in {trained_on}, this base is {found}"
            if quantize or not loaded.veneer_quantization:  # else it is stored so
                note += f"; {option} {trained_on} takes the one it was trained on"
            print(note, file=sys.stderr)
    return loaded, tokenizer


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _show(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(value)
        return
    for key, item in value.items():
        shown = f"{item:,}" if isinstance(item, int) and not isinstance(item, bool) and item >= 10_000 else item
        print(f"{key:20} {', '.join(map(str, item)) if isinstance(item, list) else shown}")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the program like Ctrl-C does: what is half written is taken away.

    Either may come while a destructor or a weak reference's callback runs. Python drops what is raised there, and the
    program would go on as if nothing had come: so it is sent once more.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    told = sys.unraisablehook

    def again(dropped: sys.UnraisableHookArgs) -> None:
        number = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(dropped.exc_type)
        if number is not None:
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()  # later: not into this callback again
        elif issubclass(dropped.exc_type, Exception):  # a `StopNow` comes again by itself
            told(dropped)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = told


def main() -> None:
    """Run a verb; what a user caused becomes one plain message and exit code 2 or 3, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    try:
        with _ended_by_signals():
            app()
    except VeneerError as error:
        print(f"veneer: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("veneer: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:  # a disk that is full, a folder that cannot be made or read
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"veneer: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
