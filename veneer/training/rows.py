"""From files to rows: read, checked, each bad one reported with its file, line and reason.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from veneer.config import DataFormat, nearest
from veneer.errors import VeneerError
from veneer.storage import PICKLE_SUFFIXES, pickle_error

ROLES = {"system", "user", "assistant", "tool"}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what each format needs, and what it may have
    "messages": (("messages",), ()),
    "prompt_completion": (("prompt", "completion"), ("system",)),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "text": (("text",), ()),
}
_LABELS = {"label", "category", "intent", "class", "answer", "target"}
_NOT_TEXT = re.compile("[\ud800-\udfff]")  # bytes that are not UTF-8 (`surrogateescape`), or a JSON \\ud800
FIELD_LIMIT = 1 << 28  # bytes in one CSV field; the csv module's own limit of 128 KiB is less than a long document


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
        format: left out, detected from the columns of the first good row.
        columns: our name -> the file's; these names decide the format.
        strict: any bad row refuses the whole.

    Raises:
        VeneerError: no such file, an unknown kind of file, columns of no format, no good row at all.
    """
    if isinstance(source, str | Path):
        paths = [Path(source)]
    elif isinstance(source, list | tuple) and source and all(isinstance(item, str | Path) for item in source):
        paths = [Path(item) for item in source]
    else:
        paths = []
    result = Rows([])
    columns = columns or {}
    kinds = _kinds(format, columns)
    raw = (item for path in paths for item in _raw_rows(path)) if paths else _in_memory(source)
    for file, line, value in raw:
        if limit is not None and len(result.rows) >= limit:
            break
        try:
            if isinstance(value, _Unreadable):
                raise _BadRow(str(value))
            if not isinstance(value, dict):
                raise _BadRow(f"found a {type(value).__name__}, expected an object with named fields")
            named = {**value, **_renamed(value, columns)}
            kinds = kinds if len(kinds) == 1 else [_detect(named, kinds)]
            row = Row(**_check(named, kinds[0]), file=file, line=line)
            if any(_NOT_TEXT.search(text) for text in (row.text, *(turn["content"] for turn in row.messages))):
                raise _BadRow("found bytes that are not UTF-8")
            result.rows.append(row)
        except _BadRow as error:
            result.bad.append(BadRow(file, line, str(error)))
    result.format = kinds[0]
    if result.bad and (strict or not result.rows):
        raise bad_rows_error(result.bad, strict)
    if not result.rows:
        raise VeneerError(f"data {', '.join(map(str, paths)) or 'given'}: found no rows, expected at least one")
    return result


def listed(bad: Sequence[BadRow]) -> list[str]:
    """The first 20 bad rows, and how many more there are."""
    return [str(row) for row in bad[:20]] + ([f"and {len(bad) - 20} more bad rows"] if len(bad) > 20 else [])


def bad_rows_error(bad: Sequence[BadRow], strict: bool) -> VeneerError:
    if not strict and len(bad) > 1 and len({row.reason for row in bad}) == 1:  # the file, rather than its rows
        return VeneerError(f"data {bad[0].file}, all {len(bad):,} rows: {bad[0].reason}")
    hint = "mend or remove these rows" + (", or leave strict out to skip them" if strict else "")
    return VeneerError([str(row) for row in bad], hint=hint)


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


