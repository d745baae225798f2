import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

import veneer
from veneer.models.load import describe_model
from veneer.quant.linear import Nf4Linear

IDS = torch.arange(1, 30)[None]


@pytest.fixture
def folder(tmp_path, tokenizer):
    return veneer.save_model(make_model(), tokenizer, tmp_path / "model")


def test_folder_round_trip(folder, tokenizer):
    model, again = veneer.load(folder, dtype="float32")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, make_model()(input_ids=IDS).logits)
    assert again("hé <|im_end|>").input_ids == tokenizer("hé <|im_end|>").input_ids
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_sharded_folder_and_a_missing_shard(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard in (0, 1):
        part = {n: tensors[n] for n in names[shard::2]}
        save_file(part, folder / f"model-0000{shard + 1}-of-00002.safetensors")
        weight_map |= dict.fromkeys(part, f"model-0000{shard + 1}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model, _ = veneer.load(folder, dtype="float32")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, make_model()(input_ids=IDS).logits)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(veneer.VeneerError, match="shard model-00002-of-00002"):
        veneer.load(folder)


def test_four_bit_folder_is_read_back(folder, tmp_path):
    model, tokenizer = veneer.load(folder, quantize="nf4", dtype="float32")
    veneer.save_model(model, tokenizer, tmp_path / "four")
    again, _ = veneer.load(tmp_path / "four", dtype="float32")
    assert isinstance(again.model.layers[1].mlp.down_proj, Nf4Linear)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert describe_model(tmp_path / "four")["quantization"] == "nf4"
    with pytest.raises(veneer.VeneerError, match="4-bit already"):
        veneer.load(tmp_path / "four", quantize="nf4")


def test_damage_and_wrong_names_are_clear(folder, tmp_path):
    for name, words in [
        ("no/such/folder", "no such folder"), ("x.gguf", "missing file"), ("w.bin", "pickle"), ("a-b/not-cached", "local cache"),
    ]:  # fmt: skip
        with pytest.raises(veneer.VeneerError, match=words):
            veneer.load(name)
    for kwargs, words in [
        ({"quantize": "fp4"}, "nf4"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"device": "toaster"}, "device"),
    ]:
        with pytest.raises(veneer.VeneerError, match=words):
            veneer.load(folder, **kwargs)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(veneer.VeneerError, match="not a valid safetensors"):
        veneer.load(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(veneer.VeneerError, match="pickle"):
        veneer.load(folder)


def test_weights_of_another_model_are_listed(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(veneer.VeneerError, match=r"found \(96, 48\), expected \(128, 48\)"):
        veneer.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.py"}}))
    with pytest.raises(veneer.VeneerError, match="code of its own"):
        veneer.load(folder)


def test_fused_head_and_packed_attention_equal_the_original():
    torch.manual_seed(0)
    plain, fused = make_model(fused=False), make_model()
    labels = IDS.clone()
    labels[:, :5] = -100
    a = plain(input_ids=IDS, labels=labels).loss
    b = fused(input_ids=IDS, labels=labels, skip_logits=True).loss
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.slow
def test_smollm2_answers_and_tokenizer_is_right():
    model, tokenizer = veneer.load("smollm2")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )  # fmt: skip
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert tokenizer.eos_token == "<|im_end|>" and model.name_or_path == "smollm2"
