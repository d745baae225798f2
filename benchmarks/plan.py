"""What a benchmark is made of: cells (one contender's measurement in a process of its own), figures, tables, checks.

Nothing here imports torch: the runner must not weigh on what it measures.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Record = dict[str, Any]  # what one process measured

# How far losses and gradient norms may be, at any step, from the peer's of the same dtype class: twice what the peer's own
# bf16 and fp32 runs are apart in the same run (two bf16 runs are each that far from the exact one), within these bounds.
LOSS_BOUNDS = (0.005, 0.02)
NORM_BOUNDS = (0.02, 0.06)


@dataclass(frozen=True)
class Options:
    """Sizes of everything; handed to every process. work: folder of the shared inputs."""

    work: str = ""
    model: str = "smollm2"
    data: str | None = None  # rows of Alpaca form for C5, follow and bases; None: home commands
    rank: int = 16
    alpha: int = 32
    rows: int = 4
    length: int = 512
    warmup: int = 1
    steps: int = 2  # timed, a process
    learning_rate: float = 1e-3
    batch: int = 8
    sft_rows: int = 192
    sft_validation: int = 32
    sft_length: int = 512  # longer rows are left out, so that nobody has to cut one
    text_blocks: int = 128  # of `length` tokens, whose perplexity is measured
    follow_steps: int = 20
    # rows a step; with 8, rounding alone moves a step's loss by up to 0.4% (PEFT, bf16 against fp32)
    follow_batch: int = 16
    head_tokens: int = 2048
    hidden: int = 576
    vocabulary: int = 49152
    quantize: tuple[int, int] = (4096, 4096)
    linears: tuple[tuple[int, int], ...] = ((576, 576), (1536, 576), (576, 1536), (4096, 4096))  # (out, in)
    linear_rows: tuple[int, ...] = (1, 4, 16, 64, 256, 2048)
    gemm: tuple[int, int, int] = (2048, 4096, 4096)
    read_bytes: int = 1 << 31  # well over any cache
    seconds: float = 0.3  # at least so long each small operation is repeated

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Options:
        values = json.loads(text)
        for name in ("quantize", "linear_rows", "gemm"):
            values[name] = tuple(values[name])
        values["linears"] = tuple(map(tuple, values["linears"]))
        return cls(**values)


QUICK: dict[str, Any] = {
    "rows": 2, "length": 32, "steps": 1, "batch": 4, "sft_rows": 8, "sft_validation": 4, "text_blocks": 2, "follow_steps": 2, "follow_batch": 4,
    "head_tokens": 48, "vocabulary": 1024, "quantize": (256, 256), "linears": ((64, 128), (256, 256)),
    "linear_rows": (1, 4), "gemm": (256, 256, 256), "read_bytes": 1 << 26, "seconds": 0.01,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One contender: `function` ("module:name" of this package) called with the options and these arguments.

    Cells of several benchmarks with the same function and arguments are measured once a round for all of them.
    needs: packages without which it is left out. once: nothing is timed, one round is enough.
    """

    name: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    once: bool = False

    @property
    def key(self) -> str:
        return f"{self.function} {json.dumps(dict(self.arguments), sort_keys=True)}"

    def missing(self) -> str | None:
        lacking = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"skipped: {', '.join(lacking)} not installed (pip install '.[parity]')" if lacking else None


class Figure(tuple[float, ...]):
    """One value a round; printed as median (least..most)."""

    @property
    def median(self) -> float:
        return statistics.median(self)

    def __str__(self) -> str:
        if len(self) == 1:
            return _number(self.median)
        return f"{_number(self.median)} ({_number(min(self))}..{_number(max(self))})"

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "min": min(self), "max": max(self), "rounds": list(self)}


@dataclass
class Result:
    """All rounds of a cell, or why there are none."""

    cell: Cell
    records: list[Record] = field(default_factory=list)
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.cell.name

    def figure(self, what: str | Callable[[Record], float]) -> Figure:
        return Figure(record[what] if isinstance(what, str) else what(record) for record in self.records)


