import json
import shutil
import warnings

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import veneer
from veneer.models.load import describe_model, stored_quantization
from veneer.quant.linear import quantized_layers

IDS = torch.arange(1, 30)[None]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture
def folder(tmp_path, tokenizer):
    return veneer.save_model(make_model(), tokenizer, tmp_path / "model")


def test_folder_round_trip(folder, tokenizer):
    model, again = veneer.load(folder, dtype="float32")
    assert torch.equal(logits(model), logits(make_model()))
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
    assert torch.equal(logits(model), logits(make_model()))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(veneer.VeneerError, match="shard model-00002-of-00002"):
        veneer.load(folder)


KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_quantised_folder_is_read_back(folder, tmp_path, kind, double):
    model, tokenizer = veneer.load(folder, quantize=kind, double_quant=double, dtype="float32")
    assert model.veneer_quantization == kind and model.model.layers[1].mlp.down_proj.kind == kind
    veneer.save_model(model, tokenizer, tmp_path / "small")
    again, _ = veneer.load(tmp_path / "small", dtype="float32")
    assert again.veneer_quantization == kind and torch.equal(logits(again), logits(model))
    assert again.config.quantization_config == model.config.quantization_config
    assert describe_model(tmp_path / "small")["quantization"] == stored_quantization(tmp_path / "small") == kind
    with pytest.raises(veneer.VeneerError, match=f"is in {kind} already"):
        veneer.load(tmp_path / "small", quantize="nf4")


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_the_memory_footprint_is_the_bytes_there_are(folder, kind, double):
    plain, _ = veneer.load(folder)
    model, _ = veneer.load(folder, quantize=kind, double_quant=double)
    saved = 0
    for layer in quantized_layers(model).values():
        out, count = layer.out_features, layer.out_features * layer.in_features
        blocks = -(-count // 64)
        constants = blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks
        saved += 2 * count - (count + 4 * out if kind == "int8" else count // 2 + constants)
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in layer.buffers())
    assert plain.get_memory_footprint() - model.get_memory_footprint() == saved > 0


def test_plain_linears_of_a_quantised_folder_are_skipped_by_name(folder):
    model, _ = veneer.load(folder, quantize="int8")
    config = model.config.quantization_config
    assert config["load_in_8bit"] and not config["load_in_4bit"] and config["llm_int8_skip_modules"] == ["lm_head"]
    assert model.config.to_dict()["quantization_config"] == config


def damaged(folder, tmp_path, kind, change):
    model, tokenizer = veneer.load(folder, quantize=kind, dtype="float32")
    path = veneer.save_model(model, tokenizer, tmp_path / "small")
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


def test_all_damaged_layers_of_a_quantised_folder_are_named_at_once(folder, tmp_path):
    layer = "model.layers.0.mlp.up_proj"

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.SCB"]
        tensors[f"{layer}.SCB"][3] = torch.nan
        tensors[f"{layer}.weight_format"].fill_(2)

    with pytest.raises(veneer.VeneerError) as caught:
        veneer.load(damaged(folder, tmp_path, "int8", change))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        f"{layer}.SCB", f"{layer}.weight_format", "model.layers.1.mlp.up_proj.weight",
    ]  # fmt: skip


def test_a_layer_that_is_not_what_config_json_says(folder, tmp_path):
    path = damaged(folder, tmp_path, "nf4", lambda tensors: None)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(veneer.VeneerError, match=r"found nf4, expected fp4 as config\.json says") as caught:
        veneer.load(path)
    assert len(caught.value.problems) == 14


def test_damage_and_wrong_names_are_clear(folder, tmp_path):
    for name, words in [
        ("no/such/folder", "no such folder"), ("x.gguf", "missing file"), ("w.bin", "pickle"), ("a-b/not-cached", "local cache"),
    ]:  # fmt: skip
        with pytest.raises(veneer.VeneerError, match=words):
            veneer.load(name)
    for kwargs, words in [
        ({"quantize": "int4"}, "expected nf4, fp4, int8 or None"),
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
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(veneer.VeneerError, match=r"layers\.1\.mlp\.up_proj\.weight: left over"):
        veneer.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(veneer.VeneerError, match=r"layers\.2\.mlp\.up_proj\.weight: missing"):
        veneer.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 4096}))
    with pytest.raises(veneer.VeneerError, match=r"config\.json describes"):
        veneer.load(folder)


