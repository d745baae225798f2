"""PiSSA, LoftQ and EVA: what they start from, what is saved, switching off, resuming, bad input."""

import copy
import functools
import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from typer.testing import CliRunner

import veneer
from veneer.adapters import starts
from veneer.adapters.attach import adapter_parameters, adapters, lora_layers
from veneer.adapters.lora import LoraLinear
from veneer.adapters.peft_format import base_quantization
from veneer.cli import app
from veneer.config import parse_recipe
from veneer.errors import RefusedError, VeneerError
from veneer.quant.linear import QuantizedLinear, quantize_model, quantized_layers
from veneer.training import batches, loop
from veneer.training.batches import start_batches

IDS = torch.arange(1, 41).view(2, 20)
BATCH = {"input_ids": IDS, "labels": IDS}


def base(quantize=None, **changes):
    """A tiny model, and as `veneer.load` leaves it a way back to its original weights."""
    model = make_model(**changes)
    if quantize:
        model.veneer_original = functools.partial(make_model, **changes)
        quantize_model(model, quantize, compute_dtype=torch.float32)
        model.veneer_quantization = quantize
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def moved(model, name="default"):
    """Every factor a little elsewhere, as after training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


# ---- before the first step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (50, 50)])
def test_the_fast_svd_is_near_the_exact_one_and_always_the_same(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    u, s, vh = starts.top_svd(w, 6, 4)
    torch.manual_seed(8)
    assert all(torch.equal(a, b) for a, b in zip((u, s, vh), starts.top_svd(w, 6, 4), strict=True))
    exact = torch.linalg.svd(w, full_matrices=False)
    least = float(exact[1][6:].norm())
    assert float((w - u * s @ vh).norm()) <= 1.01 * least and bool((s[1:] <= s[:-1]).all())
    u, s, vh = starts.top_svd(w, 6, None)
    assert float((w - u * s @ vh).norm()) <= 1.00001 * least


@pytest.mark.parametrize(
    "settings", [{}, {"rslora": True}, {"svd_niter": None}, {"rank_pattern": {"q_proj": 7}}, {"dtype": "bfloat16"}]
)
def test_pissa_starts_as_the_base_from_its_first_singular_terms(settings):
    model = base()
    before = logits(model)
    weights = {path: layer.weight.clone() for path, layer in model.named_modules() if "proj" in path.split(".")[-1]}
    veneer.attach(model, veneer.LoraConfig(r=4, alpha=12, init="pissa", **settings))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    for path, layer in lora_layers(model).items():
        rank, delta = layer.rank("default"), layer.delta("default")
        values = torch.linalg.svdvals(weights[path])
        left = torch.linalg.svdvals(layer.base_layer.weight)
        assert rank == (7 if "q_proj" in path and "rank_pattern" in settings else 4)
        assert float(left.norm()) <= 1.01 * float(values[rank:].norm())
        torch.testing.assert_close(layer.base_layer.weight + delta, weights[path], rtol=0, atol=1e-5)


def test_pissa_is_pefts():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        make_model(fused=False),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa"),
    )
    ours = veneer.attach(
        base(), veneer.LoraConfig(r=4, alpha=12, targets=["q_proj", "down_proj"], init="pissa", svd_niter=None)
    )
    for path, layer in lora_layers(ours).items():
        other = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(layer.base_layer.weight, other.base_layer.weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.delta("default"), other.get_delta_weight("default"), rtol=0, atol=1e-5)
        norms = (other.lora_A["default"].weight.norm(dim=1), other.lora_B["default"].weight.norm(dim=0))
        torch.testing.assert_close(layer.lora_A["default"].norm(dim=1), norms[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.lora_B["default"].norm(dim=0), norms[1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_four_bit_error_of_a_real_layer_is_below_qloras():
    """The papers' claim, in both their norms; more iterations of LoftQ lower it further."""
    model, _ = veneer.load("smollm2", fused=False)
    linear = model.get_submodule("model.layers.7.mlp.down_proj")
    quantized = QuantizedLinear.from_linear(linear, "nf4")
    weight = linear.weight.float()
    errors = {"qlora": weight - quantized.dequantize(torch.float32)}
    for name, settings in {
        "pissa": {"init": "pissa"},
        "loftq": {"init": "loftq"},
        "loftq 5": {"init": "loftq", "loftq_iterations": 5},
    }.items():
        made = starts.of_weights(LoraLinear(quantized), weight, 16, 2.0, veneer.LoraConfig(r=16, alpha=32, **settings))
        stands = quantized if made.base is None else made.base
        assert stands.kind == "nf4" and stands.double_quant
        errors[name] = weight - stands.dequantize(torch.float32) - 2.0 * made.b @ made.a
    norms = {name: (float(e.norm()), float(torch.linalg.svdvals(e).sum())) for name, e in errors.items()}
    for k in (0, 1):
        assert norms["pissa"][k] < 0.97 * norms["qlora"][k] and norms["loftq"][k] < 0.97 * norms["qlora"][k]
        assert norms["loftq 5"][k] < 0.97 * norms["loftq"][k]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("init", [{"init": "pissa"}, {"init": "loftq"}, {"init": "loftq", "loftq_iterations": 4}])
