"""Adapters merged into a model's files, tensor by tensor: logits, bytes left alone, proof, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_mixture, make_model, randomised
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

import veneer
from veneer.adapters.peft_format import read_adapter
from veneer.models import merging
from veneer.models.merging import merge_files
from veneer.models.weights import BaseWeights
from veneer.quant.bnb_format import pack_layer
from veneer.quant.linear import QuantizedLinear, quantize, quantize_model
from veneer.report.merge import merge_model
from veneer.storage import sha256

IDS = torch.arange(1, 30)[None]


def written(tmp_path, tokenizer, make=make_model, name="model"):
    return veneer.save_model(make(), tokenizer, tmp_path / name)


def adapter(tmp_path, folder, name="adapter", seed=0, quantize=None, **settings):
    model, _ = veneer.load(folder, dtype="float32", quantize=quantize, fused=False)
    veneer.attach(model, veneer.LoraConfig(**{"r": 4, "targets": "all-linear", **settings}), seed=seed)
    return veneer.save_adapter(randomised(model), tmp_path / name)


@torch.no_grad()
def logits(folder, *adapters, quantize=None):
    model, _ = veneer.load(folder, dtype="float32", quantize=quantize, fused=False)
    for number, path in enumerate(adapters):
        veneer.load_adapter(model, path, f"a{number}")
    return model(input_ids=IDS).logits


def sharded(folder, count):
    """The same model over `count` files, with an index, as large models come."""
    tensors = load_file(folder / "model.safetensors")
    names, where = sorted(tensors), {}
    for number in range(count):
        own = names[number::count]
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(own, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


CASES = {
    "plain": {},
    "DoRA": {"dora": True},
    "rsLoRA, patterns": {"rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "tied head": {"targets": ["lm_head", "q_proj"]},
    "embedding": {"targets": ["embed_tokens", "q_proj"]},
    "DoRA of an embedding": {"targets": ["embed_tokens"], "dora": True},
    "modules and tokens": {"targets": ["q_proj"], "modules_to_save": ["norm"], "tokens": [4, 11]},
    "tied modules": {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"targets": "attention", "bias": "all", "lora_bias": True},
}


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_logits_of_base_and_adapter(tmp_path, tokenizer, case, shards):
    folder = written(tmp_path, tokenizer, lambda: make_model(attention_bias=case == "biases"))
    path = adapter(tmp_path, folder, **CASES[case])
    expected = logits(folder, path)
    if shards > 1:
        sharded(folder, shards)
    report = merge_files(folder, [path], tmp_path / "out")
    assert report["how"] == "streamed" and report["changed"] > 0
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(file.name for file in folder.glob("*.safetensors")) and len(files) == shards
    assert report["outputs"] == {name: sha256(tmp_path / "out" / name) for name in files}
    assert report["inputs"][str(path / "adapter_model.safetensors")] == sha256(path / "adapter_model.safetensors")
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report
    assert report["error"]["max_error"] <= max(2 * report["error"]["rounding"], 1e-6)


def test_what_is_not_adapted_is_the_same_to_the_bit(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer, lambda: make_model(dtype=torch.bfloat16))
    path = adapter(tmp_path, folder, targets=["q_proj"])
    report = merge_files(folder, [path], tmp_path / "out")
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(after[key].dtype == torch.bfloat16 for key in after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)} and report["changed"] == 2
    for key in changed:  # summed in fp32, rounded once
        factors = load_file(path / "adapter_model.safetensors")
        name = f"base_model.model.{key.removesuffix('.weight')}"
        update = (
            read_adapter(path).config.scaling
            * factors[f"{name}.lora_B.weight"].double()
            @ factors[f"{name}.lora_A.weight"].double()
        )
        exact = before[key].double() + update
        assert float((after[key].double() - exact).abs().max()) <= 1.001 * report["error"]["rounding"]
        assert float((after[key] != exact.bfloat16()).double().mean()) < 1e-3
    copied = {file.name for file in folder.iterdir()} - {"model.safetensors", "config.json"}
    assert all((tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() for name in copied)


@pytest.mark.parametrize("onto", ["nf4", "fp4", "int8"])
def test_onto_what_it_was_trained_on(tmp_path, tokenizer, onto):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, quantize=onto)
    expected = logits(folder, path, quantize=onto)
    report = merge_files(folder, [path], tmp_path / "out", onto=onto)
    assert report["onto"] == onto and report["how"] == "streamed"
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    assert float((logits(folder, path) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_stored_quantised_model_is_decoded(tmp_path, tokenizer, kind):
    def make():
        model = make_model(fused=False)
        quantize_model(model, kind, compute_dtype=torch.float32)
        return model

    folder = written(tmp_path, tokenizer, make)
    path = adapter(tmp_path, folder, targets=["q_proj", "down_proj"])
    expected = logits(folder, path)
    report = merge_files(folder, [path], tmp_path / "out")
    assert report["onto"] == kind and "quantization_config" not in json.loads(
        (tmp_path / "out/config.json").read_text()
    )
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(veneer.VeneerError, match="there is no fp4 base in it"):
        merge_files(folder, [path], tmp_path / "other", onto="fp4")


def test_transformers_conv1d(tmp_path, tokenizer):
    def make():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=64, n_embd=24, n_layer=2, n_head=2)).eval()

    folder = written(tmp_path, tokenizer, make)
    for number, settings in enumerate(({}, {"dora": True})):
        path = adapter(tmp_path, folder, f"a{number}", targets=["c_attn", "c_proj"], **settings)
        error = merge_files(folder, [path], tmp_path / f"out{number}")["error"]
        assert 0 < error["max_error"] <= 1e-6
        torch.testing.assert_close(logits(tmp_path / f"out{number}"), logits(folder, path), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts(tmp_path, tokenizer, kind):
    folder = written(tmp_path, tokenizer, lambda: make_mixture(kind).eval())
    path = adapter(tmp_path, folder)
    report = merge_files(folder, [path], tmp_path / "out")
    assert report["how"] == "streamed" and 0 < report["error"]["max_error"] <= 1e-6
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder, path), rtol=1e-4, atol=1e-4)


def test_several_adapters_are_added(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    paths = [
        adapter(tmp_path, folder, f"a{n}", n, r=2 + n, targets=targets)
        for n, targets in enumerate((["q_proj", "v_proj"], ["q_proj", "down_proj"]))
    ]
    merge_files(folder, paths, tmp_path / "both")
    veneer.combine(paths, tmp_path / "sum", weights=(1, 1))
    torch.testing.assert_close(logits(tmp_path / "both"), logits(folder, tmp_path / "sum"), rtol=1e-5, atol=1e-5)
    dora = adapter(tmp_path, folder, "dora", dora=True)
    full = [adapter(tmp_path, folder, f"f{n}", n, targets=["q_proj"], modules_to_save=["norm"]) for n in (0, 1)]
    with pytest.raises(veneer.VeneerError, match="DoRA scales the whole weight"):
        merge_files(folder, [paths[0], dora], tmp_path / "no")
    with pytest.raises(veneer.VeneerError, match=r"both change model.norm.weight, and not both by low-rank updates"):
        merge_files(folder, full, tmp_path / "no")
    low = adapter(tmp_path, folder, "low", targets=["embed_tokens"])
    whole = adapter(tmp_path, folder, "whole", targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    rows = adapter(tmp_path, folder, "rows", targets=["q_proj"], tokens=[4])
    for pair in ([low, whole], [whole, low], [whole, rows], [rows, low]):
        with pytest.raises(veneer.VeneerError, match=r"both change model.embed_tokens.weight"):
            merge_files(folder, pair, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_bias_that_has_no_place_is_refused(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, targets="attention", lora_bias=True)
    with pytest.raises(veneer.VeneerError, match=r"lora_bias\) has no place in a layer without one"):
        merge_files(folder, [path], tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_not_quantised_although_it_is_adapted(tmp_path, tokenizer, tied):
    folder = written(tmp_path, tokenizer, lambda: make_model(tie_word_embeddings=tied, fused=False))
    path = adapter(tmp_path, folder, quantize="nf4", targets=["lm_head", "q_proj"])
    merge_files(folder, [path], tmp_path / "out", onto="nf4")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder, path, quantize="nf4"), rtol=1e-4, atol=1e-4)


def test_copies_of_another_base_are_refused(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, targets=["embed_tokens"])
    tensors, base = load_file(path / "adapter_model.safetensors"), load_file(folder / "model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    for copy, good in ((base["model.embed_tokens.weight"], True), (base["model.embed_tokens.weight"] + 1, False)):
        save_file({**tensors, key: copy.contiguous()}, path / "adapter_model.safetensors")
        if good:
            merge_files(folder, [path], tmp_path / "out")
        else:
            with pytest.raises(veneer.VeneerError, match="copy of this weight, and it is of another base"):
                merge_files(folder, [path], tmp_path / "no")


def test_tied_weights_that_are_stored_twice_are_tied_no_more(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = adapter(tmp_path, folder, targets=["lm_head", "q_proj"])
    expected = logits(folder, path)
    merge_files(folder, [path], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)


def test_files_of_other_shapes_types_and_with_nan(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, targets=["q_proj"], modules_to_save=["norm"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    merge_files(folder, [path], tmp_path / "out")  # fp32 in the files, whatever the config says
    norm = load_file(path / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"], norm)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(
        veneer.VeneerError, match=r"gate_proj.weight: found \(96, 48\), expected \(80, 48\) as config.json"
    ):
        merge_files(folder, [path], tmp_path / "no")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    tensors["model.embed_tokens.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(veneer.VeneerError, match=r"embed_tokens.weight: the merged weight holds NaN"):
        merge_files(folder, [path], tmp_path / "no")


def test_experts_that_are_stored_one_by_one_stay_so(tmp_path, tokenizer):
    make_mixture().eval().save_pretrained(tmp_path / "theirs")  # transformers writes them so
    folder = tmp_path / "theirs"
    tokenizer.save_pretrained(folder)
    assert any(".experts.0." in key for key in load_file(folder / "model.safetensors"))
    paths = [adapter(tmp_path, folder, name) for name in ("a", "b")]
    shapes = {key: x.shape for key, x in load_file(folder / "model.safetensors").items()}
    expected = logits(folder, paths[0])
    for shards in (1, 3):
        out = tmp_path / f"out{shards}"
        report = merge_files(folder if shards == 1 else sharded(folder, shards), paths[:1], out)
        files = [load_file(file) for file in out.glob("*.safetensors")]
        assert {key: x.shape for file in files for key, x in file.items()} == shapes and report["how"] == "streamed"
        torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=1e-4)
        assert 0 < report["error"]["max_error"] <= 1e-6
    merge_files(out, paths[1:], tmp_path / "one by one")
    merge_files(folder, paths, tmp_path / "both")
    torch.testing.assert_close(logits(tmp_path / "both"), logits(tmp_path / "one by one"), rtol=1e-4, atol=1e-4)
    full = adapter(tmp_path, folder, "c", targets=["q_proj"], modules_to_save=["mlp"])
    merge_files(folder, [full], tmp_path / "full")
    torch.testing.assert_close(logits(tmp_path / "full"), logits(folder, full), rtol=1e-4, atol=1e-4)


def test_what_transformers_converts_otherwise_is_merged_in_memory(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(merging, "pieces", lambda *_: {})
    make_mixture().eval().save_pretrained(tmp_path / "theirs")
    folder = tmp_path / "theirs"
    tokenizer.save_pretrained(folder)
    path = adapter(tmp_path, folder)
    report = merge_files(folder, [path], tmp_path / "out")
    assert report["how"] == "in memory"
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder, path), rtol=1e-4, atol=1e-4)
    with pytest.raises(veneer.VeneerError, match=r"cannot be streamed(.|\n)*combine the adapters first"):
        merge_files(folder, [path, path], tmp_path / "no")


def test_a_check_that_refuses_leaves_nothing(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder)

    def refuse(out):
        assert (out / "model.safetensors").is_file() and (out / "config.json").is_file()
        raise veneer.RefusedError("too far apart")

    with pytest.raises(veneer.RefusedError, match="too far apart"):
        merge_files(folder, [path], tmp_path / "out", check=refuse)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "model"]
    report = merge_files(folder, [path], tmp_path / "out", check=lambda out: {"kl": 0.0})
    assert report["divergence"] == {"kl": 0.0}


def test_bad_models_and_adapters(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder)
    other = adapter(tmp_path, written(tmp_path, tokenizer, lambda: make_model(hidden_size=32), "small"), "other")
    with pytest.raises(veneer.VeneerError, match=r"q_proj.lora_A: found \(4, 32\), expected \(4, 48\)"):
        merge_files(folder, [other], tmp_path / "out")
    tensors = load_file(path / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    save_file({**tensors, key: torch.full_like(tensors[key], float("nan"))}, path / "adapter_model.safetensors")
    with pytest.raises(veneer.VeneerError, match="found NaN or Inf"):
        merge_files(folder, [path], tmp_path / "out")
    save_file({**tensors, key: torch.full_like(tensors[key], 3e38)}, path / "adapter_model.safetensors")
    with pytest.raises(veneer.VeneerError, match="the merged weight holds NaN or Inf"):
        merge_files(folder, [path], tmp_path / "out")
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(veneer.VeneerError, match="found none"):
        merge_files(folder, [], tmp_path / "out")
    sharded(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(veneer.VeneerError, match=r"shard model-00002-of-00003.safetensors is missing"):
        merge_files(folder, [path], tmp_path / "out")
    data = (folder / "model-00001-of-00003.safetensors").read_bytes()
    (folder / "model-00001-of-00003.safetensors").write_bytes(data[:-50])
    with pytest.raises(veneer.VeneerError, match=r"missing|not a valid safetensors file"):
        merge_files(folder, [path], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_what_is_wrong_with_any_of_several_adapters_is_told_at_once(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    good = adapter(tmp_path, folder, "good")
    small = written(tmp_path, tokenizer, lambda: make_model(hidden_size=32), "small")
    other, spoiled = (adapter(tmp_path, small, name) for name in ("other", "spoiled"))
    tensors = load_file(spoiled / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    save_file({**tensors, key: torch.full_like(tensors[key], float("nan"))}, spoiled / "adapter_model.safetensors")
    sources = [other, good, tmp_path / "nowhere", spoiled]
    words = r"other: .*expected \(4, 48\)(.|\n)*nowhere: no such folder(.|\n)*spoiled(.|\n)*NaN"
    for merged in (merge_files, merge_model):
        with pytest.raises(veneer.VeneerError) as caught:
            merged(str(folder), sources, tmp_path / "out")
        assert re.search(words, "\n".join(caught.value.problems)), caught.value.problems
        assert not (tmp_path / "out").exists()


INTERRUPTED = """
import os, sys, veneer.storage as storage
from veneer.models.merging import merge_files
real, done = storage.hashlib.sha256, [0]
class Counting:
    def __init__(self): self.inner = real()
    def update(self, piece):
        done[0] += 1
        if done[0] == int(sys.argv[4]): os.kill(os.getpid(), 9)
        self.inner.update(piece)
    def hexdigest(self): return self.inner.hexdigest()
