import json
import re

import pytest

from veneer.errors import VeneerError
from veneer.training import rows
from veneer.training.rows import read_rows, split_rows


def write(path, text):
    path.write_text(text)
    return path


PAIR = {"prompt": "add milk", "completion": "ok"}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_files(tmp_path, kind):
    path, given = tmp_path / f"x.{kind}", [PAIR, {"prompt": "two\nlines", "completion": "y"}]
    if kind == "csv":
        write(path, 'prompt,completion\nadd milk,ok\n"two\nlines",y\n')
    elif kind == "parquet":
        from datasets import Dataset

        Dataset.from_list(given).to_parquet(path)
    else:
        write(path, json.dumps(given) if kind == "json" else "\n".join(map(json.dumps, given)))
    assert [(r.prompt[0]["content"], r.completion) for r in read_rows(path).rows] == [
        ("add milk", "ok"),
        ("two\nlines", "y"),
    ]


def test_every_bad_row_has_file_line_and_reason(tmp_path):
    lines = [
        json.dumps(PAIR),
        "{not json",
        '{"prompt": "a"}',
        '{"prompt": "", "completion": "b"}',
        "[1]",
        '{"prompt": {}, "completion": "b"}',
    ]
    path = write(tmp_path / "x.jsonl", "\n".join(lines))
    found = read_rows(path)
    assert len(found.rows) == 1 and [bad.line for bad in found.bad] == [2, 3, 4, 5, 6]
    assert all(str(path) in str(bad) and bad.reason for bad in found.bad)
    with pytest.raises(VeneerError) as caught:
        read_rows(path, strict=True)
    assert len(caught.value.problems) == 5
    csv = write(tmp_path / "x.csv", "prompt,completion\na,b\nonly one\nc,d,e\n")
    assert [bad.line for bad in read_rows(csv).bad] == [3, 4]


def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path):
    files = {
        "x.csv": b"prompt,completion\na,b\nc,caf\xe9\ne,f\n",
        "x.jsonl": b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "caf\xe9"}\n'
        b'{"prompt": "\\ud800", "completion": "b"}\n{"prompt": "e", "completion": "f"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        found = read_rows(tmp_path / name)
        assert [row.completion for row in found.rows] == ["b", "f"]
        assert [bad.line for bad in found.bad] == ([3] if name == "x.csv" else [3, 4])
        assert all("utf-8" in bad.reason.lower() for bad in found.bad)


def test_csv_rows_are_never_lost_silently(tmp_path, monkeypatch):
    long = "a" * 200_000  # more than the csv module's own limit
    path = write(tmp_path / "x.csv", f"prompt,completion\n{long},b\n\nc,d")
    assert [len(row.prompt[0]["content"]) for row in read_rows(path).rows] == [200_000, 1]
    monkeypatch.setattr(rows, "FIELD_LIMIT", 1000)
    with pytest.raises(VeneerError, match=r"x\.csv, line 2: .*field limit"):
        read_rows(path)
    path = write(tmp_path / "y.csv", 'prompt,completion\na,b\nc,"d\ne,f\n')
    with pytest.raises(VeneerError, match=r"y\.csv, line 3: .*never closed"):
        read_rows(path)


def test_a_first_row_that_does_not_fit_is_one_bad_row(tmp_path):
    given = [{"prompt": "a"}, PAIR, {"completion": "b"}]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, given)))
    for columns in ({}, {"prompt": "prompt", "completion": "completion"}):
        found = read_rows(path, columns=columns)
        assert len(found.rows) == 1 and [bad.line for bad in found.bad] == [1, 3]
    with pytest.raises(VeneerError, match="found the columns prompt"):
        read_rows(path, strict=True)


def test_mapped_names_decide_the_format(tmp_path):
    path = write(tmp_path / "x.csv", "body,label\na,b\n")
    found = read_rows(path, columns={"text": "body"})
    assert found.format == "text" and found.rows[0].text == "a"
    path = write(tmp_path / "y.csv", "messages,question,label\nx,a,b\n")
    found = read_rows(path, columns={"prompt": "question", "completion": "label"})
    assert found.format == "prompt_completion" and found.rows[0].completion == "b"
    with pytest.raises(VeneerError, match="names of one format"):
        read_rows(path, columns={"text": "question", "completion": "label"})


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "a list of turns"),
        ("x", "a list of turns"),
        (["x"], "found str"),
        ([{"role": "user", "content": "a"}], "nothing to learn"),
        ([{"role": "boss", "content": "a"}], "found role 'boss'"),
        ([{"role": ["user"], "content": "a"}], r"found role \['user'\]"),
        ([{"role": "user"}], "its content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "is empty"),
        ([{"role": "assistant", "content": "a"}], "alone"),
    ],
)
def test_bad_conversations(turns, words):
    found = read_rows([{"messages": turns}, {"messages": CHAT}])
    assert len(found.rows) == 1 and len(found.bad) == 1 and re.search(words, found.bad[0].reason)


@pytest.mark.parametrize(
    ("name", "text", "columns", "words"),
    [
        ("none.jsonl", None, {}, "no such file"),
        ("x.txt", "a", {}, "expected one of"),
        ("x.pkl", "a", {}, "pickle"),
        ("x.jsonl", "", {}, "empty"),
        ("x.jsonl", "\n\n", {}, "no rows"),
        ("x.json", "{}", {}, "expected an array"),
        ("x.csv", "text,label\na,b\n", {}, "completion: label"),
        ("x.csv", "text,label\na,b\n", {"prompt": "txt", "completion": "label"}, "did you mean 'text'"),
        ("x.csv", "text,label\na,b\n", {"promt": "text"}, "did you mean 'prompt'"),
        ("x.parquet", "junk", {}, "Parquet"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, text, columns, words):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(VeneerError, match=words):
        read_rows(path, columns=columns)


def test_split_is_stable_and_keeps_twins_together():
    given = read_rows([{"prompt": f"p{i % 20}", "completion": str(i)} for i in range(60)]).rows
    train, held = split_rows(given, 0.2, 0)
    assert split_rows(given, 0.2, 0)[1] == held and len(train) + len(held) == 60 and 12 <= len(held) <= 14
    assert not {r.prompt[0]["content"] for r in train} & {r.prompt[0]["content"] for r in held}