def test_a_quantised_base_comes_nearer_to_the_original(kind, init):
    original, model = base(), base(kind)
    plain = {path: layer.dequantize(torch.float32) for path, layer in quantized_layers(model).items()}
    veneer.attach(model, veneer.LoraConfig(r=8, alpha=16, **init))
    near = []
    for path, layer in lora_layers(model).items():
        weight = original.get_submodule(path).weight
        near.append(float(torch.dist(layer.merged("default"), weight) / torch.dist(plain[path], weight)))
        assert layer.base_layer.kind == kind
    assert sum(near) / len(near) < 0.98


def test_dora_starts_as_the_base_too():
    for settings, quantize in (({"init": "pissa"}, None), ({"init": "pissa"}, "nf4"), ({"init": "eva"}, None)):
        plain, dora = base(quantize), base(quantize)
        data = [BATCH] if settings["init"] == "eva" else None
        veneer.attach(plain, veneer.LoraConfig(r=4, **settings), data=data)
        veneer.attach(dora, veneer.LoraConfig(r=4, dora=True, **settings), data=data)
        torch.testing.assert_close(logits(dora), logits(plain), rtol=1e-4, atol=1e-5)


# ---- off and on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("init", [{"init": "pissa"}, {"init": "loftq", "loftq_iterations": 3}])
def test_unmerging_by_subtraction_is_not_how_the_base_comes_back(quantize, init):
    """Off, beside it, and taken away: the base bit for bit, the very modules it had."""
    if quantize is None and init["init"] == "loftq":
        return
    model = base(quantize, attention_bias=True)
    modules = {path: module for path, module in model.named_modules() if "proj" in path.split(".")[-1]}
    before = logits(model)
    veneer.attach(model, veneer.LoraConfig(r=4, bias="all", **init))
    after = logits(moved(model))
    assert not torch.equal(after, before)
    with veneer.adapter_off(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)
    beside = veneer.base_model(model)
    assert torch.equal(logits(beside), before) and torch.equal(logits(model), after)
    ours = {t.data_ptr() for layer in lora_layers(model).values() for t in layer.bases[None].state_dict().values()}
    assert {t.data_ptr() for path in modules for t in beside.get_submodule(path).state_dict().values()} <= ours
    veneer.attach(model, veneer.LoraConfig(r=2, bias="all"), name="plain", seed=0)
    assert torch.equal(logits(model), before)
    veneer.set_adapter(model, "default")
    assert torch.equal(logits(model), after)
    twin = copy.deepcopy(model)
    veneer.set_adapter(twin, None)
    assert torch.equal(logits(twin), before)
    veneer.remove_adapter(model, "default")
    assert torch.equal(logits(model), before)
    veneer.remove_adapter(model, "plain")
    assert all(model.get_submodule(path) is module for path, module in modules.items())


def test_merging_gives_what_was_trained():
    for quantize in (None, "nf4"):
        model = moved(veneer.attach(base(quantize), veneer.LoraConfig(r=4, init="pissa")))
        after = logits(model)
        torch.testing.assert_close(logits(veneer.merge(model)), after, rtol=1e-4, atol=1e-4)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rslora": True},
        {"alpha_pattern": {"v_proj": 3.0}},
        {"depth": [6, 2]},
        {"dora": True, "targets": "attention"},
    ],
)
def test_a_pissa_file_is_a_plain_lora_of_the_original_base(tmp_path, settings):
    model = moved(veneer.attach(base(), veneer.LoraConfig(r=4, init="pissa", **settings)))
    veneer.save_adapter(model, tmp_path / "a")
    wanted = logits(model)
    other = veneer.load_adapter(base(), tmp_path / "a")
    torch.testing.assert_close(logits(other), wanted, rtol=1e-4, atol=2e-5)
    raw = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert raw["r"] == 8 and raw["init_lora_weights"] is True
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(make_model(fused=False), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-4, atol=2e-5)


