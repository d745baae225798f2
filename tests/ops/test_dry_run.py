"""A dry run's books beside those of the real step: the same places in the arena, to the byte."""

import pytest
import torch

import veneer
from veneer.models.fuse import batch_loss, fuse, set_recompute
from veneer.models.load import skeleton_of
from veneer.ops import arena, native
from veneer.ops.dry_run import DryRun
from veneer.quant.linear import quantize_model

SIZES = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LENGTHS = (200, 120)
pytestmark = pytest.mark.skipif(native.missing() is not None, reason="no native kernels here")


def batch(device):
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    total = int(starts[-1])
    ids = torch.arange(total, device=device)[None] % 1000
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(device)
    return {
        "input_ids": ids, "labels": ids.clone(), "position_ids": places, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts,
        "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS), "attention_mask": torch.empty((1, 1, 1, 1), device=device),
    }  # fmt: skip


def prepared(kind, quantize, recompute, lora, real):
    skeleton = skeleton_of(kind, **SIZES, tie_word_embeddings=True).to(torch.bfloat16)
    model = skeleton
    if real:
        torch.manual_seed(0)
        model = type(skeleton)(skeleton.config).to(torch.bfloat16)
    with torch.device("cpu" if real else "meta"):
        if quantize:
            quantize_model(model, quantize)
        fuse(model)
        if lora is None:
            model.requires_grad_(True)
        else:
            veneer.attach(model, veneer.LoraConfig(r=6, targets="all-linear", **lora), seed=0)
    assert set_recompute(model, recompute)
    return model.train()


def step(model, inputs, micro_batches=2):
    for _ in range(micro_batches):
        torch.autograd.backward(batch_loss(model, inputs, 320))


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
@pytest.mark.parametrize(
    ("kind", "quantize", "lora"),
    [
        ("llama", None, {}), ("llama", "nf4", {}), ("qwen2", "int8", {"dropout": 0.1}), ("qwen3", None, {"dora": True}),
        ("phi3", "nf4", {}), ("llama", None, None), ("qwen3", None, None), ("gemma", "fp4", {"dora": True, "dropout": 0.1}),
    ],
)  # fmt: skip
def test_the_arena_is_as_high_as_in_the_real_step(monkeypatch, kind, quantize, lora, recompute):
    pool = arena.Arena(1 << 32)
    monkeypatch.setattr(arena, "_arena", pool)
    real = prepared(kind, quantize, recompute, lora, real=True)
    pool.places.high = 0
    step(real, batch("cpu"))
    hollow = prepared(kind, quantize, recompute, lora, real=False)
    with DryRun([*hollow.parameters(), *hollow.buffers()]) as books:
        step(hollow, batch("meta"))
    assert books.places.high == pool.places.high > 1 << 21
    assert {k: None if p.grad is None else p.grad.shape for k, p in hollow.named_parameters()} == {
        k: None if p.grad is None else p.grad.shape for k, p in real.named_parameters()
    }
    gradients = sum(p.grad.nbytes for p in hollow.parameters() if p.grad is not None)
    assert gradients <= books.beside <= gradients + (1 << 20)


def test_what_lives_beside_the_arena_is_counted_while_it_lives():
    with DryRun() as books:
        x = torch.empty((1000, 100))
        y = x.view(100, 1000)[:50]
        assert books.beside == 400_000 == books.live
        z = x + 1
        assert books.beside == 800_000
        del x, z
        assert books.beside == 400_000 and books.most == 800_000
        del y
        assert books.beside == 0
        big = arena.empty((1 << 10, 1 << 10), torch.bfloat16)
        assert books.places.high == 2 << 20 and books.beside == 0 and books.live == 2 << 20 and big.is_meta
        del big
        assert books.live == 0 and books.peak == (2 << 20) + 800_000
    assert arena.dry is None and not arena.empty((1 << 10, 1 << 10), torch.bfloat16).is_meta


def test_a_gpus_tensors_are_counted_in_its_blocks_from_the_start():
    there = torch.empty(3 << 20, dtype=torch.uint8, device="meta")
    with DryRun([there], cpu=False) as books:
        assert books.live == 3 << 20 and books.blocks.reserved == 20 << 20
        x = torch.ones((512, 1024))
        assert books.live == 5 << 20
        books.restart()
        x.logsumexp(1)  # its kernel makes a tensor of the input's size
        assert books.lately == (7 << 20) + 2048 and books.live == 5 << 20
        del x
        assert books.live == 3 << 20 and books.peak == (7 << 20) + 2048 and arena.dry is None


def test_a_gpu_keeps_what_transformers_code_saves_and_recompute_does_not():
    """The same step on a GPU: no fused halves, so more is kept; recomputed whole layers keep a tensor each."""
    from veneer.planning.memory import Run, dry_step, prepared

    def step(**changes):
        run = Run(lora=veneer.LoraConfig(r=4), batch_size=2, seq_len=128, evaluate=False, **changes)
        return dry_step(prepared(skeleton_of("llama", **SIZES), run), run)

    plain, again, cpu = step(device="cuda"), step(device="cuda", recompute="full"), step()
    hidden = 256 * SIZES["hidden_size"] * 2
    assert plain.activations > 1.5 * cpu.activations
    assert 4 * hidden <= again.activations < plain.activations / 4
    assert plain.loaded >= sum(p.nbytes for p in skeleton_of("llama", **SIZES).to(torch.bfloat16).parameters())
    assert plain.fragments[0] >= 0 and again.peak < plain.peak
