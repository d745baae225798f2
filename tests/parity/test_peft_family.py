"""Every kind of layer times every method, against PEFT: its files read, ours read by it, outputs and gradients equal."""

import copy
import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

import veneer
from veneer.adapters.attach import adapter_parameters, adapters, lora_layers
from veneer.adapters.files import file_keys
from veneer.errors import RefusedError

peft = pytest.importorskip("peft")

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


class Pictures(nn.Module):
    """Convolutions of two and one dimensions, one of them in groups."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1, bias=False)
        self.line = nn.Conv1d(12, 6, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        y = self.grouped(self.conv(x).tanh()).tanh()
        return self.head(self.line(y.flatten(2)).mean(2))


class Volumes(Pictures):
    def __init__(self):
        super().__init__()
        self.deep = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x):
        y = self.deep(self.conv(x).tanh()[:, :, None])[:, :, 0].tanh()
        return self.head(self.line(self.grouped(y).tanh().flatten(2)).mean(2))


def gpt2():
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=24, n_layer=2, n_head=2, tie_word_embeddings=True)
    return GPT2LMHeadModel(config)


def qwen2():
    config = Qwen2Config(
        vocab_size=100, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():  # biases start at zero
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def mixture(kind):
    own = {"qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16}}.get(kind, {"num_local_experts": 4})
    config = AutoConfig.for_model(
        kind, vocab_size=100, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, pad_token_id=1, bos_token_id=2, eos_token_id=1, **own,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


KINDS = {
    "linear": (qwen2, ["q_proj", "down_proj"]),
    "conv1d of transformers": (gpt2, ["c_attn", "c_fc"]),
    "convolution": (Pictures, ["conv", "line"]),
    "grouped convolution": (Pictures, ["grouped", "head"]),
    "convolution of volumes": (Volumes, ["deep", "head"]),
    "embedding": (qwen2, ["embed_tokens", "v_proj"]),
    "embedding, tied": (lambda: make_model(fused=False), ["embed_tokens", "v_proj"]),
    "head": (qwen2, ["lm_head", "v_proj"]),
    "head, tied": (lambda: make_model(fused=False), ["lm_head", "v_proj"]),
    "experts, mixtral": (lambda: mixture("mixtral"), ["v_proj"]),
    "experts, qwen3_moe": (lambda: mixture("qwen3_moe"), ["v_proj"]),
    "experts, gpt_oss": (lambda: mixture("gpt_oss"), []),  # (E, in, out), biases, another gate
    "tokens": (qwen2, ["v_proj"]),
    "tokens, tied": (lambda: make_model(fused=False), ["v_proj"]),
}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = [int(IDS[0, 2]), 99, int(IDS[1, 4]), 7]
FIRST = {
    "linear": "q_proj",
    "conv1d of transformers": "c_attn",
    "convolution": "conv",
    "grouped convolution": "grouped",
    "convolution of volumes": "deep",
}
METHODS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": "first", "alpha_pattern": "first"},
    "patterns, rsLoRA": {"rank_pattern": "first", "alpha_pattern": "first", "use_rslora": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": "some"},
    "lora_bias": {"lora_bias": True},
}
# Kinds that have methods of their own. PEFT refuses dropout, DoRA and lora_bias for parameters, and cannot put the rows of
# tokens and LoRA on one layer. It says of patterns for parameters that they "were ignored", but goes by them.
OWN = {
    "experts": {
        "LoRA": {},
        "rsLoRA": {"use_rslora": True},
        "patterns": {"rank_pattern": {"experts.gate_up_proj": 3}, "alpha_pattern": {r"layers\.1\..*down_proj": 3}},
        "patterns, rsLoRA": {"rank_pattern": {"experts.down_proj": 3}, "use_rslora": True},
        "one parameter": {"target_parameters": PARAMETERS[1:]},
        "one in one block": {"target_parameters": [f"model.layers.1.mlp.{PARAMETERS[0]}", PARAMETERS[1]]},
        "modules_to_save": {"modules_to_save": ["norm"]},
    },
    "tokens": {
        "LoRA": {},
        "DoRA": {"use_dora": True},
        "by name": {"trainable_token_indices": {"embed_tokens": TOKENS}},
        "head too": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
        "head, its own": {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [3, 50]}},
    },
}
SAVED = {Pictures: ["head"], Volumes: ["line"], gpt2: ["ln_f"], qwen2: ["norm"]}


def settings(kind, method):
    build, targets = KINDS[kind]
    found = {"r": 4, "lora_alpha": 6, "target_modules": targets}
    if kind.startswith("experts"):
        return found | {"target_parameters": PARAMETERS} | OWN["experts"][method]
    if kind.startswith("tokens"):
        return found | {"trainable_token_indices": TOKENS} | OWN["tokens"][method]
    found |= METHODS[method]
    first = FIRST.get(kind, targets[0])
    if "rank_pattern" in found:
        found |= {"rank_pattern": {first: 8}, "alpha_pattern": {first: 3}}
    if "modules_to_save" in found:
        found["modules_to_save"] = SAVED.get(build, ["norm"])
        if build in (Pictures, Volumes):
            found["modules_to_save"] = ["line"] if "head" in targets else ["head"]
    return found


def built(kind):
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()


def run(model, kind):
    if kind in KINDS and KINDS[kind][0] in (Pictures, Volumes):
        return model(torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)))
    return model(input_ids=IDS).logits


def randomised(parameters):
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)


def theirs(kind, method):
    model = peft.get_peft_model(built(kind), peft.LoraConfig(**settings(kind, method))).eval()
    randomised(p for _, p in sorted(model.named_parameters()) if p.requires_grad)
    return model


def file_key(name):
    """Of a parameter in PEFT's model."""
    name = name.replace(".modules_to_save.default.", ".").replace(".original_module.", ".")
    return name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default", "")