def require_readable(path: Path) -> None:
    """Raise VeneerError for what can be seen of a data file without reading it: asked before a model is loaded."""
    if path.suffix in PICKLE_SUFFIXES:
        raise pickle_error(path)
    if not path.is_file():
        raise VeneerError(f"data {path}: no such file")
    if path.suffix not in SUFFIXES:
        raise VeneerError(f"data {path}: found {path.suffix or 'no suffix'}, expected one of {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise VeneerError(f"data {path}: the file is empty")


def _raw_rows(path: Path) -> Iterator[tuple[str, int, Any]]:
    require_readable(path)
    if path.suffix == ".parquet":
        from datasets import Dataset

        try:
            table = Dataset.from_parquet(str(path), keep_in_memory=True)
        except Exception as error:  # pyarrow raises many kinds; each means the file cannot be read
            raise VeneerError(f"data {path} is not a readable Parquet file: {error}") from error
        yield from ((str(path), number, row) for number, row in enumerate(table, 1))
    elif path.suffix in (".csv", ".tsv"):
        yield from _csv_rows(path)
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


def _csv_rows(path: Path) -> Iterator[tuple[str, int, Any]]:
    csv.field_size_limit(FIELD_LIMIT)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        lines = chain(handle, ["\0end"])  # a row of its own, unless a quote that is never closed takes it in
        reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
        names: list[str] = []
        line = 1
        try:
            for fields in reader:
                if fields == ["\0end"]:
                    return
                if fields and fields[-1].endswith("\0end"):
                    raise csv.Error("a quote is opened in this row and never closed")
                if not names:
                    names = fields
                elif len(fields) == len(names):
                    yield str(path), reader.line_num, dict(zip(names, fields, strict=True))
                elif fields:
                    found = f"found {len(fields)} fields, expected {len(names)}"
                    yield str(path), reader.line_num, _Unreadable(found)
                line = reader.line_num + 1
        except csv.Error as error:  # where the next row begins is not known
            raise VeneerError(f"data {path}, line {line}: not valid CSV: {error}") from None


def _in_memory(source: Any) -> Iterator[tuple[str, int, Any]]:
    try:
        yield from (("rows given", number, row) for number, row in enumerate(source, 1))
    except TypeError:
        raise VeneerError(f"data: found a {type(source).__name__}, expected a file or rows") from None


def _kinds(format: DataFormat | None, columns: dict[str, str]) -> list[str]:
    """The formats that can be meant: the one given, else those that have all of our names in `columns`."""
    fields = {kind: (*needed, *more) for kind, (needed, more) in _FIELDS.items()}
    known = sorted({name for names in fields.values() for name in names})
    problems = [
        f"data.columns: {ours!r} is not a name of ours; {nearest(ours, known)}" for ours in columns if ours not in known
    ]
    kinds = [kind for kind, names in fields.items() if format in (None, kind) and columns.keys() <= set(names)]
    if not kinds and not problems:
        formats = "; ".join(f"{kind}: {', '.join(fields[kind])}" for kind in fields if format in (None, kind))
        problems = [f"data.columns: found {' and '.join(columns)}, expected names of one format ({formats})"]
    if problems:
        raise VeneerError(problems)
    return kinds


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    there = [str(name) for name in row]
    missing = [
        f"data.columns.{ours}: there is no column {theirs!r}; {nearest(theirs, there)}"
        for ours, theirs in columns.items()
        if theirs not in row
    ]
    if missing:
        raise _BadRow("; ".join(missing))
    return {ours: row[theirs] for ours, theirs in columns.items()}


def _detect(row: dict[str, Any], kinds: list[str]) -> str:
    """The first of `kinds` whose fields the row has; `text` beside a label may be half a prompt/completion row."""
    labels = sorted(_LABELS & row.keys())
    there = row.keys() | ({"messages"} if "conversations" in row else set())
    for kind in kinds:
        if there >= set(_FIELDS[kind][0]) and (kind != "text" or not labels):
            return kind
    prompt, answer = ("text", labels[0]) if labels and "text" in row else ("...", "...")
    example = f"{{prompt: {prompt}, completion: {answer}}}"
    options = f"--column prompt={prompt} --column completion={answer}"
    raise _BadRow(
        f"found the columns {', '.join(map(str, row))}; expected messages, prompt and completion, instruction and "
        f"output, or text (say which is which: data.columns: {example} in a recipe, {options} for eval)"
    )


def _check(row: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "messages":
        return {"messages": _messages(row.get("messages") or row.get("conversations"))}
    values = {name: _text(row, name) for name in _FIELDS[kind][0]}
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
        if not isinstance(role, str) or role not in ROLES:
            raise _BadRow(f"turn {number}: found role {role!r}, expected {', '.join(sorted(ROLES))}")
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise _BadRow(f"turn {number} ({role}): its content is not text, or is empty")
        turns.append({"role": role, "content": content})
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()  # nothing follows that could be learned
    if not turns:
        raise _BadRow("no assistant turn: nothing to learn")
    if len(turns) == 1:
        raise _BadRow("an assistant turn alone: expected a turn before it")
    return tuple(turns)
