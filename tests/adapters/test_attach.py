import json
import warnings

import pytest
import torch
from conftest import make_mixture as mixture
from conftest import make_model
from torch import nn

import veneer
from veneer.adapters.attach import active_adapter, adapter_parameters, adapters, lora_layers
from veneer.errors import VeneerError

EXPERTS = [f"model.layers.{n}.mlp.experts.{key}" for n in (0, 1) for key in ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", ["mlp", "all-linear"])
def test_presets_reach_the_experts_and_not_the_router(kind, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = veneer.attach(mixture(kind), veneer.LoraConfig(r=2, targets=targets))
    found = {path for path in lora_layers(model) if ".mlp." in path}
    assert found == set(EXPERTS) and len(lora_layers(model)) == (4 if targets == "mlp" else 12)
    assert not [
        name for name, p in model.named_parameters() if p.requires_grad and ("gate.w" in name or "router" in name)
    ]


def test_presets_leave_out_the_gate_of_a_shared_expert_but_not_its_layers():
    model = veneer.attach(mixture("qwen2_moe"), veneer.LoraConfig(r=2, targets="mlp"))
    assert {path.split(".", 3)[3] for path in lora_layers(model)} == {
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
        *(f"mlp.shared_expert.{kind}_proj" for kind in ("gate", "up", "down")),
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "width"), [("mixtral", 64), ("qwen3_moe", 16)])
@pytest.mark.parametrize("setting", [{"dropout": 0.1}, {"dora": True}, {"lora_bias": True}])
def test_a_preset_that_leaves_out_the_experts_says_so(kind, width, setting):
    frozen = 2 * 4 * 3 * 32 * width  # layers, experts, matrices of one
    model = mixture(kind)
    with pytest.warns(
        UserWarning,
        match=rf"with {next(iter(setting))}, .*{frozen:,} parameters stay frozen in model\.layers\.0\.mlp\.experts, model",
    ):
        veneer.attach(model, veneer.LoraConfig(r=2, **setting))
    assert {name.split(".")[3] for name in lora_layers(model)} == {"self_attn"}


def test_one_of_two_parameters_leaves_the_other_with_a_warning():
    model = mixture()
    with pytest.warns(UserWarning, match=rf"{2 * 4 * 32 * 64:,} parameters stay frozen"):
        veneer.attach(model, veneer.LoraConfig(r=2, parameters=["experts.gate_up_proj"]))
    assert {path for path in lora_layers(model) if "mlp" in path} == {EXPERTS[0], EXPERTS[2]}


def test_words_that_also_fit_parameters_of_the_experts_are_not_passed_over_in_silence():
    model = mixture("qwen2_moe")  # a shared expert of linears, and experts
    with pytest.warns(UserWarning, match=r"reaches layers only.*stay frozen in model\.layers\.0\.mlp\.experts"):
        veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj", "down_proj"]))
    assert not [path for path in lora_layers(model) if ".experts." in path]


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], r".*experts.*"])
def test_targets_in_the_experts_alone_say_how_to_name_them(targets):
    model = mixture()
    with pytest.raises(VeneerError, match=r"model\.layers\.0\.mlp\.experts.*in lora.parameters") as caught:
        veneer.attach(model, veneer.LoraConfig(r=2, targets=targets))
    assert len(caught.value.problems) == 1 and not lora_layers(model)


def test_parameters_that_have_adapters_are_no_layers_to_another_one(tmp_path):
    model = veneer.attach(mixture("qwen2_moe"), veneer.LoraConfig(r=2, targets="mlp"), name="all")
    with pytest.warns(UserWarning, match="reaches layers only"):
        veneer.attach(model, veneer.LoraConfig(r=2, targets=["down_proj"]))
    assert sorted(path for path, layer in lora_layers(model).items() if "default" in layer.lora_A) == [
        f"model.layers.{n}.mlp.shared_expert.down_proj" for n in (0, 1)
    ]
    veneer.save_adapter(model, tmp_path / "a", "all")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]


def test_exclusions_and_layers_hold_for_experts_too():
    model = veneer.attach(mixture(), veneer.LoraConfig(r=2, targets="mlp", exclude=["experts.down_proj"], layers=[1]))
    assert list(lora_layers(model)) == [EXPERTS[2]]
    model = veneer.attach(mixture(), veneer.LoraConfig(r=8, targets="all-linear", depth=[4, 0, 2]))
    assert {path: layer.rank("default") for path, layer in lora_layers(model).items() if "mlp" in path} == {
        **dict.fromkeys(EXPERTS[:2], 4), **dict.fromkeys(EXPERTS[2:], 2)
    }  # fmt: skip


