"""What adapters can be put on, and how: patterns, depths, exclusions, DoRA, biases, whole modules, several at once."""

import time

import pytest
import torch
from conftest import make_mixture, make_model, randomised
from torch import nn

import veneer
from veneer.adapters.attach import adapter_parameters, lora_layers
from veneer.adapters.lora import LoraConv, LoraLinear
from veneer.adapters.targets import depth_rank
from veneer.optim.groups import parameter_groups
from veneer.quant.linear import QuantizedLinear, quantize_model

IDS = torch.arange(1, 30)[None]


def ranks(model, name="default"):
    return {path: layer.rank(name) for path, layer in lora_layers(model).items()}


@pytest.mark.parametrize(
    ("anchors", "found"),
    [([8], [8] * 5), ([16, 4], [16, 13, 10, 7, 4]), ([0, 8, 0], [0, 4, 8, 4, 0]), ([2, 2, 8], [2, 2, 2, 5, 8])],
)
def test_ranks_between_anchors_are_interpolated_over_the_depth(anchors, found):
    assert [depth_rank(anchors, block, 4) for block in range(5)] == found


def test_ranks_by_depth_keep_the_scaling_and_are_read_back(tmp_path):
    model = make_model(num_hidden_layers=4, fused=False)
    veneer.attach(model, veneer.LoraConfig(r=8, alpha=16, targets=["q_proj"], depth=[8, 0]))
    assert ranks(model) == {f"model.layers.{n}.self_attn.q_proj": r for n, r in ((0, 8), (1, 5), (2, 3))}
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {2.0}
    randomised(model)
    veneer.save_adapter(model, tmp_path / "a")
    other = veneer.load_adapter(make_model(num_hidden_layers=4, fused=False), tmp_path / "a")
    assert ranks(other) == ranks(model)
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_rank_of_its_own_keeps_the_scaling_that_depth_promises(rslora):
    model = make_model()
    config = veneer.LoraConfig(
        r=4, alpha=8, rslora=rslora, targets=["q_proj", "v_proj"], depth=[8, 2], rank_pattern={"q_proj": 4}
    )
    veneer.attach(model, config)
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {config.scaling}
    assert [ranks(model)[f"model.layers.{n}.self_attn.{key}_proj"] for n in (0, 1) for key in "qv"] == [4, 8, 4, 2]


def test_layers_and_exclusions():
    model = make_model(num_hidden_layers=3)
    veneer.attach(model, veneer.LoraConfig(r=2, targets="all-linear", exclude=["k_proj", "mlp.up_proj"], layers=[0, 2]))
    found = set(ranks(model))
    assert len(found) == 2 * 5 and not any("layers.1." in p or p.endswith(("k_proj", "up_proj")) for p in found)
    model = make_model(num_hidden_layers=3)
    veneer.attach(model, veneer.LoraConfig(r=2, targets="all-linear", exclude=r".*\.(mlp|self_attn\.[qk]).*"))
    assert set(ranks(model)) == {f"model.layers.{n}.self_attn.{x}_proj" for n in range(3) for x in "vo"}


def test_all_problems_at_once():
    with pytest.raises(veneer.VeneerError) as error:
        veneer.attach(make_model(), veneer.LoraConfig(r=64, targets="attention", layers=[0, 7]))
    assert "found [7]" in str(error.value) and "at most 48 for q_proj" in str(error.value)
    with pytest.raises(veneer.VeneerError, match="no layer of lora"):
        veneer.attach(make_model(), veneer.LoraConfig(r=2, targets="attention", exclude=".*"))
    with pytest.raises(veneer.VeneerError) as error:
        veneer.attach(make_model(), veneer.LoraConfig(r=2, targets="attention", modules_to_save=["nrm", "q_proj"]))
    assert "'nrm' matches no module" in str(error.value) and "'q_proj' is also in lora.targets" in str(error.value)
    for bad in ({"depth": [0, 0]}, {"depth": [-1]}, {"rank_pattern": {"q_proj": 0}}, {"bias": "some"}):
        with pytest.raises(veneer.VeneerError):
            veneer.LoraConfig(**bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("four_bit", [False, True])
def test_dora_starts_as_the_base_and_merges_to_what_it_computes(dtype, four_bit):
    model = make_model(dtype=dtype)
    if four_bit:
        quantize_model(model, compute_dtype=dtype)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        veneer.attach(model, veneer.LoraConfig(r=4, targets="all-linear", dora=True))
        limit = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.03}
        torch.testing.assert_close(model(input_ids=IDS).logits, plain, **limit)
        adapted = randomised(model)(input_ids=IDS).logits
        assert float((adapted - plain).abs().max()) > 0.05
        torch.testing.assert_close(veneer.merge(model)(input_ids=IDS).logits, adapted, **limit)


