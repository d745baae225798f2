"""From rows to token ids: rendered with the chat template, marked for learning, never a control token out of user text.

A conversation is cut where the assistant's turns begin and end and the pieces are tokenised one by one, so what comes
before an answer has exactly the ids that generation will see.
"""

from __future__ import annotations

import hashlib
import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from veneer.config import IGNORED, DataConfig
from veneer.errors import VeneerError
from veneer.training.rows import BadRow, Row, bad_rows_error, listed, read_rows, split_rows

TEMPLATE_SECONDS = 10.0  # for one conversation; a template takes milliseconds
_BREAK = "\U000ffffd"  # a private-use character: cuts the control-token strings found in user text in two


@dataclass(frozen=True)
class Sample:
    """Token ids and labels of equal length; label IGNORED: not learned. The first label always is IGNORED."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass
class Encoded:
    """Samples, and in `rows` the row that each is of. Of the conversations: how many were truncated, lost the whole prompt
    of their last answer by it (`cut`), or of how many the template shows only the last answer as it was (`unmarked`)."""

    samples: list[Sample]
    bad: list[BadRow] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    warnings: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    cut: int = 0
    unmarked: int = 0

    def fingerprint(self) -> str:
        """sha256 over all ids and labels: the same data in the same order gives the same."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(repr((sample.input_ids, sample.labels)).encode())
        return digest.hexdigest()


def read_data(data: Any, config: DataConfig, seed: int) -> tuple[list[Row], list[Row] | None, list[BadRow]]:
    """Rows read and split: (train, held out, bad ones). data: in the place of `config.train`."""
    how: dict[str, Any] = {"format": config.format, "columns": config.columns, "strict": config.strict}
    found = read_rows(config.train if data is None else data, limit=config.limit, **how)
    if isinstance(config.eval, float):
        return *split_rows(found.rows, config.eval, seed), found.bad
    if config.eval is None:
        return found.rows, None, found.bad
    other = read_rows(config.eval, **how)
    return found.rows, other.rows, found.bad + other.bad


def encode_as(rows: Iterable[Row], config: DataConfig, tokenizer: Any) -> Encoded:
    """`encode_rows` with a recipe's settings."""
    return encode_rows(
        rows, tokenizer, max_length=config.max_length, loss_on=config.loss_on, system=config.system,
        strict=config.strict,
    )  # fmt: skip


def prepare_data(data: Any, config: DataConfig, tokenizer: Any, seed: int) -> tuple[Encoded, Encoded | None, list[str]]:
    """Rows read, split and encoded: (train, held out, notes for the user)."""
    rows, held, bad = read_data(data, config, seed)
    train_set = encode_as(rows, config, tokenizer)
    eval_set = None if held is None else encode_as(held, config, tokenizer)
    bad = [*bad, *train_set.bad, *(eval_set.bad if eval_set else [])]
    notes = [f"bad row skipped: {row}" for row in listed(bad)]
    notes += train_set.warnings
    if train_set.truncated:
        notes.append(
            f"{train_set.truncated:,} rows were longer than {config.max_length} tokens and lost the start of their prompt"
        )
    if train_set.dropped:
        notes.append(f"{train_set.dropped:,} rows were dropped: no learned token was left")
    return train_set, eval_set, notes


