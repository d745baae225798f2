"""What would go wrong in a run, before step 1: its data as it will be learned, and one real batch through the real model.

found = preflight(model, tokenizer, "data.jsonl", TrainConfig(epochs=2))    # nothing of the model is changed
"""

from __future__ import annotations

import math
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from veneer.adapters.attach import active_adapter, adapter_parameters, adapters, lora_layers
from veneer.adapters.lora import LoraLayer
from veneer.adapters.targets import resolve_targets
from veneer.config import IGNORED, DataConfig, LoraConfig, Method, TrainConfig
from veneer.errors import VeneerError
from veneer.training.advice import Finding, Task, advise, errors_first, recommend
from veneer.training.data import Encoded, Sample, control_tokens, encode_as, read_data
from veneer.training.packing import Order, computed, passes
from veneer.training.rows import BadRow, Row
from veneer.training.trial import try_batch

MOST = 0.5  # of the rows: with a fault in so many the run is not worth its time
MANY = 0.05  # of the rows, duplicates or truncated: fewer are a note
SHARED = 0.01  # of the held-out rows, trained on too: fewer are a note
STEPS, READ = 200, 200  # steps that packing is worked out for; rows whose answer is read back from its tokens
VIEWED = 3  # rows shown as they are learned


@dataclass
class Preflight:
    """Findings, errors first; facts, which JSON takes; and a recommendation of settings."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "warning"]


def preflight(
    model: Any,
    tokenizer: Any,
    data: Any,
    config: TrainConfig | None = None,
    *,
    method: Method = "lora",
    data_config: DataConfig | None = None,
    looked_at: int | None = None,
    reload: bool = True,
    trial: bool = True,
) -> Preflight:
    """Check what `train` would do with the same arguments. Model, gradients, modes and random states stay as they are.

    Args:
        looked_at: rows that are turned into tokens, the first ones; left out, all. Duplicates are looked for in all.
        reload: also save the adapter to a temporary folder, load it again and compare.
        trial: False: no batch goes through the model, which may then be without memory (on the meta device).

    Raises:
        VeneerError: data that cannot be read, or nothing in it to learn, as `train` would say it.
    """
    config, data_config = config or TrainConfig(), data_config or DataConfig(train="-")
    began = time.monotonic()
    rows, held, bad = read_data(data, data_config, config.seed)
    encoded = encode_as(rows[:looked_at], data_config, tokenizer)
    bad += encoded.bad
    if held and looked_at is None:
        bad += encode_as(held, data_config, tokenizer).bad
    report = Preflight()
    report.findings += _rows(rows, held, bad, tokenizer, report.facts)
    report.findings += _tokens(model, tokenizer, encoded, rows[:looked_at], data_config, report.facts)
    packing = data_config.packing and "attention" in getattr(model, "veneer_parts", ())
    report.facts["packing"] = _packing(encoded.samples, packing, data_config, config)
    lora = _adapter_config(model) if method == "lora" else None
    task = _task(model, encoded, rows, len(rows[:looked_at]), lora, config)
    report.findings += advise(task, lora, config)
    report.facts["recommended"] = recommend(task, method)
    if held is None:
        advice = "hold a share out with data.eval: 0.05, so that learning by heart is seen"
        report.findings.append(Finding("note", "no-held-out", "no rows are held out", advice))
    report.facts["data_seconds"] = round(time.monotonic() - began, 3)
    began = time.monotonic()
    found, report.facts["batch"] = (
        try_batch(model, tokenizer, encoded.samples, config, method, packing=packing, reload=reload)
        if trial
        else ([], {})
    )
    report.facts["batch_seconds"] = round(time.monotonic() - began, 3)
    report.findings = errors_first([*report.findings, *found])
    return report


# ---- rows -----------------------------------------------------------------------------------------------------------


def _rows(
    rows: list[Row], held: list[Row] | None, bad: list[BadRow], tokenizer: Any, facts: dict[str, Any]
) -> Iterator[Finding]:
    """Bad rows, duplicates, overlap of train and held-out, control tokens in the text."""
    facts["rows"] = {"train": len(rows), "held_out": None if held is None else len(held), "bad": len(bad)}
    if bad:
        found = f"{len(bad):,} rows cannot be used and are left out ({bad[0]})"
        yield Finding("warning", "bad-rows", found, "mend or remove them")
    keys = Counter(map(_key, rows))
    yield from _duplicates(rows, keys, facts)
    facts["overlap"] = None
    if held:
        yield from _overlap(rows, held, keys, facts)
    yield from _control_tokens(rows, tokenizer, facts)


def _duplicates(rows: list[Row], keys: Counter[str], facts: dict[str, Any]) -> Iterator[Finding]:
    twice = len(rows) - len(keys)
    facts["duplicates"] = {"exact": len(rows) - len(set(map(_exact, rows))), "normalised": twice}
    if twice:
        often, times = keys.most_common(1)[0]
        where = next(_place(row) for row in rows if _key(row) == often)
        yield Finding(
            "warning" if twice > MANY * len(rows) else "note",
            "duplicates",
            f"{twice:,} of {len(rows):,} rows repeat another (but for spaces and capitals), one {times:,} times ({where})",
            "remove them: each is learned as often as it is there",
        )


def _overlap(rows: list[Row], held: list[Row], keys: Counter[str], facts: dict[str, Any]) -> Iterator[Finding]:
    exact = set(map(_exact, rows))
    same = [row for row in held if _key(row) in keys]
    facts["overlap"] = {"exact": sum(_exact(row) in exact for row in held), "normalised": len(same)}
    if same:
        share = len(same) / len(held)
        yield Finding(
            "error" if share >= MOST else "warning" if share >= SHARED else "note",
            "overlap",
            f"{len(same):,} of {len(held):,} held-out rows are also trained on ({_place(same[0])})",
            "hold out rows that are not among the others: learning by heart would not be seen",
        )


def _control_tokens(rows: list[Row], tokenizer: Any, facts: dict[str, Any]) -> Iterator[Finding]:
    """Special tokens written out in the text: never tokens there, and mostly left over from a template."""
    kinds, tokens = tokenizer.added_tokens_decoder, control_tokens(tokenizer)
    pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
    texts = ("\n".join(turn["content"] for turn in row.messages) or row.text for row in rows)
    hits = [(row, hit[0]) for row, text in zip(rows, texts, strict=True) if (hit := pattern.search(text))]
    facts["rows"]["with_control_tokens"] = len(hits)
    if not hits:
        return
    special = [hit for hit in hits if kinds[tokens[hit[1]]].special]
    first, token = (special or hits)[0]
    found = f"{len(hits):,} of {len(rows):,} rows hold {token} or the like as text ({_place(first)})"
    if len(special) >= MOST * len(rows):
        yield Finding(
            "error",
            "rendered-already",
            f"{found}: it seems a chat template was applied to them, and would be learned letter by letter",
            "give the turns themselves: messages, or prompt and completion",
        )
    else:
        yield Finding(
            "warning" if special else "note",
            "control-tokens",
            found,
            "it is learned letter by letter, never as the token; remove what is left over from a template",
        )


def _key(row: Row) -> str:
    """The same for rows that differ in spaces and capitals only."""
    parts = [f"{turn['role']} {turn['content']}" for turn in row.messages] or [row.text]
    return "\0".join(" ".join(part.split()).casefold() for part in parts)


def _exact(row: Row) -> str:
    return repr((row.messages, row.text))


def _place(row: Row) -> str:
    return f"{row.file}, line {row.line}"


# ---- tokens ---------------------------------------------------------------------------------------------------------


def _tokens(
    model: Any, tokenizer: Any, encoded: Encoded, rows: list[Row], data: DataConfig, facts: dict[str, Any]
) -> Iterator[Finding]:
    """What is learned of each row."""
    samples, chat, count = encoded.samples, sum(bool(row.messages) for row in rows), len(rows)
    lengths = sorted(len(sample.input_ids) for sample in samples)
    learned = sorted(sample.supervised for sample in samples)
    facts["looked_at"] = count
    facts["tokens"] = {"all": sum(lengths), "learned": sum(learned)}
    facts["learned_per_row"] = _spread(learned)
    facts["lengths"] = {**_spread(lengths), "histogram": _histogram(lengths)}
    facts["rows"] |= {"truncated": encoded.truncated, "cut": encoded.cut, "dropped": encoded.dropped}
    facts["mask"] = _mask(tokenizer, encoded, chat, data)
    facts["view"] = [_segments(sample, tokenizer) for sample in samples[:VIEWED]]
    if encoded.dropped:
        kept = {id(row) for row in encoded.rows}
        where = next((f" ({_place(row)})" for row in rows if id(row) not in kept), "")
        yield Finding(
            "error" if encoded.dropped >= MOST * count else "warning",
            "nothing-learned",
            f"{encoded.dropped:,} of {count:,} rows have no learned token and are dropped{where}",
            "raise data.max_length, or see whether the answers are empty",
        )
    yield from _lengths(encoded, count, data.max_length)
    if encoded.unmarked:
        yield Finding(
            "warning",
            "template-rewrites",
            f"the chat template shows turns otherwise once others follow: of {encoded.unmarked:,} conversations only the last "
            "answer is learned",
            "make a conversation of each answer, or take another template",
        )
    if chat and data.loss_on == "all":
        advice = "data.loss_on: completion learns the answers alone"
        yield Finding("note", "prompt-learned", "prompts are learned too, as data.loss_on says", advice)
    if chat and tokenizer.chat_template is None:
        found = "the tokenizer has no chat template: turns are written a line each"
        yield Finding("note", "no-template", found, "take the model's chat version, if there is one")
    yield from _ends(model, tokenizer, encoded)
    yield from _answers_kept(tokenizer, encoded, data.max_length)
    yield from _double_bos(tokenizer, samples)


def _lengths(encoded: Encoded, count: int, max_length: int) -> Iterator[Finding]:
    if encoded.truncated:
        yield Finding(
            "warning" if encoded.truncated > MANY * count else "note",
            "truncated",
            f"{encoded.truncated:,} of {count:,} rows are longer than data.max_length ({max_length:,}) and lose the start of "
            "their prompt",
            "raise data.max_length, or shorten these rows",
        )
    if encoded.cut:
        yield Finding(
            "error" if encoded.cut >= MOST * count else "warning",
            "answer-cut",
            f"{encoded.cut:,} of {count:,} rows have an answer as long as data.max_length ({max_length:,}): it is learned from "
            "its middle on, without a prompt",
            "raise data.max_length",
        )


def _ends(model: Any, tokenizer: Any, encoded: Encoded) -> Iterator[Finding]:
    """Whether the token that ends an answer is learned, and is one that generation stops at."""
    stops = _stop_tokens(model)
    known = stops | {tokenizer.eos_token_id} - {None}
    last = list({id(row): sample for row, sample in zip(encoded.rows, encoded.samples, strict=True)}.values())
    open_end = [sample for sample in last if sample.labels[-1] not in known]
    if open_end:
        yield Finding(
            "error" if len(open_end) >= MOST * len(last) else "warning", "no-eos",
            f"{len(open_end):,} of {len(last):,} rows do not end with a learned end-of-turn token"
            + ("" if known else ", and neither the tokenizer nor the model has one"),
            "set the tokenizer's eos_token to the token that ends a turn: else answers never end",
        )  # fmt: skip
    ends = {sample.labels[-1] for sample in last} & known
    if stops and ends and not ends & stops:
        learned, wanted = (", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(ids)))) for ids in (ends, stops))
        yield Finding(
            "warning", "other-eos", f"answers end with {learned}, but the model's generation stops at {wanted}",
            "make both the same: the tokenizer's eos_token, or eos_token_id in generation_config.json",
        )  # fmt: skip


def _stop_tokens(model: Any) -> set[int]:
    for settings in (getattr(model, "generation_config", None), model.config):
        ids = getattr(settings, "eos_token_id", None)
        if ids is not None:
            return set(ids) if isinstance(ids, list | tuple) else {ids}
    return set()


def _answers_kept(tokenizer: Any, encoded: Encoded, max_length: int) -> Iterator[Finding]:
    """Whether what is learned reads as the row's answer: some templates leave a part of it out."""
    looked, other = 0, []
    for row, sample in list(zip(encoded.rows, encoded.samples, strict=True))[:READ]:
        ids = [label for label in sample.labels if label != IGNORED]
        whole = len(sample.input_ids) < max_length  # else it may be truncated
        unknown = tokenizer.unk_token_id
        if not row.messages or not whole or (unknown in ids and unknown != tokenizer.eos_token_id):
            continue
        looked += 1
        if _plain(row.completion) not in _plain(_decode(ids, tokenizer)):
            other.append(row)
    if other:
        yield Finding(
            "error" if len(other) == looked else "warning", "answer-changed",
            f"in {len(other):,} of {looked:,} rows looked at the chat template shows another answer than the row's "
            f"({_place(other[0])})", "see the rows as they are learned (veneer check), and take another template",
        )  # fmt: skip


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _double_bos(tokenizer: Any, samples: list[Sample]) -> Iterator[Finding]:
    bos = tokenizer.bos_token_id
    twice = sum(sample.input_ids[:2] == [bos, bos] for sample in samples)
    if bos is not None and twice:
        advice = "take it out of the chat template or out of the tokenizer's post-processor"
        yield Finding("warning", "double-bos", f"{twice:,} rows begin with two {tokenizer.bos_token}", advice)