def test_the_file_of_a_quantised_run_says_which_base_it_is_for(tmp_path):
    """With a base of its own the original is nearest; LoftQ of one iteration is exact on the quantised base."""
    for name, init in {
        "pissa": {"init": "pissa"},
        "loftq": {"init": "loftq"},
        "many": {"init": "loftq", "loftq_iterations": 4},
    }.items():
        model = moved(veneer.attach(base("nf4"), veneer.LoraConfig(r=8, **init)))
        veneer.save_adapter(model, tmp_path / name)
        wanted = logits(model)
        dense, quantized = (logits(veneer.load_adapter(base(kind), tmp_path / name)) for kind in (None, "nf4"))
        if name == "loftq":
            assert base_quantization(tmp_path / name) == "nf4" and torch.equal(quantized, wanted)
        else:
            assert base_quantization(tmp_path / name) is None
            assert torch.dist(dense, wanted) < torch.dist(quantized, wanted)


def test_a_trainers_checkpoint_is_read_back_into_its_own_start(tmp_path):
    class Trainer:
        model = moved(veneer.attach(base(), veneer.LoraConfig(r=4, init="pissa")))

    trainer = veneer.adapter_checkpoints(Trainer())
    wanted = {key: value.detach().clone() for key, value in adapter_parameters(trainer.model, "default").items()}
    trainer.model.save_pretrained(tmp_path / "a")
    trainer.model = veneer.attach(base(), veneer.LoraConfig(r=4, init="pissa"))
    trainer._load_from_checkpoint(tmp_path / "a")
    assert all(torch.equal(v, wanted[key]) for key, v in adapter_parameters(trainer.model, "default").items())
    trainer.model = veneer.attach(base(seed=1), veneer.LoraConfig(r=4, init="pissa"))
    with pytest.raises(VeneerError, match="another start"):
        trainer._load_from_checkpoint(tmp_path / "a")


def test_an_eva_file_has_its_ranks_and_the_same_scaling(tmp_path):
    model = moved(veneer.attach(base(), veneer.LoraConfig(r=4, init="eva"), data=[BATCH]))
    ranks = {path: layer.rank("default") for path, layer in lora_layers(model).items()}
    assert len(set(ranks.values())) > 1 and {layer.scaling["default"] for layer in lora_layers(model).values()} == {8.0}
    veneer.save_adapter(model, tmp_path / "a")
    other = veneer.load_adapter(base(), tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    assert {path: layer.rank("default") for path, layer in lora_layers(other).items()} == ranks


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantize", "init"),
    [(None, {"init": "pissa"}), ("nf4", {"init": "pissa"}), ("nf4", {"init": "loftq", "loftq_iterations": 3}),
     (None, {"init": "pissa", "dtype": "bfloat16"}), (None, {"init": "eva"})],
)  # fmt: skip
def test_resume_is_the_run_that_was_not_interrupted(tmp_path, tokenizer, commands, monkeypatch, quantize, init):
    data = veneer.DataConfig(train=str(commands), eval=0.2)

    def started():
        model = base(quantize, dtype=torch.bfloat16, hidden_size=64)
        rows = start_batches(model, tokenizer, data, 0) if init["init"] == "eva" else None
        return veneer.attach(model, veneer.LoraConfig(r=4, **init), seed=0, data=rows)

    def train(model, out, resume=False):
        settings = veneer.TrainConfig(batch_size=4, learning_rate=0.01, save_every=3, max_steps=8)
        veneer.train(model, tokenizer, None, settings, out=out, data_config=data, resume=resume, progress=False)

    whole = started()
    train(whole, tmp_path / "whole")
    step = loop._Run._step

    def dies(self, stop):
        if self.done == 5:
            raise SystemExit
        return step(self, stop)

    monkeypatch.setattr(loop._Run, "_step", dies)
    with pytest.raises(SystemExit):
        train(started(), tmp_path / "cut")
    monkeypatch.setattr(loop._Run, "_step", step)
    again = started()
    train(again, tmp_path / "cut", resume=True)
    assert torch.equal(logits(whole), logits(again))
    files = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "cut")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_resume_on_another_start_is_refused(tmp_path, tokenizer, commands):
    def train(resume, **settings):
        model = veneer.attach(base(), veneer.LoraConfig(r=4, **settings), seed=0)
        config = veneer.TrainConfig(batch_size=4, learning_rate=0.01, max_steps=2)
        veneer.train(model, tokenizer, commands, config, out=tmp_path / "run", resume=resume, progress=False)

    train(False, init="pissa")
    for other in ({}, {"init": "pissa", "svd_niter": 0}):
        with pytest.raises(RefusedError, match="start of lora's base"):
            train(True, **other)


