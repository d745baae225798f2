"""From files to token ids: rows read and checked, rendered with the chat template, marked for learning.

A row is a conversation (prompt/completion and Alpaca rows are conversations of two turns) or plain text.
JSON lines and CSV are read line by line here, so that one bad line costs one row and has a line number;
Parquet goes through `datasets`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.config import DataFormat, nearest
from veneer.errors import VeneerError
from veneer.storage import PICKLE_SUFFIXES, pickle_error

IGNORED = -100  # the label of a token that is not learned, as in transformers
ROLES = {"system", "user", "assistant", "tool"}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_NEEDED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
_LABELS = {"label", "category", "intent", "class", "answer", "target"}
_STANDIN = 0xF0000  # private-use characters stand for control-token strings found in user text


@dataclass(frozen=True)
class Row:
    """A checked row: a conversation, or plain text; and where it came from."""

    messages: tuple[dict[str, str], ...] = ()
    text: str = ""
    file: str = ""
    line: int = 0

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """All turns before the last one."""
        return self.messages[:-1]

    @property
    def completion(self) -> str:
        return self.messages[-1]["content"] if self.messages else self.text


@dataclass(frozen=True)
class BadRow:
    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass
class Rows:
    rows: list[Row]
    bad: list[BadRow] = field(default_factory=list)
    format: str = "messages"


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
    samples: list[Sample]
    truncated: int = 0
    dropped: int = 0
    warnings: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """sha256 over all ids and labels: the same data in the same order gives the same."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(repr((sample.input_ids, sample.labels)).encode())
        return digest.hexdigest()


def read_rows(
    source: str | Path | Sequence[Any] | Any,
    *,
    format: DataFormat | None = None,
    columns: dict[str, str] | None = None,
    strict: bool = False,
    limit: int | None = None,
) -> Rows:
    """Read and check rows from a file, several files, or anything that yields dicts (a list, a `datasets.Dataset`).

    Args:
        format: left out, detected from the columns of the first good row. columns: our name -> the file's.
        strict: any bad row refuses the whole.

    Raises:
        VeneerError: no such file, an unknown kind of file, columns that are not there, no good row at all.
    """
    if isinstance(source, str | Path):
        paths = [Path(source)]
    elif isinstance(source, list | tuple) and source and all(isinstance(item, str | Path) for item in source):
        paths = [Path(item) for item in source]
    else:
        paths = []
    result = Rows([])
    kind: str | None = format
    raw = (item for path in paths for item in _raw_rows(path)) if paths else _in_memory(source)
    for file, line, value in raw:
        if limit is not None and len(result.rows) >= limit:
            break
        try:
            if isinstance(value, _Unreadable):
                raise _BadRow(str(value))
            if not isinstance(value, dict):
                raise _BadRow(f"found a {type(value).__name__}, expected an object with named fields")
            named = {**value, **_renamed(value, columns or {}, file)}
            kind = kind or _detect(named, file)
            result.rows.append(Row(**_check(named, kind), file=file, line=line))
        except _BadRow as error:
            result.bad.append(BadRow(file, line, str(error)))
    result.format = kind or "messages"
    shown = [str(bad) for bad in result.bad[:20]]
    if len(result.bad) > 20:
        shown.append(f"and {len(result.bad) - 20} more bad rows")
    if result.bad and (strict or not result.rows):
        raise VeneerError(
            shown, hint="mend or remove these rows" + (", or leave strict out to skip them" if strict else "")
        )
    if not result.rows:
        raise VeneerError(f"data {', '.join(map(str, paths)) or 'given'}: found no rows, expected at least one")
    return result


