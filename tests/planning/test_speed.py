"""How long a step takes, from a few layers."""

import time

import pytest
import torch

import veneer
from veneer.models.known import MODELS
from veneer.models.load import skeletons
from veneer.ops import native
from veneer.planning import speed
from veneer.planning.memory import Run

SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 12, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(MODELS, "small", ("llama", SIZES))
    monkeypatch.setattr(speed, "SECONDS", 0.5)
    return "small"


def test_layers_are_in_proportion(small, monkeypatch):
    parts = speed._Parts(1.0, 2.0, 0.5, 0.25, 4.0)
    monkeypatch.setattr(speed, "_timed", lambda *_: parts)
    monkeypatch.setattr(speed, "LAYERS", 3)
    run = Run(lora=veneer.LoraConfig(r=4), seq_len=1024, batch_size=4, grad_accumulation=3)
    skeleton = skeletons(small)()
    found = speed.measure(skeleton, run, trained=10**6)
    mine = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    assert len(skeleton.model.layers) == 3
    assert found.seconds == pytest.approx(6 * (4 * 3.0 + 0.5 + 0.25) + 4.0 * 10**6 / mine)
    assert found.tokens == 6 * 2048 and found.forward == pytest.approx((4 * 1.0 + 0.25) / 2048)


def test_a_wide_head_is_measured_in_part(monkeypatch):
    monkeypatch.setitem(MODELS, "wide", ("llama", {**SIZES, "vocab_size": 4 * speed.VOCABULARY}))
    monkeypatch.setattr(speed, "_timed", lambda *_: speed._Parts(0.0, 0.0, 1.0, 0.0, 0.0))
    skeleton = skeletons("wide")()
    assert speed.measure(skeleton, Run(lora=veneer.LoraConfig(r=4), seq_len=64), 1).seconds == pytest.approx(4.0)
    assert skeleton.get_input_embeddings().weight is skeleton.lm_head.weight and len(skeleton.lm_head.weight) == 32768


@pytest.mark.skipif(native.missing() is not None, reason="no native kernels here")
@pytest.mark.parametrize("settings", [{}, {"quantize": "nf4"}, {"method": "full"}, {"recompute": "full"}])
def test_the_time_is_about_that_of_the_whole_model(small, settings):
    """Wide bounds: other programs run beside the tests. benchmarks/c12_plan.py has the narrow ones."""
    run = Run(lora=veneer.LoraConfig(r=4), seq_len=256, **settings)
    whole = speed.filled(speed.prepared(skeletons(small)(), run), torch.device("cpu"))
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    predicted = speed.measure(skeletons(small)(), run, trained)
    batch = speed._batch(whole, run, 1.0, torch.device("cpu"))
    optimizer = speed.Optimizer(list(whole.parameters()), foreach=False)
    hooks = [p.register_post_accumulate_grad_hook(optimizer.add) for p in speed.rounded(optimizer.masters)]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        optimizer.adam.zero_grad()
        speed.batch_loss(whole, batch, 1).backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    del hooks
    assert 0.5 < predicted.seconds / min(times) < 2


@pytest.mark.parametrize(
    ("lora", "back"),
    [
        ({"layers": [10, 11]}, 2), ({"layers": [3]}, 9), ({"targets": r"model\.layers\.8\.mlp\.up_proj"}, 4),
        ({"rank_pattern": {"layers.9.mlp.up_proj": 8}}, 12), ({"tokens": [2000]}, 12), ({"adalora": True}, 12), ({"dora": True}, 12),
    ],
)  # fmt: skip
def test_an_adapter_on_some_layers_is_measured_on_these(small, monkeypatch, lora, back):
    parts = speed._Parts(1.0, 2.0, 0.0, 0.0, 0.0)
    real = speed._timed

    def timed(*given):
        real(*given)
        return parts

    monkeypatch.setattr(speed, "_timed", timed)
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "LAYERS", 3)
    monkeypatch.setattr(speed, "VOCABULARY", 512)
    skeleton = skeletons(small)()
    found = speed.measure(skeleton, Run(lora=veneer.LoraConfig(r=4, **lora), seq_len=64), 10**6)
    kept = len(skeleton.model.layers)
    assert kept == min(3, back) and found.seconds == pytest.approx((12 * 1.0 + back * 2.0) / kept)


def test_what_would_not_fit_is_not_measured(small, monkeypatch):
    monkeypatch.setattr(speed, "available_bytes", lambda: 10**6)
    found = veneer.plan(small, method="lora", rank=4, seq_len=64, device="cpu", budget="100GB", time=True)
    assert found["fits"] and "seconds_per_step" not in found and "not measured: the layers" in found["notes"][-1]


def test_time_of_a_plan(small):
    found = veneer.plan(small, method="lora", rank=4, seq_len=64, device="cpu", time=True)
    assert found["tokens_per_second"] == pytest.approx(64 / found["seconds_per_step"]) and found["seconds_per_step"] > 0
