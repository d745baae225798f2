"""Adapters on the experts of a mixture: their maths, every forward that uses them, and all that adapters can do."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_mixture as mixture
from conftest import randomised
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers.integrations import use_experts_implementation

import veneer
from veneer.adapters import experts
from veneer.adapters.attach import adapter_parameters, lora_layers
from veneer.adapters.experts import LoraExperts, LoraParameter
from veneer.adapters.targets import expert_parameters
from veneer.quant.linear import quantize_model
from veneer.report.adapter import inspect_adapter

IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
EXPERTS = [f"model.layers.{n}.mlp.experts.{key}" for n in (0, 1) for key in ("gate_up_proj", "down_proj")]
KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]


def built(kind="mixtral", seed=0):
    torch.manual_seed(seed)
    model = mixture(kind).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3 or name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def dense(model):
    """Its weights with the update of every expert, made from PEFT's definition of the factors' layout, differentiable."""
    made = {}
    for path, layer in lora_layers(model).items():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        if isinstance(layer, LoraParameter):
            a = a.reshape(layer.experts, -1, layer.in_features)
            b = b.reshape(layer.out_features, -1, layer.experts)
            update = torch.einsum("ore,eri->eio" if layer.transposed else "ore,eri->eoi", b, a)
        else:
            update, path = b @ a, f"{path}.weight"
        made[path] = layer.weight.detach() + layer.scaling["default"] * update
    return made


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_forward_of_theirs_and_ours_computes_the_definition_with_all_gradients(kind, implementation):
    model, plain = built(kind), built(kind)
    for one in (model, plain):
        one.set_experts_implementation(implementation)
    base = plain(input_ids=IDS).logits.detach()
    veneer.attach(model, veneer.LoraConfig(r=3, alpha=5, targets="mlp"), seed=0)
    torch.testing.assert_close(model(input_ids=IDS).logits, base, rtol=1e-5, atol=1e-5)
    randomised(model)
    found = model(input_ids=IDS).logits
    expected = torch.func.functional_call(plain, dense(model), (), {"input_ids": IDS}).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((expected - base).abs().max()) > 0.01
    parameters = list(adapter_parameters(model, "default").values())
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        torch.autograd.grad(found, parameters, dy), torch.autograd.grad(expected, parameters, dy), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    veneer.set_adapter(model, None)
    assert torch.equal(model(input_ids=IDS).logits, base)


class Own(nn.Module):
    """Experts that transformers has no mark on: every one of them sees every token."""

    def __init__(self, transposed):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 8))
        self.is_transposed = transposed

    def forward(self, x, *, scale=1.0):
        first, second = (self.first, self.second) if self.is_transposed else (self.second.mT, self.first.mT)
        return torch.bmm(torch.bmm(x.expand(3, *x.shape), first).tanh(), second).sum(0) * scale


class Holder(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.experts = Own(transposed)

    def forward(self, x):
        return self.experts(self.embed(x), scale=2.0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_of_any_kind_run_their_own_forward_on_the_changed_weight(transposed, dtype):
    torch.manual_seed(0)
    model = Holder(transposed)
    veneer.attach(model, veneer.LoraConfig(r=2, alpha=3, targets=["embed"], parameters=["experts.first", "second"]))
    randomised(model)
    x = torch.randn(5, 8)
    model.experts.base_layer.to(dtype)
    model.embed.base_layer.to(dtype)
    found = model(x.to(dtype))
    plain = Holder(transposed)
    plain.load_state_dict(
        {n.replace("base_layer.", ""): p.float() for n, p in model.named_parameters() if "lora" not in n}
    )
    changed = dense(model)
    expected = torch.func.functional_call(plain, changed, (x,))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(found.float(), expected, **close)
    names = [n for n in adapter_parameters(model, "default") if "experts" in n]
    parameters = [adapter_parameters(model, "default")[n] for n in names]
    assert len(parameters) == 4
    mine = torch.autograd.grad(found.float().square().sum(), parameters)
    for a, b in zip(mine, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=(1e-5 if dtype == torch.float32 else 0.05) * float(b.abs().max())
        )


def test_bf16_and_a_quantised_rest_are_near_the_fp32_definition():
    model = built("qwen3_moe").to(torch.bfloat16)
    quantize_model(model, compute_dtype=torch.bfloat16)
    veneer.attach(model, veneer.LoraConfig(r=4, targets="all-linear"))
    randomised(model)
    exact = copy.deepcopy(model)
    veneer.merge(exact)
    with torch.no_grad():
        found, expected = model(input_ids=IDS).logits, exact(input_ids=IDS).logits
    assert float((found - expected).abs().max()) < 0.06 * float(expected.abs().max())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in adapter_parameters(model, "default").values()
    )


def test_no_update_of_a_weights_size_is_made_or_kept(monkeypatch):
    """What autograd keeps of an adapted mixture is rows, not experts: PEFT's parametrisation keeps W' of every block."""
    model = built("mixtral")
    veneer.attach(model, veneer.LoraConfig(r=2, targets="mlp"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    base = {p.data_ptr() for p in model.parameters()}
    assert not [t.shape for t in kept if t.ndim == 3 and t.shape[0] == 4 and t.data_ptr() not in base]
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_adapters_do_works_with_experts(tmp_path, kind):
    model = built(kind)
    names = [name for name, _ in model.named_modules()]
    logits = {None: model(input_ids=IDS).logits.detach()}
    config = {"all": {"targets": "all-linear"}, "down": {"targets": [], "parameters": ["experts.down_proj"]}}
    for name, settings in config.items():
        veneer.attach(model, veneer.LoraConfig(r=3, **settings), name=name)
        logits[name] = randomised(model, name)(input_ids=IDS).logits.detach()
    for name in ("all", None, "down", "all"):
        veneer.set_adapter(model, name)
        torch.testing.assert_close(model(input_ids=IDS).logits, logits[name], rtol=0, atol=0)
    shapes = [model.get_parameter(path.replace(".experts.", ".experts.base_layer.")).shape for path in EXPERTS]
    per_expert = sum(3 * 4 * (shape[1] + shape[2]) for shape in shapes)
    linears = sum(3 * (m.in_features + m.out_features) for p, m in lora_layers(model).items() if "self_attn" in p)
    assert veneer.count_parameters(model).trainable == per_expert + linears
    with veneer.adapter_off(model):
        assert torch.equal(model(input_ids=IDS).logits, logits[None])
    bare = veneer.base_model(model)
    assert [name for name, _ in bare.named_modules()] == names and torch.equal(bare(input_ids=IDS).logits, logits[None])
    for name in ("all", "down"):
        veneer.save_adapter(model, tmp_path / name, name)
        other = veneer.load_adapter(built(kind), tmp_path / name)
        torch.testing.assert_close(other(input_ids=IDS).logits, logits[name], rtol=0, atol=0)
        torch.testing.assert_close(veneer.merge(other)(input_ids=IDS).logits, logits[name], rtol=1e-4, atol=1e-5)
        assert [name for name, _ in other.named_modules()] == names
        veneer.save_adapter(veneer.load_adapter(built(kind), tmp_path / name), tmp_path / f"{name}-again")
        files = [tmp_path / f / "adapter_config.json" for f in (name, f"{name}-again")]
        assert len({json.dumps(json.loads(file.read_text()), sort_keys=True) for file in files}) == 1
    veneer.remove_adapter(model, "all")
    assert {type(m) for m in model.modules()} & {LoraExperts} and len(lora_layers(model)) == 2
    veneer.remove_adapter(model, "down")
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(input_ids=IDS).logits, logits[None])


@pytest.mark.parametrize("where", [{"layers": [1]}, {"depth": [0, 2]}])
def test_what_is_restricted_to_blocks_is_written_so_that_peft_reads_the_same(tmp_path, where):
    peft = pytest.importorskip("peft")
    model = built()
    veneer.attach(model, veneer.LoraConfig(r=4, targets="all-linear", exclude=["experts.down_proj"], **where))
    randomised(model)
    veneer.save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_parameters"] == [EXPERTS[2]]
    assert {layer.rank("default") for layer in lora_layers(model).values()} == ({4} if "layers" in where else {2})
    back = peft.PeftModel.from_pretrained(built(), tmp_path / "a").eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_inspect_shows_each_parameter_by_name_with_norms_over_all_experts(tmp_path):
    model = built()
    veneer.attach(
        model, veneer.LoraConfig(r=4, alpha=8, targets="all-linear", rank_pattern={"experts.gate_up_proj": 2})
    )
    randomised(model)
    veneer.save_adapter(model, tmp_path / "a")
    found = inspect_adapter(tmp_path / "a")
    rows = {row["layer"]: row for row in found["by_layer"]}
    assert found["parameters"] == veneer.count_parameters(model).trainable and set(EXPERTS) < set(rows)
    for path in EXPERTS:
        layer = lora_layers(model)[path]
        row = rows[path]
        assert row["r"] == layer.rank("default") == (2 if "gate" in path else 4) and row["experts"] == 4
        assert row["norm"] == pytest.approx(float(layer.delta("default").norm()), rel=1e-5)
        assert row["rank_99"] <= row["r"] and 0 < row["effective_rank"] <= row["r"]
        values = torch.linalg.svdvals(layer.delta("default"))[:, : row["r"]].square().sum(0).sqrt()
        torch.testing.assert_close(torch.tensor(row["singular_values"]).float(), values, rtol=1e-4, atol=1e-5)


A = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        (None, lambda t: t.update({A: torch.zeros(7, 64)}), r"found \(7, 64\), expected \(2 x experts, in\)"),
        (None, lambda t: t.update({A: torch.zeros(6, 64)}), r"down_proj: found lora_A of 3 experts, lora_B of 4"),
        (None, lambda t: [t.pop(k) for k in list(t) if "0.mlp.experts.base_layer" in k], "adapters of 1 parameters"),
        (None, lambda t: t[A].fill_(float("inf")), "NaN or Inf"),
        (None, lambda t: [t.pop(k) for k in list(t) if "1.mlp.experts" in k], "layers.1.mlp.experts.down_proj: in target_"),
        (lambda c: c.update(target_parameters=["experts.up"]), None, "expected one for each of"),
        (lambda c: c.update(target_parameters="experts.down_proj"), None, "target_parameters: found"),
        (lambda c: c.update(lora_dropout=0.1), None, "target_parameters: found .* does not go with lora_dropout"),
        (lambda c: c.update(target_parameters=["gate.weight", "q_proj"]), None, "adapters of 2 parameters"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_whole(tmp_path, config, tensors, words):
    model = built()
    veneer.attach(model, veneer.LoraConfig(r=2, targets="mlp"))
    veneer.save_adapter(randomised(model), tmp_path / "a")
    raw = json.loads((tmp_path / "a/adapter_config.json").read_text())
    found = load_file(tmp_path / "a/adapter_model.safetensors")
    (config or (lambda c: None))(raw)
    (tensors or (lambda t: None))(found)
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(raw))
    save_file({k: v.contiguous() for k, v in found.items()}, tmp_path / "a/adapter_model.safetensors")
    other = built()
    with pytest.raises(veneer.VeneerError, match=words):
        veneer.load_adapter(other, tmp_path / "a")
    assert not [name for name, _ in other.named_modules() if "lora" in name or "base_layer" in name]


def test_words_for_parameters_are_checked_all_at_once():
    asked = ["experts.dwn_proj", "gate.weight", "q_proj.weight", "gate_up_proj"]
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.attach(mixture(), veneer.LoraConfig(r=2, parameters=asked, modules_to_save=["nrm"]))
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "did you mean 'experts.down_proj'" in text and "'nrm' matches no module" in text
    assert (
        "mlp.gate.weight (4, 32), expected a parameter (experts, rows, columns)" in text
        and "q_proj.weight (32," in text
    )
    with pytest.raises(veneer.VeneerError, match="at most 32 for gate_up_proj"):
        veneer.attach(mixture(), veneer.LoraConfig(r=40, targets=[], parameters=["gate_up_proj"]))
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.LoraConfig(parameters=["x"], dropout=0.1, dora=True, lora_bias=True)
    assert len(caught.value.problems) == 4  # and dora with lora_bias
    with pytest.raises(veneer.VeneerError, match="no 3-D parameters"):
        veneer.attach(nn.Sequential(nn.Linear(4, 4)), veneer.LoraConfig(r=2, targets=["0"], parameters=["w"]))


def test_a_convolutions_weight_is_no_parameter_of_experts():
    model = nn.Sequential(nn.Conv1d(4, 4, 3))
    assert expert_parameters(model) == []
    with pytest.raises(veneer.VeneerError, match=r"layers are named in lora\.targets"):
        veneer.attach(model, veneer.LoraConfig(r=2, targets=["0"], parameters=["0.weight"]))


def test_the_weight_that_other_modules_run_on_is_not_kept(monkeypatch):
    """Of W' nothing lives from the forward to the backward pass, where it is made once more for each parameter."""
    made = []

    def added(*parts):
        made.append(original(*parts))
        refs.append(StorageWeakRef(made[-1].untyped_storage()))
        return made.pop()

    original, refs = experts._added, []
    monkeypatch.setattr(experts, "_added", added)
    model = Holder(False)
    veneer.attach(model, veneer.LoraConfig(r=2, targets=[], parameters=["experts.first", "second"]))
    loss = randomised(model)(torch.randn(2, 8, requires_grad=True)).sum()
    assert len(refs) == 2 and all(ref.expired() for ref in refs)
    loss.backward()
    assert len(refs) == 4 and all(ref.expired() for ref in refs)


