"""What settings say before a run, given how much data there is: findings, and what we would take. No model, no files.

Figures named here were measured on SmolLM2-135M (docs/methods.md); docs/preflight.md says which thresholds are the seeds',
which measured and which rules of thumb.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from veneer.config import LoraConfig, Method, TrainConfig
from veneer.optim.schedule import default_learning_rate

Severity = Literal["error", "warning", "note"]
SCALINGS = (0.25, 4.0)  # below, learning is slow; above, it may not be stable
RATES = (1 / 32, 8.0)  # times the usual learning rate; the shipped recipe `quality` is at 1/26 of it on SmolLM2
ROWS_A_RANK = 8  # fewer are learned by heart; rank 64 on 1,000 rows, 16 a rank, was the best on rows held out
HIGH_RANK = 128
TOKENS_A_PARAMETER = 2  # that an adapter can hold ("LoRA Without Regret": 2 bits a parameter, about 1 bit a token)
FEW_ANSWERS, ENOUGH_ROWS = 10, 50  # fewer different answers, in more rows, are narrow
ONE_ANSWER = 0.5  # of all rows
LABELS = 0.05  # different answers of all rows: below, the answers are names of classes


@dataclass(frozen=True)
class Finding:
    """error: the run would be wasted; warning: look at it; note: good to know. code: a short name, for scripts."""

    severity: Severity
    code: str
    found: str
    advice: str

    def __str__(self) -> str:
        return f"{self.code}: {self.found}; {self.advice}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def errors_first(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes; within each as they came."""
    return sorted(findings, key=lambda finding: ("error", "warning", "note").index(finding.severity))


class Task(NamedTuple):
    """What is trained, in numbers.

    rows: samples. learned_tokens: in one pass over them. distinct, commonest: different answers, and rows with the commonest
    one. width: the model's hidden size. trained: parameters. steps, warmup: of the run. kinds: of the adapted layers, out of
    embeddings, head, attention, other.
    """

    rows: int
    learned_tokens: int
    distinct: int
    commonest: int
    width: int
    trained: int
    steps: int
    warmup: int
    kinds: frozenset[str] = frozenset({"attention", "other"})


def advise(task: Task, lora: LoraConfig | None, train: TrainConfig) -> list[Finding]:
    """What is unusual in a run's settings. lora: None for full fine-tuning."""
    adapter = [] if lora is None else [*_scaling(lora), *_layers(task.kinds), *_rank(task, lora)]
    return [*adapter, *_steps(task, "full" if lora is None else "lora", train), *_answers(task)]


def recommend(task: Task, method: Method = "lora") -> dict[str, Any]:
    """Rank, alpha, targets and learning rate for so much data and so wide a model, and why each."""
    rate = default_learning_rate(task.width, method)
    why = {"learning_rate": "by the model's width and the method"}
    if method == "full":
        return {"learning_rate": rate, "why": why}
    small = task.width < 1024
    if task.rows < ROWS_A_RANK * 16:
        rank = min(8, _rank_for(task.rows))
        reason = f"{task.rows:,} rows are few, a higher rank learns them by heart"
    elif task.rows < 1000:
        rank, reason = 16, "the usual one"
    elif small:
        rank, reason = 64, "on 1,000 rows 3 and 15 points above rank 16 (measured, SmolLM2)"
    else:
        rank, reason = 32, "the usual one for 1,000 rows and more; not measured at this width"
    return {
        "r": rank,
        "alpha": 2 * rank,
        "targets": "all-linear",
        "learning_rate": rate,
        "why": {
            "r": reason,
            "alpha": "twice the rank",
            "targets": "19 and 24 points above attention alone (measured, SmolLM2)",
            **why,
        },
    }