@pytest.mark.parametrize("kind", ["linear", "4-bit", "convolution", "embedding"])
def test_dora_gradients_are_those_of_its_formula_with_a_constant_norm(kind):
    torch.manual_seed(1)
    if kind == "convolution":
        base, x = nn.Conv2d(3, 6, 3, padding=1, dilation=2, stride=2), torch.randn(2, 3, 9, 9)
    elif kind == "embedding":
        base, x = nn.Embedding(20, 12), torch.randint(0, 20, (3, 5))
    else:
        base, x = nn.Linear(16, 12), torch.randn(5, 16)
    model = nn.Sequential(base)
    if kind == "4-bit":
        quantize_model(model, compute_dtype=torch.float32)
    veneer.attach(model, veneer.LoraConfig(r=2, alpha=3, targets=["0"], dora=True))
    layer = randomised(model)[0]
    parameters = list(layer.parameters_of("default").values())
    a, b, m = (p.detach().clone().requires_grad_() for p in parameters)
    with torch.no_grad():
        norms = layer._row_norms(layer.dense() + layer.delta("default"))
    weight = (layer.dense() + 1.5 * layer._update(a, b)) * layer._over_rows(m.reshape(-1)) / norms
    if kind == "embedding":
        expected = nn.functional.embedding(x, weight)
    elif kind == "convolution":
        expected = nn.functional.conv2d(x, weight, base.bias, 2, 1, 2)
    else:
        expected = nn.functional.linear(x, weight, layer.bias)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    for p, q in zip(
        torch.autograd.grad(found, parameters, g), torch.autograd.grad(expected, (a, b, m), g), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_dora_follows_a_model_that_moves():
    """Its kept norms are of the weight on the device where that was; `.to` moves a weight's data under the same name."""
    model = make_model(fused=False)
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj"], dora=True))
    model(input_ids=IDS)
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    assert layer._square_norms() is layer._square_norms()
    model.to("meta")
    assert layer._square_norms().device.type == "meta"


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"dora": True}, "lora.dora: c is a convolution"), ({"adalora": True}, "lora.adalora: c is a convolution"), ({"r": 3}, "lora.r: found 3, .* 2 groups for c")],
)  # fmt: skip
def test_what_a_convolution_with_groups_does_not_allow_is_said_before_anything_changes(setting, words):
    model = nn.Sequential()
    model.add_module("a", nn.Linear(8, 8))
    model.add_module("c", nn.Conv1d(8, 8, 3, groups=2))
    with pytest.raises(veneer.VeneerError, match=words):
        veneer.attach(model, veneer.LoraConfig(**({"r": 2} | setting), targets=["a", "c"]))
    assert not lora_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_dora_on_a_convolution_with_another_border_is_refused():
    model = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"))
    with pytest.raises(veneer.VeneerError, match=r"lora\.dora: 0 is a convolution .* circular"):
        veneer.attach(model, veneer.LoraConfig(r=2, targets=["0"], dora=True))


@pytest.mark.parametrize("whole", [True, False])
def test_a_quantised_weight_is_not_trained_in_full(whole):
    model = make_model(dtype=torch.bfloat16, attention_bias=True)
    quantize_model(model, "nf4")
    with pytest.raises(
        veneer.VeneerError, match=r"quantised weight of model\.layers\.0\.self_attn\.q_proj cannot be trained"
    ):
        veneer.attach(
            model,
            veneer.LoraConfig(r=2, targets="mlp", modules_to_save=["self_attn" if whole else "q_proj"]),
        )
    veneer.attach(model, veneer.LoraConfig(r=2, targets="mlp", modules_to_save=["norm"]))


