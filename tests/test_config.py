import json
from pathlib import Path

import pytest

from veneer.config import (
    AdaLoraConfig,
    DataConfig,
    LoraConfig,
    Recipe,
    TrainConfig,
    parse_recipe,
    read_recipe,
    shipped_recipes,
    write_recipe,
)
from veneer.errors import VeneerError

DATA = {"data": {"train": "x.jsonl"}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modle": "x", **DATA}, "unknown key 'modle'; did you mean 'model'"),
        ({**DATA, "train": {"batchsize": 2}}, "unknown key 'batchsize' in train; did you mean 'batch_size'"),
        ({**DATA, "lora": {"r": 0}}, "lora.r"),
        ({**DATA, "lora": {"targets": []}}, "lora.targets"),
        ({**DATA, "quantize": "int4"}, "expected one of nf4, fp4, int8"),
        ({**DATA, "train": {"learning_rate": -1}}, "above 0"),
        ({"data": {"train": "x", "eval": 1.5}}, "between 0 and 1"),
        ({**DATA, "train": {"early_stopping": 2}}, "data.eval"),
        ({}, "missing key 'data'"),
    ],
)
def test_bad_recipes(values, words):
    with pytest.raises(VeneerError, match=words):
        parse_recipe(values)


def test_all_problems_at_once():
    with pytest.raises(VeneerError) as caught:
        parse_recipe({"modle": 1, "lora": {"r": 0, "rnk": 2}, "train": {"epochs": "many"}, **DATA})
    assert len(caught.value.problems) == 4


def test_files_overrides_and_round_trip(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data: {train: a.jsonl}\ntrain: {learning_rate: 2e-3}\n")
    recipe = read_recipe(path, ["train.epochs=3", "lora.r=8", "data.columns={prompt: text}"])
    assert (recipe.train.learning_rate, recipe.train.epochs, recipe.lora.r) == (0.002, 3, 8)
    path.write_text(write_recipe(recipe))
    assert read_recipe(path) == recipe
    for text, words in [
        ("a: [", "not valid YAML"),
        ("", "found nothing"),
        ("- 1", "found a list"),
        ("a: 2020-13-45", "not valid YAML: month must be"),
    ]:
        path.write_text(text)
        with pytest.raises(VeneerError, match=words):
            read_recipe(path)
    path.write_text("data: {train: a.jsonl}")
    assert read_recipe(path, ["train.out=2020-13-45"]).train.out == "2020-13-45"  # no date: plain text
    for override in ("x", "a..b=1", "data.train.x.y=1"):
        path.write_text("data: {train: a.jsonl}")
        with pytest.raises(VeneerError):
            read_recipe(path, [override])
    with pytest.raises(VeneerError, match="shipped recipes: demo, production, quality, quick"):
        read_recipe("none.yaml")


@pytest.mark.parametrize("name", ["demo", "production", "quality", "quick"])
def test_shipped_recipes_are_valid(name):
    assert name in shipped_recipes() and read_recipe(name).lora.r in (16, 32, 64)


@pytest.mark.parametrize(
    "values",
    [
        {"r": True},
        {"alpha": True},
        {"rank_pattern": {"q": True}},
        {"tokens": [True]},
        {"layers": [True]},
        {"depth": [4, True]},
    ],
)
def test_true_is_no_number(values):
    with pytest.raises(VeneerError, match="found true, expected a number"):
        LoraConfig(**values)


def settings_rows(settings):
    for name, field in settings.model_fields.items():
        if name not in ("lora", "data") and field.annotation is not TrainConfig:
            default = "needed" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
            yield f"| `{name}` | {default.replace('null', '')} | {field.description} |"


def test_the_page_of_settings_is_true():
    page = (Path(__file__).parent.parent / "docs" / "recipe.md").read_text(encoding="utf-8")
    expected = [
        row for part in (Recipe, LoraConfig, AdaLoraConfig, DataConfig, TrainConfig) for row in settings_rows(part)
    ]
    assert [line for line in page.splitlines() if line.startswith("| `")] == expected
