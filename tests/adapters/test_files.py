import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

import veneer
from veneer.adapters import patterns
from veneer.adapters.attach import adapter_parameters, adapters
from veneer.errors import RefusedError

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
        (None, lambda t: t.update({"../../x.lora_A.weight": torch.zeros(4, 4)}), "expected a name of letters"),
        (None, lambda t: t.update({"x\x1b[2J\n": torch.zeros(4, 4)}), r"tensor 'x\\x1b\[2J"),
        (
            None,
            lambda t: t.update({f"x\x1b[2J.lora_{part}.weight": torch.zeros(4, 4) for part in "AB"}),
            r"2 problems:\n  - .*tensor 'x\\x1b\[2J.lora_A.weight': expected a name",
        ),
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


def test_config_tensors_and_base_are_told_in_one_error(tmp_path):
    """What the config says wrongly hides neither what is wrong with tensors nor that the base is another."""

    def spoil(t):
        t[KEY.replace("q_proj", "k_proj")][0, 0] = float("inf")
        t["base_model.model.strange"] = torch.ones(2)
        del t[KEY.replace("q_proj", "v_proj")]

    path = damaged(tmp_path, lambda c: c.update(lora_alpha=-1, use_qalora=True, bias=3), spoil)
    base = make_model(hidden_size=64)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.load_adapter(base, path)
    problems = "\n".join(caught.value.problems)
    for words in (
        "lora_alpha: found -1", "bias: found 3", "use_qalora is True", "found NaN or Inf", "strange: expected names like",
        "v_proj: found no lora_A", "q_proj.lora_A: found (4, 48), expected (4, 64)",
    ):  # fmt: skip
        assert words in problems, words
    assert type(caught.value) is veneer.VeneerError and "in target_modules" not in problems
    assert before.keys() == base.state_dict().keys()
    damaged(tmp_path, lambda c: c.update(lora_alpha=8, bias="none"), lambda t: t.clear())
    with pytest.raises(veneer.VeneerError, match=r"use_qalora|no lora_A and lora_B") as caught:
        veneer.load_adapter(make_model(), path)
    assert len([p for p in caught.value.problems if "in target_modules" not in p]) == 2


def test_a_rank_that_cannot_be_is_told_without_what_would_follow_from_it(tmp_path):
    path = damaged(tmp_path, lambda c: c.update(r=0), lambda t: t[KEY].fill_(float("nan")))
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.load_adapter(make_model(), path)
    assert len(caught.value.problems) == 2, caught.value.problems
    assert "r: found 0" in caught.value.problems[0] and "NaN" in caught.value.problems[1]


def test_a_config_that_cannot_be_beside_a_damaged_file(tmp_path):
    path = damaged(tmp_path, lambda c: c.update(r=-3))
    (path / "adapter_model.safetensors").write_bytes(b"12345678901234")
    with pytest.raises(veneer.VeneerError, match=r"r: found -3(.|\n)*not a valid safetensors file"):
        veneer.load_adapter(make_model(), path)


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


def changed(tmp_path, model, change_config=None, change_tensors=None):
    veneer.save_adapter(model, tmp_path / "a")
    return damaged(tmp_path, change_config, change_tensors)


def shaken(model, seed=0, **config):
    veneer.attach(model, veneer.LoraConfig(**{"r": 4, "targets": ["q_proj"], **config}), seed=seed)
    for parameter in adapter_parameters(model, "default").values():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


BIASED = {"attention_bias": True}
BIAS = "base_model.model.model.layers.0.self_attn.{}.bias"


