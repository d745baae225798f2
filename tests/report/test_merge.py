"""Merging with proof: the nearer base, the tolerance, what is known of the base in training; and the figures of a divergence."""

import json
import math

import pytest
import torch
from models.test_merging import adapter, logits, written
from safetensors.torch import load_file, save_file

import veneer
from veneer.errors import RefusedError
from veneer.evaluation import divergence
from veneer.report.merge import merge_model


def test_a_divergence_by_hand():
    a, b = torch.tensor([[0.0, math.log(3.0)], [2.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    p = torch.tensor([[0.25, 0.75], [math.exp(2) / (1 + math.exp(2)), 1 / (1 + math.exp(2))]])
    q = torch.tensor([[0.5, 0.5], [1 / (1 + math.e), math.e / (1 + math.e)]])
    expected = float((p * (p / q).log()).sum(1).mean())
    found = divergence([a[:1], a[1:]], [b[:1], b[1:]])
    assert found["kl"] == pytest.approx(expected, rel=1e-5) and found["tokens"] == 2
    assert found["max_logit_difference"] == pytest.approx(2) and found["top1_agreement"] == 0.0
    assert divergence([a], [a])["kl"] == pytest.approx(0, abs=1e-7)


def test_the_nearer_base_is_taken_and_both_are_told(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, quantize="nf4")
    report = merge_model(str(folder), [path], tmp_path / "out")
    measured = report["measured"]
    assert (
        measured["nf4"]["kl"] < measured["16-bit"]["kl"] and report["onto"] == "nf4" and "measured" in report["chosen"]
    )
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder, path, quantize="nf4"), rtol=1e-4, atol=1e-4)
    written_report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written_report["measured"] == measured and written_report["chosen"] == report["chosen"]
    assert report["kl"] == pytest.approx(report["divergence"]["kl"]) and report["trained_on"] == "nf4"


def test_beyond_the_tolerance_nothing_is_written_but_by_force(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, quantize="nf4")
    kl = merge_model(str(folder), [path], tmp_path / "a", onto="16-bit", tolerance=1.0)["kl"]
    assert kl > 0
    with pytest.raises(RefusedError, match=r"too far from base and adapter: found a KL of"):
        merge_model(str(folder), [path], tmp_path / "b", onto="16-bit", tolerance=kl / 2)
    assert not (tmp_path / "b").exists()
    report = merge_model(str(folder), [path], tmp_path / "b", onto="16-bit", tolerance=kl / 2, force=True)
    assert report["forced"] and report["kl"] == pytest.approx(kl)
    assert merge_model(str(folder), [path], tmp_path / "c", check=False)["divergence"] is None


def test_an_adapter_that_does_not_say_what_it_was_trained_on(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, quantize="nf4")
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})  # as PEFT's
    report = merge_model(str(folder), [path], tmp_path / "a")
    assert report["onto"] == "16-bit" and "not known" in report["chosen"] and "not known" in report["trained_on"]
    report = merge_model(str(folder), [path], tmp_path / "b", trained_on="nf4")
    assert report["onto"] == "nf4" and report["trained_on"] == "nf4"


def test_single_quantised_training_is_merged_onto_the_same_codes(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    model, _ = veneer.load(folder, quantize="nf4", double_quant=False, dtype="float32", fused=False)
    veneer.attach(model, veneer.LoraConfig(r=4, targets="all-linear"), seed=0)
    path = veneer.save_adapter(model, tmp_path / "single")
    report = merge_model(str(folder), [path], tmp_path / "out", onto="nf4")
    assert report["kl"] < 1e-9 and merge_model(str(folder), [path], tmp_path / "auto")["measured"]["nf4"]["kl"] < 1e-9
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_both_bases_are_measured_for_several_adapters(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    paths = [adapter(tmp_path, folder, name, quantize="nf4") for name in ("a", "b")]
    report = merge_model(str(folder), paths, tmp_path / "out")
    assert report["onto"] == "nf4" and report["measured"]["nf4"]["kl"] < report["measured"]["16-bit"]["kl"]
    assert report["kl"] < report["measured"]["16-bit"]["kl"]


def test_options_that_do_not_go_together(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder)
    with pytest.raises(veneer.VeneerError) as raised:
        merge_model(str(folder), [path], tmp_path / "no", check=False, tolerance=1.0, force=True, texts=["a"],
                    residual_rank=4)  # fmt: skip
    found = [problem.partition(":")[0] for problem in raised.value.problems]
    assert found == ["--text", "--tolerance", "--force", "--residual-rank"] and not (tmp_path / "no").exists()


def test_what_cannot_be_asked(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    a, b = adapter(tmp_path, folder, "a", quantize="nf4"), adapter(tmp_path, folder, "b")
    for more, message in (
        ({"onto": "nf5"}, "--onto: found"), ({"trained_on": "x"}, "--trained-on: found"), ({"requantize": "x"}, "--requantize"),
        ({"requantize": "int8"}, "merges onto a base in nf4"),
    ):  # fmt: skip
        with pytest.raises(veneer.VeneerError, match=message):
            merge_model(str(folder), [a], tmp_path / "no", **more)
    with pytest.raises(veneer.VeneerError, match="trained on different bases"):
        merge_model(str(folder), [a, b], tmp_path / "no")
    with pytest.raises(veneer.VeneerError, match="found several adapters, expected one"):
        merge_model(str(folder), [a, a], tmp_path / "no", requantize="nf4")
    assert not (tmp_path / "no").exists()
