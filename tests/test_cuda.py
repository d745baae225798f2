"""Veneer on a CUDA GPU against Veneer on the CPU. Without a GPU all of it is skipped."""

import json
import sys

import pytest
import torch
import transformers
from conftest import make_mixture, make_model, randomised
from models.test_fuse import build, drop, gradients
from ops.test_quantize import DTYPES, SHAPES, weights
from torch.nn import functional as F
from training.test_loop import fresh, lines, run

import veneer
from veneer import cli, ops
from veneer.adapters.attach import adapter_parameters
from veneer.inference.generate import generate_greedy
from veneer.models.fuse import fuse, set_recompute
from veneer.ops import reference
from veneer.quant.linear import QuantizedLinear, quantize_model
from veneer.training.data import Sample
from veneer.training.packing import collate_packed, collate_padded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
GPU = "cuda"
NAMES = ["Llama", "Qwen3", "Gemma"]


def samples(*lengths):
    g = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 130, (length,), generator=g).tolist() for length in lengths]
    return [Sample(row, row) for row in rows]


BATCHES = {
    "packed": lambda: collate_packed(samples(5, 17, 1, 30)),
    "padded": lambda: collate_padded(samples(12, 7, 21), 0),
}


def on(device, batch):
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def step(model, batch):
    """Loss and all adapter gradients, brought to the CPU."""
    loss, gradient = gradients(model, **on(next(model.parameters()).device, batch))
    return float(loss), gradient.cpu()


def apart(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


# ---- model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_the_cpu(name, batch, dtype, kind):
    batch = BATCHES[batch]()
    exact_loss, exact = step(build(name, False, torch.float32, kind), batch)
    loss, found = step(build(name, True, dtype, kind).to(GPU), {**batch, "skip_logits": True})
    if dtype == torch.float32:
        assert loss == pytest.approx(exact_loss, rel=1e-5) and apart(found, exact) < 1e-4
        return
    original_loss, original = step(build(name, False, dtype, kind), batch)
    assert apart(found, exact) < 1.5 * apart(original, exact) + 0.02
    assert abs(loss - exact_loss) < 1.5 * abs(original_loss - exact_loss) + 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_do_not_see_each_other(name, dtype):
    model = build(name, True, dtype).to(GPU)
    rows = samples(5, 17, 1, 30)
    other = [*rows[:1], Sample(rows[1].input_ids[::-1], rows[1].labels), *rows[2:]]
    batches = [on(GPU, collate_packed(group)) for group in (rows, other)]
    with torch.no_grad():
        logits, changed = (model(**batch, use_cache=False).logits[0].float() for batch in batches)
        alone = [model(input_ids=torch.tensor([row.input_ids], device=GPU)).logits[0].float() for row in rows]
    assert torch.equal(logits[:5], changed[:5]) and torch.equal(logits[22:53], changed[22:53])
    assert not torch.equal(logits[5:22], changed[5:22])
    assert apart(logits[:53], torch.cat(alone)) < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_gives_the_same_gradients(dtype, dropout):
    found = []
    for how in ("none", "mlp", "full"):
        model = drop(build("Qwen3", True, dtype).to(GPU), dropout)
        assert set_recompute(model, how)
        torch.manual_seed(0)
        found.append(step(model, {**collate_packed(samples(40, 20)), "skip_logits": True})[1])
    assert apart(found[1], found[0]) < 1e-3 and apart(found[2], found[0]) < 1e-3  # with other masks: above 0.1


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_autocast_over_an_fp32_base(kind):
    batch = {**collate_padded(samples(12, 7, 21), 0), "skip_logits": True}
    model = build("Llama", True, torch.float32, kind).to(GPU)
    exact_loss, exact = step(model, batch)
    model.zero_grad()
    with torch.autocast(GPU, torch.bfloat16):
        loss = model(**on(GPU, batch), use_cache=False).loss
    loss.backward()
    found = torch.cat([value.grad.flatten() for value in adapter_parameters(model, "default").values()])
    assert float(loss) == pytest.approx(exact_loss, rel=0.01) and 0 < apart(found.cpu(), exact) < 0.15


# ---- quantised weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("size", ["normal", "zeros", "denormal", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4_bits_equal_the_cpu_bit_for_bit(dtype, size, kind):
    for shape in SHAPES:
        w = weights(shape, dtype, size)
        wanted, found = reference.quantize_4bit(w, kind), ops.quantize_4bit(w.to(GPU), kind)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True)), shape
        for out in DTYPES:
            decoded = ops.dequantize_4bit(*found, w.shape, out, kind=kind)
            expected = reference.dequantize_4bit(*wanted, w.shape, out, kind=kind)
            assert torch.equal(decoded.cpu(), expected), (shape, out)


