import pytest
import torch
from conftest import make_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import veneer
from veneer.adapters.attach import adapter_parameters
from veneer.config import IGNORED
from veneer.models.fuse import batch_loss, fuse
from veneer.training.batches import batches
from veneer.training.data import Sample
from veneer.training.packing import Order, collate_packed, collate_padded, pack


def samples(count=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        size = int(torch.randint(2, 40, (1,), generator=g))
        ids = torch.randint(0, 256, (size,), generator=g).tolist()
        out.append(Sample(ids, [IGNORED, *[i if k % 3 else IGNORED for k, i in enumerate(ids)][1:]]))
    return out


def test_order_covers_every_epoch_and_is_stateless():
    order = Order(10, 4, seed=3)
    assert order.steps_per_epoch == 3
    first = [i for k in range(3) for i in order.step(k)]
    assert sorted(first) == list(range(10)) and [i for k in range(3, 6) for i in order.step(k)] != first
    assert Order(10, 4, seed=3).step(4) == order.step(4) and Order(10, 4, seed=4).step(0) != order.step(0)


def test_packing_keeps_every_sample_within_the_budget():
    rows = samples(30)
    bins = pack(rows, 64)
    assert sorted(map(id, rows)) == sorted(id(s) for b in bins for s in b)
    assert all(sum(len(s.input_ids) for s in b) <= 64 for b in bins) and len(bins) < 30


@pytest.mark.parametrize("fused", [True, False])
def test_packed_padded_and_single_give_the_same_loss_and_gradient(fused):
    model, rows = make_model(fused=fused), samples()
    items = sum(s.supervised for s in rows)

    def run(batches):
        model.zero_grad()
        total = sum(batch_loss(model, batch, items) for batch in batches)
        total.backward()
        return total.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    single = run([collate_padded([s], 256) for s in rows])
    for other in ([collate_packed(rows)], [collate_padded(rows, 256)], [collate_packed(b) for b in pack(rows, 50)]):
        for a, b in zip(run(other), single, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_packed_samples_do_not_see_each_other():
    model, rows = make_model(), samples(3)
    changed = [Sample([(i + 1) % 256 for i in rows[0].input_ids], rows[0].labels), *rows[1:]]
    cut = len(rows[0].input_ids)
    with torch.no_grad():
        a, b = (model(**{k: v for k, v in collate_packed(r).items() if k != "labels"}).logits for r in (rows, changed))
    assert a.shape[1] % 64 == 0
    assert torch.equal(a[:, cut:], b[:, cut:]) and not torch.equal(a[:, :cut], b[:, :cut])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_samples_in_the_batches_of_training_do_not_see_each_other(family, tokenizer):
    model = make_model()
    if family == "qwen3":
        config = {**model.config.to_dict(), "architectures": None, "head_dim": 16}
        model = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in config.items() if k != "model_type"})).eval()
        fuse(model)
    veneer.attach(model, veneer.LoraConfig(r=4), seed=0)
    for name, factor in adapter_parameters(model, "default").items():
        torch.nn.init.normal_(factor, std=0.1 if "lora_B" in name else 1.0)
    rows = samples(12)
    together = list(batches(rows, True, tokenizer, 128, torch.device("cpu")))
    assert 1 < len(together) < len(rows)
    alone = sum(float(batch_loss(model, collate_padded([row], 256), 1)) for row in rows)
    assert sum(float(batch_loss(model, batch, 1)) for batch in together) == pytest.approx(alone, rel=1e-5)


def test_eos_that_is_also_padding_is_still_learned():
    batch = collate_padded([Sample([1, 256], [IGNORED, 256]), Sample([1, 2, 3, 256], [IGNORED, 2, 3, 256])], 256)
    assert batch["labels"].tolist() == [[IGNORED, 256, IGNORED, IGNORED], [IGNORED, 2, 3, 256]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