def _mask(tokenizer: Any, encoded: Encoded, chat: int, data: DataConfig) -> str:
    if not chat:
        return "plain text: every token is learned"
    if data.loss_on == "all":
        return "every token is learned, of prompts too (data.loss_on: all)"
    if tokenizer.chat_template is None:
        return "answers are learned; there is no chat template, turns are written a line each"
    marks = "generation %}" in str(tokenizer.chat_template) or "generation -%}" in str(tokenizer.chat_template)
    told = "has generation marks, which are not needed" if marks else "has no generation marks, and needs none"
    how = (
        "answers are learned with their end-of-turn token: each begins where the conversation before it, rendered, ends"
    )
    if encoded.unmarked == chat:
        how = "the last answer is learned, found by its text"
    return f"{how}; the chat template {told}"


def _segments(sample: Sample, tokenizer: Any) -> list[dict[str, Any]]:
    """Text of a sample, cut where learning begins and ends."""
    found: list[tuple[bool, list[int]]] = []
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        if not found or found[-1][0] != (label != IGNORED):
            found.append((label != IGNORED, []))
        found[-1][1].append(token)
    return [{"learned": learned, "text": _decode(ids, tokenizer)} for learned, ids in found]


def _decode(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _spread(values: list[int]) -> dict[str, int]:
    """values: sorted."""
    return {
        "least": values[0],
        "median": values[len(values) // 2],
        "p95": values[int(0.95 * len(values))],
        "most": values[-1],
    }


def _histogram(values: list[int], bars: int = 10) -> list[dict[str, int]]:
    """How many of the values lie in each of at most `bars` stretches of equal, round width."""
    least, most = values[0], values[-1]
    width = max(1, math.ceil((most - least + 1) / bars))
    unit = 10 ** int(math.log10(width))
    width = math.ceil(width / unit) * unit
    first = least // width * width
    counted = Counter((value - first) // width for value in values)
    return [
        {"from": first + n * width, "to": first + (n + 1) * width - 1, "rows": counted[n]}
        for n in range((most - first) // width + 1)
    ]


def _packing(samples: list[Sample], on: bool, data: DataConfig, train: TrainConfig) -> dict[str, Any]:
    """The share of the tokens that are computed which are of rows, packed and padded, in the run's first steps."""
    order = Order(len(samples), train.batch_size * train.grad_accumulation, train.seed)
    tokens = packed = padded = 0
    for step in range(min(STEPS, order.steps_per_epoch)):
        rows = [samples[i] for i in order.step(step)]
        tokens += sum(len(row.input_ids) for row in rows)
        padded += sum(computed(group, False) for group in passes(rows, train.batch_size, False, data.max_length))
        packed += sum(computed(group, True) for group in passes(rows, train.batch_size, True, data.max_length))
    return {
        "on": on,
        "efficiency": tokens / (packed if on else padded),
        "packed": tokens / packed,
        "padded": tokens / padded,
    }


# ---- the task -------------------------------------------------------------------------------------------------------


def _adapter_config(model: Any) -> LoraConfig | None:
    name = active_adapter(model)
    return None if name is None else adapters(model)[name].config


def _task(
    model: Any, encoded: Encoded, rows: list[Row], looked_at: int, lora: LoraConfig | None, train: TrainConfig
) -> Task:
    """In numbers; where not all rows were looked at, the others are taken for like them."""
    times = len(rows) / looked_at
    count = round(len(encoded.samples) * times)
    answers = Counter(row.completion.strip() for row in rows if row.messages)
    chat = bool(answers)
    steps, warmup = Order(count, train.batch_size * train.grad_accumulation, train.seed).steps(train)
    name = active_adapter(model)
    trained = model.parameters() if lora is None or name is None else adapter_parameters(model, name).values()
    return Task(
        rows=count,
        learned_tokens=round(sum(sample.supervised for sample in encoded.samples) * times),
        distinct=len(answers) if chat else count,
        commonest=answers.most_common(1)[0][1] if chat else 1,
        width=model.config.get_text_config().hidden_size,
        trained=sum(p.numel() for p in trained),
        steps=steps,
        warmup=warmup,
        kinds=frozenset() if name is None else _kinds(model, name),
    )


def _kinds(model: Any, name: str) -> frozenset[str]:
    """Of the layers an adapter is on: embeddings, head, attention, other."""
    try:
        attention = set(resolve_targets(model, "attention"))
    except VeneerError:
        attention = set()
    head = model.get_output_embeddings()

    def kind(path: str, layer: LoraLayer) -> str:
        if isinstance(layer.base_layer, nn.Embedding):
            return "embeddings"
        if layer is head or layer.base_layer is head:
            return "head"
        return "attention" if path in attention else "other"

    return frozenset(kind(path, layer) for path, layer in lora_layers(model).items() if name in layer.lora_A)