storage.hashlib.sha256 = Counting
merge_files(sys.argv[1], [sys.argv[2]], sys.argv[3])
"""


@pytest.mark.parametrize("piece", [1, 2, 9, 15])
def test_a_killed_merge_leaves_nothing_under_the_final_name(tmp_path, tokenizer, piece):
    folder = sharded(written(tmp_path, tokenizer), 3)
    path = adapter(tmp_path, folder)
    command = [sys.executable, "-c", INTERRUPTED, str(folder), str(path), str(tmp_path / "out"), str(piece)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == -9 and not (tmp_path / "out").exists()
    merge_files(folder, [path], tmp_path / "out")  # what was left beside it is in nobody's way
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder, path), rtol=1e-5, atol=1e-5)


PEAK = """
import sys, resource
from veneer.models.merging import merge_files
from veneer.machine import current_bytes, peak_bytes, reset_peak
small, path, big, big_path, out = sys.argv[1:]
merge_files(small, [path], out + "1")  # everything is imported and warm
reset_peak()
before = current_bytes()
merge_files(big, [big_path], out + "2")
print(peak_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not say what the peak was")
@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"targets": ["embed_tokens", "q_proj"]}])
def test_the_peak_is_below_two_shards(tmp_path, tokenizer, settings):
    def large():
        return make_model(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=2048, fused=False)

    small = written(tmp_path, tokenizer, name="small")
    folder = sharded(written(tmp_path, tokenizer, large), 10)
    paths = [adapter(tmp_path, small, "a"), adapter(tmp_path, folder, "b", **settings)]
    shard = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", PEAK, small, paths[0], folder, paths[1], tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * shard, (int(done.stdout), shard)