def _rank_for(rows: int) -> int:
    """The highest power of two that so many rows are enough for."""
    return int(2 ** int(math.log2(max(1, rows // ROWS_A_RANK))))


def _scaling(lora: LoraConfig) -> list[Finding]:
    usual = LoraConfig()
    ratio, usual_ratio = lora.alpha / lora.r, usual.alpha / usual.r
    given = {"r", "alpha"} & lora.model_fields_set
    found = []
    if given == {"r"} and ratio != usual_ratio and not lora.rslora:  # which is made for other ranks at the same alpha
        found.append(
            Finding(
                "warning",
                "rank-without-alpha",
                f"lora.r is {lora.r} and lora.alpha was left at {lora.alpha:g}: the scaling is {ratio:g}, not {usual_ratio:g}",
                f"set lora.alpha to {usual_ratio * lora.r:g}, which keeps the scaling, or to {lora.alpha:g}, if that is meant",
            )
        )
    if given == {"alpha"} and ratio != usual_ratio:
        found.append(
            Finding(
                "warning",
                "alpha-without-rank",
                f"lora.alpha is {lora.alpha:g} and lora.r was left at {lora.r}: alpha / r is {ratio:g}, not {usual_ratio:g}",
                f"set lora.r to {max(1, round(lora.alpha / usual_ratio))}, which keeps it, or to {lora.r}, if that is meant",
            )
        )
    changed = lora.rank_pattern.keys() | lora.alpha_pattern.keys()
    pairs = [(lora.rank_pattern.get(key, lora.r), lora.alpha_pattern.get(key, lora.alpha)) for key in changed]
    low, high = SCALINGS
    how = "alpha / sqrt(r)" if lora.rslora else "alpha / r"
    for r, alpha in sorted({(lora.r, lora.alpha), *pairs}):
        scaling = lora.scaling_at(r, alpha)
        if not low <= scaling <= high:
            unit = lora.scaling_at(r, 1)
            found.append(
                Finding(
                    "warning",
                    "scaling",
                    f"{how} is {scaling:g} (rank {r}, alpha {alpha:g}), outside of {low:g} to {high:g}: "
                    + ("training may not be stable" if scaling > high else "learning is slow"),
                    f"take an alpha from {low / unit:g} to {high / unit:g}",
                )
            )
    return found


def _layers(kinds: frozenset[str]) -> list[Finding]:
    if kinds and kinds <= {"embeddings", "head"}:
        where, embeddings = " and ".join(sorted(kinds)), "embeddings" in kinds
        return [
            Finding(
                "warning",
                "only-embeddings" if embeddings else "only-head",
                f"of the model only the {where} {'are' if embeddings else 'is'} adapted, which hardly changes what it says",
                "set lora.targets to all-linear, and lora.tokens for new tokens",
            )
        ]
    if kinds == {"attention"}:
        return [
            Finding(
                "note",
                "attention-only",
                "only attention is adapted: 19 and 24 points below all linears (measured, SmolLM2)",
                "try lora.targets: all-linear",
            )
        ]
    return []


def _rank(task: Task, lora: LoraConfig) -> list[Finding]:
    found = []
    if task.rows < ROWS_A_RANK * lora.r:
        rank = _rank_for(task.rows)
        found.append(
            Finding(
                "warning",
                "few-examples",
                f"{task.rows:,} rows for rank {lora.r}: an adapter learns so few by heart",
                f"use more rows ({ROWS_A_RANK * lora.r:,} would do), rank {rank}, or fewer epochs, and hold rows out (data.eval)",
            )
        )
    if task.learned_tokens > TOKENS_A_PARAMETER * task.trained:
        needed = math.ceil(lora.r * task.learned_tokens / (TOKENS_A_PARAMETER * task.trained))
        found.append(
            Finding(
                "warning",
                "low-rank",
                f"{task.learned_tokens:,} learned tokens are more than {task.trained:,} trained parameters can hold",
                f"rank {needed:,} would hold them; or adapt more layers (lora.targets), or take full fine-tuning",
            )
        )
    if lora.r >= HIGH_RANK:
        found.append(
            Finding(
                "note",
                "high-rank",
                f"rank {lora.r}: above 64 there is rarely more to gain",
                "compare with rank 64, and with rslora",
            )
        )
    return found


def _steps(task: Task, method: Method, train: TrainConfig) -> list[Finding]:
    found = []
    if train.learning_rate != "auto":
        usual = default_learning_rate(task.width, method)
        times = train.learning_rate / usual
        if not RATES[0] <= times <= RATES[1]:
            high = times > 1
            found.append(
                Finding(
                    "warning",
                    "learning-rate",
                    f"train.learning_rate is {train.learning_rate:g}, {times if high else 1 / times:,.0f} times "
                    f"{'above' if high else 'below'} the usual {usual:.2g} ({method}, width {task.width:,}): "
                    + ("the loss may jump or not fall" if high else "little is learned"),
                    f"take auto or about {usual:.1g}",
                )
            )
    if task.warmup >= task.steps > 1:
        found.append(
            Finding(
                "warning",
                "warm-up",
                f"the learning rate rises for {task.warmup:,} steps, but the run has {task.steps:,}: it never gets there",
                "leave train.warmup_steps out (3% of the steps), or train for longer",
            )
        )
    return found


def _answers(task: Task) -> list[Finding]:
    advice = "mix in other rows if the model has to keep what else it can do"
    if task.rows >= FEW_ANSWERS and task.commonest >= ONE_ANSWER * task.rows:
        share = f"{100 * task.commonest / task.rows:.0f}%"
        found = f"{share} of {task.rows:,} rows have the same answer: a model learns to give that one"
        return [Finding("warning", "narrow-data", found, "balance the answers, or " + advice)]
    if task.rows >= ENOUGH_ROWS and task.distinct < FEW_ANSWERS:
        found = (
            f"only {task.distinct:,} different answers in {task.rows:,} rows: the model forgets to say anything else"
        )
        return [Finding("warning", "narrow-data", found, advice)]
    if task.rows >= ENOUGH_ROWS and task.distinct < LABELS * task.rows:
        return [Finding("note", "narrow-data", f"{task.distinct:,} different answers in {task.rows:,} rows", advice)]
    return []
