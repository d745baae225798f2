"""The runner: every cell of every round in a fresh process, contenders taking turns, the machine's limits between.

python -m benchmarks.run [c1 ... c7 c10 c11 c12 follow bases starts ways] [--rounds 5] [--quick] [--isa avx2] [--data FILE] [--out DIR] [--only NAME]

Progress goes to stderr; tables to stdout and, with all raw records, to OUT/<date>-<cpu>.md and .json.
Exit code 1: a contender failed, a ratio is void, follow is not met, or other processes kept the machine busy.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.plan import QUICK, Benchmark, Cell, Figure, Options, Percent, Result, Table

ROOT = Path(__file__).parent.parent
FILES = {
    "c1": "c1_lora_step", "c2": "c2_qlora_step", "c3": "c3_memory", "c4": "c4_head", "c5": "c5_sft",
    "c6": "c6_quantize", "c7": "c7_linear", "c10": "c10_methods", "c11": "c11_merge", "c12": "c12_plan", "follow": "follow", "bases": "bases",
    "starts": "starts", "ways": "ways",
}  # fmt: skip
THREADS = "2"
BAD = ("VOID", "BUSY", "NOT MET")  # how notes begin that forbid to quote a figure
# What holds each library to an instruction set: ours, torch's oneDNN, its own kernels, MKL. bitsandbytes has no switch.
ISAS = {
    "avx2": ("avx2", "AVX2", "avx2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "avx512", "AVX512"),
    "avx512bf16": ("avx512bf16", "AVX512_CORE_BF16", "avx512", "AVX512"),
    "amx": ("amx", "AVX512_CORE_AMX", "avx512", "AVX512"),
}
ISA_VARIABLES = ("VENEER_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
PREPARE = Cell("inputs", "benchmarks.data:prepare")
ENVIRONMENT = Cell("versions", "benchmarks.measure:environment")
LIMITS = Cell("machine limits", "benchmarks.measure:limits")
BUSY = (
    0.1  # share of the machine that other processes may take; two threads that wait for a third lose far more than that
)
SHOWN_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


class Runner:
    def __init__(self, options: Options, rounds: int, isa: str | None, limit: float) -> None:
        self.options, self.rounds, self.limit = options, rounds, limit
        threads = {f"{name}_NUM_THREADS": THREADS for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        kept = {name: value for name, value in os.environ.items() if name not in ISA_VARIABLES}
        self.environment = {**kept, **threads, **offline}
        if isa is not None:
            self.environment |= dict(zip(ISA_VARIABLES, ISAS[isa], strict=True))

    def process(self, cell: Cell) -> dict[str, Any] | str:
        """The record of one fresh process, or what went wrong."""
        out = Path(self.options.work) / "record.json"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.child", cell.function, json.dumps(dict(cell.arguments))]
        try:
            done = subprocess.run(
                [*command, self.options.to_json(), str(out)], cwd=ROOT, env=self.environment, timeout=self.limit,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"failed: not done after {self.limit:.0f} s"
        if done.returncode != 0 or not out.is_file():
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            print(done.stdout[-4000:], file=sys.stderr)
            return f"failed (exit {done.returncode}): {lines[-1] if lines else 'no output'}"
        return json.loads(out.read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def measure(self, cells: Sequence[Cell], group: str) -> tuple[dict[str, Result], Result]:
        """All rounds of the cells by their keys, and the machine's limits, measured before each round."""
        limits, results = Result(LIMITS), {cell.key: Result(cell, problem=cell.missing()) for cell in cells}
        for result in results.values():
            if result.problem:
                say(f"{group}: {result.name}: {result.problem}")
        for number in range(1, self.rounds + 1):
            for result in (limits, *results.values()):
                if result.problem or (result.cell.once and number > 1):
                    continue
                began, before = time.monotonic(), _cpu_seconds()
                try:
                    record = self.process(result.cell)
                except KeyboardInterrupt:
                    return self._interrupted(results, limits, group)
                elapsed = time.monotonic() - began
                others = max(0.0, _cpu_seconds() - before) / elapsed / (os.cpu_count() or 1)
                took = f"{elapsed:.1f} s, others took {others:.0%} of the machine"
                if isinstance(record, str):
                    result.problem, result.records = record, []  # a contender that fails once is not measured
                    took = record
                else:
                    result.records.append({**record, "others": others})
                say(f"{group}: round {number} of {self.rounds}: {result.name}: {took}")
            if limits.problem:
                raise SystemExit(f"the machine's limits could not be measured: {limits.problem}")
            if all(result.problem or result.cell.once for result in results.values()):
                break
        return results, limits

    def _interrupted(self, results: dict[str, Result], limits: Result, group: str) -> tuple[dict[str, Result], Result]:
        """What is there is kept: Ctrl-C ends a long run early, not in vain. A round that is not whole counts for nobody."""
        if not limits.records:
            raise KeyboardInterrupt
        say(f"{group}: interrupted: what was measured is written")
        counts = [len(result.records) for result in results.values() if not (result.problem or result.cell.once)]
        whole = max(1, min(counts, default=1))
        limits.records = limits.records[:whole]
        for result in results.values():
            result.records = result.records[:whole]
            if not result.records and not result.problem:
                result.problem = "not measured: interrupted"
        return results, limits