def test_keys_of_a_config_never_reach_code(folder):
    config = json.loads((folder / "config.json").read_text())
    keys = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
    (folder / "config.json").write_text(
        json.dumps({**config, **dict.fromkeys(keys, "evil/kernel"), "auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    )
    (folder / "evil.py").write_text("raise SystemExit('this was run')")
    with pytest.warns(UserWarning, match="code of its own"):
        model, _ = veneer.load(folder, dtype="float32")
    assert "evil" not in str(model.config.to_dict()) and model.config._attn_implementation == "veneer"
    assert torch.equal(logits(model), logits(make_model()))
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(veneer.VeneerError, match="code of its own"):
        veneer.load(folder)


def test_a_common_generation_config_is_kept(folder, tmp_path):
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    model, tokenizer = veneer.load(folder)
    model.generation_config.max_new_tokens = 7  # once changed, transformers' own saving refuses it
    again, _ = veneer.load(veneer.save_model(model, tokenizer, tmp_path / "again"))
    assert again.generation_config.max_new_tokens == 7
    assert again.generation_config.temperature == 0.6 and again.generation_config.do_sample is False


SMALL = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 257, "eos_token_id": 256, "pad_token_id": 256,
}  # fmt: skip
FAMILIES = {
    "gemma": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "gpt_neox": {},
    "phi3": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}


def family(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **FAMILIES[kind])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_folders_that_transformers_writes(kind, tmp_path, tokenizer):
    model = family(kind)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    ours, _ = veneer.load(tmp_path / "theirs", dtype="float32")
    torch.testing.assert_close(logits(ours), logits(model))
    veneer.save_model(ours, tokenizer, tmp_path / "ours")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(model))
    torch.testing.assert_close(logits(veneer.load(tmp_path / "ours", dtype="float32")[0]), logits(model))


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "mixtral", "gpt_neox"])
def test_quantised_folders_of_other_families(name, quantize, tmp_path, tokenizer):
    model = family(name)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    four, _ = veneer.load(tmp_path / "plain", quantize=quantize, dtype="float32")
    again, _ = veneer.load(veneer.save_model(four, tokenizer, tmp_path / "four"), dtype="float32")
    assert again.veneer_quantization == quantize
    assert torch.equal(logits(again), logits(four))


def test_what_is_not_quantised_is_said(tmp_path, tokenizer):
    config = GPT2Config(vocab_size=258, n_positions=64, n_embd=24, n_layer=2, n_head=2)
    folder = veneer.save_model(GPT2LMHeadModel(config).eval(), tokenizer, tmp_path / "gpt2")
    with pytest.raises(veneer.VeneerError, match="found no linear layers in GPT2LMHeadModel but its head"):
        veneer.load(folder, quantize="nf4")
    folder = veneer.save_model(family("mixtral").eval(), tokenizer, tmp_path / "mixture")
    with pytest.warns(UserWarning, match="stay in 16 bits, as a mixture's experts do"):
        veneer.load(folder, quantize="nf4")
    folder = veneer.save_model(make_model(), tokenizer, tmp_path / "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.load(folder, quantize="nf4")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Makes a folder the cached snapshot of the hub id lab/tiny, as huggingface_hub lays it out; nothing is online."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub/models--lab--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("0" * 40)

    def put(folder):
        (repo / "snapshots").mkdir(exist_ok=True)
        (repo / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)

    return put


def test_a_hub_id_is_its_cached_folder(cached, folder):
    cached(folder)
    model, _ = veneer.load("lab/tiny", dtype="float32")
    assert torch.equal(logits(model), logits(make_model())) and model.name_or_path == "lab/tiny"
    assert describe_model("lab/tiny")["model_type"] == "llama"
    with pytest.raises(veneer.VeneerError, match="local cache"):
        veneer.load("lab/tiny", revision="other")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(veneer.VeneerError, match=r"model\.norm\.weight: missing"):
        veneer.load("lab/tiny")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(veneer.VeneerError, match="not a valid safetensors"):
        veneer.load("lab/tiny")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(veneer.VeneerError, match="pickle"):
        veneer.load("lab/tiny")


def test_a_four_bit_hub_id(cached, folder, tmp_path):
    model, tokenizer = veneer.load(folder, quantize="nf4", dtype="float32")
    cached(veneer.save_model(model, tokenizer, tmp_path / "four"))
    assert stored_quantization("lab/tiny") == "nf4"
    assert torch.equal(logits(veneer.load("lab/tiny", dtype="float32")[0]), logits(model))


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
        [{"role": "user", "content": "Name the capital of France."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )  # fmt: skip
    # of every token the next best is at least 1.0 lower in fp32: no rounding decides
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert tokenizer.eos_token == "<|im_end|>" and model.name_or_path == "smollm2"


def test_a_disk_too_small_for_the_model_is_said_before_it_is_written(tmp_path, model, tokenizer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 8, 1000))
    with pytest.raises(veneer.VeneerError, match=r"disk too small for the model: found 0\.0 MB .*expected 0\.[1-9] MB"):
        veneer.save_model(model, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())