def test_a_rank_too_large_is_one_problem_for_each_kind_of_layer():
    with pytest.raises(VeneerError) as caught:
        veneer.attach(make_model(), veneer.LoraConfig(r=40, targets="attention"))
    assert caught.value.problems == [
        f"lora.r: found 40, expected at most 24 for {kind} (24 x 48)" for kind in ("k_proj", "v_proj")
    ]


def test_a_dense_model_says_nothing_of_experts():
    with pytest.raises(VeneerError, match="matches no layer") as caught:
        veneer.attach(make_model(), veneer.LoraConfig(r=2, targets=["w_proj"]))
    assert "experts" not in str(caught.value) and "q_proj" in str(caught.value)


@pytest.mark.parametrize(("make", "targets"), [(mixture, ["q_proj"]), (make_model, "all-linear"), (make_model, "mlp")])
def test_no_warning_without_experts_in_what_was_asked(make, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.attach(make(), veneer.LoraConfig(r=2, targets=targets))


IDS = torch.arange(1, 30)[None]
LAYER = "model.layers.0.self_attn.q_proj"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model, name):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    return model


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}, {"targets": ["q_proj"], "tokens": [3, 4]}),
        ({"targets": ["q_proj"], "modules_to_save": ["lm_head"]}, {"targets": ["lm_head"], "dora": True}),
        ({"targets": ["v_proj"], "modules_to_save": ["q_proj"]}, {"targets": ["q_proj"], "dora": True}),
        ({"targets": ["v_proj"], "modules_to_save": ["q_proj"]}, {"targets": ["q_proj"], "init": "pissa"}),
        ({"targets": ["q_proj"], "init": "pissa"}, {"targets": ["q_proj"], "dora": True}),
        ({"targets": ["q_proj"], "bias": "all"}, {"targets": ["q_proj"], "init": "pissa"}),
        ({"targets": ["q_proj"], "bias": "all"}, {"targets": ["v_proj"], "bias": "all"}),
    ],
)
def test_a_second_adapter_starts_from_the_base_whatever_the_active_one_has_trained(first, second):
    tied = "lm_head" not in first.get("modules_to_save", [])
    model = make_model(fused=False, attention_bias=True, tie_word_embeddings=tied)
    before = logits(model)
    trained(veneer.attach(model, veneer.LoraConfig(r=2, **first), name="a"), "a")
    with_a = logits(model)
    assert not torch.allclose(with_a, before, atol=1e-3)
    veneer.attach(model, veneer.LoraConfig(r=2, **second), name="b")
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    veneer.set_adapter(model, "a")
    assert torch.equal(logits(model), with_a)
    veneer.set_adapter(model, None)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("wrong", [{"r": 999}, {"init": "eva"}])
def test_an_attach_that_fails_leaves_the_model_and_its_active_adapter_as_they_were(wrong):
    model = trained(veneer.attach(make_model(), veneer.LoraConfig(r=2, modules_to_save=["norm"]), name="a"), "a")
    before, trainable = logits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(VeneerError):
        veneer.attach(model, veneer.LoraConfig(**({"r": 2} | wrong)), name="b")
    assert active_adapter(model) == "a" and list(adapters(model)) == ["a"]
    assert torch.equal(logits(model), before) and [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": {"r": 2}}, "found <class 'dict'>, expected a veneer.LoraConfig"),
        ({"name": None}, "adapter name: found None"),
        ({"name": 5}, "adapter name: found 5"),
        ({"seed": "a"}, "seed: found 'a'"),
        ({"seed": 2**70}, "seed: found"),
    ],
)
def test_arguments_of_other_types_are_refused_in_words(arguments, words):
    model = make_model()
    with pytest.raises(VeneerError, match=words):
        veneer.attach(model, **({"config": veneer.LoraConfig(r=2)} | arguments))
    assert not lora_layers(model)