def test_a_recipe_takes_its_own_rows_for_eva_and_none_that_are_held_out(tokenizer, commands, monkeypatch):
    data = veneer.DataConfig(train=str(commands), eval=0.5)
    train_set, held, _ = loop.prepare_data(None, data, tokenizer, 3)
    found = start_batches(base(), tokenizer, data, 3)
    tokens = torch.cat([batch["input_ids"].flatten() for batch in found]).tolist()
    text = tokenizer.decode(tokens)
    assert all(tokenizer.decode(sample.input_ids) in text for sample in train_set.samples)
    assert held is not None and not any(tokenizer.decode(sample.input_ids) in text for sample in held.samples)
    monkeypatch.setattr(batches, "START_TOKENS", 100)
    few = start_batches(base(), tokenizer, data, 3)
    assert sum(int((batch["labels"] != -100).sum()) for batch in few) < sum(
        int((batch["labels"] != -100).sum()) for batch in found
    )


# ---- EVA -------------------------------------------------------------------------------------------------------------


def test_moments_batch_by_batch_are_those_of_all_tokens():
    x = torch.randn(90, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 12) + 50
    moments = starts.Moments(12, torch.device("cpu"))
    for part in (x[:1], x[1:40], x[40:40], x[40:]):
        moments.add(part)
    torch.testing.assert_close(moments.scatter / 89, torch.cov(x.T), rtol=1e-4, atol=1e-4)
    vectors, shares = moments.directions(3)
    _, s, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close((vectors * vh[:3]).sum(1).abs(), torch.ones(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(shares, (s.square() / s.square().sum())[:3], rtol=1e-3, atol=1e-5)


def test_ranks_go_where_the_variance_is_and_their_sum_stays():
    shares = {"a": torch.tensor([0.5, 0.3, 0.1, 0.05]), "b": torch.tensor([0.2, 0.02, 0.01, 0.01])}
    assert starts.spread_ranks({"a": 2, "b": 2}, shares) == {"a": 3, "b": 1}
    assert starts.spread_ranks({"a": 3, "b": 3}, shares) == {"a": 4, "b": 2}


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": torch.bfloat16, "hidden_size": 64}], ids=["as it was", "fused layers"]
)
def test_eva_starts_as_the_base_in_the_inputs_directions(changes, monkeypatch):
    model = base(**changes)
    before, forward = logits(model), model.model.layers[0].forward
    veneer.attach(model, veneer.LoraConfig(r=4, init="eva"), data=[BATCH, BATCH])
    assert torch.equal(logits(model), before) and model.model.layers[0].forward == forward
    layers = lora_layers(model)
    assert sum(layer.rank("default") for layer in layers.values()) == 4 * len(layers)
    for layer in layers.values():
        a = layer.lora_A["default"]
        assert 1 <= len(a) <= 8 and not layer.lora_B["default"].any()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-4)
    q, k = (layers[f"model.layers.0.self_attn.{name}_proj"].lora_A["default"] for name in "qk")
    n = min(len(q), len(k))
    assert torch.equal(q[:n], k[:n])  # one input, one covariance
    monkeypatch.setattr(starts, "MOMENT_BYTES", 1)  # every layer in a pass of its own
    one_by_one = veneer.attach(base(**changes), veneer.LoraConfig(r=4, init="eva"), data=[BATCH, BATCH])
    for path, layer in lora_layers(one_by_one).items():
        assert torch.equal(layer.lora_A["default"], layers[path].lora_A["default"])


def test_eva_counts_the_learned_tokens_alone():
    labels = IDS.clone()
    labels[:, 12:] = -100  # at the end, where causal attention shows them to no counted token
    ids = IDS.clone()
    ids[:, 12:] = 7
    found = [
        starts.input_directions(base(), {"model.layers.1.mlp.up_proj": 4}, [{"input_ids": x, "labels": labels}])
        for x in (IDS, ids)
    ]
    torch.testing.assert_close(*(next(iter(f.values()))[1] for f in found))