def test_convolutions_with_groups_are_trained_but_not_merged():
    model = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4, padding=1))
    veneer.attach(model, veneer.LoraConfig(r=4, targets=["0"]))
    assert isinstance(model[0], LoraConv) and randomised(model)(torch.randn(1, 8, 5, 5)).shape == (1, 12, 5, 5)
    with pytest.raises(veneer.VeneerError, match="4 groups"):
        model[0].merged("default")
    with pytest.raises(veneer.VeneerError, match="multiple of the convolution's 4 groups"):
        veneer.attach(nn.Sequential(nn.Conv2d(8, 12, 3, groups=4)), veneer.LoraConfig(r=6, targets=["0"]))


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_trained_in_full_takes_the_bases_place_and_keeps_the_tie(tmp_path, tied):
    model = make_model(tie_word_embeddings=tied, fused=False)
    plain = model(input_ids=IDS).logits
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj"], modules_to_save=["embed_tokens", "model.norm"]))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    randomised(model)
    changed = model(input_ids=IDS).logits
    assert float((changed - plain).abs().max()) > 0.1
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = adapter_parameters(model, "default")
    assert all(p.grad is not None for p in trained.values())
    assert {"model.embed_tokens.weight", "model.norm.weight"} < trained.keys() and "lm_head.weight" not in trained
    veneer.save_adapter(model, tmp_path / "a")
    veneer.set_adapter(model, None)
    assert torch.equal(model(input_ids=IDS).logits, plain)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    veneer.load_adapter(model, tmp_path / "a", name="again")
    assert torch.equal(model(input_ids=IDS).logits, changed)
    torch.testing.assert_close(veneer.merge(model)(input_ids=IDS).logits, changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fused", "experts"])
def test_an_adapter_in_16_bits_is_half_as_large_and_trains(tmp_path, kind):
    def make():
        if kind == "experts":
            torch.manual_seed(0)
            return make_mixture()
        return make_model(dtype=torch.float32 if kind == "float32" else torch.bfloat16, hidden_size=64)

    model, full = (
        veneer.attach(make(), veneer.LoraConfig(r=4, dtype=dtype, dora=kind == "fused"), seed=0)
        for dtype in ("bfloat16", "float32")
    )
    half, whole = (adapter_parameters(m, "default") for m in (model, full))
    with torch.no_grad():
        for key, parameter in half.items():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key))) / 10)
            whole[key].copy_(parameter)
    assert {p.dtype for key, p in half.items() if "magnitude" not in key} == {torch.bfloat16}
    losses = [m(input_ids=IDS, labels=IDS).loss for m in (model, full)]
    torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-3)
    for loss in losses:
        loss.backward()
    for key, parameter in half.items():
        assert parameter.grad.dtype == parameter.dtype
        torch.testing.assert_close(
            parameter.grad.float(), whole[key].grad, rtol=0.05, atol=0.05 * float(whole[key].grad.abs().max())
        )
    veneer.save_adapter(model, tmp_path / "a")
    again = veneer.load_adapter(make(), tmp_path / "a", dtype="bfloat16")
    assert all(
        torch.equal(p, half[key]) and p.dtype == half[key].dtype
        for key, p in adapter_parameters(again, "default").items()
    )
    assert {p.dtype for p in adapter_parameters(veneer.load_adapter(make(), tmp_path / "a"), "default").values()} == {
        torch.float32
    }


def test_both_sides_of_a_tie_are_one_parameter_and_the_base_comes_back(tmp_path):
    model = make_model()
    before = model(input_ids=IDS).logits
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    trained = randomised(model)(input_ids=IDS).logits
    assert len([key for key in adapter_parameters(model, "default") if "lora" not in key]) == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    veneer.save_adapter(model, tmp_path / "a")
    veneer.set_adapter(model, None)
    assert torch.equal(model(input_ids=IDS).logits, before)
    again = veneer.load_adapter(make_model(), tmp_path / "a")
    torch.testing.assert_close(again(input_ids=IDS).logits, trained, rtol=1e-5, atol=1e-5)


def test_several_adapters_change_places_in_milliseconds(tmp_path):
    model = make_model()
    logits = {None: model(input_ids=IDS).logits}
    kinds = {
        "plain": {"targets": "all-linear"},
        "dora": {"targets": "attention", "dora": True},
        "words": {"targets": ["embed_tokens", "v_proj"], "modules_to_save": ["norm"]},
    }
    for name, config in kinds.items():
        veneer.attach(model, veneer.LoraConfig(r=4, **config), name=name)
        logits[name] = randomised(model, name)(input_ids=IDS).logits.detach()
    for name in ["dora", None, "words", "plain", "words", None, "dora"]:
        began = time.perf_counter()
        veneer.set_adapter(model, name)
        assert time.perf_counter() - began < 0.05
        assert torch.equal(model(input_ids=IDS).logits, logits[name]), name
        assert veneer.active_adapter(model) == name
    veneer.remove_adapter(model, "dora")
    veneer.remove_adapter(model, "words")
    assert veneer.active_adapter(model) is None and torch.equal(model(input_ids=IDS).logits, logits[None])
    veneer.set_adapter(model, "plain")
    assert torch.equal(model(input_ids=IDS).logits, logits["plain"])


