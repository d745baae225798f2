import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

import veneer
from veneer.adapters.attach import lora_layers
from veneer.errors import VeneerError
from veneer.report.adapter import LISTED, describe, inspect_adapter, plot


@pytest.fixture
def base(tmp_path, tokenizer):
    return veneer.save_model(make_model(), tokenizer, tmp_path / "model")


def adapter(base, path, quantize=None, change=None, **settings):
    model, _ = veneer.load(base, quantize=quantize, dtype="float32")
    veneer.attach(model, veneer.LoraConfig(**({"r": 6, "alpha": 12} | settings)), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_B["default"].normal_(generator=generator)
            if change:
                change(name, layer.lora_A["default"], layer.lora_B["default"])
    veneer.save_adapter(model, path)
    return model


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_each_layer_as_its_dense_update_says(base, tmp_path, quantize):
    model = adapter(base, tmp_path / "a", quantize)
    found = inspect_adapter(tmp_path / "a", str(base))
    assert found["layers"] == len(found["by_layer"]) == 14 and found["ranks"] == [6]
    plain = make_model()
    squares = []
    for row in found["by_layer"]:
        dense = lora_layers(model)[row["layer"]].delta("default").double()
        s = torch.linalg.svdvals(dense)
        weight = plain.get_submodule(row["layer"]).weight
        assert row["shape"] == list(dense.shape)
        assert row["singular_values"] == pytest.approx(s[:6].tolist(), rel=1e-4)
        assert row["norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
        assert row["relative_norm"] == pytest.approx(float(dense.norm() / weight.norm()), rel=1e-2)
        assert row["stable_rank"] == pytest.approx(float(dense.norm() ** 2 / s[0] ** 2), rel=1e-4)
        assert 1 <= row["stable_rank"] <= row["effective_rank"] <= 6
        squares.append((float(dense.norm() ** 2), float(weight.norm() ** 2)))
    total, under = (sum(x) for x in zip(*squares, strict=True))
    assert found["norm"] == pytest.approx(total**0.5) and found["relative_norm"] == pytest.approx(
        (total / under) ** 0.5, rel=1e-2
    )


def test_a_4_bit_base_is_decoded_one_layer_at_a_time(base, tmp_path, tokenizer):
    model, _ = veneer.load(base, quantize="nf4", dtype="float32", fused=False)
    veneer.save_model(model, tokenizer, tmp_path / "four")
    adapter(base, tmp_path / "a", "nf4")
    found = inspect_adapter(tmp_path / "a", str(tmp_path / "four"))
    for row in found["by_layer"]:
        weight = model.get_submodule(row["layer"]).dequantize(torch.float32)
        assert row["base_norm"] == pytest.approx(float(weight.norm()), rel=1e-6)


def test_an_update_of_rank_two_needed_rank_two(base, tmp_path):
    def of_rank_two(name, a, b):
        b[:, 2:] = 0
        if "q_proj" in name:
            b[:, 1:] = 0

    adapter(base, tmp_path / "a", change=of_rank_two)
    found = inspect_adapter(tmp_path / "a")
    assert found["enough"]["rank_99"] == {"largest": 2, "median": 2}
    assert {row["rank_99"] for row in found["by_layer"] if "q_proj" in row["layer"]} == {1}
    assert {round(row["effective_rank"], 6) for row in found["by_layer"] if "q_proj" in row["layer"]} == {1.0}
    said = describe(found)
    assert "rank that was enough   2 for 95% of every layer's update, 2 for 99%" in said and "it has 6" in said


def test_the_scale_of_each_layer_is_its_own(base, tmp_path):
    adapter(base, tmp_path / "a", rslora=True)
    config = tmp_path / "a/adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"alpha_pattern": {"q_proj": 48}}))
    rows = {row["layer"]: row for row in inspect_adapter(tmp_path / "a")["by_layer"]}
    assert rows["model.layers.0.self_attn.q_proj"]["scaling"] == pytest.approx(48 / 6**0.5)
    assert rows["model.layers.0.self_attn.k_proj"]["scaling"] == pytest.approx(12 / 6**0.5)


def test_the_base_is_found_by_the_name_in_the_adapter_or_a_note_says_it_is_not(base, tmp_path):
    adapter(base, tmp_path / "a")
    found = inspect_adapter(tmp_path / "a")
    assert found["base"] == str(base) and found["relative_norm"] and not found["notes"]
    base.rename(tmp_path / "gone")
    found = inspect_adapter(tmp_path / "a")
    assert found["base"] is None and found["relative_norm"] is None
    assert "is not on this machine" in found["notes"][0] and found["norm"] > 0


def test_a_base_that_does_not_fit_is_an_error_where_it_was_named_and_a_note_where_not(base, tmp_path, tokenizer):
    adapter(base, tmp_path / "a")
    other = veneer.save_model(make_model(intermediate_size=64), tokenizer, tmp_path / "other")
    with pytest.raises(VeneerError, match="6 problems") as caught:
        inspect_adapter(tmp_path / "a", str(other))
    assert "gate_proj: found (64, 48)" in str(caught.value) and "another model" in str(caught.value)
    base.rename(tmp_path / "gone")
    other.rename(base)
    found = inspect_adapter(tmp_path / "a")
    assert found["relative_norm"] is None and "6 layers do not fit the base found" in found["notes"][0]


def test_names_without_their_first_part_are_found(base, tmp_path):
    adapter(base, tmp_path / "a")
    file = base / "model.safetensors"
    save_file({key.removeprefix("model."): value for key, value in load_file(file).items()}, file)
    assert inspect_adapter(tmp_path / "a", str(base))["relative_norm"]


def test_a_tied_head_is_compared_with_the_embeddings(base, tmp_path):
    adapter(base, tmp_path / "a", targets=["q_proj", "lm_head"])
    rows = {row["layer"]: row for row in inspect_adapter(tmp_path / "a", str(base))["by_layer"]}
    assert rows["lm_head"]["base_norm"] == pytest.approx(float(make_model().lm_head.weight.norm()), rel=1e-2)


def test_a_fresh_adapter_has_no_update(base, tmp_path):
    adapter(base, tmp_path / "a", change=lambda name, a, b: b.zero_())
    found = inspect_adapter(tmp_path / "a")
    assert found["norm"] == 0 and found["enough"]["rank_95"]["largest"] == 0
    assert json.loads(json.dumps(found, allow_nan=False)) and "0.00%" in describe(found)


def test_many_layers_are_shown_by_kind_or_all(tmp_path, tokenizer):
    deep = veneer.save_model(make_model(num_hidden_layers=7), tokenizer, tmp_path / "deep")
    adapter(deep, tmp_path / "a")
    found = inspect_adapter(tmp_path / "a")
    assert len(found["by_layer"]) == 49 > LISTED
    assert "q_proj x 7" in describe(found) and "layers.3" not in describe(found)
    assert "model.layers.3.self_attn.q_proj" in describe(found, every_layer=True)


@pytest.mark.parametrize(("name", "start"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml")])
def test_the_plot(base, tmp_path, name, start):
    pytest.importorskip("matplotlib")
    adapter(base, tmp_path / "a", change=lambda n, a, b: b.zero_() if "k_proj" in n else None)
    file = plot(inspect_adapter(tmp_path / "a"), tmp_path / name)
    content = file.read_bytes()
    assert content.startswith(start) and len(content) > 5_000
    with pytest.raises(VeneerError, match=r"ending in \.png or \.svg"):
        plot(inspect_adapter(tmp_path / "a"), tmp_path / "p.pdf")


def test_without_matplotlib_the_plot_says_what_to_install(base, tmp_path, monkeypatch):
    adapter(base, tmp_path / "a")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(VeneerError, match=r"veneer\[report\]"):
        plot(inspect_adapter(tmp_path / "a"), tmp_path / "p.png")