def run(benchmarks: Sequence[Benchmark], runner: Runner, only: str | None = None) -> dict[str, Any]:
    """Measure and report: {machine, inputs, limits, tables, records}."""
    inputs, versions = runner.process(PREPARE), runner.process(ENVIRONMENT)
    if isinstance(inputs, str) or isinstance(versions, str):
        raise SystemExit(f"cannot start: {inputs if isinstance(inputs, str) else versions}")
    (Path(runner.options.work) / "prepare.json").write_text(json.dumps(inputs), encoding="utf-8")
    found: dict[str, Any] = {"inputs": inputs, "versions": versions, "limits": {}, "tables": [], "records": {}}
    for group in dict.fromkeys(benchmark.group for benchmark in benchmarks):
        members = [benchmark for benchmark in benchmarks if benchmark.group == group]
        cells = {cell.key: cell for benchmark in members for cell in benchmark.cells}
        if only is not None:
            cells = {key: cell for key, cell in cells.items() if re.search(only, cell.name)}
        measured, limits = runner.measure(list(cells.values()), " ".join(b.name for b in members))
        for name in ("bf16_gflops", "fp32_gflops", "read_gbs", "copy_gbs", "read_cached_gbs"):
            found["limits"].setdefault(group, {})[name] = limits.figure(name)
        found["limits"][group]["others"] = Figure(
            max(record["others"] for record in records)
            for records in zip(
                *(r.records for r in (limits, *measured.values()) if len(r.records) == len(limits.records)), strict=True
            )
        )
        for benchmark in members:
            results = {
                cell.name: measured.get(cell.key, Result(cell, problem="left out by --only"))
                for cell in benchmark.cells
            }
            found["tables"] += benchmark.report(results, limits, runner.options)
        found["records"][group] = {
            result.name: {"problem": result.problem, "rounds": result.records}
            for result in (*measured.values(), limits)
        }
    return found


def machine_line() -> str:
    """CPU, its family and what its instruction sets are, cores, memory, load."""
    values: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    flags = [flag for flag in SHOWN_FLAGS if flag in values.get("flags", "").split()]
    name = values.get("model name", "unknown CPU")
    family = f"family {values.get('cpu family', '?')} model {values.get('model', '?')}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = os.getloadavg()[0]
    return (
        f"{name} ({family}), {os.cpu_count()} cores, {THREADS} threads used, {memory:.0f} GB; {' '.join(flags)}; "
        f"load at the start {load:.1f}"
    )


def limits_table(found: dict[str, Any]) -> Table:
    rows = [
        {"during": group, "bf16 GFLOP/s": v["bf16_gflops"], "fp32 GFLOP/s": v["fp32_gflops"], "read GB/s": v["read_gbs"],
         "copy GB/s": v["copy_gbs"], "read 8 MB GB/s": v["read_cached_gbs"], "taken by others, most": Percent(v["others"])}
        for group, v in found["limits"].items()
    ]  # fmt: skip
    busy = [
        f"{row['during']} {max(row['taken by others, most']):.0%}"
        for row in rows
        if max(row["taken by others, most"]) > BUSY
    ]
    notes = (
        [f"BUSY: other processes took much of the machine ({', '.join(busy)}): do not quote these figures"]
        if busy
        else []
    )
    return Table("The machine's own limits, measured in the same run", rows, notes)


