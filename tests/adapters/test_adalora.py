"""AdaLoRA: the published formulas, the budget at every step, right ranks where they are known, plain LoRA on disk."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from torch import nn

import veneer
from veneer.adapters.adalora import Allocator
from veneer.adapters.attach import adapter_parameters, adapters
from veneer.quant.linear import quantize_model

IDS = torch.arange(1, 30)[None]
RANKS = {"a": 8, "b": 0, "c": 2, "d": 4, "e": 0, "f": 10}  # of the updates that the synthetic task needs


class Linears(nn.Module):
    """Linears side by side, each with its own output."""

    def __init__(self, names, width=32, out=48):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(width, out, bias=False))

    def forward(self, x):
        return {name: layer(x) for name, layer in self.named_children()}


def allocator(model, name="default"):
    return adapters(model)[name].allocator


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def attached(seed=1, **settings):
    model = make_model(fused=False)
    config = veneer.LoraConfig(r=4, alpha=8, targets=["q_proj", "down_proj"], adalora={"steps": 12, **settings})
    veneer.attach(model, config, seed=seed)
    return model


def steps(model, count, lr=0.02):
    optimizer = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0)
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_ranks_go_to_the_layers_that_need_them_within_the_budget_of_every_step(seed):
    torch.manual_seed(seed)
    model, length = Linears(RANKS), 400
    layers = dict(model.named_children())
    wanted = {
        name: layers[name].weight.detach() + 0.05 * torch.randn(48, r) @ torch.randn(r, 32) for name, r in RANKS.items()
    }
    config = veneer.LoraConfig(
        r=4, alpha=4, targets=list(RANKS), adalora={"steps": length, "start": 3, "orthogonality": 0.1}
    )
    veneer.attach(model, config, seed=seed)
    found = allocator(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0)
    budgets = []
    for step in range(1, length + 1):
        x = torch.randn(64, 32)
        loss = sum(((y - x @ wanted[name].T) ** 2).mean() for name, y in model(x).items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budgets.append(found.budget_at(step))
        assert sum(int((layer.lora_E["default"] != 0).sum()) for layer in found.layers.values()) <= budgets[-1]
    assert budgets[0] == 6 * 12 and budgets[-1] == 6 * 4 == sum(RANKS.values())
    assert budgets == sorted(budgets, reverse=True)
    ranks = {name: int(alive.sum()) for name, alive in found.alive.items()}
    assert sum(ranks.values()) == 24 and all(abs(ranks[name] - r) <= 1 for name, r in RANKS.items()), ranks
    assert float(loss) < 0.15


def test_the_worth_of_a_rank_is_the_papers():
    model = attached(warmup=0.9, settle=0.0, beta=0.7, orthogonality=0.0)
    found, beta = allocator(model), 0.7
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    mean, stray = {}, {}
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        for key, p in adapter_parameters(model, "default").items():
            now = (p * p.grad).abs().detach()
            mean[key] = beta * mean.get(key, 0) + (1 - beta) * now
            stray[key] = beta * stray.get(key, 0) + (1 - beta) * (now - mean[key]).abs()
    for path, score in found.scores().items():
        worth = {key.rsplit(path)[1]: mean[key] * stray[key] for key in mean if key.startswith(path)}
        expected = worth[".lora_E"] + worth[".lora_A.weight"].mean(1) + worth[".lora_B.weight"].mean(0)
        torch.testing.assert_close(score, expected)
        assert float(score.min()) > 0


def test_the_orthogonality_term_is_the_papers():
    model = attached(orthogonality=0.3)
    parameters = adapter_parameters(model, "default")
    penalty = torch.zeros(())
    for key, p in parameters.items():
        p.grad = torch.zeros_like(p)
        if not key.endswith("lora_E"):
            gram = p @ p.T if "lora_A" in key else p.T @ p
            penalty = penalty + ((gram - torch.eye(len(gram))) ** 2).sum()
    expected = torch.autograd.grad(0.3 * penalty, [p for key, p in parameters.items() if not key.endswith("lora_E")])
    allocator(model).before_step()
    found = [p.grad for key, p in parameters.items() if not key.endswith("lora_E")]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert all(float(p.grad.abs().max()) == 0 for key, p in parameters.items() if key.endswith("lora_E"))


def test_it_starts_as_the_base_and_keeps_its_factors_near_orthogonal():
    model = make_model(fused=False)
    before = model(input_ids=IDS).logits
    veneer.attach(model, veneer.LoraConfig(r=4, adalora={"steps": 60, "orthogonality": 0.5}), seed=0)
    assert torch.equal(model(input_ids=IDS).logits, before)
    steps(model, 60, lr=5e-3)
    for path, layer in allocator(model).layers.items():
        p = layer.lora_B["default"].detach()
        assert float((p.T @ p - torch.eye(p.shape[1])).abs().max()) < 0.1, path


def test_the_file_is_plain_lora_with_a_rank_pattern(tmp_path):
    peft = pytest.importorskip("peft")
    model = attached(start=2, settle=0.5)
    steps(model, 12)
    expected = model(input_ids=IDS).logits
    veneer.save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    found = allocator(model)
    assert (
        config["peft_type"] == "LORA" and sum(int(alive.sum()) for alive in found.alive.values()) == found.budget == 16
    )
    assert len({int(alive.sum()) for alive in found.alive.values()}) > 1, "the task left all ranks alike"
    other = veneer.load_adapter(make_model(fused=False), tmp_path / "a")
    torch.testing.assert_close(other(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(make_model(fused=False), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(veneer.merge(model)(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_dead_ranks_are_taken_out_once_all_is_settled(optimizer):
    """Adafactor keeps sums over rows and columns, which nobody here knows how to cut: all ranks stay."""
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    # without the orthogonality term, by which living ranks still feel the dead ones that stayed
    model, whole = (attached(start=2, settle=0.5, orthogonality=0.0) for _ in range(2))
    optimizers = [optimizer(trainable(one), lr=0.02, **more) for one in (model, whole)]
    found, other = allocator(model), allocator(whole)
    other._take_out = lambda _: None
    for step in range(12):
        for one, its in zip((model, whole), optimizers, strict=True):
            its.zero_grad()
            one(input_ids=IDS, labels=IDS).loss.backward()
            its.step()
        assert found.cut == (step >= 6 and optimizer is not torch.optim.Adafactor), step
    if found.cut:
        assert not found.buffers().keys() & {f"sensitivity/{path}/Q" for path in found.layers}
        for path, layer in found.layers.items():
            kept = max(1, int(other.alive[path].sum()))
            assert [*layer.lora_E["default"].shape] == [kept], path
            state = optimizers[0].state[layer.lora_B["default"]]
            assert {x.shape for x in state.values() if x is not None and x.dim()} == {layer.lora_B["default"].shape}
    assert len({int(mask.sum()) for mask in other.alive.values()}) > 1, "the task left all ranks alike"
    for path in found.layers:
        for one, its in zip(found.plain(path), other.plain(path), strict=True):
            torch.testing.assert_close(one, its, rtol=1e-4, atol=1e-5)


def test_a_layer_left_without_a_rank_is_not_in_the_file(tmp_path):
    peft = pytest.importorskip("peft")
    model = attached()
    found = allocator(model)
    steps(model, 3)
    first, *others = found.alive
    found.alive[first].zero_()
    for path in others:
        found.alive[path][1:] = False
    for path, layer in found.layers.items():
        layer.lora_E["default"].data *= found.alive[path]
    veneer.save_adapter(model, tmp_path / "a")
    for other in (
        veneer.load_adapter(make_model(fused=False), tmp_path / "a"),
        peft.PeftModel.from_pretrained(make_model(fused=False), tmp_path / "a").eval(),
    ):
        torch.testing.assert_close(other(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    assert first not in json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]


def test_another_loop_has_to_say_how_long_it_is_and_is_never_silently_plain_lora():
    model = make_model(fused=False)
    veneer.attach(model, veneer.LoraConfig(r=4, adalora=True))
    with pytest.raises(veneer.VeneerError, match=r"how long the training is.*\n?.*adalora={'steps'"):
        steps(model, 1)


def test_a_layer_that_takes_no_part_does_not_stop_the_sharing():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.a, self.b = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    model = Model()
    config = veneer.LoraConfig(r=2, targets=["unused", "a", "b"], adalora={"start": 4, "steps": 10})
    veneer.attach(model, config, seed=0)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    found = allocator(model)
    assert int(found.done) == 10 and sum(int(mask.sum()) for mask in found.alive.values()) == 6
    assert not found.alive["unused"].any()


def test_parts_of_it_in_several_optimizers_are_refused():
    model = attached()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(veneer.VeneerError, match=r"1 of the 12 parameters that learn, expected all in one"):
        torch.optim.AdamW([trainable(model)[0]]).step()


def test_what_is_saved_before_the_end_says_so(tmp_path):
    model = attached(start=2)
    steps(model, 4)
    with pytest.warns(UserWarning, match="AdaLoRA is at step 4 of 12: [23]. ranks live, 16 were asked for"):
        veneer.save_adapter(model, tmp_path / "a")
    with pytest.raises(veneer.VeneerError, match="AdaLoRA cannot be read back"):
        veneer.adapter_checkpoints(SimpleNamespace(model=model))


def test_a_copied_model_is_allocated_too():
    model = copy.deepcopy(attached())
    steps(model, 12)
    assert int(allocator(model).done) == 12
    assert sum(int((x.lora_E["default"] != 0).sum()) for x in allocator(model).layers.values()) == 16


def test_an_optimizer_of_other_parameters_moves_nothing():
    model, other = attached(), nn.Linear(3, 3)
    other.weight.grad = torch.ones(3, 3)
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    found = allocator(model)
    assert int(found.done) == 0
    veneer.remove_adapter(model, "default")
    steps(veneer.attach(model, veneer.LoraConfig(r=2)), 1)
    assert int(found.done) == 0


@pytest.mark.parametrize("kind", ["Conv1d", "Embedding"])
def test_convolutions_and_embeddings(kind):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv1d(6, 10, 3) if kind == "Conv1d" else nn.Embedding(20, 10)

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    model = Other()
    x = torch.randn(2, 6, 9) if kind == "Conv1d" else torch.arange(12)
    before = model(x)
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["layer"], adalora={"steps": 6, "start": 2}), seed=0)
    torch.testing.assert_close(model(x), before)
    optimizer = torch.optim.SGD(trainable(model), lr=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        ((model(x) - 1) ** 2).mean().backward()
        optimizer.step()
    found: Allocator = allocator(model)
    assert int(found.alive["layer"].sum()) == 2 and not torch.equal(model(x), before)
    a, b = found.plain("layer")
    plain = Other()
    plain.load_state_dict({key.replace("base_layer.", ""): v for key, v in model.state_dict().items() if "base" in key})
    veneer.attach(plain, veneer.LoraConfig(r=2, targets=["layer"]))
    for parameter, value in zip(adapter_parameters(plain, "default").values(), (a, b), strict=True):
        parameter.data.copy_(value)
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adalora": True, "dora": True}, "adalora: found dora too"),
        ({"adalora": {"warmup": 0.6, "settle": 0.5}}, "warmup 0.6 and settle 0.5, expected less than 1"),
        ({"adalora": {"start": 0.5}}, "adalora.start: .*found 0.5"),
        ({"adalora": {"beta": 1}}, "adalora.beta: .*found 1"),
        ({"adalora": {"deltaT": 3}}, "unknown key 'deltaT' in adalora; "),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(veneer.VeneerError, match=message):
        veneer.LoraConfig(**settings)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_on_a_quantised_base(kind, tmp_path):
    def base():
        model = make_model(fused=False)
        quantize_model(model, kind, compute_dtype=torch.float32)
        return model

    model = base()
    config = veneer.LoraConfig(r=4, alpha=8, targets=["q_proj", "down_proj"], adalora={"steps": 12})
    veneer.attach(model, config, seed=1)
    before = float(model(input_ids=IDS, labels=IDS).loss)
    steps(model, 12)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert float(model(input_ids=IDS, labels=IDS).loss) < before - 0.1
        other = veneer.load_adapter(base(), veneer.save_adapter(model, tmp_path / "adapter"))
        torch.testing.assert_close(other(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(veneer.merge(other)(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