@pytest.mark.parametrize("known", [True, False])
def test_under_gradient_checkpointing_the_gradients_are_the_same(known):
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = built() if known else Holder(True)
        parameters = [] if known else ["experts.first", "second"]
        veneer.attach(
            model, veneer.LoraConfig(r=2, targets="mlp" if known else ["embed"], parameters=parameters), seed=0
        )
        randomised(model).train()
        if known:
            if again:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(input_ids=IDS, labels=IDS).loss.backward()
        else:
            x = torch.ones(2, 8)
            (checkpoint(model, x, use_reentrant=False) if again else model(x)).square().sum().backward()
        gradients.append([p.grad for p in adapter_parameters(model, "default").values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert a.any()


def test_the_base_called_between_forward_and_backward_changes_no_gradient():
    """As DPO does; the weights made again in the backward pass are the adapter's."""
    gradients = []
    for off in (False, True):
        torch.manual_seed(0)
        model = Holder(False)
        veneer.attach(model, veneer.LoraConfig(r=2, targets=[], parameters=["experts.first", "second"]), seed=0)
        loss = randomised(model)(torch.ones(2, 8)).square().sum()
        if off:
            with torch.no_grad(), veneer.adapter_off(model):
                model(torch.ones(2, 8))
        loss.backward()
        gradients.append([p.grad for p in adapter_parameters(model, "default").values()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


def test_a_run_resumed_from_its_checkpoint_is_the_run_that_was_not_interrupted(tmp_path, tokenizer, commands):
    def run(out, steps, resume=False):
        model = built("qwen3_moe")
        lora = veneer.LoraConfig(r=2, targets="all-linear", tokens=[5, 257])
        veneer.attach(model, lora, seed=1)
        config = veneer.TrainConfig(
            batch_size=4, learning_rate=0.01, max_steps=steps, schedule="constant", warmup_steps=0, save_every=2
        )
        veneer.train(model, tokenizer, commands, config, out=out, resume=resume, progress=False)
        return model

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 4, resume=True)
    start = adapter_parameters(
        veneer.attach(built("qwen3_moe"), veneer.LoraConfig(r=2, tokens=[5, 257]), seed=1), "default"
    )
    found, wanted = (adapter_parameters(model, "default") for model in (resumed, whole))
    assert found.keys() == wanted.keys() == start.keys()
    for key, parameter in wanted.items():
        assert torch.equal(found[key], parameter) and not torch.equal(parameter, start[key]), key
    written = veneer.load_adapter(built("qwen3_moe"), tmp_path / "cut/adapter")
    torch.testing.assert_close(written(input_ids=IDS).logits, whole(input_ids=IDS).logits, rtol=0, atol=0)


def test_a_trainers_checkpoint_of_experts_and_tokens_is_read_back(tmp_path):
    model = built()
    veneer.attach(model, veneer.LoraConfig(r=2, targets="all-linear", tokens=[5]))
    randomised(model)
    wanted = {key: p.detach().clone() for key, p in adapter_parameters(model, "default").items()}
    model.save_pretrained(tmp_path / "checkpoint")
    with torch.no_grad():
        for parameter in adapter_parameters(model, "default").values():
            parameter.zero_()
    trainer = veneer.adapter_checkpoints(SimpleNamespace(model=model))
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint"))
    for key, parameter in adapter_parameters(model, "default").items():
        assert torch.equal(parameter, wanted[key]), key


@pytest.mark.parametrize("one_by_one", [False, True])
def test_inspect_compares_with_the_base_however_its_experts_are_stored(tmp_path, tokenizer, one_by_one):
    model = built("qwen3_moe")
    norms = {path: float(model.get_parameter(path).norm()) for path in EXPERTS}
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if one_by_one:
        for path in EXPERTS:
            stacked, owner = state.pop(path), path.rpartition(".")[0]
            for e, weight in enumerate(stacked):
                names = ("gate_proj", "up_proj") if "gate" in path else ("down_proj",)
                for name, part in zip(names, weight.chunk(len(names)), strict=True):
                    state[f"{owner}.{e}.{name}.weight"] = part.contiguous()
    model.config.save_pretrained(tmp_path / "base")
    save_file(state, tmp_path / "base/model.safetensors")
    veneer.attach(model, veneer.LoraConfig(r=2, targets="mlp"))
    veneer.save_adapter(randomised(model), tmp_path / "a")
    found = inspect_adapter(tmp_path / "a", model=str(tmp_path / "base"))
    assert {row["layer"]: row["base_norm"] for row in found["by_layer"]} == pytest.approx(norms, rel=1e-5)
    assert found["relative_norm"] > 0


@use_experts_implementation(has_gate=False, is_transposed=True, has_post_expert_norm=True)
class Ungated(nn.Module):
    """What NemotronH, Aria and others have and the three above have not: no gate, (E, in, out), a norm of each output."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.act_fn, self.post_expert_norm = 5, nn.ReLU(), nn.LayerNorm(8)
        self.up_proj = nn.Parameter(torch.randn(5, 8, 12))
        self.down_proj = nn.Parameter(torch.randn(5, 12, 8))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_every_shape_that_transformers_marks_as_experts(implementation):
    torch.manual_seed(0)
    model, plain = (nn.Sequential(Ungated(SimpleNamespace(_experts_implementation=implementation))) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    x, scores = torch.randn(7, 8), torch.rand(7, 2)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(7)])  # nobody asks the fifth
    veneer.attach(model, veneer.LoraConfig(r=2, alpha=3, targets=[], parameters=["up_proj", "0.down_proj"]))
    randomised(model)
    found = model[0](x, chosen, scores)
    expected = torch.func.functional_call(plain[0], {k[2:]: w for k, w in dense(model).items()}, (x, chosen, scores))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    parameters = list(adapter_parameters(model, "default").values())
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
