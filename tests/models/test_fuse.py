"""Fused models against transformers' own: logits, losses and adapter gradients, every architecture of the tables."""

import copy
import inspect

import pytest
import torch
import transformers
from conftest import make_model

import veneer
from veneer.adapters.attach import adapter_parameters, lora_layers
from veneer.models import fuse as fuse_module
from veneer.models.fuse import _rest, fuse
from veneer.ops import native
from veneer.quant.linear import quantize_model, quantized_layers
from veneer.training.data import Sample
from veneer.training.packing import collate_packed

needs_library = pytest.mark.skipif(native.missing() is not None, reason="no compiler built the kernels")
SMALL = {
    "vocab_size": 130, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = {
    "Llama": {"attention_bias": True},
    "Mistral": {"sliding_window": 64},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Phi3": {"partial_rotary_factor": 0.5},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "Gemma": {"head_dim": 16},
}


def build(name, fused, dtype=torch.bfloat16, kind=None, dora=False):
    config = getattr(transformers, f"{name}Config")(**SMALL, **ARCHITECTURES[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).eval()
    for parameter in model.parameters():  # norms too: a weight of 1 would hide a mistake
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    if kind:
        quantize_model(model, kind, compute_dtype=dtype)
    model = model.to(dtype)
    if fused:
        fuse(model)
    veneer.attach(model, veneer.LoraConfig(r=4, dora=dora), seed=1)
    g = torch.Generator().manual_seed(2)
    for key, value in adapter_parameters(model, "default").items():
        if "lora_B" in key:
            value.data.normal_(0, 0.1, generator=g)
        elif "magnitude" in key:
            value.data.mul_(torch.empty_like(value).uniform_(0.7, 1.3, generator=g))
    return model


def gradients(model, **batch):
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    found = {k: v.grad for k, v in adapter_parameters(model, "default").items()}
    assert all(g is not None for g in found.values())
    return loss.detach(), torch.cat([g.flatten() for g in found.values()])


@needs_library
@pytest.mark.parametrize("kind", [None, "nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_is_as_close_to_fp32_as_the_original_in_bf16(name, kind):
    ids = torch.randint(3, 130, (3, 21), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    exact_loss, exact = gradients(build(name, False, torch.float32, kind), **batch)
    loss, original = gradients(build(name, False, kind=kind), **batch)
    model = build(name, True, kind=kind)
    assert model.veneer_parts == ["attention", "head", "layer", "norm"]
    fused_loss, fused = gradients(model, **batch, skip_logits=True)
    errors = [float((g - exact).norm() / exact.norm()) for g in (fused, original)]
    assert errors[0] < 1.2 * errors[1] + 0.003, errors
    assert abs(float(fused_loss - exact_loss)) < 1.5 * abs(float(loss - exact_loss)) + 0.01


@needs_library
@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("how", ["none", "full"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dora_stays_on_both_halves_and_is_as_close_to_fp32(name, how, kind, monkeypatch):
    ids = torch.randint(3, 130, (3, 21), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    exact_loss, exact = gradients(build(name, False, torch.float32, kind, dora=True), **batch)
    loss, original = gradients(build(name, False, kind=kind, dora=True), **batch)
    ran = []
    for half in ("attention_block", "mlp_block"):
        form = getattr(fuse_module.ops, half)
        monkeypatch.setattr(fuse_module.ops, half, lambda x, b, r, f=form, h=half: ran.append(h) or f(x, b, r))
    model = build(name, True, kind=kind, dora=True)
    fuse_module.set_recompute(model, how)
    fused_loss, fused = gradients(model, **batch, skip_logits=True)
    assert ran == ["attention_block", "mlp_block"] * 3
    lengths = torch.cat(
        [torch.full((p.numel(),), "magnitude" in k) for k, p in adapter_parameters(model, "default").items()]
    )
    for part in (lengths, ~lengths):
        errors = [float((g - exact)[part].norm() / exact[part].norm()) for g in (fused, original)]
        assert errors[0] < 1.2 * errors[1] + 0.003, errors
    assert abs(float(fused_loss - exact_loss)) < 1.5 * abs(float(loss - exact_loss)) + 0.01


@needs_library
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_layer_ran_on_both_halves(name, monkeypatch):
    ran = []
    for half in ("attention_block", "mlp_block"):
        original = getattr(fuse_module.ops, half)
        monkeypatch.setattr(fuse_module.ops, half, lambda x, b, r, f=original, h=half: ran.append(h) or f(x, b, r))
    model = build(name, True)
    model(input_ids=torch.randint(3, 130, (2, 9)), use_cache=False)
    assert ran == ["attention_block", "mlp_block"] * 3


@needs_library
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_rows_do_not_see_each_other(name):
    model = build(name, True)
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 130, (n,), generator=g).tolist() for n in (5, 17, 1, 30)]
    batch = collate_packed([Sample(row, row) for row in rows])
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0].float()
        alone = torch.cat([model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in rows]).float()
    torch.testing.assert_close(packed[: len(alone)], alone, rtol=0.02, atol=0.05)


@needs_library
def test_the_rest_of_the_residual_stream_is_not_used_for_another_tensor():
    """Between layers it travels beside the hidden states; who changes or replaces them gets what they now are."""
    ids = torch.randint(3, 130, (2, 9))
    model = build("Llama", True)
    seen = []
    plain = model(input_ids=ids, use_cache=False).logits

    def change(how):
        hook = model.model.layers[1].register_forward_hook(lambda m, a, y: seen.append(_rest(y)) or how(y))
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        hook.remove()
        return logits

    assert torch.equal(change(lambda y: y), plain) and all(rest is not None and bool(rest.any()) for rest in seen)
    copied, zeroed = change(lambda y: y.clone()), change(lambda y: y.zero_())
    assert not torch.equal(copied, plain)
    torch.testing.assert_close(copied, plain, rtol=0.05, atol=0.05)
    assert torch.equal(zeroed, change(lambda y: torch.zeros_like(y)))
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)


@needs_library
def test_rows_padded_on_the_right_give_what_they_give_alone():
    model = build("Llama", True)
    ids = torch.randint(3, 130, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        alone = model(input_ids=ids[1:, :7], use_cache=False).logits
        left = model(input_ids=ids.flip(1), attention_mask=mask.flip(1), use_cache=False).logits
        plain = type(model).forward(build("Llama", False), input_ids=ids.flip(1), attention_mask=mask.flip(1)).logits
    torch.testing.assert_close(both[1:, :7].float(), alone.float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(left[1, 5:].float(), plain[1, 5:].float(), rtol=0.02, atol=0.08)


@needs_library
def test_generation_with_a_cache_agrees_with_the_fused_pass():
    model = build("Qwen3", True)
    ids = torch.randint(3, 130, (1, 6))
    out = model.generate(ids, max_new_tokens=8, do_sample=False, min_new_tokens=8)
    with torch.no_grad():
        again = model(input_ids=out[:, :-1], use_cache=False).logits[:, 5:]
    top = again.float().topk(2).values
    close_call = (top[..., 0] - top[..., 1]) < 0.1
    assert bool(((again.argmax(-1) == out[:, 6:]) | close_call).all())


def drop(model, p):
    for layer in lora_layers(model).values():
        layer.dropout["default"] = p
    return model.train()


@needs_library
@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("name", ["Llama", "Phi3"])
def test_adapter_dropout_stays_on_both_halves(name, kind, monkeypatch):
    ids = torch.randint(3, 130, (2, 21), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "skip_logits": True}
    model = build(name, True, kind=kind)
    plain = float(model(**batch).loss.detach())
    drop(model, 0.1)
    ran, masks, found = [], [], []
    for half in ("attention_block", "mlp_block"):  # the same masks in plain torch, where the halves are its definitions
        forms = (getattr(fuse_module.ops, half), getattr(fuse_module.ops.reference, half))
        monkeypatch.setattr(
            fuse_module.ops,
            half,
            lambda x, b, r, f=forms, h=half: ran.append(h) or masks.append(b) or f[len(ran) > 6](x, b, r),
        )
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(3)
        found.append(gradients(model, **batch))
    assert ran == ["attention_block", "mlp_block"] * 6
    linears = [linear for b in masks for linear in ((*b.qkv, b.out) if hasattr(b, "qkv") else (*b.gate_up, b.down))]
    each = len(lora_layers(model))
    assert len({linear.seed for linear in linears[:each]}) == each and all(linear.dropout == 0.1 for linear in linears)
    assert [linear.seed for linear in linears[:each]] == [linear.seed for linear in linears[each:]]
    assert float((found[0][0] - found[1][0]).abs()) < 0.02 and abs(float(found[0][0]) - plain) > 1e-3
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 0.1  # other masks: above 1


@needs_library
@pytest.mark.parametrize("how", ["none", "mlp", "full"])
def test_the_seed_decides_dropout_and_evaluation_has_none(how):
    ids = torch.randint(3, 130, (2, 21))
    model = build("Qwen3", True)
    fuse_module.set_recompute(model, how)
    plain = model(input_ids=ids, labels=ids, skip_logits=True).loss
    state = torch.get_rng_state()
    assert torch.equal(drop(model, 0.3).eval()(input_ids=ids, labels=ids, skip_logits=True).loss, plain)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn where nothing is dropped
    model.train()
    found = []
    for seed in (5, 5, 6):
        model.zero_grad()
        torch.manual_seed(seed)
        found.append(gradients(model, input_ids=ids, labels=ids, skip_logits=True))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0]) and not torch.equal(found[0][0], plain)


@needs_library
def test_dropout_moves_the_logits_as_torch_dropout_does():
    """The same mean and the same spread over masks as that of the layers one at a time."""
    ids = torch.randint(3, 130, (1, 9), generator=torch.Generator().manual_seed(0))
    mean, spread = [], []
    for fused in (True, False):
        model = drop(build("Llama", fused), 0.1)
        torch.manual_seed(0)
        with torch.no_grad():
            logits = torch.stack([model(input_ids=ids, use_cache=False).logits.float() for _ in range(100)])
        mean.append(logits.mean(0))
        spread.append(float(logits.std(0).norm()))
    assert float((mean[0] - mean[1]).norm()) < 1.3 * (2 / 100) ** 0.5 * spread[1]
    assert spread[0] == pytest.approx(spread[1], rel=0.1)


def weight_gradients(model, **batch):
    """Of every weight, norms and embeddings in groups of their own: matrices would hide a mistake in them."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    groups = {"norm": [], "embed": [], "lm_head": [], "bias": [], "proj": []}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        groups[next(kind for kind in groups if kind in name)].append(parameter.grad.float().flatten())
    return {kind: torch.cat(found) for kind, found in groups.items() if found}


@needs_library
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_all_weights_is_as_close_to_fp32_as_the_original_in_bf16(name, monkeypatch):
    ids = torch.randint(3, 130, (3, 21), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    models = [build(name, fused, dtype) for fused, dtype in ((False, torch.float32), (False, torch.bfloat16))]
    models.append(build(name, True))
    for model in models:
        veneer.remove_adapter(model, "default")
    exact, original = (weight_gradients(model, **batch) for model in models[:2])
    ran = []
    for half in ("attention_block", "mlp_block"):
        form = getattr(fuse_module.ops, half)
        monkeypatch.setattr(fuse_module.ops, half, lambda x, b, r, f=form, h=half: ran.append(h) or f(x, b, r))
    fused = weight_gradients(models[2], **batch, skip_logits=True)
    assert ran == ["attention_block", "mlp_block"] * 3 and fused.keys() == exact.keys()
    for kind, wanted in exact.items():
        errors = [float((found[kind] - wanted).norm() / wanted.norm()) for found in (fused, original)]
        assert errors[0] < 1.2 * errors[1] + 0.003, (kind, errors)


@needs_library
def test_a_deep_copy_runs_its_own_weights():
    model = build("Llama", True)
    other = copy.deepcopy(model)
    ids = torch.randint(3, 130, (1, 9))
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(input_ids=ids, use_cache=False).logits.any()
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


@needs_library
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("how", ["mlp", "full"])
def test_recompute_gives_the_same_gradients(how, dropout):
    ids = torch.randint(3, 130, (2, 33))
    found = []
    for recompute in ("none", how):
        model = drop(build("Qwen3", True), dropout)
        torch.manual_seed(0)
        assert fuse_module.set_recompute(model, recompute)
        found.append(gradients(model, input_ids=ids, labels=ids, skip_logits=True)[1])
    assert torch.equal(*found)


def test_a_model_that_mixes_tokens_outside_attention_is_not_packed():
    config = transformers.Lfm2Config(
        vocab_size=130, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    model = transformers.Lfm2ForCausalLM(config)
    assert "attention" not in fuse(model)


def test_the_signature_of_forward_is_the_original_one():
    """generate reads there that the prompt needs no logits but the last; Trainer which columns the model takes."""
    fused, plain = make_model(), make_model(fused=False)
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    made = []
    fused.lm_head.register_forward_hook(lambda module, inputs, logits: made.append(logits.shape[1]))
    fused.generate(torch.randint(0, 250, (2, 9)), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert made == [1, 1]


def test_an_adapter_on_the_head_takes_part_in_the_loss():
    model = make_model(hidden_size=64)
    veneer.attach(model, veneer.LoraConfig(r=2, targets=["q_proj", "lm_head"]))
    ids = torch.randint(0, 250, (1, 9))
    model(input_ids=ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()
    grads = {k: v.grad for k, v in adapter_parameters(model, "default").items() if "lm_head" in k and "lora_B" in k}
    assert grads and all(float(g.abs().sum()) > 0 for g in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_run_as_they_were(dtype):
    fused, plain = make_model(dtype=dtype), make_model(dtype=dtype, fused=False)
    ids = torch.randint(0, 250, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(fused(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_autocast_over_an_fp32_base(kind):
    model = make_model()
    if kind:
        quantize_model(model, kind, compute_dtype=torch.float32)
    veneer.attach(model, veneer.LoraConfig(r=2))
    ids = torch.randint(0, 250, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in adapter_parameters(model, "default").values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_checkpointing_that_other_loops_switch_on_is_done(dtype, monkeypatch):
    """Trainer calls gradient_checkpointing_enable: fused layers recompute, others are made again whole; same gradients."""
    ids = torch.randint(3, 130, (2, 40), generator=torch.Generator().manual_seed(0))
    seen, saved = [], []
    for enable in (False, True):
        model = build("Llama", True, dtype).train()
        if enable:
            model.gradient_checkpointing_enable()
        for half in ("attention_block", "mlp_block"):
            original = getattr(fuse_module.ops, half)
            monkeypatch.setattr(
                fuse_module.ops,
                half,
                lambda x, parts, rest, o=original: (seen.append(parts.recompute), o(x, parts, rest))[1],
            )
        bytes_kept = 0

        def count(tensor):
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in adapter_parameters(model, "default").values()])
        saved.append((bytes_kept, loss.detach(), found))
        monkeypatch.undo()
    (kept, loss, grads), (kept_less, same_loss, same_grads) = saved
    assert kept_less < 0.7 * kept
    torch.testing.assert_close(same_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(same_grads, grads, rtol=1e-3, atol=1e-6)
    if seen:  # bf16 with the library: the halves did it themselves
        assert seen[:6] == ["none"] * 6 and set(seen[6:]) == {"full"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_flattened_batches_of_other_collators_keep_rows_apart(dtype):
    """transformers' and TRL's padding-free collators: position ids that restart, with or without the starts of the rows."""
    model = build("Llama", True, dtype)
    rows = [torch.randint(3, 130, (n,), generator=torch.Generator().manual_seed(n)) for n in (11, 30, 7)]
    features = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
        for with_starts in (False, True):
            collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=with_starts)
            batch = {key: value for key, value in collator(features).items() if key != "labels"}
            together = model(**batch, use_cache=False).logits[0]
            spread = (together - alone).float().abs().max() / alone.float().abs().max()
            assert spread < (0.03 if dtype == torch.bfloat16 else 1e-5), (with_starts, spread)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_the_loss_is_divided_by_what_a_trainer_counted(dtype, skip_logits):
    """Trainer gives the learned tokens of the whole step: two halves of it must add up to it."""
    model = build("Llama", True, dtype)
    ids = torch.randint(3, 130, (4, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :15] = -100  # halves of unequal size
    labels[1, :12] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = model(input_ids=ids, labels=labels, skip_logits=skip_logits).loss
    halves = [
        model(input_ids=i, labels=t, num_items_in_batch=count, skip_logits=skip_logits).loss
        for i, t in zip(ids.chunk(2), labels.chunk(2), strict=True)
    ]
    torch.testing.assert_close(sum(halves), whole, rtol=1e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_threshold_for_outliers_rounds_inputs_in_eval_mode_only(fused):
    model = make_model(dtype=torch.bfloat16, fused=fused, hidden_size=64, intermediate_size=128)
    quantize_model(model, "int8")
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        for layer in quantized_layers(model).values():
            layer.outlier_threshold = 6.0
        mixed, training = (model.train(t)(input_ids=ids, use_cache=False).logits for t in (False, True))
    assert torch.equal(training, plain) and not torch.equal(mixed, plain)
    assert (mixed - plain).norm() < 0.05 * plain.norm()