def encode_rows(
    rows: Iterable[Row], tokenizer: Any, *, max_length: int, loss_on: str = "completion", system: str | None = None
) -> Encoded:
    """Token ids and labels. Learned: the assistant's turns with their end-of-turn token, or everything (`loss_on` "all").

    Each conversation is cut where the assistant's turns begin and end and the pieces are tokenised one by one, so
    what comes before an answer has exactly the ids that generation will see. A conversation longer than
    `max_length` loses tokens at its start (BOS is kept); plain text is split into several samples instead.

    Raises:
        VeneerError: no learned token in any row.
    """
    result, pieces, plan = Encoded([]), [], []
    unmarked = 0
    for row in rows:
        if row.messages:
            parts, exact = _conversation(row.messages, tokenizer, system)
            unmarked += not exact
        else:
            parts = [(_bos(tokenizer), False), (_guarded(row.text, tokenizer), True)]
        plan.append((len(parts), bool(row.messages), [learned for _, learned in parts]))
        pieces += [text for text, _ in parts]
    ids = _tokenize(pieces, tokenizer)
    position = 0
    for count, chat, learned in plan:
        tokens, labels = [], []
        for piece, mark in zip(ids[position : position + count], learned, strict=True):
            tokens += piece
            labels += piece if mark or loss_on == "all" else [IGNORED] * len(piece)
        position += count
        if tokenizer.eos_token_id is not None and (not tokens or tokens[-1] != tokenizer.eos_token_id):
            tokens.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        if chat:
            result.truncated += len(tokens) > max_length
            samples = [_cut(tokens, labels, max_length, tokenizer.bos_token_id)]
        else:
            starts = range(0, len(tokens), max_length)
            samples = [(tokens[s : s + max_length], labels[s : s + max_length]) for s in starts]
        for sample_ids, sample_labels in samples:
            sample = Sample(sample_ids, [IGNORED, *sample_labels[1:]])
            if sample.supervised:
                result.samples.append(sample)
            else:
                result.dropped += 1
    if unmarked:
        result.warnings.append(
            f"{unmarked} conversations: the chat template rewrites earlier turns, so only the last answer is learned"
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


def split_rows(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a share: (train, held out). Rows with the same prompt stay on the same side."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr(row.prompt) if row.messages else row.text, []).append(row)
    keys = sorted(groups, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    random.Random(seed).shuffle(keys)
    held: list[Row] = []
    while keys and len(held) < max(1, round(share * len(rows))):
        held += groups.pop(keys.pop())
    kept = [row for group in groups.values() for row in group]
    if not kept:
        raise VeneerError(f"data.eval: holding out {share:g} of {len(rows)} rows leaves none to train on")
    return kept, held


# ---- reading -----------------------------------------------------------------------------------------------------


class _BadRow(Exception):
    pass


class _Unreadable(str):
    """In place of a row that could not be parsed: the reason."""


def _raw_rows(path: Path) -> Iterator[tuple[str, int, Any]]:
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_error(path)
    if not path.is_file():
        raise VeneerError(f"data {path}: no such file")
    if path.suffix not in SUFFIXES:
        raise VeneerError(f"data {path}: found {path.suffix or 'no suffix'}, expected one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise VeneerError(f"data {path}: the file is empty")
    if path.suffix == ".parquet":
        from datasets import Dataset

        try:
            table = Dataset.from_parquet(str(path), keep_in_memory=True)
        except Exception as error:  # pyarrow raises many kinds; each means the file cannot be read
            raise VeneerError(f"data {path} is not a readable Parquet file: {error}") from error
        yield from ((str(path), number, row) for number, row in enumerate(table, 1))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as handle:
            reader = csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ",", restkey="\0more")
            try:
                for row in reader:
                    if "\0more" in row or None in row.values():
                        found = len([v for k, v in row.items() if k != "\0more" and v is not None])
                        found += len(row.get("\0more", ()))
                        names = len(reader.fieldnames or ())
                        yield str(path), reader.line_num, _Unreadable(f"found {found} fields, expected {names}")
                    else:
                        yield str(path), reader.line_num, row
            except csv.Error as error:
                yield str(path), reader.line_num, _Unreadable(f"not valid CSV: {error}")
    elif path.suffix == ".json":
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise VeneerError(f"data {path} is not valid JSON: {error}", hint="one object a line is .jsonl") from None
        if not isinstance(value, list):
            raise VeneerError(f"data {path}: found a JSON {type(value).__name__}, expected an array of objects")
        yield from ((str(path), number, row) for number, row in enumerate(value, 1))
    else:
        with open(path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    try:
                        yield str(path), number, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        yield str(path), number, _Unreadable(f"not valid JSON: {error}")


def _in_memory(source: Any) -> Iterator[tuple[str, int, Any]]:
    try:
        yield from (("rows given", number, row) for number, row in enumerate(source, 1))
    except TypeError:
        raise VeneerError(f"data: found a {type(source).__name__}, expected a file or rows") from None


def _renamed(row: dict[str, Any], columns: dict[str, str], file: str) -> dict[str, Any]:
    known = sorted({name for names in _NEEDED.values() for name in names} | {"input", "system"})
    problems = [
        f"data.columns: {ours!r} is not a name of ours; {nearest(ours, known)}" for ours in columns if ours not in known
    ]
    there = [str(name) for name in row]
    problems += [
        f"data.columns.{ours}: {file} has no column {theirs!r}; {nearest(theirs, there)}"
        for ours, theirs in columns.items()
        if theirs not in row
    ]
    if problems:
        raise VeneerError(problems)
    return {ours: row[theirs] for ours, theirs in columns.items()}


def _detect(row: dict[str, Any], file: str) -> str:
    if "conversations" in row or "messages" in row:
        return "messages"
    for kind in ("prompt_completion", "alpaca"):
        if all(name in row for name in _NEEDED[kind]):
            return kind
    labels = sorted(_LABELS & row.keys())
    if "text" in row and not labels:
        return "text"
    example = (
        f"{{prompt: text, completion: {labels[0]}}}" if labels and "text" in row else "{prompt: ..., completion: ...}"
    )
    raise VeneerError(
        f"data {file}: found the columns {', '.join(map(str, row))}; "
        "expected messages, prompt and completion, instruction and output, or text",
        hint=f"say which is which in the recipe, for example data.columns: {example}",
    )


def _check(row: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "messages":
        return {"messages": _messages(row.get("messages") or row.get("conversations"))}
    values = {name: _text(row, name) for name in _NEEDED[kind]}
    if kind == "text":
        return {"text": values["text"]}
    if kind == "alpaca":
        extra = row.get("input")
        prompt = values["instruction"] + (f"\n\n{extra}" if isinstance(extra, str) and extra.strip() else "")
        answer = values["output"]
    else:
        prompt, answer = values["prompt"], values["completion"]
    start = [{"role": "system", "content": str(row["system"])}] if row.get("system") else []
    return {"messages": (*start, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer})}


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise _BadRow(f"field {name!r} is missing")
    value = row[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # labels that are numbers
    if isinstance(value, dict | list) and name in ("completion", "output"):
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise _BadRow(f"field {name!r}: found {type(value).__name__}, expected text")
    if not value.strip():
        raise _BadRow(f"field {name!r} is empty")
    return value


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise _BadRow("field 'messages': expected a list of turns")
    turns = []
    share_gpt = {"human": "user", "gpt": "assistant"}
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise _BadRow(f"turn {number}: found {type(turn).__name__}, expected role and content")
        role = turn.get("role", turn.get("from"))
        role = share_gpt.get(role, role) if isinstance(role, str) else role
        content = turn.get("content", turn.get("value"))
        if role not in ROLES:
            raise _BadRow(f"turn {number}: found role {role!r}, expected {', '.join(sorted(ROLES))}")
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise _BadRow(f"turn {number} ({role}): its content is not text, or is empty")
        turns.append({"role": role, "content": content})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()  # nothing follows that could be learned
    if not turns:
        raise _BadRow("no assistant turn: nothing to learn")
    return tuple(turns)


# ---- rendering and tokens -----------------------------------------------------------------------------------------


def _with_system(messages: Sequence[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    if system and not (messages and messages[0]["role"] == "system"):
        return [{"role": "system", "content": system}, *messages]
    return list(messages)


def _controls(tokenizer: Any) -> list[str]:
    """The strings that would become control tokens, longest first."""
    cached = tokenizer.__dict__.get("_veneer_controls")
    if cached is None:
        added = {str(t.content) for t in tokenizer.added_tokens_decoder.values()}
        cached = sorted(added | set(tokenizer.all_special_tokens), key=lambda s: (-len(s), s))
        tokenizer.__dict__["_veneer_controls"] = cached
    return cached  # type: ignore[no-any-return]


def _guarded(text: str, tokenizer: Any) -> str:
    """User text with every control-token string replaced by a private-use stand-in."""
    for number, control in enumerate(_controls(tokenizer)):
        if control in text:
            text = text.replace(control, chr(_STANDIN + number))
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
        return str(tokenizer.apply_chat_template(guarded, tokenize=False, add_generation_prompt=opening))
    except Exception as error:  # templates raise whatever they like
        raise VeneerError(f"the chat template refused a conversation: {error}") from error


def _conversation(
    messages: Sequence[dict[str, str]], tokenizer: Any, system: str | None
) -> tuple[list[tuple[str, bool]], bool]:
    """The rendered conversation as (piece, learned); False when only the last answer could be marked."""
    turns = _with_system(messages, system)
    full = _render(turns, tokenizer, opening=False)
    parts: list[tuple[str, bool]] = []
    at, exact = 0, True
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
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
    """Ids of each piece; stand-ins become the plain text they stand for, never the control token."""
    if not pieces:
        return []
    ids: list[list[int]] = tokenizer(pieces, add_special_tokens=False).input_ids
    controls = _controls(tokenizer)
    standins = re.compile(f"[{chr(_STANDIN)}-{chr(_STANDIN + len(controls))}]")
    template = re.compile("|".join(f"({re.escape(control)})" for control in controls) or r"(?!)")
    for number, piece in enumerate(pieces):
        if not standins.search(piece):
            continue
        found: list[int] = []
        at = 0
        for match in [*template.finditer(piece), None]:
            plain = piece[at : match.start() if match else None]
            plain = standins.sub(
                lambda m: controls[ord(m[0]) - _STANDIN] if ord(m[0]) - _STANDIN < len(controls) else m[0], plain
            )
            if plain:
                found += tokenizer(plain, add_special_tokens=False, split_special_tokens=True).input_ids
            if match:
                found.append(tokenizer.convert_tokens_to_ids(match[0]))
                at = match.end()
        ids[number] = found
    return ids


def _cut(tokens: list[int], labels: list[int], limit: int, bos: int | None) -> tuple[list[int], list[int]]:
    if len(tokens) <= limit:
        return tokens, labels
    if bos is not None and tokens[0] == bos:
        return [bos, *tokens[len(tokens) - limit + 1 :]], [IGNORED, *labels[len(labels) - limit + 1 :]]
    return tokens[-limit:], labels[-limit:]