@pytest.mark.parametrize("m", [1, 256, 1024, 4096])
def test_double_quantisation_equals_the_cpu_bit_for_bit(m):
    """Whole multiples of a power of two: any order of summing gives the same mean."""
    absmax = torch.randint(1, 1 << 12, (m,), generator=torch.Generator().manual_seed(0)) / 4096
    wanted, found = reference.double_quantize(absmax), ops.double_quantize(absmax.to(GPU))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(ops.double_dequantize(*found).cpu(), reference.double_dequantize(*wanted))


@pytest.mark.parametrize("m", [255, 257, 5000])
def test_double_quantisation_differs_from_the_cpu_by_the_rounding_of_the_mean(m):
    absmax = torch.rand(m, generator=torch.Generator().manual_seed(2)) * 0.1
    wanted, found = reference.double_quantize(absmax), ops.double_quantize(absmax.to(GPU))
    assert float((found[0].cpu() != wanted[0]).float().mean()) < 0.01
    torch.testing.assert_close(found[2].cpu(), wanted[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_quantised_layer_moved_there_decodes_to_the_same_bits(kind, double):
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(torch.nn.Linear(333, 100), kind, double_quant=double)
    wanted = [layer.dequantize(dtype) for dtype in DTYPES]
    layer.to(GPU)
    assert all(buffer.is_cuda for buffer in layer.buffers())
    assert all(torch.equal(layer.dequantize(dtype).cpu(), w) for dtype, w in zip(DTYPES, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_qlora_steps_follow_those_of_the_cpu(dtype):
    found = {}
    for device in ("cpu", GPU):
        model, losses = build("Llama", True, dtype, "nf4").to(device), []
        optimizer = torch.optim.AdamW(adapter_parameters(model, "default").values(), lr=3e-3)
        for _ in range(10):
            optimizer.zero_grad()
            losses.append(step(model, {**BATCHES["packed"](), "skip_logits": True})[0])
            optimizer.step()
        found[device] = torch.tensor(losses)
    limit = {"rtol": 1e-3, "atol": 0} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found[GPU], found["cpu"], **limit)
    assert found[GPU][-1] < 0.9 * found[GPU][0]


# ---- head and cross-entropy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 257, 1300])
def test_head_and_loss_are_those_of_plain_torch(rows, dtype, trained_head):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 64, generator=g).to(GPU, dtype).requires_grad_()
    weight = (torch.randn(1001, 64, generator=g) * 0.3).to(GPU, dtype).requires_grad_(trained_head)
    labels = torch.randint(0, 1001, (rows,), generator=g).to(GPU)
    exact = [x.detach().float().requires_grad_(x.requires_grad) for x in (hidden, weight)]
    loss = ops.linear_cross_entropy(hidden, weight, labels, 700)
    wanted = F.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum") / 700
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert float(loss) == pytest.approx(float(wanted), rel=limit)
    (3 * loss).backward()
    (3 * wanted).backward()
    for found, x in zip((hidden, weight), exact, strict=True):
        assert (found.grad is None) == (x.grad is None)
        assert x.grad is None or apart(found.grad.float(), x.grad) < limit


def test_head_and_loss_take_a_fraction_of_the_memory():
    hidden, weight = torch.randn(4096, 256, device=GPU), torch.randn(32000, 256, device=GPU)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    labels = torch.randint(0, 32000, (4096,), device=GPU)
    peaks = []
    for form in (ops.linear_cross_entropy, reference.linear_cross_entropy):
        hidden.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        form(hidden, weight, labels, 4096).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < peaks[1] / 4, peaks


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_the_run_that_was_not_interrupted(tmp_path, tokenizer, commands, dtype, recompute):
    how = {"schedule": "constant", "warmup_steps": 0, "recompute": recompute, "resume": True}
    weights = []
    for out, parts in (("whole", [8]), ("cut", [5, 8])):
        for steps in parts:
            model = fresh(quantize=dtype == torch.bfloat16, dropout=0.1, model={"dtype": dtype, "hidden_size": 64})
            result = run(model.to(GPU), tokenizer, commands, tmp_path / out, max_steps=steps, **how)
        weights.append(adapter_parameters(model, "default"))
    assert [row["step"] for row in lines(tmp_path / "cut")] == list(range(1, 9))
    assert all(value.is_cuda and torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert result["peak_bytes"] <= torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_fine_tuning_follows_the_cpu_and_resumes(tmp_path, tokenizer, commands, dtype):
    settings = {"method": "full", "learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0}
    losses, models = {}, {}
    for device in ("cpu", GPU):
        models[device] = make_model(dtype=dtype, hidden_size=64).to(device)
        run(models[device], tokenizer, commands, tmp_path / device, max_steps=6, **settings)
        losses[device] = [row["loss"] for row in lines(tmp_path / device)]
    assert losses[GPU] == pytest.approx(losses["cpu"], rel=1e-4 if dtype == torch.float32 else 2e-2)
    again = make_model(dtype=dtype, hidden_size=64).to(GPU)
    run(again, tokenizer, commands, tmp_path / "cut", max_steps=3, **settings)
    again = make_model(dtype=dtype, hidden_size=64).to(GPU)
    result = run(again, tokenizer, commands, tmp_path / "cut", max_steps=6, resume=True, **settings)
    for name, weight in models[GPU].named_parameters():
        torch.testing.assert_close(again.get_parameter(name), weight, rtol=1e-2, atol=1e-4)
    written, _ = veneer.load(result["model"], dtype=str(dtype).removeprefix("torch."), device="cpu")
    assert all(torch.equal(p, again.get_parameter(name).cpu()) for name, p in written.named_parameters())


def test_a_run_of_the_gpu_is_not_resumed_on_the_cpu(tmp_path, tokenizer, commands):
    run(fresh().to(GPU), tokenizer, commands, tmp_path / "run", max_steps=1)
    with pytest.raises(veneer.RefusedError, match="device: the checkpoint has 'cuda', this run 'cpu'"):
        run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=2, resume=True)


def test_what_was_trained_there_is_the_same_on_the_cpu(tmp_path, tokenizer, commands):
    def base():
        model = make_model(hidden_size=64)
        quantize_model(model, compute_dtype=torch.float32)
        return model

    model = base().to(GPU)
    veneer.attach(model, veneer.LoraConfig(r=4, dropout=0.1), seed=1)
    result = run(model, tokenizer, commands, tmp_path / "run", epochs=2)
    cpu = veneer.load_adapter(base(), result["adapter"])
    again = veneer.load_adapter(base().to(GPU), result["adapter"])
    ids = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = cpu(input_ids=ids).logits
        for other in (model, again, veneer.merge(model)):
            torch.testing.assert_close(other(input_ids=ids.to(GPU)).logits.cpu(), logits, rtol=1e-3, atol=1e-3)
    prompts = [tokenizer(text).input_ids for text in ("switch lamp 3 on", "switch", "lamp 12")]
    answers = [generate_greedy(m, tokenizer, prompts, max_new_tokens=12) for m in (cpu, again, model)]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_the_whole_life_from_the_command_line(tmp_path, tokenizer, commands, monkeypatch, capsys, quantize):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["veneer", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code, capsys.readouterr().err
        return capsys.readouterr().out

    folder = veneer.save_model(make_model(dtype=torch.bfloat16, hidden_size=64), tokenizer, tmp_path / "model")
    loaded, _ = veneer.load(folder, quantize=quantize)
    assert all(tensor.is_cuda for tensor in (*loaded.parameters(), *loaded.buffers()))
    (tmp_path / "r.yaml").write_text(
        f"model: {folder}\nquantize: {quantize or 'null'}\nlora: {{r: 4, dropout: 0.1}}\n"
        f"data: {{train: {commands}, eval: 0.1}}\n"
        f"train: {{epochs: 3, batch_size: 4, learning_rate: 0.01, save_every: 5, out: {tmp_path}/run}}\n"
    )
    result = json.loads(call("train", tmp_path / "r.yaml", "--json"))
    log = lines(tmp_path / "run")
    assert log[-1]["loss"] < 0.95 * log[0]["loss"] and result["eval_loss"] > 0
    speed = (tmp_path / "run/speed.jsonl").read_text().splitlines()
    assert json.loads(speed[-1])["memory_bytes"] > 0
    more = ["--adapter", result["adapter"], *(["--quantize", quantize] if quantize else [])]
    scored = ["--data", commands, "--limit", "9", "--max-new-tokens", "8", "--json"]
    measured = json.loads(call("eval", folder, *more, *scored))
    merged = json.loads(call("merge", folder, result["adapter"], "--out", tmp_path / "merged", "--json"))
    assert merged["onto"] == (quantize or "16-bit") and merged["max_logit_difference"] < 0.3
    assert json.loads(call("eval", tmp_path / "merged", *scored))["loss"] == pytest.approx(measured["loss"], rel=0.02)
    call("quantize", folder, "--out", tmp_path / "four", "--json")
    four, _ = veneer.load(tmp_path / "four")
    assert four.veneer_quantization == "nf4" and four(torch.tensor([[1, 2, 3]], device=GPU)).logits.isfinite().all()


def test_it_trains_in_transformers_trainer(tmp_path):
    model, rows = build("Llama", True, torch.float32), [{"input_ids": s.input_ids} for s in samples(*[16] * 8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, bf16=True, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    data = [{**row, "labels": row["input_ids"]} for row in rows]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0] and next(model.parameters()).is_cuda


# ---- the LoRA family ----------------------------------------------------------------------------------------------

FAMILY = {
    "DoRA": {"dora": True},
    "DoRA of 16 bits": {"dora": True, "dtype": "bfloat16"},
    "embedding and head": {"targets": ["embed_tokens", "lm_head", "q_proj"]},
    "tokens and modules": {"tokens": [3, 7], "modules_to_save": ["norm"]},
    "biases": {"lora_bias": True, "bias": "lora_only"},
    "ranks": {"rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}},
}


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
@pytest.mark.parametrize("which", FAMILY)
def test_a_step_of_every_method_is_that_of_the_cpu(which, kind):
    found = []
    for device in ("cpu", GPU):
        model = make_model(tie_word_embeddings="head" not in which, fused=False)
        if kind:
            quantize_model(model, kind, compute_dtype=torch.float32)
        fuse(model)
        veneer.attach(model.to(device), veneer.LoraConfig(**{"r": 4, **FAMILY[which]}), seed=0)
        found.append(step(randomised(model), {**BATCHES["packed"](), "skip_logits": True}))
    (exact_loss, exact), (loss, gradient) = found
    tolerance = 1e-2 if "16 bits" in which else 1e-4
    assert loss == pytest.approx(exact_loss, rel=tolerance) and apart(gradient, exact) < tolerance


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_step_through_experts_is_that_of_the_cpu(kind, implementation):
    found, ids = [], torch.arange(3, 27).reshape(2, 12)
    for device in ("cpu", GPU):
        torch.manual_seed(0)
        model = make_mixture(kind).eval()
        if implementation == "grouped_mm" and device == GPU:
            model = model.to(torch.bfloat16)  # torch's product of groups takes no fp32 there
        model.set_experts_implementation("eager" if device == "cpu" else implementation)
        veneer.attach(model.to(device), veneer.LoraConfig(r=4, targets="all-linear"), seed=0)
        found.append(step(randomised(model), {"input_ids": ids, "labels": ids}))
    (exact_loss, exact), (loss, gradient) = found
    assert apart(gradient, exact) < (0.15 if implementation == "grouped_mm" else 1e-4)
    assert loss == pytest.approx(exact_loss, rel=0.02 if implementation == "grouped_mm" else 1e-5)


def test_adalora_leaves_the_ranks_that_the_cpu_leaves():
    left, losses, ids = [], [], torch.arange(1, 30)[None]
    for device in ("cpu", GPU):
        config = veneer.LoraConfig(r=4, targets=["q_proj", "down_proj"], adalora={"steps": 12})
        model = veneer.attach(make_model().to(device), config, seed=0)
        optimizer = torch.optim.AdamW(adapter_parameters(model, "default").values(), lr=0.02, weight_decay=0)
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(input_ids=ids.to(device), labels=ids.to(device)).loss
            loss.backward()
            optimizer.step()
        losses.append(float(loss))
        left.append(
            {k: v.detach().cpu() != 0 for k, v in adapter_parameters(model, "default").items() if "lora_E" in k}
        )
    assert left[0].keys() == left[1].keys() and all(torch.equal(left[0][key], left[1][key]) for key in left[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_a_start_from_the_weights_is_that_of_the_cpu(start):
    found = []
    for device in ("cpu", GPU):
        model, original = make_model(), make_model().to(device)
        quantize_model(model, "nf4", compute_dtype=torch.float32)
        veneer.attach(model.to(device), veneer.LoraConfig(r=4, init=start), seed=0, original=original)
        found.append(model(input_ids=torch.arange(1, 30, device=device)[None]).logits.detach().cpu())
    assert apart(found[1], found[0]) < 1e-3


def test_an_adapter_waits_on_the_cpu_while_another_is_active(tmp_path):
    model = veneer.attach(make_model().to(GPU), veneer.LoraConfig(r=4, modules_to_save=["norm"], tokens=[3]), seed=0)
    randomised(model)
    ids = torch.tensor([[1, 2, 3]], device=GPU)
    expected = model(input_ids=ids).logits
    veneer.save_adapter(model, tmp_path / "a")
    veneer.load_adapter(model, tmp_path / "a", "waiting", device="cpu", activate=False)
    assert {p.device.type for p in adapter_parameters(model, "waiting").values()} == {"cpu"}
    veneer.set_adapter(model, "waiting")
    assert {p.device.type for p in adapter_parameters(model, "waiting").values()} == {"cuda"}
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    veneer.set_adapter(model, "default")
    assert {p.device.type for p in adapter_parameters(model, "waiting").values()} == {"cpu"}


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_merged_in_place_and_taken_out_again(kind):
    model = make_model(fused=False)
    if kind:
        quantize_model(model, kind, compute_dtype=torch.float32)
    fuse(model)
    model.to(GPU)
    for seed, name in enumerate(("one", "two")):
        veneer.attach(model, veneer.LoraConfig(r=4, targets="all-linear"), name=name, seed=seed)
        randomised(model, name)
    ids = torch.arange(1, 30, device=GPU)[None]
    expected = {}
    for name in ("one", "two", None):
        veneer.set_adapter(model, name)
        with torch.no_grad():
            expected[name] = model(input_ids=ids).logits
    with torch.no_grad():
        for name in ("one", "two", "one"):
            torch.testing.assert_close(
                veneer.hot_merge(model, name)(input_ids=ids).logits, expected[name], rtol=1e-3, atol=1e-3
            )
        veneer.unmerge(model)
        assert torch.equal(model(input_ids=ids).logits, expected["one"])
        veneer.set_adapter(model, None)
        assert torch.equal(model(input_ids=ids).logits, expected[None])