def encode_rows(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int,
    loss_on: str = "completion",
    system: str | None = None,
    strict: bool = False,
) -> Encoded:
    """Token ids and labels. Learned: the assistant's turns with their end-of-turn token, or everything (`loss_on` "all").

    A conversation longer than `max_length` loses tokens at its start (BOS is kept); plain text is split into several
    samples instead, each starting with the last token of the one before, so that every token is learned once.

    A row that the chat template refuses is a bad row; with `strict` it refuses the whole.

    Raises:
        VeneerError: no row can be rendered, or no learned token in any row.
    """
    result, pieces, plan = Encoded([]), [], []
    for row in rows:
        if row.messages:
            try:
                parts, exact = _conversation(row.messages, tokenizer, system)
            except VeneerError as error:
                result.bad.append(BadRow(row.file, row.line, error.problems[0]))
                continue
            result.unmarked += not exact
        else:
            parts = [(_bos(tokenizer), False), (_guarded(row.text, tokenizer), True)]
        plan.append((row, [learned for _, learned in parts]))
        pieces += [text for text, _ in parts]
    if result.bad and (strict or not plan):
        raise bad_rows_error(result.bad, strict)
    ids = _tokenize(pieces, tokenizer)
    position = 0
    for row, learned in plan:
        tokens: list[int] = []
        labels: list[int] = []
        answer = 0  # where the last one begins
        for piece, mark in zip(ids[position : position + len(learned)], learned, strict=True):
            answer = len(tokens) if mark else answer
            tokens += piece
            labels += piece if mark or loss_on == "all" else [IGNORED] * len(piece)
        position += len(learned)
        if tokenizer.eos_token_id is not None and (not tokens or tokens[-1] != tokenizer.eos_token_id):
            tokens.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        if row.messages:
            result.truncated += len(tokens) > max_length
            samples = [_cut(tokens, labels, max_length, tokenizer.bos_token_id)]
            result.cut += len(tokens) - answer >= max_length
        else:
            starts = range(0, max(1, len(tokens) - 1), max(1, max_length - 1))
            samples = [(tokens[s : s + max_length], labels[s : s + max_length]) for s in starts]
        for sample_ids, sample_labels in samples:
            sample = Sample(sample_ids, [IGNORED, *sample_labels[1:]])
            if sample.supervised:
                result.samples.append(sample)
                result.rows.append(row)
            else:
                result.dropped += 1
    if result.unmarked:
        result.warnings.append(
            f"{result.unmarked} conversations: the chat template rewrites earlier turns, so only the last answer is learned"
        )
    if not result.samples:
        raise VeneerError(
            f"no learned token in any of {len(plan)} rows",
            hint="check data.columns and data.format, or raise data.max_length",
        )
    return result


def encode_prompt(messages: Sequence[dict[str, str]], tokenizer: Any, system: str | None = None) -> list[int]:
    """The ids generation starts from: the conversation and the opening of the assistant's turn."""
    return _tokenize([_render(_with_system(messages, system), tokenizer, opening=True)], tokenizer)[0]


# ---- rendering ------------------------------------------------------------------------------------------------------