def gradients(model, kind, parameters):
    out = run(model, kind)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return out.detach(), dict(
        zip(parameters, torch.autograd.grad((out * weights).sum(), list(parameters.values())), strict=True)
    )


def cells():
    for kind in KINDS:
        if (own := kind.split(",")[0]) in OWN:
            yield from ((kind, method) for method in OWN[own] if (kind, method) != ("tokens, tied", "head, its own"))
            continue
        for method in METHODS:
            if method == "lora_bias" and kind not in ("linear", "conv1d of transformers", "convolution", "head"):
                continue
            if method.startswith("bias") and kind in ("embedding, tied", "head, tied"):
                continue  # no biases there
            if method == "DoRA" and kind == "grouped convolution":
                continue  # PEFT multiplies factors of other shapes there and fails
            yield kind, method


@pytest.mark.parametrize(("kind", "method"), cells())
def test_their_file_is_the_same_adapter_here(tmp_path, kind, method):
    model = theirs(kind, method)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = veneer.load_adapter(built(kind), tmp_path)
    wanted, their_gradients = gradients(model, kind, {n: p for n, p in model.named_parameters() if p.requires_grad})
    found, our_gradients = gradients(ours, kind, adapter_parameters(ours, "default"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    keys = file_keys(ours, "default")
    our_gradients = {keys[name]: gradient for name, gradient in our_gradients.items()}
    assert our_gradients.keys() == {file_key(name) for name in their_gradients}
    for name, gradient in their_gradients.items():
        mine = our_gradients[file_key(name)]
        torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))
    veneer.set_adapter(ours, None)
    assert torch.equal(run(ours, kind), run(built(kind), kind))


