"""Exports: each tool's files computed as that tool computes them, beside the adapter itself."""

import json

import gguf
import numpy as np
import pytest
import torch
from conftest import make_mixture, make_model
from models.test_merging import adapter, logits, written
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import veneer
from veneer.adapters.peft_format import read_adapter
from veneer.errors import RefusedError
from veneer.models.gguf_export import Names, modelfile, write_model
from veneer.models.load import read_config
from veneer.models.merging import merge_files
from veneer.report.export import export

TRICKY = {"rslora": True, "r": 4, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}}


def qwen2():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=256, bos_token_id=257, eos_token_id=256,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return model


def llama():
    return make_model(hidden_size=64, fused=False)


# ---- PEFT and vLLM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [TRICKY, {"dora": True, **TRICKY}, {"modules_to_save": ["norm"], "targets": "qv"},
                                      {"targets": "attention", "lora_bias": True, "bias": "all"}])  # fmt: skip
def test_peft_gets_a_scaling_of_one_and_the_same_logits(tmp_path, tokenizer, settings):
    folder = written(tmp_path, tokenizer, lambda: make_model(attention_bias=True, fused=False))
    path = adapter(tmp_path, folder, **settings)
    found = export(path, tmp_path / "out", "peft")
    assert found["form"] == "adapter"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    torch.testing.assert_close(logits(folder, tmp_path / "out"), logits(folder, path), rtol=1e-5, atol=1e-5)
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(make_model(attention_bias=True, fused=False), tmp_path / "out").eval()
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, logits(folder, path), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "rank"), [(TRICKY, 8), ({"r": 9}, 16), ({"r": 20, "alpha": 8}, 32), ({"r": 1}, 1)]
)
def test_vllm_gets_one_rank_that_it_allows_and_one_scale(tmp_path, tokenizer, settings, rank):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, **settings)
    export(path, tmp_path / "out", "vllm")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == rank and not config["rank_pattern"]
    for name, one in read_adapter(path).factors.items():  # vLLM: one alpha / r for all
        a, b = (tensors[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
        assert len(a) == rank == b.shape[1]
        torch.testing.assert_close(b @ a, one.scaling * one.b @ one.a, rtol=1e-5, atol=1e-6)
    assert config["target_modules"] == sorted({name.rpartition(".")[2] for name in read_adapter(path).factors})


REFUSED = {
    "use_dora": {"dora": True},
    "modules_to_save": {"modules_to_save": ["norm"], "targets": "qv"},
    "trainable_token_indices": {"tokens": [3], "targets": "qv"},
    "lora_bias": {"targets": "attention", "lora_bias": True},
}


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("which", REFUSED)
def test_what_a_tool_cannot_hold_is_refused_or_merged(tmp_path, tokenizer, which, consumer):
    make = lambda: make_model(hidden_size=64, attention_bias=which == "lora_bias", fused=False)  # noqa: E731
    folder = written(tmp_path, tokenizer, make)
    path = adapter(tmp_path, folder, **REFUSED[which])
    if consumer == "vllm":
        with pytest.raises(RefusedError, match=rf"cannot hold this adapter: {which}(.|\n)*--model"):
            export(path, tmp_path / "out", consumer)
        found = export(path, tmp_path / "out", consumer, model=str(folder))
        assert found["form"] == "merged model" and which in found["reasons"][0]
        torch.testing.assert_close(logits(tmp_path / "out"), logits(folder, path), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(veneer.VeneerError, match=r"is no GGUF(.|\n)*expected a GGUF of the same model"):
            export(path, tmp_path / "out", consumer, model=str(folder))
        assert not (tmp_path / "out").exists()


def test_ranks_and_layers_that_vllm_has_not(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer, lambda: make_mixture().eval())
    path = adapter(tmp_path, folder)
    with pytest.raises(RefusedError, match="vLLM takes adapters of linear layers"):
        export(path, tmp_path / "out", "vllm")
    with pytest.raises(veneer.VeneerError, match=r"--for: found 'gpt', expected peft, vllm, llama.cpp, ollama"):
        export(path, tmp_path / "out", "gpt")
    with pytest.raises(veneer.VeneerError, match="--model: found none"):
        export(path, tmp_path / "out", "ollama")


def test_a_merged_model_is_measured_and_refused_as_by_merge(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, quantize="nf4")
    found = export(path, tmp_path / "out", "vllm", model=str(folder), merged=True)
    measured = found["merge"]["measured"]
    assert found["merge"]["onto"] == "nf4" and 0 < measured["nf4"]["kl"] < measured["16-bit"]["kl"]
    assert (
        json.loads((tmp_path / "out" / "merge_report.json").read_text())["divergence"] == found["merge"]["divergence"]
    )
    with pytest.raises(RefusedError, match="too far from base and adapter"):
        export(path, tmp_path / "no", "peft", model=str(folder), merged=True, onto="16-bit", tolerance=1e-9)
    assert not (tmp_path / "no").exists()
    found = export(path, tmp_path / "yes", "peft", model=str(folder), merged=True, onto="16-bit", check=False)
    assert found["merge"]["divergence"] is None


@pytest.mark.parametrize(("consumer", "options", "message"), [
    ("peft", {"onto": "nf4", "check": False}, "--onto, --no-check: of a merged model"),
    ("vllm", {"kind": "q8_0", "like": "x.gguf"}, r"--type: is for llama.cpp and ollama(.|\n)*--like: is for"),
    ("llama.cpp", {"model": "m", "system": "Hi."}, "--system: is for ollama"),
    ("peft", {"onto": "nf5"}, "--onto: found 'nf5'"),
    ("vllm", {"trained_on": "nf4", "texts": ["a"]}, "--trained-on, --text: of a merged model"),
])  # fmt: skip
def test_options_without_use_are_refused(tmp_path, tokenizer, consumer, options, message):
    path = adapter(tmp_path, written(tmp_path, tokenizer))
    with pytest.raises(veneer.VeneerError, match=message):
        export(path, tmp_path / "no", consumer, **options)


# ---- llama.cpp ----------------------------------------------------------------------------------------------------------


def gguf_of(folder, path, kind="f16"):
    """A GGUF of a model folder, made here by hand, as llama.cpp's converter would make it."""
    config = read_config(folder)[0]
    names = Names(config)
    arch = gguf.MODEL_ARCH_NAMES[names.family.arch]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("by hand")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for key, value in load_file(folder / "model.safetensors").items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads and names.family.turned:  # halves of each head become neighbours
            value = torch.cat([torch.stack(h.chunk(2), 1).flatten(0, 1) for h in value.chunk(heads)])
        array = value.float().numpy()
        writer.add_tensor(names.of(key), array.astype(np.float16) if array.ndim > 1 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(path):
    return {
        t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))).float()
        for t in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("make", [llama, qwen2])
@pytest.mark.parametrize("settings", [TRICKY, {"r": 8, "targets": "attention"}])
def test_a_gguf_adapter_added_as_llama_cpp_adds_it(tmp_path, tokenizer, make, settings):
    folder = written(tmp_path, tokenizer, make)
    path = adapter(tmp_path, folder, **settings)
    found = export(path, tmp_path / "out", "llama.cpp", model=str(folder))
    assert found["files"] == ["adapter.gguf"]
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    value = lambda key: reader.fields[key].contents()  # noqa: E731
    assert (value("general.type"), value("adapter.type")) == ("adapter", "lora")
    alpha, factors = value("adapter.lora.alpha"), tensors_of(tmp_path / "out" / "adapter.gguf")
    base = tensors_of(gguf_of(folder, tmp_path / "base.gguf"))
    veneer_merged = written_merged(tmp_path, folder, path)
    wanted = tensors_of(gguf_of(veneer_merged, tmp_path / "wanted.gguf"))
    changed = {name.rpartition(".lora")[0] for name in factors}
    assert changed == {name for name in base if not torch.equal(base[name], wanted[name])}
    for name in changed:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        total = base[name] + alpha / b.shape[1] * b @ a  # one alpha, the rank of each tensor
        torch.testing.assert_close(total, wanted[name], rtol=2e-3, atol=2e-3)


def written_merged(tmp_path, folder, path):

    merge_files(folder, [path], tmp_path / "merged")
    return tmp_path / "merged"


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("make", [llama, qwen2])
def test_a_merged_gguf_is_that_of_the_merged_model(tmp_path, tokenizer, make, kind):
    folder = written(tmp_path, tokenizer, make)
    path = adapter(tmp_path, folder, **TRICKY)
    base = gguf_of(folder, tmp_path / "base.gguf")
    out = export(path, tmp_path / "out", "llama.cpp", model=str(folder), merged=True, like=base, kind=kind)
    assert out["files"] == ["merge_report.json", "model.gguf"] and out["form"] == "merged model"
    wanted = tensors_of(gguf_of(written_merged(tmp_path, folder, path), tmp_path / "wanted.gguf"))
    found = tensors_of(tmp_path / "out" / "model.gguf")
    assert found.keys() == wanted.keys()
    for name in wanted:
        tolerance = 1e-6 if kind == "f16" else float(wanted[name].abs().max()) / 100
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=tolerance)
    before, after = gguf.GGUFReader(base).fields, gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    for key in before:
        if not key.startswith("GGUF.") and key not in ("general.file_type", "general.quantization_version"):
            assert before[key].contents() == after[key].contents(), key
    assert after["general.file_type"].contents() == (1 if kind == "f16" else 7)


def test_a_gguf_of_another_model_is_seen(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer, llama)
    other = written(tmp_path, tokenizer, lambda: make_model(seed=5, hidden_size=64, fused=False), "other")
    deeper = written(
        tmp_path, tokenizer, lambda: make_model(hidden_size=64, num_hidden_layers=3, fused=False), "deeper"
    )
    with pytest.raises(veneer.VeneerError, match=r"found other weights there \(cosine"):
        write_model(folder, gguf_of(other, tmp_path / "other.gguf"), tmp_path / "x.gguf", base=folder)
    with pytest.raises(veneer.VeneerError, match=r"blk.2.attn_k.weight: in .*, not in the model"):
        write_model(folder, gguf_of(deeper, tmp_path / "deeper.gguf"), tmp_path / "x.gguf", base=folder)
    with pytest.raises(veneer.VeneerError, match="found the architecture qwen2, expected llama"):
        write_model(
            folder,
            gguf_of(written(tmp_path, tokenizer, qwen2, "q"), tmp_path / "q.gguf"),
            tmp_path / "x.gguf",
            base=folder,
        )
    with pytest.raises(veneer.VeneerError, match="type: found 'q4_0', expected f16, q8_0"):
        write_model(folder, tmp_path / "q.gguf", tmp_path / "x.gguf", base=folder, kind="q4_0")
    assert not (tmp_path / "x.gguf").exists()
    mixture = written(tmp_path, tokenizer, lambda: make_mixture().eval(), "mixture")
    with pytest.raises(RefusedError, match="found the architecture mixtral, expected llama, mistral, qwen2, qwen3"):
        export(adapter(tmp_path, mixture, targets="attention"), tmp_path / "out", "llama.cpp", model=str(mixture))


def test_adapters_that_are_not_of_this_base_and_heads_that_are_tied(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer, llama)
    other = adapter(tmp_path, written(tmp_path, tokenizer, lambda: make_model(hidden_size=32), "small"), "other")
    with pytest.raises(veneer.VeneerError, match=r"found \(4, 32\), expected \(4, 64\)"):
        export(other, tmp_path / "out", "llama.cpp", model=str(folder))
    head = adapter(tmp_path, folder, "head", targets=["lm_head", "q_proj"])
    base = gguf_of(folder, tmp_path / "base.gguf")
    found = export(head, tmp_path / "out", "llama.cpp", model=str(folder), like=base)
    assert found["form"] == "merged model" and "a GGUF has no tensor for it" in found["reasons"][0]
    tensors = tensors_of(tmp_path / "out" / "model.gguf")
    assert not torch.equal(tensors["output.weight"], tensors["token_embd.weight"])
    with pytest.raises(veneer.VeneerError, match="--type: found 'q4'"):
        export(head, tmp_path / "no", "llama.cpp", model=str(folder), like=base, kind="q4")
    with pytest.raises(veneer.VeneerError, match="no such file, expected a GGUF of the base"):
        export(head, tmp_path / "no", "llama.cpp", model=str(folder), like=tmp_path / "none.gguf")
    four, tok = veneer.load(folder, quantize="nf4", fused=False)
    veneer.save_model(four, tok, tmp_path / "four")
    with pytest.raises(RefusedError, match="is stored in nf4: it cannot be compared"):
        export(adapter(tmp_path, tmp_path / "four", "q"), tmp_path / "no", "llama.cpp", model=str(tmp_path / "four"),
               merged=True, like=base)  # fmt: skip
    assert not (tmp_path / "no").exists()


def test_what_is_refused_is_refused_before_anything_is_merged(tmp_path, tokenizer, monkeypatch):
    folder = written(tmp_path, tokenizer, llama)
    base, path = gguf_of(folder, tmp_path / "base.gguf"), adapter(tmp_path, folder)
    with pytest.raises(veneer.VeneerError, match="--like: of a merged model"):
        export(path, tmp_path / "no", "llama.cpp", model=str(folder), like=base)
    monkeypatch.setattr("veneer.report.export.merge_into", None)
    with pytest.raises(veneer.VeneerError, match="which would end it"):
        export(path, tmp_path / "no", "ollama", model=str(folder), like=base, merged=True, system='"""')
    assert not (tmp_path / "no").exists()


def test_vllm_gets_no_copies_of_the_base(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer)
    path = adapter(tmp_path, folder, targets=["q_proj"])
    tensors, base = load_file(path / "adapter_model.safetensors"), load_file(folder / "model.safetensors")
    copies = {"base_model.model.model.embed_tokens.weight": base["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **copies}, path / "adapter_model.safetensors")
    export(path, tmp_path / "out", "vllm")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == tensors.keys()


# ---- Ollama -----------------------------------------------------------------------------------------------------------


def test_a_modelfile_says_what_the_template_says(tmp_path, tokenizer):
    folder = written(tmp_path, tokenizer, llama)
    base = gguf_of(folder, tmp_path / "base.gguf")
    path = adapter(tmp_path, folder, **TRICKY)
    found = export(path, tmp_path / "out", "ollama", model=str(folder), like=base)
    assert found["files"] == ["Modelfile", "adapter.gguf"]
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert f"FROM {base.absolute()}" in text and "ADAPTER ./adapter.gguf" in text and 'stop "<|im_end|>"' in text
    assert "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n" in text
    found = export(path, tmp_path / "whole", "ollama", model=str(folder), like=base, merged=True, system="Be brief.")
    text = (tmp_path / "whole" / "Modelfile").read_text()
    assert (
        found["files"] == ["Modelfile", "merge_report.json", "model.gguf"]
        and "FROM ./model.gguf" in text
        and "ADAPTER" not in text
    )
    assert 'SYSTEM """Be brief."""' in text


def test_templates_with_a_system_message_of_their_own_and_unknown_ones(tokenizer):
    own = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
        + tokenizer.chat_template
    )
    tokenizer.chat_template = own
    assert 'SYSTEM """Help."""' in modelfile(tokenizer, "./model.gguf")
    tokenizer.chat_template = (
        "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
        "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    )
    assert "# conversations in Llama 3" in modelfile(tokenizer, "./model.gguf")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    with pytest.raises(RefusedError, match="chat template is none of ChatML, Llama 3"):
        modelfile(tokenizer, "./model.gguf")
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(RefusedError, match="cannot be compared: no system here"):
        modelfile(tokenizer, "./model.gguf")
    tokenizer.chat_template = None
    with pytest.raises(RefusedError, match="cannot be compared"):
        modelfile(tokenizer, "./model.gguf")


# ---- the real ones ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_llama_cpp_gives_our_greedy_answers(tmp_path):
    """SmolLM2 with a short fine-tune: its GGUF adapter beside GGUFs of the base, and merged GGUFs, run in llama.cpp.

    Beside 16-bit weights it must give what we compute in fp32. On 4 and 8 bits llama.cpp rounds activations to 8 bits as
    well, which moves the plain base's logits by a KL of 0.004: there the adapter may not add to that.
    """
    llama_cpp = pytest.importorskip("llama_cpp")
    from veneer.demo_data import SYSTEM, build_demo_data, write_demo_data
    from veneer.evaluation import divergence
    from veneer.inference.generate import generate_greedy
    from veneer.models.load import embedded_gguf
    from veneer.training.data import encode_prompt
    from veneer.training.rows import read_rows

    paths = write_demo_data(tmp_path / "data", build_demo_data(0, 640, 24))
    model, tokenizer = veneer.load("smollm2")
    veneer.attach(model, veneer.LoraConfig(r=16, alpha=32, targets="all-linear", rslora=True), seed=0)
    config = veneer.TrainConfig(batch_size=16, learning_rate=5e-4, max_steps=40)
    data = veneer.DataConfig(train=str(paths["train"]), system=SYSTEM)
    tuned = veneer.train(model, tokenizer, None, config, out=tmp_path / "run", data_config=data)["adapter"]
    veneer.attach(model := veneer.load("smollm2")[0], veneer.LoraConfig(r=1, targets=["q_proj"]), seed=0)
    zero = veneer.save_adapter(model, tmp_path / "zero")
    model, _ = veneer.load("smollm2", dtype="float32", fused=False)
    rows = read_rows(paths["unseen_sentences"]).rows[:12]
    prompts = [encode_prompt(row.prompt, tokenizer, SYSTEM) for row in rows]
    texts = [
        p + tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        for p, row in zip(prompts, rows, strict=True)
    ]

    def our_logits():
        with torch.no_grad():
            return [model(input_ids=torch.tensor([text])).logits[0] for text in texts]

    plain = our_logits()
    veneer.load_adapter(model, tuned)
    wanted = our_logits()

    def greedy():
        found = generate_greedy(model, tokenizer, prompts, max_new_tokens=48, batch_size=12, progress="")
        return [answer.strip() for answer in found]

    answers = greedy()
    merge_files("smollm2", [tuned], tmp_path / "merged")
    model, _ = veneer.load(tmp_path / "merged", dtype="float32", fused=False)
    merged = greedy()

    def run(file, lora=None):
        """The greedy answers of llama.cpp, and its logits on the rows."""
        one = llama_cpp.Llama(
            str(file), lora_path=None if lora is None else str(lora), n_ctx=1024, verbose=False, logits_all=True, n_threads=2
        )  # fmt: skip
        found, scores = [], []
        for text in texts:
            one.reset()
            one.eval(text)
            scores.append(torch.tensor(np.array(one.scores[: len(text)])))
        for prompt in prompts:
            tokens = []
            for token in one.generate(prompt, temp=0.0, reset=True):
                if token == tokenizer.eos_token_id or len(tokens) == 48:
                    break
                tokens.append(token)
            found.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
        return found, scores

    export(tuned, tmp_path / "adapter", "llama.cpp", model="smollm2")
    lora = tmp_path / "adapter" / "adapter.gguf"
    for name, source, kind in (("base", zero, "f16"), ("f16", tuned, "f16"), ("q8_0", tuned, "q8_0")):
        export(source, tmp_path / name, "llama.cpp", model="smollm2", merged=True, kind=kind)
    report = {
        "adapter, f16 base": run(tmp_path / "base" / "model.gguf", lora),
        "merged, f16": run(tmp_path / "f16" / "model.gguf"),
        "merged, q8_0": run(tmp_path / "q8_0" / "model.gguf"),
        "adapter, Q4_1 base": run(embedded_gguf(), lora),
        "no adapter, Q4_1 base": run(embedded_gguf()),
    }
    same = {
        name: sum(a == b for a, b in zip(found, merged if name.startswith("merged") else answers, strict=True))
        for name, (found, _) in report.items()
    }
    kl = {n: divergence(wanted, scores)["kl"] for n, (_, scores) in report.items()}
    noise = divergence(plain, report["no adapter, Q4_1 base"][1])["kl"]
    print(f"same answers of {len(rows)}: {same}\nKL: {kl}\nKL of the plain Q4_1 base: {noise}")
    assert same["adapter, f16 base"] == same["merged, f16"] == len(rows), (same, kl)
    assert kl["adapter, f16 base"] < 1e-4 and kl["merged, f16"] < 1e-3  # bf16 rounding of the merge
    assert same["merged, q8_0"] >= 8 and same["adapter, Q4_1 base"] >= 6 and same["no adapter, Q4_1 base"] <= 2, same
    assert kl["adapter, Q4_1 base"] < 1.5 * noise and kl["merged, q8_0"] < 2 * noise, (kl, noise)