def _with_system(messages: Sequence[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    if system and not (messages and messages[0]["role"] == "system"):
        return [{"role": "system", "content": system}, *messages]
    return list(messages)


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """The strings that would become control tokens and their ids, longest first.

    Every added token but those of white space or one character, which are ordinary text in some vocabularies.
    """
    size, cached = tokenizer.__dict__.get("_veneer_controls", (0, {}))
    if size != len(tokenizer):  # tokens can be added later
        ids = {str(token.content): number for number, token in tokenizer.added_tokens_decoder.items()}
        meant = [text for text in ids if len(text) > 1 and text.strip(" ▁\t\r\n")]
        cached = {text: ids[text] for text in sorted(meant, key=lambda text: (-len(text), text))}
        tokenizer.__dict__["_veneer_controls"] = (len(tokenizer), cached)
    return cached  # type: ignore[no-any-return]


def _guarded(text: str, tokenizer: Any) -> str:
    """User text with a break inside every string that would become a control token."""
    text = text.replace(_BREAK, "")
    for control in control_tokens(tokenizer):
        while control in text:
            text = text.replace(control, control[0] + _BREAK + control[1:])
    return text


def _render(messages: Sequence[dict[str, str]], tokenizer: Any, *, opening: bool) -> str:
    guarded = [{**turn, "content": _guarded(turn["content"], tokenizer)} for turn in messages]
    if tokenizer.chat_template is None:  # a base model: the turns, a line each
        return (
            _bos(tokenizer)
            + "".join(turn["content"] + "\n" for turn in guarded[: None if opening else -1])
            + ("" if opening else guarded[-1]["content"] + (tokenizer.eos_token or ""))
        )
    try:
        with _time_limit(TEMPLATE_SECONDS):
            return str(tokenizer.apply_chat_template(guarded, tokenize=False, add_generation_prompt=opening))
    except Exception as error:  # templates raise whatever they like
        raise VeneerError(f"the chat template refused a conversation: {error}") from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Stops a chat template that loops without end; in seconds of computing. Python lets only the main thread do this."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def _conversation(
    messages: Sequence[dict[str, str]], tokenizer: Any, system: str | None
) -> tuple[list[tuple[str, bool]], bool]:
    """The rendered conversation as (piece, learned); False when only the last answer could be marked.

    What an assistant says before the first user turn (a greeting) is kept and not learned: nothing asked for it.
    """
    turns = _with_system(messages, system)
    first = next((number for number, turn in enumerate(turns) if turn["role"] == "user"), len(turns) - 1)
    full = _render(turns, tokenizer, opening=False)
    parts: list[tuple[str, bool]] = []
    at, exact = 0, True
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant" or number < first:
            continue
        before = _render(turns[:number], tokenizer, opening=True)
        after = full if number == len(turns) - 1 else _render(turns[: number + 1], tokenizer, opening=False)
        if not (full.startswith(after) and after.startswith(before) and len(before) >= at):
            exact = False
            continue
        end = _turn_end(after, len(before), tokenizer.eos_token)
        parts += [(full[at : len(before)], False), (full[len(before) : end], True)]
        at = end
    if not parts:
        before = _render(turns[:-1], tokenizer, opening=True)
        start = len(before)
        if not full.startswith(before):  # the last answer, looked for before its end-of-turn token
            body = (
                full[: full.rfind(tokenizer.eos_token)] if tokenizer.eos_token and tokenizer.eos_token in full else full
            )
            start = body.rfind(_guarded(turns[-1]["content"], tokenizer).strip())
        if start < 0:
            raise VeneerError(
                "the chat template does not show the assistant's answer", hint="use a model with another template"
            )
        return [(full[:start], False), (full[start : _turn_end(full, start, tokenizer.eos_token)], True)], False
    return parts, exact  # what follows the last answer's end-of-turn token is never generated, so it is left out


def _turn_end(text: str, start: int, eos: str | None) -> int:
    found = text.rfind(eos, start) if eos else -1
    return found + len(eos) if eos and found >= 0 else start + len(text[start:].rstrip("\n"))


def _bos(tokenizer: Any) -> str:
    adds = getattr(tokenizer, "add_bos_token", False) or tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if tokenizer.bos_token and adds else ""


def _tokenize(pieces: list[str], tokenizer: Any) -> list[list[int]]:
    """Ids of each piece, without breaks. The control tokens are those written out in a piece, and no others."""
    if not pieces:
        return []
    ids: list[list[int]] = tokenizer(pieces, add_special_tokens=False).input_ids
    controls = control_tokens(tokenizer)
    known = set(controls.values()) - {tokenizer.unk_token_id}  # unknown: what rare plain text may be
    written = re.compile("|".join(map(re.escape, controls)) or "(?!)")
    for number, piece in enumerate(pieces):
        meant = [controls[control] for control in written.findall(piece)]
        if _BREAK not in piece and [i for i in ids[number] if i in known] == [i for i in meant if i in known]:
            continue
        found: list[int] = []
        for plain, control in zip_longest(written.split(piece), meant):
            for text in filter(None, plain.split(_BREAK)):
                part = tokenizer(text, add_special_tokens=False).input_ids
                if known & set(part):  # the tokenizer's normalizer made a control token of it: letter by letter then
                    part = [i for letter in text for i in tokenizer(letter, add_special_tokens=False).input_ids]
                found += part
            found += [] if control is None else [control]
        ids[number] = found
    return ids


def _cut(tokens: list[int], labels: list[int], limit: int, bos: int | None) -> tuple[list[int], list[int]]:
    if len(tokens) <= limit:
        return tokens, labels
    if bos is not None and tokens[0] == bos:
        return [bos, *tokens[len(tokens) - limit + 1 :]], [IGNORED, *labels[len(labels) - limit + 1 :]]
    return tokens[-limit:], labels[-limit:]
