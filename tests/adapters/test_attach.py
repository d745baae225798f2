import json
import warnings

import pytest
from conftest import make_mixture as mixture
from conftest import make_model

import veneer
from veneer.adapters.attach import lora_layers
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