def test_an_adapter_is_made_active_by_its_name_only():
    model = veneer.attach(make_model(), veneer.LoraConfig(r=2))
    with pytest.raises(VeneerError, match=r"\['default'\] is not on this model"):
        veneer.set_adapter(model, ["default"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"rank_pattern": {"q_prjo": 2}}, "lora.rank_pattern: 'q_prjo' matches no layer; did you mean 'q_proj'"),
        ({"alpha_pattern": {"x": 2}}, "lora.alpha_pattern: 'x' matches no layer; known: "),
        ({"rank_pattern": {"experts.down_proj": 4}}, "lora.rank_pattern: 'experts.down_proj' matches no layer"),
        ({"rank_pattern": {"": 2}}, "lora.rank_pattern: .*found an empty one"),
        ({"exclude": ["down_prjo"]}, "lora.exclude: 'down_prjo' matches no layer; did you mean 'down_proj'"),
        ({"exclude": [""]}, "lora.exclude: expected name suffixes; found an empty one"),
        ({"exclude": ""}, "lora.exclude: expected name suffixes; found an empty one"),
        ({"exclude": "down_proj"}, r"lora.exclude: 'down_proj' matches .*write \[down_proj\]"),
    ],
)
def test_words_that_mean_no_layer_are_an_error(setting, words):
    model = make_model()
    with pytest.raises(VeneerError, match=words):
        veneer.attach(model, veneer.LoraConfig(r=2, **setting))
    assert not lora_layers(model)