FULL_DISK = """
import resource, signal, sys
import veneer
from veneer.models.merging import merge_files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
try:
    if sys.argv[5] == "merge":
        merge_files(sys.argv[1], [sys.argv[2]], sys.argv[3])
    else:
        veneer.combine([sys.argv[2], sys.argv[2]], sys.argv[3])
except (veneer.VeneerError, OSError) as error:
    print(error)
"""


@pytest.mark.parametrize(("what", "limit"), [("merge", 10), ("merge", 5_000), ("merge", 200_000), ("combine", 3_000)])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, tokenizer, what, limit):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder)
    command = [sys.executable, "-c", FULL_DISK, str(folder), str(path), str(tmp_path / "out"), str(limit), what]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "could not be written" in done.stdout or "File too large" in done.stdout, done.stdout
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "model"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_merged_is_base_and_adapter(tmp_path, dtype):
    model, tokenizer = veneer.load("smollm2", dtype=dtype, fused=False)
    folder = veneer.save_model(model, tokenizer, tmp_path / "base")
    veneer.attach(model, veneer.LoraConfig(r=16, targets="all-linear"), seed=0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, layer in model.named_parameters():
            if "lora_B" in name:
                layer.copy_(torch.randn(layer.shape, generator=g) * 0.01)
    ids = torch.tensor([tokenizer("The harbour was quiet before sunrise.")["input_ids"]])
    with torch.no_grad():
        beside = model(input_ids=ids).logits.double()
        path = veneer.save_adapter(model, tmp_path / "adapter")
        veneer.set_adapter(model, None)
        plain = model(input_ids=ids).logits.double()
        before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
        hot = veneer.hot_merge(model, "default")(input_ids=ids).logits.double()
        veneer.set_adapter(model, None)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
        report = merge_files(folder, [path], tmp_path / "merged")
        merged, _ = veneer.load(tmp_path / "merged", dtype=dtype, fused=False)
        found = merged(input_ids=ids).logits.double()
    assert report["changed"] == 210 and report["error"]["max_error"] <= 1.01 * report["error"]["rounding"] + 1e-7
    assert torch.equal(found, hot)
    effect = float((beside - plain).norm())
    if dtype == "float32":
        torch.testing.assert_close(found, beside, rtol=1e-5, atol=1e-5 * float(beside.abs().max()))
    else:  # as near as bf16 is: what rounding the weights makes, and computing with them, and with those of base and adapter
        exact, rounded = (
            veneer.load(where, dtype="float32", fused=False)[0] for where in (folder, tmp_path / "merged")
        )
        veneer.load_adapter(exact, path)
        with torch.no_grad():
            wanted, weights = (one(input_ids=ids).logits.double() for one in (exact, rounded))
        unavoidable = float((weights - wanted).norm() + (beside - wanted).norm())
        assert float((found - wanted).norm()) < 1.2 * unavoidable and float((weights - wanted).norm()) < effect


# ---- tensors that are called otherwise than the model's ---------------------------------------------------------------


def theirs(tmp_path, tokenizer, model, name="theirs"):
    """A model as transformers writes it."""
    model.eval().save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / name


def test_experts_one_by_one_in_bf16_are_rounded_once_and_the_others_are_the_same_to_the_bit(tmp_path, tokenizer):
    folder = theirs(tmp_path, tokenizer, make_mixture().to(torch.bfloat16))
    settings = {"targets": [], "parameters": ["experts.down_proj"]}
    paths = [adapter(tmp_path, folder, "a", **settings), adapter(tmp_path, folder, "b", 1, r=2, **settings)]
    factors = [read_adapter(path).factors for path in paths]
    report = merge_files(folder, paths, tmp_path / "out")
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "out"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert report["changed"] == len(changed) == 8 and all(".w2." in key for key in changed)
    for key in changed:
        layer, expert = int(key.split(".")[2]), int(key.split(".experts.")[1].split(".")[0])
        exact = before[key].double()
        for file in factors:
            one = file[f"model.layers.{layer}.mlp.experts.down_proj"]
            a = one.a.double().view(4, -1, one.a.shape[1])[expert]
            b = one.b.double().view(one.b.shape[0], -1, 4)[..., expert]
            exact += one.scaling * b @ a
        assert float((after[key] != exact.bfloat16()).double().mean()) < 1e-3
        assert float((after[key].double() - exact).abs().max()) <= 1.001 * report["error"]["rounding"] + 1e-3


def test_onto_what_it_was_trained_on_with_experts_one_by_one(tmp_path, tokenizer):
    folder = theirs(tmp_path, tokenizer, make_mixture())
    path = adapter(tmp_path, folder, quantize="nf4")
    merge_files(folder, [path], tmp_path / "out", onto="nf4")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder, path, quantize="nf4"), rtol=1e-4, atol=1e-4)