def test_a_trained_bias_of_a_4_bit_layer_gets_its_gradient():
    model = make_model(attention_bias=True, fused=False)
    exact = make_model(attention_bias=True, fused=False)
    quantize_model(model, compute_dtype=torch.float32)
    for path, layer in list(exact.named_modules()):
        if isinstance(model.get_submodule(path), QuantizedLinear):
            layer.weight.data = model.get_submodule(path).dequantize(torch.float32)
    for one in (model, exact):
        veneer.attach(one, veneer.LoraConfig(r=2, targets=["q_proj"], bias="all"), seed=0)
        randomised(one)
        one(input_ids=IDS, labels=IDS).loss.backward()
    found, wanted = (adapter_parameters(one, "default") for one in (model, exact))
    assert found.keys() == wanted.keys() and sum(name.endswith("bias") for name in found) == 8
    for name, parameter in wanted.items():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_lora_plus_gives_b_a_rate_of_its_own():
    model = make_model()
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj", "embed_tokens"], modules_to_save=["model.norm"]))
    parameters = adapter_parameters(model, "default")
    slow, fast = parameter_groups(parameters, 16.0)
    assert (slow["factor"], fast["factor"]) == (1.0, 16.0)
    names = {id(p): name for name, p in parameters.items()}
    assert all(names[id(p)].endswith(("lora_B.weight", "lora_embedding_B")) for p in fast["params"])
    assert len(fast["params"]) == 3 and len(slow["params"]) == 4
    assert [len(group["params"]) for group in parameter_groups(parameters)] == [7]
    assert veneer.TrainConfig(lora_plus=True).lora_plus == 16 and veneer.TrainConfig(lora_plus=False).lora_plus is None
    assert isinstance(lora_layers(model)["model.layers.0.self_attn.q_proj"], LoraLinear)


@pytest.mark.parametrize("kind", ["fused", "4-bit", "dropout"])
def test_the_bias_of_b_is_trained_in_every_path(kind):
    """y + scaling * (B A x + bias): the plain definition on dense weights says what comes out, and every gradient."""
    model = make_model(dtype=torch.bfloat16 if kind == "fused" else torch.float32, attention_bias=True)
    if kind == "4-bit":
        quantize_model(model, compute_dtype=torch.float32)
    before = model(input_ids=IDS).logits.detach()
    config = veneer.LoraConfig(
        r=2, alpha=3, targets=["q_proj", "o_proj"], lora_bias=True, dropout=0.5 * (kind == "dropout")
    )
    veneer.attach(model, config)
    assert torch.equal(model(input_ids=IDS).logits, before)
    biases = {k: p for k, p in adapter_parameters(model, "default").items() if k.endswith("lora_B.bias")}
    assert len(biases) == 4 and all(not p.any() for p in biases.values())
    randomised(model)
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    x = torch.randn(7, 48).to(before.dtype)
    a, b, bias = layer.parameters_of("default").values()
    expected = layer.base_layer(x).float() + 1.5 * (x.float() @ a.T @ b.T + bias)
    close = {"rtol": 0.02, "atol": 0.02} if kind == "fused" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(layer(x).float(), expected, **close)
    (found,) = torch.autograd.grad(layer.train()(x).float().sum(), [bias])
    torch.testing.assert_close(found, torch.full_like(bias, 1.5 * 7))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in biases.values())
    adapted = model.eval()(input_ids=IDS).logits.detach()
    merged = veneer.merge(model)(input_ids=IDS).logits
    limit = {"rtol": 0.05, "atol": 0.05} if kind == "fused" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(merged, adapted, **limit)


def test_a_bias_of_b_goes_with_neither_dora_nor_embeddings_nor_a_layer_without_bias_when_merged(tmp_path):
    for more in ({"dora": True}, {"init": "gaussian"}):
        with pytest.raises(veneer.VeneerError, match="lora_bias"):
            veneer.LoraConfig(lora_bias=True, **more)
    with pytest.raises(veneer.VeneerError, match="embed_tokens are embeddings"):
        veneer.attach(make_model(), veneer.LoraConfig(r=2, targets=["embed_tokens", "q_proj"], lora_bias=True))
    model = make_model()
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj"], lora_bias=True))
    before = randomised(model)(input_ids=IDS).logits
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.merge(model)
    assert len(caught.value.problems) == 2 and torch.equal(model(input_ids=IDS).logits, before)
