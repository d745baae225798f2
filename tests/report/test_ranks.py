import json

import pytest
from conftest import make_mixture, make_model
from transformers import AutoConfig, AutoModelForCausalLM

import veneer
from veneer import machine
from veneer.adapters.targets import resolve_targets
from veneer.errors import VeneerError
from veneer.report import ranks


def cells(table):
    return {(row["targets"], row["r"]): row for row in table["rows"]}


def test_a_seed_figure_rank_8_of_a_4096_square_matrix():
    (row,) = ranks.rank_table("4096x4096", ranks=(8,))["rows"]
    assert row["parameters"] == 65_536
    assert row["parameters"] / (4096 * 4096) == pytest.approx(1 / 256)  # the seeds: 256 times fewer, 0.39%
    assert (row["bytes_fp32"], row["bytes_16bit"]) == (262_144, 131_072)


def test_a_seed_figure_gpt_3_at_rank_1_on_q_and_v():
    found = ranks.rank_table(None, "gpt3", (1, 4, 8, 64))
    assert 174.5e9 < found["parameters"] < 175.1e9
    qv = [cells(found)["qv", r]["parameters"] for r in (1, 4, 8, 64)]
    assert qv == [r * 96 * 2 * (12288 + 12288) for r in (1, 4, 8, 64)]
    assert qv[0] == 4_718_592  # "4.7 million"; another seed's 0.3 M for it is 16 times too low
    assert cells(found)["qv", 1]["share"] == pytest.approx(4_718_592 / (found["parameters"] + 4_718_592))


def test_the_published_figures_of_llamas():
    seven = cells(ranks.rank_table(None, "llama-7b", (8, 16)))
    assert seven["qv", 8]["parameters"] == 4_194_304 and seven["attention", 8]["parameters"] == 8_388_608
    assert seven["all-linear", 8]["parameters"] == 19_988_480 and seven["all-linear", 16]["parameters"] == 39_976_960
    eight = cells(ranks.rank_table(None, "llama3-8b", (16,)))
    assert eight["attention", 16]["parameters"] == 13_631_488 and eight["all-linear", 16]["parameters"] == 41_943_040
    assert ranks.rank_table(None, "llama-7b", (1,))["parameters"] == 6_738_415_616
    assert ranks.rank_table(None, "llama3-8b", (1,))["parameters"] == 8_030_261_248
    assert ranks.rank_table(None, "mistral-7b", (1,))["parameters"] == 7_241_732_096
    assert ranks.rank_table(None, "llama2-70b", (1,))["parameters"] == 68_976_648_192


@pytest.mark.parametrize("target", ["attention", "qv", "mlp", "all-linear"])
def test_the_table_is_what_attaching_gives(tmp_path, tokenizer, target):
    folder = veneer.save_model(make_model(), tokenizer, tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.unlink()  # the config alone is enough
    row = cells(ranks.rank_table(str(folder), ranks=(4,)))[target, 4]
    model = make_model()
    veneer.attach(model, veneer.LoraConfig(r=4, targets=target))
    count = veneer.count_parameters(model)
    assert (row["parameters"], row["share"]) == (count.trainable, pytest.approx(count.ratio))


@pytest.mark.parametrize("target", ["attention", "mlp", "all-linear"])
def test_the_experts_of_a_mixture_are_counted(tmp_path, target):
    model = make_mixture("qwen3_moe")
    model.config.save_pretrained(tmp_path)
    row = cells(ranks.rank_table(str(tmp_path), ranks=(4,)))[target, 4]
    veneer.attach(model, veneer.LoraConfig(r=4, targets=target))
    assert row["parameters"] == veneer.count_parameters(model).trainable


def test_a_rank_above_a_width_has_no_figure(tmp_path, tokenizer):
    folder = veneer.save_model(make_model(), tokenizer, tmp_path / "model")
    found = cells(ranks.rank_table(str(folder), ranks=(24, 32)))
    assert found["qv", 24]["parameters"] and found["qv", 32]["parameters"] is None  # v_proj is 24 x 48
    assert "above the width of a layer" in ranks.describe(ranks.rank_table(str(folder), ranks=(32,)))


def test_qv_of_a_fused_layer_is_refused_with_its_name():
    config = AutoConfig.for_model(
        "phi3", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(VeneerError, match=r"qv: query, key and value are one layer here \(qkv_proj\)"):
        resolve_targets(model, "qv")


def test_qv_is_only_of_attention_and_written_as_suffixes(tmp_path):
    model = make_model()
    names = resolve_targets(model, "qv")
    assert {name.rsplit(".", 1)[-1] for name in names} == {"q_proj", "v_proj"} and len(names) == 4
    veneer.attach(model, veneer.LoraConfig(r=2, targets="qv"))
    veneer.save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


def test_a_preset_that_has_no_layer_is_a_note_not_an_error(tmp_path, tokenizer):
    config = AutoConfig.for_model(
        "phi3", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = ranks.rank_table(str(tmp_path), ranks=(2,))
    assert "qv" not in found["layers"] and any("one layer here" in note for note in found["notes"])
    assert cells(found)["all-linear", 2]["parameters"] == 2 * (32 + 64 + 32 + 32 + 32 + 128 + 64 + 32)


def test_no_weight_is_read_or_held(monkeypatch):
    monkeypatch.setattr("veneer.models.load.read_tensors", None)
    before = machine.current_bytes()
    assert ranks.rank_table(None, "llama3-70b", (1,))["parameters"] == 70_553_706_496
    assert machine.current_bytes() - before < 300e6


def test_bad_input():
    for arguments, words in [
        ((None,), "one of them"),
        (("smollm2", "gpt3"), "one of them"),
        ((None, "gpt-3"), "did you mean 'gpt3'"),
        ((None, "gpt3", (0, 4)), "whole numbers from 1"),
        (("no/of/this",), "no such folder"),
    ]:
        with pytest.raises(VeneerError, match=words):
            ranks.rank_table(*arguments)


@pytest.mark.slow
def test_the_embedded_model_from_its_header():
    found = ranks.rank_table("smollm2", ranks=(16,))
    assert found["parameters"] == 134_515_008 and cells(found)["all-linear", 16]["parameters"] == 4_884_480


def test_a_matrix_without_columns_is_none():
    with pytest.raises(veneer.VeneerError):
        ranks.rank_table("4096x0")