def test_a_mixture_of_one(tmp_path, tokenizer):
    config = make_mixture().config
    config.num_local_experts = config.num_experts_per_tok = 1
    folder = theirs(tmp_path, tokenizer, AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    path = adapter(tmp_path, folder)
    assert merge_files(folder, [path], tmp_path / "out")["how"] == "streamed"
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder, path), rtol=1e-4, atol=1e-4)


def test_quantised_experts_one_by_one_are_refused_in_words(tmp_path, tokenizer):
    folder = theirs(tmp_path, tokenizer, make_mixture())
    path = adapter(tmp_path, folder)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        layer = QuantizedLinear(quantize(tensors.pop(key), "nf4"), None, torch.float32)
        tensors |= {f"{key.removesuffix('.weight')}.{part}": value for part, value in pack_layer(layer).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": four}))
    with pytest.raises(veneer.VeneerError):
        merge_files(folder, [path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_an_older_name(tmp_path, tokenizer, tied):
    config = GPTNeoXConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    folder = theirs(tmp_path, tokenizer, model)
    ours = veneer.save_model(model, tokenizer, tmp_path / "ours")
    names, own = (load_file(where / "model.safetensors").keys() for where in (folder, ours))
    assert names == own and ("embed_out.weight" in names) != tied
    path = adapter(tmp_path, folder, targets=["lm_head", "dense"])
    report = merge_files(folder, [path], tmp_path / "out")
    assert report["how"] == "streamed"
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder, path), rtol=1e-5, atol=1e-5)
    norm = BaseWeights(folder).norms(["lm_head"])["lm_head"][0]
    assert norm == pytest.approx(float(model.get_output_embeddings().weight.norm()), rel=1e-5)


def test_a_saved_mixture_has_the_names_that_others_read(tmp_path, tokenizer):
    model = make_mixture("qwen3_moe").eval()
    wanted = load_file(theirs(tmp_path, tokenizer, model) / "model.safetensors")
    found = load_file(veneer.save_model(model, tokenizer, tmp_path / "ours") / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "ours"), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(plain(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
