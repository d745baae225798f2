"""A merge into a model that stays in 4 or 8 bits: the nearest way of each layer, and the residual adapter."""

import json

import pytest
import torch
from conftest import make_model
from models.test_merging import adapter, logits, written

import veneer
from veneer.adapters.attach import lora_layers
from veneer.models.requantize import merge_quantized
from veneer.quant.four_bit import FourBitTensor
from veneer.quant.linear import quantized_layers


def weights(folder, *adapters, quantize=None):
    """Dense fp32 weights of all linears of a model with adapters."""
    model, _ = veneer.load(folder, dtype="float32", quantize=quantize, fused=False)
    for path in adapters:
        veneer.load_adapter(model, path)
    layers = lora_layers(model)
    found = {path: layer.merged("default").detach() for path, layer in layers.items()}
    for path, layer in quantized_layers(model).items():
        path = path.removesuffix(".base_layer")
        if path not in found:
            found[path] = layer.dequantize(torch.float32)
    return found


def error(found, wanted):
    return sum(float((found[p] - wanted[p]).square().sum()) for p in wanted) ** 0.5


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("rank", [0, 2, 4, 9])
def test_what_is_left_is_the_nearest_and_its_error_is_told(tmp_path, tokenizer, kind, rank):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, quantize=kind, targets=["q_proj", "down_proj"])
    wanted, base = weights(folder, path, quantize=kind), weights(folder, quantize=kind)
    report = merge_quantized(folder, path, tmp_path / "out", kind=kind, rank=rank)
    residual = [tmp_path / "out" / "residual"] if rank else []
    assert (tmp_path / "out" / "residual").exists() == bool(rank)
    found, update = weights(tmp_path / "out", *residual), error(base, wanted)
    assert report["error"]["with residual"] == pytest.approx(error(found, wanted) / update, abs=2e-3)
    bare = weights(tmp_path / "out")
    assert report["error"]["without residual"] == pytest.approx(error(bare, wanted) / update, abs=2e-3)
    assert veneer.load(tmp_path / "out")[0].veneer_quantization == kind
    if rank >= 4:  # the adapter's own rank: nothing need be lost
        assert report["ways"] == {"kept": 4} and report["error"]["with residual"] < 1e-5
        torch.testing.assert_close(
            logits(tmp_path / "out", *residual), logits(folder, path, quantize=kind), rtol=1e-4, atol=1e-4
        )
    elif rank:
        assert report["error"]["with residual"] < 0.95 * report["error"]["without residual"]
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report


def test_onto_the_16_bit_base(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    for number, settings in enumerate(({}, {"dora": True})):
        path = adapter(tmp_path, folder, f"a{number}", targets=["q_proj", "v_proj"], **settings)
        out = tmp_path / f"out{number}"
        report = merge_quantized(folder, path, out, rank=16, decoded=False)
        model, _ = veneer.load(folder, dtype="float32", fused=False)
        veneer.load_adapter(model, path)
        wanted = {p: layer.merged("default").detach() for p, layer in lora_layers(model).items()}
        found = weights(out, out / "residual")
        update = sum(float((w - model.get_submodule(p).weight).square().sum()) for p, w in wanted.items()) ** 0.5
        assert report["onto"] == "16-bit"
        assert report["error"]["with residual"] == pytest.approx(error(found, wanted) / update, abs=2e-3)


def test_biases_and_layers_that_allow_less_rank(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer, lambda: make_model(attention_bias=True, fused=False))
    path = adapter(tmp_path, folder, quantize="nf4", targets="attention", lora_bias=True)
    report = merge_quantized(folder, path, tmp_path / "out", rank=32)  # k_proj and v_proj have 24 rows
    expected = logits(folder, path, quantize="nf4")
    torch.testing.assert_close(logits(tmp_path / "out", tmp_path / "out" / "residual"), expected, rtol=1e-4, atol=1e-4)
    assert report["inputs"] and report["outputs"].keys() == {"model.safetensors", "residual/adapter_model.safetensors"}
    bare = written(tmp_path, tokenizer, name="bare")
    path = adapter(tmp_path, bare, "c", quantize="nf4", targets="attention", lora_bias=True)
    with pytest.raises(veneer.VeneerError, match="lora_bias: not a quantised linear"):
        merge_quantized(bare, path, tmp_path / "no")


def test_nearest_codes_under_given_scales():
    g = torch.Generator().manual_seed(0)
    for shape in ((7, 13), (64, 48), (5, 64)):
        weight = torch.randn(shape, generator=g)
        for kind in ("nf4", "fp4"):
            four = FourBitTensor.quantize(weight, kind)
            same = four.nearest(four.dequantize(torch.float32))
            assert torch.equal(same.dequantize(torch.float32), four.dequantize(torch.float32))
            moved = weight + 0.2 * torch.randn(shape, generator=g)
            near = four.nearest(moved).dequantize(torch.float32)
            values = four.scales().repeat_interleave(64)[: weight.numel()].view(shape)[..., None]
            from veneer.ops.reference import CODE_BOOKS

            best = (values * CODE_BOOKS[kind].values - moved[..., None]).abs().amin(-1)
            torch.testing.assert_close((near - moved).abs(), best, rtol=1e-5, atol=1e-6)


def test_what_cannot_stay_quantised(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, targets=["q_proj", "lm_head"])
    with pytest.raises(veneer.VeneerError, match="lm_head: not a quantised linear"):
        merge_quantized(folder, path, tmp_path / "out")
    path = adapter(tmp_path, folder, "b", targets=["q_proj"], modules_to_save=["norm"], tokens=[3])
    with pytest.raises(veneer.VeneerError, match=r"model.norm.weight: not a quantised linear"):
        merge_quantized(folder, path, tmp_path / "out")
    for rank in (-1, 5000, 1.5, True):
        with pytest.raises(veneer.VeneerError, match="rank of the residual"):
            merge_quantized(folder, path, tmp_path / "out", rank=rank)
    four, tok = veneer.load(folder, quantize="nf4", fused=False)
    veneer.save_model(four, tok, tmp_path / "four")
    with pytest.raises(veneer.VeneerError, match="is stored in nf4: found int8"):
        merge_quantized(tmp_path / "four", path, tmp_path / "out", kind="int8")
    with pytest.raises(veneer.VeneerError, match="no 16-bit base in it"):
        merge_quantized(tmp_path / "four", path, tmp_path / "out", decoded=False)
    assert not (tmp_path / "out").exists()