def test_words_that_mean_no_layer_are_harmless_in_a_file_of_peft(tmp_path):
    veneer.save_adapter(veneer.attach(make_model(), veneer.LoraConfig(r=2, targets=["q_proj"])), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    more = {"rank_pattern": {"fc9": 4}, "alpha_pattern": {"fc9": 4}, "exclude_modules": ["fc9"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    assert len(lora_layers(veneer.load_adapter(make_model(), tmp_path / "a"))) == 2


def test_exclusions_may_name_what_cannot_be_adapted_and_patterns_layers_that_are_not_targets():
    model = veneer.attach(mixture(), veneer.LoraConfig(r=2, targets="attention", exclude=["gate", "k_proj", "norm"]))
    assert {path.rsplit(".", 1)[-1] for path in lora_layers(model)} == {"q_proj", "v_proj", "o_proj"}
    with pytest.warns(
        UserWarning, match=r"lora\.rank_pattern: experts\.down_proj, v_proj: for no layer of lora\.targets"
    ):
        veneer.attach(
            mixture(),
            veneer.LoraConfig(r=2, targets=["q_proj"], rank_pattern={"experts.down_proj": 4, "v_proj": 2, "q_proj": 3}),
        )


def test_a_target_outside_the_blocks_is_not_left_out_by_layers_in_silence():
    model = make_model()
    with pytest.warns(UserWarning, match=r"lora\.targets: lm_head not adapted: in none of the numbered blocks"):
        veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj", "lm_head"], layers=[0]))
    assert list(lora_layers(model)) == [LAYER]


def test_a_string_that_fits_the_ends_of_names_is_said_to_be_a_regex():
    with pytest.raises(VeneerError, match=r"a string is a regex for a layer's whole name: write \[q_proj\]") as error:
        veneer.attach(make_model(), veneer.LoraConfig(r=2, targets="q_proj"))
    assert "did you mean" not in str(error.value)


def test_a_regex_that_fits_experts_warns_that_they_stay_frozen():
    model = mixture("qwen2_moe")
    with pytest.warns(UserWarning, match=r"reaches layers only.*stay frozen in model\.layers\.0\.mlp\.experts"):
        veneer.attach(model, veneer.LoraConfig(r=2, targets=r".*\.(q_proj|down_proj)"))
    assert not [path for path in lora_layers(model) if ".experts." in path]


def test_a_mixture_of_experts_alone_with_dropout_is_not_sent_to_a_setting_that_refuses_it_too():
    with pytest.raises(VeneerError, match="with dropout they cannot be adapted") as error:
        veneer.attach(mixture(), veneer.LoraConfig(r=2, targets="mlp", dropout=0.1))
    assert "lora.parameters" not in str(error.value)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.out_proj(self.attention(x, x, x)[0])


def test_the_layer_that_torchs_attention_never_calls_is_not_adapted():
    model = veneer.attach(Attending(), veneer.LoraConfig(r=2))
    assert list(lora_layers(model)) == ["out_proj"]
    model(torch.randn(1, 3, 8)).sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model, "default").values())
    with pytest.warns(UserWarning, match=r"attention\.out_proj not adapted: nn\.MultiheadAttention reads"):
        assert list(lora_layers(veneer.attach(Attending(), veneer.LoraConfig(r=2, targets=["out_proj"])))) == [
            "out_proj"
        ]
    with pytest.raises(VeneerError, match=r"matches no layer .*\(nn\.MultiheadAttention reads"):
        veneer.attach(Attending(), veneer.LoraConfig(r=2, targets=["attention.out_proj"]))


def test_a_file_for_the_layer_that_torchs_attention_never_calls_is_refused(tmp_path):
    class Called(Attending):
        def __init__(self):
            super().__init__()
            self.attention = nn.Module()
            self.attention.out_proj = nn.Linear(8, 8)

    veneer.save_adapter(veneer.attach(Called(), veneer.LoraConfig(r=2, targets=["attention.out_proj"])), tmp_path / "a")
    with pytest.raises(
        VeneerError, match=r"attention\.out_proj: found in the adapter, but this model has no such layer"
    ):
        veneer.load_adapter(Attending(), tmp_path / "a")


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt", "float8"])
def test_linears_that_another_library_has_quantised_are_refused(tmp_path, kind):
    model = make_model(fused=False)
    veneer.save_adapter(veneer.attach(make_model(), veneer.LoraConfig(r=2, targets=["q_proj"])), tmp_path / "a")
    layer = model.get_submodule(LAYER)
    if kind == "float8":
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    else:
        bnb = pytest.importorskip("bitsandbytes")
        theirs = getattr(bnb.nn, kind)(
            48, 48, bias=False, **({} if kind == "Linear4bit" else {"has_fp16_weights": False})
        )
        theirs.load_state_dict(layer.state_dict())
        model.model.layers[0].self_attn.q_proj = theirs.to("cpu")
    trainable = [p.requires_grad for p in model.parameters()]
    for act in (
        lambda: veneer.attach(model, veneer.LoraConfig(r=2)),
        lambda: veneer.attach(model, veneer.LoraConfig(r=2, targets="mlp", modules_to_save=["q_proj"])),
        lambda: veneer.load_adapter(model, tmp_path / "a"),
    ):
        with pytest.raises(VeneerError, match="quantised"):
            act()
        assert not lora_layers(model) and [p.requires_grad for p in model.parameters()] == trainable


def test_words_that_fit_a_layer_of_another_kind_are_told():
    model = mixture()
    with pytest.warns(UserWarning, match=r"mlp.gate, model.layers.1.mlp.gate not adapted: no adapter for \w*Router"):
        veneer.attach(model, veneer.LoraConfig(r=2, targets=r".*(q_proj|mlp\.gate)"))


@pytest.mark.parametrize(("bias", "words"), [("all", "this model has none"), ("lora_only", "no adapted layer has one")])
def test_biases_that_are_not_there_are_told(bias, words):
    with pytest.warns(UserWarning, match=rf"lora.bias {bias}: {words}"):
        veneer.attach(make_model(), veneer.LoraConfig(r=2, targets="qv", bias=bias))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.attach(make_model(attention_bias=True), veneer.LoraConfig(r=2, targets="qv", bias=bias))


def test_adapters_are_listed_and_wait_where_they_are_told():
    model = make_model()
    assert veneer.list_adapters(model) == []
    veneer.attach(model, veneer.LoraConfig(r=2), name="a", device="cpu")
    veneer.attach(model, veneer.LoraConfig(r=2), name="b")
    assert veneer.list_adapters(model) == ["a", "b"] and veneer.active_adapter(model) == "b"
    veneer.remove_adapter(model, "b")
    assert veneer.list_adapters(model) == ["a"] and veneer.active_adapter(model) is None
    for device in ("cuda:77", "moon"):
        with pytest.raises(veneer.VeneerError, match=f"device: found '{device}', expected cpu"):
            veneer.attach(model, veneer.LoraConfig(r=2), name="c", device=device)


def test_training_on_a_base_in_fp16():
    model = veneer.attach(make_model(dtype=torch.float16, fused=False), veneer.LoraConfig(r=4, alpha=8), seed=0)
    ids = torch.arange(1, 30)[None]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer, losses = torch.optim.AdamW(trained, lr=5e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1, losses
