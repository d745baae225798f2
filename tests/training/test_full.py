"""Full fine-tuning: every weight in the same loop, against AdamW written out, and the rules of runs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from training.test_loop import lines, run
from transformers import AutoModelForCausalLM

import veneer
from veneer.adapters.attach import adapter_parameters
from veneer.config import parse_recipe, read_recipe, write_recipe
from veneer.optim.schedule import default_learning_rate
from veneer.quant.linear import quantize_model
from veneer.training import loop
from veneer.training.checkpoint import newest_checkpoint
from veneer.training.data import prepare_data

BF16 = {"dtype": torch.bfloat16, "hidden_size": 64}
KINDS = {"fp32": {}, "bf16": BF16}


def full(model, tokenizer, data, out, **settings):
    return run(model, tokenizer, data, out, method="full", **settings)


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_steps(model, tokenizer, commands, steps, lr):
    """The same run by hand: the losses, and AdamW on fp32 copies of all weights."""
    samples, _, _ = prepare_data(str(commands), veneer.DataConfig(train="-"), tokenizer, 0)
    order = loop.Order(len(samples.samples), 4, 0)
    weights = dict(model.named_parameters())
    masters = {name: p.detach().float().requires_grad_() for name, p in weights.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=lr, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step in range(steps):
        rows = [samples.samples[i] for i in order.step(step)]
        model.zero_grad()
        items, total = sum(row.supervised for row in rows), 0.0
        for row in rows:  # one by one, in transformers' own code
            labels = torch.tensor([row.labels])
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction="sum") / items
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        for name, master in masters.items():
            master.grad = weights[name].grad.float()
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(masters[name])
    return losses, masters


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_adamw_on_every_weight(tmp_path, tokenizer, commands, kind):
    ours, by_hand = make_model(**KINDS[kind]), make_model(fused=False, **KINDS[kind])
    before = state(ours)
    settings = {"max_steps": 5, "learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0}
    result = full(ours, tokenizer, commands, tmp_path / "run", **settings)
    losses, masters = plain_steps(by_hand, tokenizer, commands, 5, 1e-3)
    exact = kind == "fp32"
    assert [row["loss"] for row in lines(tmp_path / "run")] == pytest.approx(losses, rel=1e-5 if exact else 5e-3)
    kept = {
        key.removeprefix("parameter/"): value
        for key, value in newest_checkpoint(tmp_path / "run/checkpoints")[1].items()
        if key.startswith("parameter/")
    }
    assert kept.keys() == masters.keys() == before.keys() and "lm_head.weight" not in kept
    assert all(value.dtype == torch.float32 for value in kept.values())
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, kept[name].to(weight.dtype)), name  # rounded from the master, in each dtype
        moved, wanted = kept[name] - before[name].float(), masters[name].detach() - before[name].float()
        apart = float((moved - wanted).norm() / wanted.norm())
        assert apart < (2e-3 if exact else 0.25), (name, apart)  # Adam makes whole steps of rounding errors
    assert result["trainable_parameters"] == sum(p.numel() for p in ours.parameters())
    assert result["adapter"] is None and result["learning_rate"] == 1e-3


def test_steps_smaller_than_the_rounding_of_bf16_add_up(tmp_path, tokenizer, commands):
    model = make_model(**BF16)
    before = state(model)
    full(model, tokenizer, commands, tmp_path / "run", max_steps=2, learning_rate=1e-6)
    masters = newest_checkpoint(tmp_path / "run/checkpoints")[1]
    name = "model.layers.0.mlp.gate_proj.weight"
    large = before[name].float().abs() > 0.01  # a step of 1e-6 is far below half a unit of the last place there
    assert torch.equal(model.get_parameter(name)[large], before[name][large])
    assert bool((masters[f"parameter/{name}"] != before[name].float())[large].float().mean() > 0.9)


def test_an_fp32_model_has_no_second_copy(tokenizer):
    model = make_model()
    weights = loop.trained_weights("full", model, tokenizer)
    assert all(value is model.get_parameter(name) for name, value in weights.parameters.items())


def test_ties_stay_and_norms_do_not_decay(tmp_path, tokenizer, commands):
    for tied in (True, False):
        model = make_model(tie_word_embeddings=tied)
        result = full(model, tokenizer, commands, tmp_path / str(tied), max_steps=2)
        same = model.lm_head.weight is model.model.embed_tokens.weight
        assert same is tied and ("lm_head.weight" in load_file(f"{result['model']}/model.safetensors")) is not tied
    decay = {
        id(p): group["weight_decay"]
        for group in loop.trained_weights("full", model, tokenizer).groups(veneer.TrainConfig(weight_decay=0.1))
        for p in group["params"]
    }
    assert decay[id(model.model.norm.weight)] == 0 and decay[id(model.lm_head.weight)] == 0.1
    assert len(decay) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_a_plain_model_folder(tmp_path, tokenizer, commands, kind):
    model = make_model(**KINDS[kind])
    result = full(model, tokenizer, commands, tmp_path / "run", max_steps=3)
    ids = torch.randint(0, 250, (1, 9))
    plain = AutoModelForCausalLM.from_pretrained(result["model"], dtype="auto")
    ours, _ = veneer.load(result["model"], dtype=str(model.dtype).removeprefix("torch."))
    for other in (plain, ours):
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in other.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits.float(), model(ids).logits.float(), rtol=0.02, atol=0.02)
    assert not model.training and not (tmp_path / "run/adapter").exists()
    assert not any(path.suffix in (".bin", ".pt") for path in (tmp_path / "run").rglob("*"))


def test_the_folder_the_base_was_loaded_from_is_not_changed(tmp_path, tokenizer, commands):
    """Its weights are mapped from the file until something writes to them."""
    folder = veneer.save_model(make_model(**BF16), tokenizer, tmp_path / "model")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for dtype in ("bfloat16", "float32"):
        model, _ = veneer.load(folder, dtype=dtype)
        full(model, tokenizer, commands, tmp_path / dtype, max_steps=2)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_and_packing_do_not_change_the_step(tmp_path, tokenizer, commands, kind):
    moved = []
    for number, (settings, packing) in enumerate(
        [({"batch_size": 8}, True), ({"batch_size": 2, "grad_accumulation": 4}, True), ({"batch_size": 8}, False)]
    ):
        model = make_model(**KINDS[kind])
        data = veneer.DataConfig(train=str(commands), packing=packing)
        full(model, tokenizer, None, tmp_path / str(number), data_config=data, max_steps=1, **settings)
        tensors = newest_checkpoint(tmp_path / f"{number}/checkpoints")[1]
        # after one step that is 0.1 times the gradient
        gradient = {k: v for k, v in tensors.items() if k.startswith("optimizer/exp_avg/")}
        moved.append(torch.cat([gradient[key].flatten() for key in sorted(gradient)]))
    for other in moved[1:]:
        assert float((moved[0] - other).norm() / moved[0].norm()) < (1e-5 if kind == "fp32" else 0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["mlp", "full"])
def test_recompute_gives_the_same_weights(tmp_path, tokenizer, commands, kind, how):
    weights = []
    for recompute in ("none", how):
        model = make_model(**KINDS[kind])
        full(model, tokenizer, commands, tmp_path / recompute, max_steps=3, recompute=recompute)
        weights.append(state(model))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=5e-5)  # Adam enlarges rounding near zero


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_the_run_that_was_not_interrupted(tmp_path, tokenizer, commands, monkeypatch, kind):
    whole = make_model(**KINDS[kind])
    full(whole, tokenizer, commands, tmp_path / "whole", max_steps=12, epochs=2)
    original = loop._Run._step
    monkeypatch.setattr(loop._Run, "_step", lambda self, stop: original(self, stop) if self.done < 8 else sys.exit())
    with pytest.raises(SystemExit):
        full(make_model(**KINDS[kind]), tokenizer, commands, tmp_path / "cut", max_steps=12, epochs=2)
    monkeypatch.setattr(loop._Run, "_step", original)
    again = make_model(**KINDS[kind])
    result = full(again, tokenizer, commands, tmp_path / "cut", max_steps=12, epochs=2, resume=True)
    assert [row["step"] for row in lines(tmp_path / "cut")] == list(range(1, 13)) and result["steps"] == 12
    kept = [newest_checkpoint(tmp_path / name / "checkpoints")[1] for name in ("whole", "cut")]
    assert all(torch.equal(value, kept[1][key]) for key, value in kept[0].items())
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in whole.named_parameters())


def test_early_stopping_gives_the_best_weights(tmp_path, tokenizer, commands, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(loop, "evaluation_loss", lambda *a: {"loss": next(losses), "tokens": 1})
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    model = make_model(**BF16)
    result = full(model, tokenizer, None, tmp_path / "run", data_config=data, epochs=9, eval_every=2, early_stopping=2,
                  guard=False)  # fmt: skip
    assert result["stopped_early"] and result["steps"] == 8 and result["eval_loss"] == 2.0
    best = newest_checkpoint(tmp_path / "run/checkpoints/best")
    written = load_file(f"{result['model']}/model.safetensors")
    assert best[0]["step"] == 4
    for name, weight in model.named_parameters():
        assert torch.equal(weight, best[1][f"parameter/{name}"].bfloat16()) and torch.equal(weight, written[name])


def test_resume_refuses_the_other_method(tmp_path, tokenizer, commands):
    full(make_model(), tokenizer, commands, tmp_path / "run", max_steps=1)
    model = make_model()
    veneer.attach(model, veneer.LoraConfig(r=2))
    with pytest.raises(veneer.RefusedError, match=r"lora\.r"):
        run(model, tokenizer, commands, tmp_path / "run", max_steps=2, resume=True)
    run(model, tokenizer, commands, tmp_path / "other", max_steps=1)
    with pytest.raises(veneer.RefusedError, match="method: the checkpoint has None, this run 'full'"):
        full(make_model(), tokenizer, commands, tmp_path / "other", max_steps=2, resume=True)


def test_what_cannot_be_trained_in_full_is_refused_at_once(tmp_path, tokenizer, commands):
    model = make_model(dtype=torch.float16)
    quantize_model(model)
    veneer.attach(model, veneer.LoraConfig(r=2))
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(veneer.VeneerError) as caught:
        full(model, tokenizer, commands, tmp_path / "run")
    assert len(caught.value.problems) == 3
    for words in ("carries adapters (default)", "14 layers are quantised", "float16"):
        assert words in str(caught.value)
    assert frozen == {name: p.requires_grad for name, p in model.named_parameters()} and not (tmp_path / "run").exists()
    with pytest.raises(veneer.VeneerError, match="method: found 'half', expected lora or full"):
        run(make_model(), tokenizer, commands, tmp_path / "run", method="half")


def test_recipes_of_full_fine_tuning(tmp_path):
    data = {"data": {"train": "x.jsonl"}, "method": "full"}
    bad = {
        **data,
        "quantize": "nf4",
        "dtype": "float16",
        "lora": {"r": 4},
        "train": {"early_stopping": 1, "lora_plus": 16},
    }
    with pytest.raises(veneer.VeneerError) as caught:
        parse_recipe(bad)
    named = [problem.removeprefix("recipe: ").split(":")[0].split(" ")[0] for problem in caught.value.problems]
    assert named == ["train.early_stopping", "quantize", "dtype", "lora", "train.lora_plus"]
    path = tmp_path / "r.yaml"
    path.write_text(write_recipe(parse_recipe(data)))
    assert read_recipe(path) == parse_recipe(data) and "lora:" not in path.read_text()


def test_a_weight_without_a_gradient_stops_the_run(tmp_path, tokenizer, commands):
    model = make_model()
    model.model.layers[1].mlp.forward = torch.zeros_like
    with pytest.raises(veneer.VeneerError, match=r"4 of 20 weights .*layers\.1\.mlp\.gate_proj\.weight"):
        full(model, tokenizer, commands, tmp_path / "run", max_steps=1)


def test_nan_is_never_written(tmp_path, tokenizer, commands):
    model = make_model()
    weights = loop.trained_weights("full", model, tokenizer)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(veneer.VeneerError, match=r"model\.norm\.weight: found NaN"):
        weights.save(tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_disk_too_small_is_refused_before_anything_starts(tmp_path, tokenizer, commands, monkeypatch):
    model = make_model(**BF16)
    size = sum(p.numel() for p in model.parameters())
    # two checkpoints, one more while it is written, which may be in the middle of a step, and the model
    needed = 3 * (12 * size + (1 << 20)) + 4 * size + 2 * size
    for free in (needed - 1, needed):
        monkeypatch.setattr("shutil.disk_usage", lambda path, n=free: type("U", (), {"free": n})())
        if free < needed:
            with pytest.raises(veneer.VeneerError, match="disk too small"):
                full(model, tokenizer, commands, tmp_path / "run", max_steps=1)
            assert not (tmp_path / "run").exists()
        else:
            full(model, tokenizer, commands, tmp_path / "run", max_steps=1)


def test_afterwards_the_gradients_are_the_weights_own_again(tmp_path, tokenizer, commands):
    model = make_model(**BF16)
    full(model, tokenizer, commands, tmp_path / "run", max_steps=1)
    ids = torch.randint(0, 250, (1, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_learning_rate_that_is_left_out(tmp_path, tokenizer, commands):
    result = full(make_model(), tokenizer, commands, tmp_path / "run", max_steps=1, learning_rate="auto")
    assert result["learning_rate"] == pytest.approx(default_learning_rate(48) / 10)


def test_from_the_command_line(tmp_path, tokenizer, commands):
    folder = veneer.save_model(make_model(**BF16), tokenizer, tmp_path / "model")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {folder}\nmethod: full\ndata: {{train: {commands}}}\n"
        f"train: {{max_steps: 3, batch_size: 4, out: {tmp_path}/run}}\n"
    )

    def call(*arguments, stdin=""):
        return subprocess.run(
            [sys.executable, "-m", "veneer.cli", *map(str, arguments)], capture_output=True, text=True, input=stdin,
            env={**os.environ, "PYTHONPATH": "."},
        )  # fmt: skip

    done = call("train", recipe)
    assert done.returncode == 0 and f"veneer chat {tmp_path}/run/model" in done.stdout, done.stderr
    resumed = call("train", tmp_path / "run/recipe.yaml", "--resume", "--set", "train.max_steps=4", "--json")
    result = json.loads(resumed.stdout)
    assert result["steps"] == 4 and result["adapter"] is None, resumed.stderr
    scored = call("eval", result["model"], "--data", commands, "--limit", 4, "--max-new-tokens", 4, "--json")
    assert json.loads(scored.stdout)["rows"] == 4, scored.stderr
    talk = call("chat", result["model"], "--max-new-tokens", 3, stdin="hello\n")
    assert talk.returncode == 0, talk.stderr
    refused = call("train", recipe, "--set", "quantize=nf4", "--set", f"train.out={tmp_path}/other")
    assert refused.returncode == 2 and "method full trains the base" in refused.stderr


def test_16_bit_weights_beside_an_adapter_have_masters_too(tmp_path, tokenizer, commands):
    """Steps of 1e-4 on a bf16 norm of 1 are below its rounding: they add up only in fp32."""
    model = make_model(dtype=torch.bfloat16)
    veneer.attach(model, veneer.LoraConfig(r=2, targets="attention", modules_to_save=["model.norm"]), seed=0)
    config = veneer.TrainConfig(max_steps=25, warmup_steps=0, learning_rate=2e-4, schedule="constant", batch_size=4)
    veneer.train(model, tokenizer, str(commands), config, out=tmp_path / "run", progress=False)
    norm = adapter_parameters(model, "default")["model.norm.weight"]
    assert norm is model.model.norm.weight and norm.dtype == torch.bfloat16
    assert float((norm.float() - 1).abs().max()) > 0.003
    again = veneer.load_adapter(make_model(dtype=torch.bfloat16), tmp_path / "run" / "adapter")
    assert torch.equal(again.model.norm.weight, norm)
