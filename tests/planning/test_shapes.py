"""Models by numbers, and configs that transformers does not know."""

import json
import sys

import pytest
from conftest import make_model

import veneer
from veneer import cli
from veneer.planning.shapes import shape_of, skeleton_maker

SEVEN = {"layers": 32, "hidden": 4096, "heads": 32, "intermediate": 11008, "vocab": 32000}


def count(model):
    return sum(p.numel() for p in skeleton_maker(model)[0]().parameters())


def test_numbers_are_a_llama_of_these_sizes():
    assert count(SEVEN) == count("llama-7b") == 6_738_415_616
    eight = shape_of("layers=32, hidden=4096,heads=32,kv_heads=8,intermediate=14336,vocab=128256")
    assert count(eight) == count("llama3-8b")
    found = veneer.plan(SEVEN, seq_len=64, recompute="full", budget="100GB", device="cpu")
    assert found["model"].startswith("layers=32,hidden=4096") and found["notes"] == ["a Llama of these sizes"]


def test_all_that_is_wrong_with_numbers_is_said_at_once():
    with pytest.raises(veneer.VeneerError) as caught:
        skeleton_maker({"layers": -3, "hidden": 4096, "heads": 10**9, "what": 1})
    told = str(caught.value)
    assert len(caught.value.problems) == 5
    for word in ("layers", "-3", "heads", "intermediate", "vocab", "what"):
        assert word in told
    with pytest.raises(veneer.VeneerError, match="multiple of heads"):
        skeleton_maker({**SEVEN, "heads": 3})
    with pytest.raises(veneer.VeneerError, match="divisor of heads"):
        skeleton_maker({**SEVEN, "kv_heads": 5})
    with pytest.raises(veneer.VeneerError) as caught:
        shape_of("layers=32,hiden=4096,heads=many,vocab")
    assert len(caught.value.problems) == 3 and "hidden" in str(caught.value)


@pytest.fixture
def config(tmp_path, tokenizer):
    """Writes a model's config.json with changes; None: without that field."""
    veneer.save_model(make_model(), tokenizer, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    raw = json.loads(file.read_text())

    def write(**changes):
        values = {key: value for key, value in {**raw, **changes}.items() if value is not None}
        file.write_text(json.dumps(values))
        return str(file.parent)

    return write


def test_an_unknown_architecture_is_planned_as_a_llama_and_that_is_said(config, capsys, monkeypatch):
    known = veneer.plan(config(), seq_len=64, rank=2)
    unknown = veneer.plan(config(model_type="who_knows"), seq_len=64, rank=2)
    assert unknown["parts"] == known["parts"] and known["notes"] == []
    assert "'who_knows' is not known" in unknown["notes"][0] and "as a Llama" in unknown["notes"][0]
    monkeypatch.setattr(
        sys, "argv", ["veneer", "plan", config(model_type="who_knows"), "--seq-len", "64", "--rank", "2"]
    )
    with pytest.raises(SystemExit):
        cli.main()
    assert "as a Llama" in capsys.readouterr().out


def test_other_names_of_sizes(config):
    known = veneer.plan(folder := config(), seq_len=64, rank=2)
    with open(f"{folder}/config.json") as file:
        raw = json.load(file)
    named = {"n_embd": raw["hidden_size"], "n_layer": raw["num_hidden_layers"], "n_head": raw["num_attention_heads"]}
    other = config(model_type="mine", hidden_size=None, num_hidden_layers=None, num_attention_heads=None, **named)
    assert veneer.plan(other, seq_len=64, rank=2)["parts"] == known["parts"]


def test_fields_that_an_unknown_architecture_lacks_are_listed(config):
    folder = config(model_type="who_knows", hidden_size=None, vocab_size=-5, num_hidden_layers=10**9)
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.plan(folder)
    told = str(caught.value)
    assert len(caught.value.problems) == 3
    assert "hidden (hidden_size) is missing" in told and "-5" in told and "1000000000" in told


def test_fields_of_a_known_architecture(config):
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.plan(config(hidden_size=-64, vocab_size=0, num_hidden_layers="many"))
    assert len(caught.value.problems) == 3
    found = veneer.plan(config(num_hidden_layers=None), seq_len=64, rank=2)
    assert "num_hidden_layers is missing: transformers' own" in found["notes"][0]