@pytest.mark.parametrize(
    ("settings", "config", "tensors", "words"),
    [
        ({"targets": ["q_proj", "v_proj"]}, {"target_modules": ["q_proj"]}, None, r"1\.self_attn\.v_proj: found in"),
        ({}, {"target_modules": ["nothing_at_all"]}, None, r"0\.self_attn\.q_proj: found in the adapter, but not"),
        ({}, {"layers_to_transform": [0]}, None, r"layers\.1\.self_attn\.q_proj: found in the adapter, but not"),
        ({}, {"exclude_modules": ["q_proj"]}, None, r"q_proj: found in the adapter, but not"),
        ({"targets": "mlp"}, {"target_modules": "mlp"}, None, r"up_proj: found in the adapter, but not"),
        ({"targets": "attention"}, {"target_modules": "attention"}, None, r"q_proj: found in the adapter, but not"),
        ({"bias": "all"}, {}, lambda t: t.pop(BIAS.format("v_proj")), r"v_proj\.bias: meant by bias all, but not in"),
        ({"bias": "lora_only"}, {}, lambda t: t.pop(BIAS.format("q_proj.base_layer")), "meant by bias lora_only"),
        ({"bias": "all"}, {"bias": "lora_only"}, None, r"v_proj\.bias: found in the adapter, but not meant by"),
        (
            {"modules_to_save": ["layernorm"]},
            {},
            lambda t: t.pop("base_model.model.model.layers.1.input_layernorm.weight"),
            r"1\.input_layernorm\.weight: meant by modules_to_save, but not in",
        ),
        (
            {},
            {},
            lambda t: t.update({KEY.removeprefix("base_model.model."): t[KEY] * 2}),
            "found with base_model.model. before it as well",
        ),
        (
            {},
            {"target_modules": ["q_proj", "base_layer"]},
            lambda t: t.update({k.replace("q_proj", "q_proj.base_layer"): v.clone() for k, v in t.items()}),
            r"q_proj\.base_layer: found in the adapter, but this model has no such layer",
        ),
    ],
)
def test_what_the_config_does_not_mean_or_the_file_lacks_is_an_error(tmp_path, settings, config, tensors, words):
    path = changed(tmp_path, shaken(make_model(**BIASED), **settings), lambda c: c.update(config), tensors)
    model = make_model(**BIASED)
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj"]), name="other")
    before = {name for name, _ in model.named_parameters()}
    with pytest.raises(veneer.VeneerError, match=words):
        veneer.load_adapter(model, path)
    assert {name for name, _ in model.named_parameters()} == before