Results = dict[str, Result]  # by the cell's name in this benchmark


@dataclass
class Table:
    """Rows of named values: figures, texts or None; all rows have the columns of the first."""

    title: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        rows = [{k: v.to_json() if isinstance(v, Figure) else v for k, v in row.items()} for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": self.notes}


@dataclass(frozen=True)
class Benchmark:
    """report: from the results, the machine's limits of the same run (`measure.limits`) and the options to tables.

    Benchmarks of one `group` are interleaved with each other.
    """

    name: str
    title: str
    group: str
    cells: tuple[Cell, ...]
    report: Callable[[Results, Result, Options], list[Table]]


def ratio(upper: Figure, lower: Figure) -> Figure:
    """Round by round: what ran side by side is divided, so that the machine's slow phases cancel."""
    return Figure(a / b for a, b in zip(upper, lower, strict=False))


def best(results: Sequence[Result], figure: Callable[[Result], Figure]) -> Result | None:
    """The one of the highest median among those that were measured."""
    there = [result for result in results if result.records]
    return max(there, key=lambda result: figure(result).median) if there else None


def difference(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest relative difference; infinite when a value is not finite or there are not as many of both."""
    if len(a) != len(b) or not all(map(math.isfinite, (*a, *b))):
        return math.inf
    return max(abs(x - y) / max(abs(y), 1e-12) for x, y in zip(a, b, strict=True))


class Agreement:
    """Whether training runs learn what the peer's does; `exact` is the peer's fp32 run from the same start, if any.

    Where the peer was not done in time (bf16 without bf16 instructions), its fp32 run takes its place.
    """

    def __init__(self, peer: Result, exact: Result | None) -> None:
        self.instead = ""
        if exact is not None and exact.records and not peer.records:
            self.instead = f"; {peer.name} was not measured: compared with {exact.name}"
            peer, exact = exact, None
        self.peer, self.loss, self.norm, self.own = peer, LOSS_BOUNDS[0], NORM_BOUNDS[0], "not measured"
        if peer.records and exact is not None and exact.records:
            loss, norm = self.apart(exact) or (0.0, 0.0)
            self.own = f"{loss:.2%} and {norm:.2%}"
            self.loss = min(max(2 * loss, LOSS_BOUNDS[0]), LOSS_BOUNDS[1])
            self.norm = min(max(2 * norm, NORM_BOUNDS[0]), NORM_BOUNDS[1])

    def apart(self, result: Result) -> tuple[float, float] | None:
        """Largest relative difference of losses and of gradient norms over all steps of the first round."""
        if not result.records or not self.peer.records:
            return None
        a, b = result.records[0], self.peer.records[0]
        return difference(a["losses"], b["losses"]), difference(a["grad_norms"], b["grad_norms"])

    def void(self, result: Result) -> str | None:
        """Why a ratio would mean nothing; None when the numbers agree."""
        apart = self.apart(result)
        if apart is None:
            return f"VOID: {result.name}: {self.peer.name} was not measured"
        if apart[0] <= self.loss and apart[1] <= self.norm:
            return None
        return f"VOID: {result.name}: loss {apart[0]:.2%}, gradient norm {apart[1]:.2%} from {self.peer.name}"

    def note(self) -> str:
        return (
            f"tolerance from {self.peer.name}, at every step: loss {self.loss:.2%}, gradient norm {self.norm:.2%} (twice what "
            f"the peer's own bf16 and fp32 runs are apart, {self.own}; at least {LOSS_BOUNDS[0]:.1%} and {NORM_BOUNDS[0]:.0%}){self.instead}"
        )


class Percent(Figure):
    """A share, printed in percent."""

    def __str__(self) -> str:
        if len(self) == 1:
            return f"{self.median:.0%}"
        return f"{self.median:.0%} ({min(self):.0%}..{max(self):.0%})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