def _cpu_seconds() -> float:
    """CPU time that was spent on this machine, steal included, without that of this process and its finished children."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    all_of_it = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return all_of_it - sum(os.times()[:4])


def show(tables: Sequence[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=None if sys.stdout.isatty() else 180)
    for table in tables:
        drawn = RichTable(title=table.title, title_justify="left")
        for column in table.rows[0] if table.rows else ():
            drawn.add_column(column)
        for row in table.rows:
            drawn.add_row(*map(_cell, row.values()))
        console.print(drawn)
        for note in table.notes:
            console.print(f"  {note}", style="bold red" if note.startswith(BAD) else "dim", markup=False)


def markdown(head: Sequence[str], tables: Sequence[Table]) -> str:
    lines = [f"# Benchmarks, {head[0]}", "", *(f"{line}  " for line in head[1:])]
    for table in tables:
        columns = list(table.rows[0]) if table.rows else []
        lines += ["", f"## {table.title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(map(_cell, row.values()))} |" for row in table.rows]
        lines += ["", *(f"{note}  " for note in table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "names", nargs="*", choices=[[], *FILES], default=[], metavar="|".join(FILES), help="left out: all"
    )
    parser.add_argument("--rounds", type=int, default=None, help="fresh processes of each contender (5; quick: 2)")
    parser.add_argument("--steps", type=int, default=None, help="timed training steps in each process")
    parser.add_argument("--learning-rate", type=float, help="of C1 to C3, C5 and follow (1e-3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, the figures mean nothing")
    parser.add_argument("--isa", choices=list(ISAS), help="hold every process to this instruction set")
    parser.add_argument(
        "--data", help="rows of Alpaca form (.jsonl or .json) for C5, follow, bases, starts and the tokens of C1 to C3"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", help="a regex: only contenders whose names it finds (no ratios without the peer)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds a process may take")
    parser.add_argument("--out", help="folder of the results (benchmarks/results; quick: runs/benchmarks)")
    given = parser.parse_args(arguments)

    options = Options(model=given.model, data=str(Path(given.data).resolve()) if given.data else None)
    options = replace(options, **QUICK) if given.quick else options
    options = replace(options, steps=given.steps) if given.steps else options
    options = replace(options, learning_rate=given.learning_rate) if given.learning_rate else options
    rounds = given.rounds or (2 if given.quick else 5)
    benchmarks = [import_module(f"benchmarks.{FILES[name]}").BENCHMARK for name in given.names or FILES]
    machine = machine_line()
    say(machine)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="veneer-bench-") as work:
        found = run(benchmarks, Runner(replace(options, work=work), rounds, given.isa, given.limit), given.only)

    now = datetime.datetime.now()
    head = [
        f"{now:%Y-%m-%d %H:%M}{', quick: figures mean nothing' if given.quick else ''}",
        f"machine: {machine}",
        f"instruction set: {given.isa or 'the best of each library'}",
        "versions: " + ", ".join(f"{name} {value}" for name, value in found["versions"].items()) + f", git {_commit()}",
        "inputs: " + ", ".join(f"{name} {value}" for name, value in found["inputs"].items() if name != "model"),
        f"{rounds} rounds, each contender in a fresh process, taking turns; figures are median (least..most) over the "
        f"rounds, ratios are taken round by round; {(time.monotonic() - began) / 60:.0f} minutes in all",
        f"command: python -m benchmarks.run {' '.join(arguments if arguments is not None else sys.argv[1:])}".rstrip(),
    ]
    tables = [limits_table(found), *found["tables"]]
    show(tables)
    folder = Path(given.out or (ROOT / "runs/benchmarks" if given.quick else ROOT / "benchmarks/results"))
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", machine.split(",")[0].lower()).strip("-")
    names = "-".join(given.names) if given.names else "all"
    path = folder / f"{now:%Y-%m-%d-%H%M}-{names}-{slug}{'-' + given.isa if given.isa else ''}"
    path.with_suffix(".md").write_text(markdown(head, tables), encoding="utf-8")
    raw = {
        "head": head,
        "options": json.loads(options.to_json()),
        "versions": found["versions"],
        "inputs": found["inputs"],
    }
    raw |= {"tables": [table.to_json() for table in tables], "records": found["records"]}
    if options.data:
        raw["options"]["data"] = found["inputs"]["data"]  # by its place beside the project
    path.with_suffix(".json").write_text(
        json.dumps(raw, indent=1).replace(str(Path.home()), "~") + "\n", encoding="utf-8"
    )
    say(f"written: {path}.md and .json")
    return int(bool(problems(found, tables)))


def problems(found: dict[str, Any], tables: Sequence[Table]) -> list[str]:
    """What makes the run's exit code 1: contenders that failed, ratios that are void, a machine that was busy."""
    failed = [
        f"{name}: {r['problem']}"
        for group in found["records"].values()
        for name, r in group.items()
        if r["problem"] and r["problem"].startswith("failed")
    ]
    return failed + [note for table in tables for note in table.notes if note.startswith(BAD)]


def _commit() -> str:
    asked = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    sys.exit(main())