def test_files_are_named_by_the_layers_of_their_own_adapter(tmp_path):
    model = shaken(make_model(**BIASED), bias="all", modules_to_save=["o_proj"])
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["v_proj", "o_proj"]), name="other")
    veneer.set_adapter(model, "default")
    veneer.save_adapter(model, tmp_path / "a", "default")
    keys = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert {BIAS.format("v_proj"), BIAS.format("q_proj.base_layer"), BIAS.format("o_proj")} <= keys
    again = veneer.load_adapter(make_model(**BIASED), tmp_path / "a")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_bias_of_lora_only_keeps_its_place_where_adalora_left_no_rank(tmp_path):
    model = shaken(make_model(**BIASED), bias="lora_only", adalora=True, targets=["q_proj", "v_proj"])
    allocator = adapters(model)["default"].allocator
    dead = "model.layers.1.self_attn.v_proj"
    allocator.alive[dead][:] = False
    with torch.no_grad():
        adapter_parameters(model, "default")[f"{dead}.lora_E"].zero_()
    veneer.save_adapter(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = f"base_model.model.{dead}"
    assert tensors[f"{key}.lora_A.weight"].shape == (1, 48) and not tensors[f"{key}.lora_B.weight"].any()
    assert f"{key}.base_layer.bias" in tensors
    again = veneer.load_adapter(make_model(**BIASED), tmp_path / "a")
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_tied_modules_trained_in_full_are_written_under_both_names(tmp_path):
    model = shaken(make_model(), modules_to_save=["lm_head"])
    veneer.save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.embed_tokens"] and config["ensure_weight_tying"] is True
    again = veneer.load_adapter(make_model(), tmp_path / "a")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert len(adapters(again)["default"].replaced) == 1
    veneer.set_adapter(again, None)
    assert torch.equal(again(input_ids=IDS).logits, make_model()(input_ids=IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    embedding = "base_model.model.model.embed_tokens.weight"
    damaged(tmp_path, None, lambda t: t[embedding].mul_(2))
    with pytest.raises(RefusedError, match="expected equal weights, found different ones"):
        veneer.load_adapter(make_model(), tmp_path / "a")


def test_a_regex_of_a_file_that_explodes_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    path = changed(tmp_path, trained(targets=["q_proj"]), lambda c: c.update(target_modules=r"((\w+)\.?)+!"))
    with pytest.raises(veneer.VeneerError, match=r"target_modules: .* gave no answer in 0\.5 s"):
        veneer.load_adapter(make_model(), path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"lora_alpha": 1e300},
            r"adapter_config\.json: lora_alpha: found 1e\+300, expected a number above 0 that fp32",
        ),
        ({"lora_alpha": 10**400}, r"adapter_config\.json: lora_alpha: found 10{59} \.\.\. \(401 characters\)"),
        ({"alpha_pattern": {"q_proj": 1e39}}, "alpha_pattern: found"),
        ({"trainable_token_indices": {"embed_tokens": []}}, "trainable_token_indices: found .*embed_tokens.*not empty"),
        ({"peft_type": "ADALORA"}, "found peft_type 'ADALORA', expected 'LORA'\n.*merge_and_unload"),
        ({"layers_pattern": 3}, "layers_pattern: found 3, expected a name"),
        ({"ensure_weight_tying": "yes"}, "ensure_weight_tying: found 'yes', expected true or false"),
    ],
)
def test_fields_that_cannot_be_are_told_with_their_file(tmp_path, config, words):
    path = damaged(tmp_path, lambda c: c.update(config))
    with pytest.raises(veneer.VeneerError, match=words) as caught:
        veneer.load_adapter(make_model(), path)
    assert len(str(caught.value)) < 600


def test_a_number_of_thousands_of_digits_and_float8_are_errors_and_a_bom_is_none(tmp_path):
    path = damaged(tmp_path)
    text = (path / "adapter_config.json").read_text()
    (path / "adapter_config.json").write_text(text, encoding="utf-8-sig")
    veneer.load_adapter(make_model(), path)
    (path / "adapter_config.json").write_text(text.replace('"r": 4', f'"r": {"4" * 5000}'))
    with pytest.raises(veneer.VeneerError, match=r"adapter_config\.json is not valid JSON"):
        veneer.load_adapter(make_model(), path)
    (path / "adapter_config.json").write_text(text)
    damaged(tmp_path, None, lambda t: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)}))
    with pytest.raises(veneer.VeneerError, match="found float8_e4m3fn, expected floating point: float32"):
        veneer.load_adapter(make_model(), path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "fp32"}, "dtype: found 'fp32', expected bfloat16, float16, float32"),
        ({"dtype": "int8"}, "dtype: found 'int8'"),
        ({"device": "cuda:9"}, "device: found 'cuda:9', expected cpu, or a GPU"),
        ({"device": "meta"}, "device: found 'meta'"),
        ({"device": "nowhere"}, "device: found 'nowhere'"),
        ({"name": 5}, "name: found 5, expected a string"),
        ({"path": None}, "path: found None, expected an adapter's folder"),
        ({"path": "a" * 300}, "adapter 'aaa.*: File name too long"),
        ({"path": "a\0b"}, r"adapter a\\x00b: no such folder"),
    ],
)
def test_settings_of_load_adapter_that_cannot_be(tmp_path, settings, words):
    model = make_model()
    with pytest.raises(veneer.VeneerError, match=words):
        veneer.load_adapter(model, **{"path": damaged(tmp_path), **settings})
    assert not [n for n, _ in model.named_modules() if "lora" in n]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_card_says_the_dtype(tmp_path, dtype):
    veneer.save_adapter(trained(dtype=dtype), tmp_path / "a")
    assert f"parameters in {dtype}," in (tmp_path / "a" / "README.md").read_text()