@pytest.mark.parametrize(("kind", "method"), cells())
def test_our_file_is_the_same_adapter_there(tmp_path, kind, method):
    model = theirs(kind, method)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = veneer.load_adapter(built(kind), tmp_path / "theirs")
    veneer.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(built(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(run(back, kind), run(ours, kind), rtol=1e-5, atol=1e-5)
    found, wanted = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("kind", "method"), cells())
def test_our_own_adapter_is_read_there(tmp_path, kind, method):
    asked = settings(kind, method)
    ours = built(kind)
    plain = run(ours, kind)
    veneer.attach(
        ours,
        veneer.LoraConfig(
            r=4, alpha=6, targets=asked["target_modules"], rslora=asked.get("use_rslora", False),
            dora=asked.get("use_dora", False), rank_pattern=asked.get("rank_pattern", {}),
            alpha_pattern=asked.get("alpha_pattern", {}), bias=asked.get("bias", "none"),
            modules_to_save=asked.get("modules_to_save", []), parameters=asked.get("target_parameters", []),
            tokens=asked.get("trainable_token_indices", []), lora_bias=asked.get("lora_bias", False),
        ),
    )  # fmt: skip
    torch.testing.assert_close(run(ours, kind), plain, rtol=1e-5, atol=1e-5)
    randomised(adapter_parameters(ours, "default").values())
    veneer.save_adapter(ours, tmp_path)
    back = peft.PeftModel.from_pretrained(built(kind), tmp_path).eval()
    torch.testing.assert_close(run(back, kind), run(ours, kind), rtol=1e-5, atol=1e-5)
    wanted = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (wanted["r"], wanted["lora_alpha"]) == (4, 6)
    if method == "lora_bias" and kind in ("linear", "head"):  # down_proj and the head have no bias
        with pytest.raises(RuntimeError, match="no bias"):
            back.merge_and_unload()
        with pytest.raises(veneer.VeneerError, match="layer without one"):
            veneer.merge(ours)
    elif "convolution" not in kind:
        merged = veneer.merge(ours)
        torch.testing.assert_close(run(merged, kind), run(back, kind), rtol=1e-4, atol=1e-5)
        assert not [name for name, _ in merged.named_parameters() if "lora" in name or "token_rows" in name]


@pytest.mark.parametrize("kind", ["experts, mixtral", "experts, qwen3_moe"])
def test_experts_that_peft_was_asked_for_by_the_names_of_linears_are_read(tmp_path, kind):
    """It turns names that transformers 4 had into parameters, with the rank doubled for those that became one."""
    names = {"experts, mixtral": ["w1", "w2", "w3"], "experts, qwen3_moe": ["gate_proj", "up_proj", "down_proj"]}[kind]
    model = peft.get_peft_model(
        built(kind), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj", *names])
    ).eval()
    randomised(p for _, p in sorted(model.named_parameters()) if p.requires_grad)
    model.save_pretrained(tmp_path)
    ours = veneer.load_adapter(built(kind), tmp_path)
    torch.testing.assert_close(run(ours, kind), run(model, kind), rtol=1e-5, atol=1e-5)
    ranks = {path.rsplit(".", 1)[-1]: layer.rank("default") for path, layer in lora_layers(ours).items()}
    assert ranks == {"v_proj": 3, "gate_up_proj": 6, "down_proj": 3}


def test_a_dense_block_among_mixtures_which_peft_leaves_out_without_a_word(tmp_path):
    """It takes gate_proj, up_proj and down_proj of such a model for the experts', so it adapts no linear of these names."""

    def model():
        torch.manual_seed(0)
        config = mixture("qwen3_moe").config
        config.mlp_only_layers = [0]
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    ours = veneer.attach(model(), veneer.LoraConfig(r=2, targets="mlp"))
    adapted = {path.removeprefix("model.layers.") for path in lora_layers(ours)}
    assert adapted == {f"0.mlp.{n}_proj" for n in ("gate", "up", "down")} | {f"1.mlp.{name}" for name in PARAMETERS}
    randomised(adapter_parameters(ours, "default").values())
    veneer.save_adapter(ours, tmp_path / "a")
    again = veneer.load_adapter(model(), tmp_path / "a")
    assert torch.equal(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    asked = peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], target_parameters=PARAMETERS)
    theirs = peft.get_peft_model(model(), asked)
    assert not [name for name, _ in theirs.named_parameters() if "lora" in name and "layers.0" in name]


def test_what_peft_refuses_for_parameters_tokens_and_biases_is_refused_here():
    for wrong in ({"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(ValueError, match="does not work with"):
            peft.get_peft_model(
                built("experts, mixtral"), peft.LoraConfig(target_modules=[], target_parameters=PARAMETERS, **wrong)
            )
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], trainable_token_indices=TOKENS)
    with pytest.raises((ValueError, TypeError, AttributeError)):  # in its forward, or before it
        run(peft.get_peft_model(built("tokens"), config), "tokens")
    for wrong in ({"dropout": 0.1}, {"dora": True}, {"lora_bias": True}):
        with pytest.raises(veneer.VeneerError):
            veneer.LoraConfig(targets=[], parameters=PARAMETERS, **wrong)
    with pytest.raises(veneer.VeneerError, match=r"is also in lora\.targets"):
        veneer.attach(built("tokens"), veneer.LoraConfig(r=2, targets=["embed_tokens"], tokens=TOKENS))
    with pytest.raises(ValueError, match="not supported for DoRA"):
        peft.LoraConfig(lora_bias=True, use_dora=True)
    with pytest.raises(ValueError, match="lora_bias=True is not supported for Embedding"):
        peft.get_peft_model(built("embedding"), peft.LoraConfig(target_modules=["embed_tokens"], lora_bias=True))


