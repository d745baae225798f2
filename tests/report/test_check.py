"""`veneer check` of whole recipes, in words and in JSON, and what `veneer train` looks at first."""

import json

import pytest
import torch
from conftest import make_model, make_tokenizer

import veneer
from veneer.config import parse_recipe
from veneer.models.merging import REPORT_FILE
from veneer.planning import plan as planning
from veneer.planning.memory import CannotPlanError
from veneer.report import check
from veneer.report.check import check_recipe, describe, require_sound


@pytest.fixture
def recipe(tmp_path):
    model = make_model(dtype=torch.bfloat16, hidden_size=64, eos_token_id=257, bos_token_id=256)
    veneer.save_model(model, make_tokenizer(), tmp_path / "model")

    def make(rows=None, data=(), **changes):
        rows = [{"prompt": f"lamp {n}", "completion": f"lamp {n} is on"} for n in range(48)] if rows is None else rows
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "model": str(tmp_path / "model"), "lora": {"r": 4, "alpha": 8},
            "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 0.1, **dict(data)}, "train": {"batch_size": 8},
        }  # fmt: skip
        return parse_recipe({**values, **changes})

    return make


def codes(found, *severities):
    return [f["code"] for f in found["findings"] if f["severity"] in severities]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantize": "nf4"},
        {"method": "full", "lora": None},
        {"lora": {"r": 4, "alpha": 8, "init": "eva"}},
        {"quantize": "nf4", "lora": {"r": 4, "alpha": 8, "init": "pissa"}},
    ],
)
def test_a_sound_recipe(recipe, changes):
    made = (
        recipe(**{key: value for key, value in changes.items() if value is not None})
        if changes.get("method") != "full"
        else None
    )
    if made is None:
        values = recipe().model_dump(exclude={"lora"})
        made = parse_recipe({**values, "method": "full"})
    found = check_recipe(made)
    assert codes(found, "note") == ["output"] and (found["errors"], found["warnings"]) == (0, 0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["plan"]["seconds"] > 0


def test_it_is_said_in_words(recipe):
    rows = [{"prompt": f"say {n} \x1b[31mred", "completion": f"lamp {n}\nis on"} for n in range(48)]
    found = check_recipe(recipe(rows=rows, lora={"r": 32}))
    text = describe(found)
    assert codes(found, "warning")[:2] == ["rank-without-alpha", "few-examples"]
    assert text.index("warning  rank-without-alpha") < text.index("rows: ")
    assert "[lamp 0\\nis on<|im_end|>]" in text and "\x1b" not in text  # nothing of the rows reaches the terminal
    assert "tokens a row: " in text and "█" in text and "planned memory: " in text and "bit for bit" in text
    assert text.endswith("0 errors, 2 warnings")
    coloured = describe(found, colours=True)
    assert (
        "\x1b[32mlamp 0\\nis on<|im_end|>\x1b[0m" in coloured and "\x1b[33m" in coloured and "[lamp 0" not in coloured
    )


def test_what_does_not_fit_is_an_error(recipe, monkeypatch):
    monkeypatch.setattr(planning, "available_bytes", lambda: 10**6)
    found = check_recipe(recipe())
    assert codes(found, "error") == ["memory"] and found["errors"] == 1
    assert "error  memory: this run does not fit" in describe(found) and "no batch was tried" in describe(found)


def test_what_does_not_fit_is_not_loaded(recipe, monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(planning, "available_bytes", lambda: 10**6)
    monkeypatch.setattr(check, "load_for", never)
    rows = [{"prompt": f"lamp {n}", "completion": f"lamp {n} is on"} for n in range(48)]
    found = check_recipe(recipe(rows=[*rows, *rows], lora={"r": 32}, quantize="nf4"))
    assert codes(found, "error") == ["memory"]
    assert codes(found, "warning") == ["duplicates", "rank-without-alpha", "few-examples"]
    assert found["facts"]["packing"]["on"] and not found["plan"]["fits"]


def test_a_batch_that_does_not_fit_in_fact_is_an_error(recipe, monkeypatch):
    def out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(check, "preflight", out)
    assert codes(check_recipe(recipe()), "error") == ["memory"]


def test_a_model_that_cannot_be_planned_is_checked_all_the_same(recipe, monkeypatch):
    def cannot(*_, **__):
        raise CannotPlanError("its memory cannot be planned", hint="begin small")

    monkeypatch.setattr(check, "plan_recipe", cannot)
    found = check_recipe(recipe())
    assert codes(found, "warning") == ["not-planned"] and found["facts"]["batch"]["gradients"]["none"] == 0


def test_there_has_to_be_a_place_for_the_result(recipe, tmp_path, monkeypatch):
    assert codes(check_recipe(recipe(train={"out": str(tmp_path / "new")})), "error", "note") == []
    (tmp_path / "there").mkdir()
    (tmp_path / "there/x").write_text("mine")
    found = check_recipe(recipe(train={"out": str(tmp_path / "there")}))
    assert codes(found, "error") == ["output"] and "not empty" in found["findings"][0]["found"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 1000})())
    found = check_recipe(recipe(train={"out": str(tmp_path / "new")}))
    assert codes(found, "error") == ["bad-input"] and "disk too small" in found["findings"][0]["found"]


def test_adalora_for_another_number_of_steps(recipe):
    found = check_recipe(recipe(lora={"r": 4, "alpha": 8, "adalora": {"steps": 7}}))
    assert codes(found, "error") == ["bad-input"] and "lora.adalora.steps" in found["findings"][0]["found"]


def test_nothing_of_a_rows_columns_reaches_the_terminal(recipe):
    rows = [{"prompt": f"lamp {n}", "completion": f"lamp {n} is on"} for n in range(48)]
    found = check_recipe(recipe(rows=[{"\x1b[2J": 1}, *rows]))
    assert "bad-rows" in codes(found, "warning") and "\x1b" not in describe(found)


def test_a_merged_base_is_pointed_out(recipe, tmp_path):
    (tmp_path / "model" / REPORT_FILE).write_text("{}")
    assert codes(check_recipe(recipe()), "error", "warning") == ["merged-base"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"columns": {"prompt": "question"}}}, "there is no column 'question'"),
        ({"lora": {"r": 4, "targets": ["nothing"]}}, "lora.targets"),
        ({"model": "none/of/this"}, "none/of/this"),
    ],
)
def test_bad_input_is_a_finding(recipe, changes, words):
    found = check_recipe(recipe(**changes))
    assert set(codes(found, "error")) == {"bad-input"} and words in found["findings"][0]["found"]
    assert "error  bad-input" in describe(found)


def test_train_hands_on_warnings_and_refuses_errors(recipe):
    made = recipe(lora={"r": 32})
    model, tokenizer = veneer.load(made.model)
    veneer.attach(model, made.lora, seed=0)
    said = []
    require_sound(made, model, tokenizer, said.append)
    assert [text.split(":")[0] for text in said] == ["rank-without-alpha", "few-examples"]
    made = recipe(
        rows=[{"text": f"<|im_start|>user\n{n}<|im_end|>"} for n in range(48)], data={"eval": made.data.train}
    )
    said.clear()
    with pytest.raises(veneer.VeneerError, match=r"(?s)2 problems.*overlap.*rendered-already.*--no-check"):
        require_sound(made, model, tokenizer, said.append)
    assert "few-examples" in said[1]
