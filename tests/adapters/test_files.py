import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

import veneer
from veneer.adapters.attach import adapter_parameters

IDS = torch.arange(1, 30)[None]


def trained(seed=0, **config):
    model = make_model()
    veneer.attach(model, veneer.LoraConfig(**{"r": 4, **config}), seed=seed)
    torch.manual_seed(seed)
    for parameter in adapter_parameters(model, "default").values():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("config", [{}, {"targets": ["q_proj", "down_proj"]}, {"rslora": True, "targets": "attention"}])
def test_round_trip(tmp_path, config):
    model = trained(**config)
    veneer.save_adapter(model, tmp_path / "a")
    other = make_model()
    veneer.load_adapter(other, tmp_path / "a", name="billing")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)
    veneer.save_adapter(other, tmp_path / "b")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text()) == json.loads(
        (tmp_path / "b/adapter_config.json").read_text()
    )


def damaged(tmp_path, change_config=None, change_tensors=None):
    path = tmp_path / "a"
    if not path.exists():
        veneer.save_adapter(trained(), path)
    config, tensors = (
        json.loads((path / "adapter_config.json").read_text()),
        load_file(path / "adapter_model.safetensors"),
    )
    (change_config or (lambda c: None))(config)
    (change_tensors or (lambda t: None))(tensors)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        (None, lambda t: t[KEY].fill_(float("nan")), "NaN"),
        (None, lambda t: t.pop(KEY), "found no lora_A"),
        (None, lambda t: t.update({KEY: torch.zeros(4, 50)}), r"found \(4, 50\), expected \(4, 48\)"),
        (
            None,
            lambda t: t.update({"x.lora_A.weight": torch.zeros(4, 4), "x.lora_B.weight": torch.zeros(4, 4)}),
            "x: found in the adapter, but this model has no such layer",
        ),
        (lambda c: c.update(use_dora=True), None, "lora_magnitude_vector"),
        (lambda c: c.update(lora_bias=True), None, "found no lora_B.bias"),
        (lambda c: c.update(lora_bias="yes"), None, "lora_bias: found 'yes', expected true or false"),
        (lambda c: c.update(lora_bias=True, use_dora=True), None, "does not go with use_dora"),
        (None, lambda t: t.update({KEY.replace("A.weight", "B.bias"): torch.zeros(48)}), "lora_bias is not true"),
        (lambda c: c.update(modules_to_save=["lm_head"]), None, "modules_to_save"),
        (lambda c: c.update(init_lora_weights="pissa"), None, "init_lora_weights"),
        (lambda c: c.update(peft_type="IA3"), None, "IA3"),
        (lambda c: c.update(r=0), None, "found 0"),
        (lambda c: c.update(r=1_000_000), None, r"found \(4, 48\), expected \(1000000, in\)"),
        (lambda c: c.update(lora_alpha=float("nan")), None, "lora_alpha: found nan, expected a number above 0"),
        (lambda c: c.update(kasa_config={"beta": 1}), None, "kasa_config is .* which changes the result"),
        (lambda c: c.update(rank_pattern={r"((\w+)\.?)+!": 2}), None, "rank_pattern: .* gave no answer in"),
        (None, lambda t: t.update({KEY: torch.ones(4, 48, dtype=torch.int32)}), "found int32, expected floating point"),
        (None, lambda t: t.update({"../../x.lora_A.weight": torch.zeros(4, 4)}), "x: found no lora_B"),
        (None, lambda t: t.update({"x\x1b[2J\n": torch.zeros(4, 4)}), r"tensor x\\x1b\[2J"),
    ],
)
def test_bad_adapters_are_refused_whole(tmp_path, config, tensors, words):
    path = damaged(tmp_path, config, tensors)
    model = make_model()
    with pytest.raises(veneer.VeneerError, match=words):
        veneer.load_adapter(model, path)
    assert not [n for n, _ in model.named_modules() if "lora" in n]


def test_swapped_factors_and_all_other_problems_are_told_at_once(tmp_path):
    other = KEY.replace("q_proj", "k_proj")

    def swap(t):
        b = KEY.replace("lora_A", "lora_B")
        t[KEY], t[b] = t[b], t[KEY]
        t[other][0, 0] = float("nan")
        del t[other.replace("lora_A", "lora_B")]

    with pytest.raises(veneer.VeneerError) as caught:
        veneer.load_adapter(make_model(), damaged(tmp_path, None, swap))
    problems = "\n".join(caught.value.problems)
    assert "found (48, 4), expected (4, in)" in problems and "found (4, 48), expected (48, 4)" not in problems
    assert "NaN" in problems and "found no lora_B" in problems and len(caught.value.problems) == 4


def test_a_field_of_a_newer_tool_is_kept_and_said(tmp_path):
    path = damaged(tmp_path, lambda c: c.update(new_idea=3, other_idea=None))
    with pytest.warns(UserWarning, match="adapter_config.json: new_idea: not known here"):
        model = veneer.load_adapter(make_model(), path)
    veneer.save_adapter(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["new_idea"] == 3


def test_missing_layer_and_other_base(tmp_path):
    path = damaged(tmp_path, None, lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.up_proj" in k])
    with pytest.raises(veneer.VeneerError, match=r"layers\.1\.mlp\.up_proj: in target_modules"):
        veneer.load_adapter(make_model(), path)
    with pytest.raises(veneer.VeneerError, match=r"expected \(4, 64\)"):
        veneer.load_adapter(make_model(hidden_size=64), path)


def test_a_name_that_matches_nothing_hides_no_missing_layer(tmp_path):
    more = lambda c: c.update(target_modules=[*c["target_modules"], "w1"])  # noqa: E731
    path = damaged(tmp_path, more)
    veneer.load_adapter(make_model(), path)  # as PEFT does: another model's name in the list is no error
    damaged(tmp_path, None, lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.up_proj" in k])
    with pytest.raises(veneer.VeneerError, match=r"layers\.1\.mlp\.up_proj: in target_modules"):
        veneer.load_adapter(make_model(), path)
    damaged(tmp_path, None, lambda t: (t.clear(), t.update(x=torch.zeros(1))))
    with pytest.raises(veneer.VeneerError, match="no lora_A and lora_B tensors"):
        veneer.load_adapter(make_model(), path)


def test_pickle_and_missing_files(tmp_path):
    path = damaged(tmp_path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(veneer.VeneerError, match="pickle"):
        veneer.load_adapter(make_model(), path)
    with pytest.raises(veneer.VeneerError, match="no such folder"):
        veneer.load_adapter(make_model(), tmp_path / "none")


def test_nan_is_not_saved_and_full_folders_not_overwritten(tmp_path):
    model = trained()
    veneer.save_adapter(model, tmp_path / "a")
    with pytest.raises(veneer.VeneerError, match="not empty"):
        veneer.save_adapter(model, tmp_path / "a")
    next(iter(adapter_parameters(model, "default").values())).data[0, 0] = float("inf")
    with pytest.raises(veneer.VeneerError, match="NaN or Inf"):
        veneer.save_adapter(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_unknown_adapter_is_named():
    with pytest.raises(veneer.VeneerError, match="adapters there are: default"):
        veneer.set_adapter(trained(), "billing")
    with pytest.raises(veneer.VeneerError, match="adapter name"):
        veneer.attach(make_model(), veneer.LoraConfig(r=2), name="../evil")