def tied():
    return make_model(fused=False, attention_bias=True).eval()


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"]])
def test_tied_modules_that_peft_trained_alone_are_refused_until_they_are_untied(tmp_path, names):
    model = peft.get_peft_model(tied(), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names)).eval()
    randomised(p for _, p in sorted(model.named_parameters()) if p.requires_grad)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = tied()
    with pytest.raises(RefusedError, match=r"is tied to .* here; PEFT trained a copy of .* alone(.|\n)*untie them"):
        veneer.load_adapter(ours, tmp_path)
    ours.lm_head.weight = nn.Parameter(ours.lm_head.weight.detach().clone())
    veneer.load_adapter(ours, tmp_path)
    torch.testing.assert_close(run(ours, "tied"), run(model, "tied"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_modules_that_peft_kept_tied_are_the_same_here(tmp_path, names):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names, ensure_weight_tying=True)
    model = peft.get_peft_model(tied(), config).eval()
    randomised(p for _, p in sorted(model.named_parameters()) if p.requires_grad)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = veneer.load_adapter(tied(), tmp_path / "theirs")
    torch.testing.assert_close(run(ours, "tied"), run(model, "tied"), rtol=1e-5, atol=1e-5)
    veneer.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(tied(), tmp_path / "ours").eval()
    torch.testing.assert_close(run(back, "tied"), run(ours, "tied"), rtol=1e-5, atol=1e-5)


def test_targets_that_peft_kept_tied_are_the_same_here(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = peft.get_peft_model(tied(), config).eval()
    randomised(p for _, p in sorted(model.named_parameters()) if p.requires_grad)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = veneer.load_adapter(tied(), tmp_path)
    torch.testing.assert_close(run(ours, "tied"), run(model, "tied"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("targets", "save"), [(["embed_tokens"], "auto"), (["lm_head", "q_proj"], "auto"), (["q_proj"], True)]
)
def test_copies_of_the_base_in_their_file_are_compared_with_it(tmp_path, targets, save, dtype):
    base = qwen2().eval().to(dtype)
    config = peft.LoraConfig(r=2, target_modules=targets)
    model = peft.get_peft_model(copy.deepcopy(base).float(), config).eval()
    randomised(p for _, p in sorted(model.named_parameters()) if p.requires_grad)
    model.save_pretrained(tmp_path, save_embedding_layers=save)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert any(key.endswith("weight") and "lora" not in key for key in written)
    ours = veneer.load_adapter(copy.deepcopy(base), tmp_path)
    if dtype == torch.float32:
        torch.testing.assert_close(run(ours, "linear"), run(model, "linear"), rtol=1e-5, atol=1e-5)
    resized, changed = copy.deepcopy(base), copy.deepcopy(base)
    resized.resize_token_embeddings(90)
    with torch.no_grad():
        changed.get_input_embeddings().weight[0] += 0.5
        changed.lm_head.weight[0] += 0.5
    for other in (resized, changed):
        with pytest.raises(veneer.VeneerError, match="is another; it was changed or resized before the training"):
            veneer.load_adapter(other, tmp_path)


def test_biases_that_peft_writes_twice_beside_modules_to_save(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", modules_to_save=["k_proj"])
    model = peft.get_peft_model(tied(), config).eval()
    randomised(p for _, p in sorted(model.named_parameters()) if p.requires_grad)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = veneer.load_adapter(tied(), tmp_path)
    torch.testing.assert_close(run(ours, "tied"), run(model, "tied"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"targets": ["q_proj", "embed_tokens"], "depth": [4, 0]},
        {"targets": ["q_proj", "lm_head"], "depth": [4, 2]},
        {"targets": r".*\.(q|v)_proj", "layers": [1]},
        {"targets": r".*\.(q|v)_proj", "depth": [0, 4]},
        {"targets": ["q_proj"], "depth": [0, 4]},
        {"targets": "mlp", "layers": [0]},
        {"bias": "all", "other": ["v_proj"]},
        {"modules_to_save": ["o_proj"], "other": ["o_proj"]},
        {
            "bias": "lora_only",
            "adalora": True,
            "targets": ["q_proj", "v_proj"],
            "dead": "model.layers.0.self_attn.v_proj",
        },
    ],
)
def test_ties_blocks_biases_and_other_adapters_are_written_as_peft_means_them(tmp_path, settings):
    settings = {"targets": ["q_proj"], **settings}
    other, dead = settings.pop("other", None), settings.pop("dead", None)
    ours = veneer.attach(tied(), veneer.LoraConfig(r=4, alpha=6, **settings))
    randomised(adapter_parameters(ours, "default").values())
    if dead:
        adapters(ours)["default"].allocator.alive[dead][:] = False
        nn.init.zeros_(adapter_parameters(ours, "default")[f"{dead}.lora_E"])
    if other:
        veneer.attach(ours, veneer.LoraConfig(r=2, targets=other), name="other")
        veneer.set_adapter(ours, "default")
    veneer.save_adapter(ours, tmp_path, "default")
    back = peft.PeftModel.from_pretrained(tied(), tmp_path).eval()
    torch.testing.assert_close(run(back, "tied"), run(ours, "tied"), rtol=1e-5, atol=1e-5)
    again = veneer.load_adapter(tied(), tmp_path)
    torch.testing.assert_close(run(again, "tied"), run(ours, "tied"), rtol=1e-5, atol=1e-5)