def test_eva_is_pefts():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["v_proj", "down_proj"], init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, tau=0.999), task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_eva_state_dict(make_model(fused=False), [BATCH], config, show_progress_bar=False)
    found = starts.input_directions(base(), dict.fromkeys(theirs, 4), [BATCH])
    for path, vectors in theirs.items():
        ours = found[path][0]
        assert float((ours.double() @ vectors.double().T).square().sum()) / len(vectors) > 0.98, path


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantize", "settings", "message"),
    [
        (
            None,
            {"init": "pissa", "targets": ["embed_tokens", "q_proj"]},
            "pissa is for linear layers, found Embedding at",
        ),
        (None, {"init": "loftq"}, "loftq is for quantised layers, found a float32 one at"),
        (None, {"init": "eva"}, "eva needs rows"),
    ],
)
def test_a_start_that_cannot_be_is_refused_and_the_model_as_it_was(quantize, settings, message):
    model = base(quantize)
    with pytest.raises(VeneerError, match=message):
        veneer.attach(model, veneer.LoraConfig(r=4, **settings))
    assert not lora_layers(model) and not adapters(model) and model.lm_head.weight.requires_grad


def test_original_weights_that_are_missing_or_of_another_model_are_refused():
    model = base("nf4")
    del model.veneer_original
    with pytest.raises(VeneerError, match="before they were quantised"):
        veneer.attach(model, veneer.LoraConfig(r=4, init="loftq"))
    with pytest.raises(VeneerError, match="not that of the original model in nf4"):
        veneer.attach(model, veneer.LoraConfig(r=4, init="pissa"), original=make_model(seed=1))
    with pytest.raises(VeneerError, match="expected a dense weight"):
        veneer.attach(
            model, veneer.LoraConfig(r=4, init="pissa", targets="mlp"), original=make_model(intermediate_size=64)
        )
    veneer.attach(model, veneer.LoraConfig(r=4, init="pissa"), original=make_model())


def test_eva_data_that_is_empty_or_not_finite_is_refused():
    for data, message in (([], "no batches"), ([{**BATCH, "labels": torch.full_like(IDS, -100)}], "no tokens")):
        model = base()
        with pytest.raises(VeneerError, match=message):
            veneer.attach(model, veneer.LoraConfig(r=4, init="eva"), data=data)
        assert model.model.layers[0].forward.__name__ == "_layer_forward"


def test_a_recipe_with_loftq_needs_a_quantised_base():
    recipe = {"lora": {"init": "loftq"}, "data": {"train": "x.jsonl"}}
    with pytest.raises(VeneerError, match="set quantize to nf4"):
        parse_recipe(recipe)
    assert parse_recipe({**recipe, "quantize": "nf4"}).lora.loftq_iterations == 1


@pytest.mark.parametrize("init", ["pissa", "loftq", "eva"])
def test_a_recipe_needs_nothing_but_the_name_of_the_start(tmp_path, tokenizer, commands, init):
    folder = veneer.save_model(make_model(), tokenizer, tmp_path / "model")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {folder}\nquantize: nf4\nlora: {{r: 4, init: {init}}}\ndata: {{train: {commands}, eval: 0.1}}\n"
        f"train: {{max_steps: 2, batch_size: 4, out: {tmp_path}/run}}\n"
    )
    done = CliRunner().invoke(app, ["train", str(recipe)])
    assert done.exit_code == 0, done.output
    assert ("--quantize nf4" in done.output) == (init != "pissa")  # which base it is tried on
    model, _ = veneer.load(folder, quantize="nf4")
    veneer.load_adapter(model, tmp_path / "run/adapter")
    ranks = [layer.rank("default") for layer in lora_layers(model).values()]
    assert sum(ranks) == (8 if init == "pissa" else 4) * len(ranks)


@pytest.mark.slow
def test_a_loaded_4_bit_model_reads_its_original_again():
    model, _ = veneer.load("smollm2", quantize="nf4")
    config = veneer.LoraConfig(r=16, init="pissa", targets=["v_proj"], layers=[0, 29])
    veneer.attach(model, config)
    original, _ = veneer.load("smollm2", fused=False)
    for path, layer in lora_layers(model).items():
        weight, plain = original.get_submodule(path).weight.float(), layer.bases[None].dequantize(torch.float32)
        assert torch.dist(layer.merged("default"), weight) < 0.95 * torch.dist(plain, weight)
