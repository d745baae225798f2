import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file

import veneer
from veneer.adapters.attach import adapter_parameters, adapters
from veneer.quant.linear import quantize_model
from veneer.storage import write_tensors
from veneer.training import loop
from veneer.training.checkpoint import newest_checkpoint, restore, save_checkpoint
from veneer.training.weights import Masters


def fresh(quantize=False, model=None, **config):
    model = make_model(**(model or {}))
    if quantize:
        quantize_model(model)
    veneer.attach(model, veneer.LoraConfig(**{"r": 4, **config}), seed=1)
    return model


def run(model, tokenizer, data, out, resume=False, data_config=None, method="lora", **settings):
    config = veneer.TrainConfig(**{"batch_size": 4, "learning_rate": 0.01, "save_every": 3, **settings})
    return veneer.train(
        model, tokenizer, data, config, method=method, out=out, resume=resume, data_config=data_config, progress=False
    )


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_writes_what_it_says(tmp_path, tokenizer, commands):
    result = run(fresh(), tokenizer, commands, tmp_path / "run", epochs=6)
    log = lines(tmp_path / "run")
    assert [row["step"] for row in log] == list(range(1, 61)) and result["steps"] == 60
    # the frozen base is random, so there is a floor far above zero
    assert log[-1]["loss"] < 0.9 * log[0]["loss"] and all(row["applied"] for row in log)
    other = make_model()
    veneer.load_adapter(other, result["adapter"])
    assert result["seconds"] > 0 and result["peak_bytes"] > 0 and result["tokens_per_second"] > 0


def test_accumulation_and_packing_do_not_change_the_step(tmp_path, tokenizer, commands):
    weights = []
    for number, (settings, packing) in enumerate([({"batch_size": 8}, True), ({"batch_size": 2, "grad_accumulation": 4}, True),
                                                   ({"batch_size": 8}, False)]):  # fmt: skip
        model = fresh()
        data = veneer.DataConfig(train=str(commands), packing=packing)
        run(
            model,
            tokenizer,
            None,
            tmp_path / str(number),
            data_config=data,
            max_steps=4,
            learning_rate=1e-3,
            **settings,
        )
        weights.append(torch.cat([p.detach().flatten() for p in adapter_parameters(model, "default").values()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(weights[0], weights[2], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recompute_gives_the_same_weights(tmp_path, tokenizer, commands, dtype, dropout):
    weights = []
    for how in ("none", "mlp", "full"):
        model = make_model(dtype=dtype, hidden_size=64)
        veneer.attach(model, veneer.LoraConfig(r=4, dropout=dropout), seed=0)
        run(model, tokenizer, commands, tmp_path / how, max_steps=3, recompute=how)
        weights.append(adapter_parameters(model, "default"))
    for name, value in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=2e-5)


def test_gradient_checkpointing_is_another_name_for_recompute():
    assert veneer.TrainConfig(gradient_checkpointing=True).recompute == "full"
    assert veneer.TrainConfig(gradient_checkpointing=False).recompute == "none"


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ({}, {}),
        ({"dtype": torch.bfloat16, "hidden_size": 64}, {}),
        ({}, {"adalora": True}),
        ({"dtype": torch.bfloat16, "hidden_size": 64}, {"adalora": {"settle": 0.75}}),
    ],
    ids=["as it was", "fused layers", "adalora", "adalora, settled before the checkpoint"],
)
def test_resume_is_the_run_that_was_not_interrupted(tmp_path, tokenizer, commands, monkeypatch, model, method):
    whole = fresh(dropout=0.1, model=model, **method)
    run(whole, tokenizer, commands, tmp_path / "whole", epochs=2)
    seen = []
    original = loop.Order.step
    monkeypatch.setattr(loop.Order, "step", lambda self, k: seen.append((k, original(self, k))) or original(self, k))
    original_step = loop._Run._step

    def dies(self):
        if self.done == 8:
            raise SystemExit  # killed between two checkpoints
        return original_step(self)

    monkeypatch.setattr(loop._Run, "_step", dies)
    with pytest.raises(SystemExit):
        run(fresh(dropout=0.1, model=model, **method), tokenizer, commands, tmp_path / "cut", epochs=2)
    monkeypatch.setattr(loop._Run, "_step", original_step)
    seen.clear()
    again = fresh(dropout=0.1, model=model, **method)
    result = run(again, tokenizer, commands, tmp_path / "cut", epochs=2, resume=True)
    assert seen[0] == (6, original(loop.Order(37, 4, 0), 6)) and result["steps"] == 20
    assert [row["step"] for row in lines(tmp_path / "cut")] == list(range(1, 21))
    for name, value in adapter_parameters(whole, "default").items():
        assert torch.equal(value, adapter_parameters(again, "default")[name])
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_adalora_needs_no_calls_and_ends_with_the_ranks_asked_for(tmp_path, tokenizer, commands):
    model = fresh(adalora={"start": 2})
    result = run(model, tokenizer, commands, tmp_path / "run", epochs=2)
    alive = adapters(model)["default"].allocator.alive
    assert sum(int(mask.sum()) for mask in alive.values()) == 4 * 14
    assert all(len(mask) == max(1, int(mask.sum())) for mask in alive.values())  # the others were taken out
    other = veneer.load_adapter(make_model(), result["adapter"])
    ids = torch.arange(1, 30)[None]
    torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_adalora_with_another_number_of_steps_is_refused(tmp_path, tokenizer, commands):
    with pytest.raises(
        veneer.VeneerError, match=r"adalora.steps: found 100, but this run has 6 steps(.|\n)*leave it out"
    ):
        run(fresh(adalora={"steps": 100}), tokenizer, commands, tmp_path / "run", max_steps=6)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, tokenizer, commands):
    run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=7)
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000006", "step-00000007"]
    (folder / "step-00000007/state.safetensors").write_bytes(b"junk")
    state, _, problems = newest_checkpoint(folder)
    assert state["step"] == 6 and "step-00000007" in problems[0]


def test_resume_refuses_other_data_or_ranks(tmp_path, tokenizer, commands):
    run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=2)
    model = fresh(r=2, alpha=8, rslora=True, dropout=0.1, targets="attention")
    model.name_or_path = "another"
    changed = {"seed": 5, "learning_rate": 0.02, "schedule": "linear", "weight_decay": 0.1, "batch_size": 2}
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(veneer.VeneerError) as caught:
        veneer.train(
            model, tokenizer, commands, veneer.TrainConfig(**changed), out=tmp_path / "run", resume=True, recipe="x",
            progress=False,
        )  # fmt: skip
    named = {problem.split(":")[0] for problem in caught.value.problems}
    lora = {"lora.r", "lora.alpha", "lora.rslora", "lora.dropout", "lora.targets"}
    assert named == {f"train.{key}" for key in changed if key != "batch_size"} | lora | {"model", "rows a step"}
    other = tmp_path / "other.jsonl"
    other.write_text(commands.read_text().replace("lamp 3", "lamp X"))
    with pytest.raises(veneer.VeneerError, match="training data"):
        run(fresh(), tokenizer, other, tmp_path / "run", resume=True)
    with pytest.raises(veneer.VeneerError, match="quantize: the checkpoint has None, this run 'nf4'"):
        run(fresh(quantize=True), tokenizer, commands, tmp_path / "run", resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=4, resume=True, batch_size=2,
                 grad_accumulation=2, save_every=1)  # fmt: skip
    assert result["steps"] == 4 and any("4 steps instead of 2" in note for note in result["notes"])


def test_resume_of_a_folder_that_is_no_run_touches_nothing(tmp_path, tokenizer, commands):
    mine = tmp_path / "mine/adapter/adapter_model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("hours of work")
    with pytest.raises(veneer.VeneerError, match="not empty"):
        run(fresh(), tokenizer, commands, tmp_path / "mine", max_steps=1, resume=True)
    assert mine.read_text() == "hours of work"


def test_resume_before_the_first_checkpoint_starts_the_log_again(tmp_path, tokenizer, commands, monkeypatch):
    original_step = loop._Run._step
    monkeypatch.setattr(loop._Run, "_step", lambda self: original_step(self) if self.done < 2 else sys.exit())
    with pytest.raises(SystemExit):
        run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=4)
    monkeypatch.setattr(loop._Run, "_step", original_step)
    run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=4, resume=True)
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_seed_decides_dropout(tmp_path, tokenizer, commands):
    weights = []
    for number in range(2):
        model = fresh(dropout=0.5)
        torch.manual_seed(100 + number)
        run(model, tokenizer, commands, tmp_path / str(number), max_steps=2)
        weights.append(adapter_parameters(model, "default"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_random_state_is_resumed(tmp_path):
    parameters = {"a": torch.nn.Parameter(torch.zeros(2, device="cuda"))}
    optimizer = torch.optim.AdamW(parameters.values())
    save_checkpoint(tmp_path, 1, Masters(parameters), optimizer, {}, 1)
    expected = torch.rand(3, device="cuda")
    restore(newest_checkpoint(tmp_path)[1], Masters(parameters), optimizer)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_a_later_checkpoint_of_a_run_gone_back_is_removed(tmp_path):
    parameters = {"a": torch.nn.Parameter(torch.zeros(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    for step in (2, 4, 9, 6):
        save_checkpoint(tmp_path, step, Masters(parameters), optimizer, {}, 2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000006"]


def test_a_factor_without_a_gradient_stops_the_run(tmp_path, tokenizer, commands):
    model = fresh()
    model.model.layers[1].mlp.forward = torch.zeros_like
    with pytest.raises(veneer.VeneerError, match=r"6 of 28 adapter weights .*layers\.1\.mlp\.gate_proj\.lora_A"):
        run(model, tokenizer, commands, tmp_path / "run", max_steps=1)


def test_nan_is_not_applied_and_three_in_a_row_stop(tmp_path, tokenizer, commands, monkeypatch):
    original, calls = loop.batch_loss, []

    def sometimes(bad):
        def loss(model, batch, items):
            calls.append(1)
            value = original(model, batch, items)
            return value * float("nan") if bad(len(calls)) else value

        return loss

    monkeypatch.setattr(loop, "batch_loss", sometimes(lambda n: n == 2))
    result = run(fresh(), tokenizer, commands, tmp_path / "one", max_steps=4)
    log = lines(tmp_path / "one")
    assert [row["applied"] for row in log] == [True, False, True, True] and log[1]["loss"] == "nan"
    assert result["skipped_steps"] == 1 and result["train_loss"] == result["train_loss"]
    calls.clear()
    monkeypatch.setattr(loop, "batch_loss", sometimes(lambda n: n >= 2))
    with pytest.raises(veneer.VeneerError, match="3 steps in a row"):
        run(fresh(), tokenizer, commands, tmp_path / "three", max_steps=9)
    assert len(lines(tmp_path / "three")) == 4


def test_steps_that_get_a_line_in_the_log(tmp_path, tokenizer, commands):
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    run(fresh(), tokenizer, None, tmp_path / "run", data_config=data, max_steps=7, log_every=3, eval_every=4)
    assert [row["step"] for row in lines(tmp_path / "run")] == [3, 4, 6, 7]


def test_early_stopping_keeps_the_best(tmp_path, tokenizer, commands, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(loop, "evaluation_loss", lambda *a: {"loss": next(losses), "tokens": 1})
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    model = fresh()
    result = run(model, tokenizer, None, tmp_path / "run", data_config=data, epochs=9, eval_every=2, early_stopping=2)
    assert result["stopped_early"] and result["steps"] == 8 and result["eval_loss"] == 2.0
    best = newest_checkpoint(tmp_path / "run/checkpoints/best")
    assert best[0]["step"] == 4
    for name, value in adapter_parameters(model, "default").items():
        assert torch.equal(value, best[1][f"parameter/{name}"])
    log = (tmp_path / "run/metrics.jsonl").read_text()
    again = fresh()
    resumed = run(again, tokenizer, None, tmp_path / "run", data_config=data, epochs=9, eval_every=2, early_stopping=2,
                  resume=True)  # fmt: skip
    assert resumed["stopped_early"] and resumed["steps"] == 8 and resumed["eval_loss"] == 2.0
    assert (tmp_path / "run/metrics.jsonl").read_text() == log
    for name, value in adapter_parameters(again, "default").items():
        assert torch.equal(value, best[1][f"parameter/{name}"])


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(tmp_path, tokenizer, commands, monkeypatch):
    losses = iter([float("nan"), 3.0, float("-inf"), float("nan")])
    monkeypatch.setattr(loop, "evaluation_loss", lambda *a: {"loss": next(losses), "tokens": 1})
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    result = run(fresh(), tokenizer, None, tmp_path / "run", data_config=data, epochs=9, eval_every=1, early_stopping=2)
    assert (result["steps"], result["eval_loss"]) == (4, 3.0)
    assert [row["eval_loss"] for row in lines(tmp_path / "run")] == ["nan", 3.0, "-inf", "nan"]


def test_resume_of_a_finished_run_gives_its_held_out_loss(tmp_path, tokenizer, commands):
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    first, again = (
        run(fresh(), tokenizer, None, tmp_path / "run", data_config=data, max_steps=2, resume=resume)
        for resume in (False, True)
    )
    assert again["eval_loss"] == first["eval_loss"] > 0 and again["steps"] == 2


def test_bad_starts(tmp_path, tokenizer, commands):
    with pytest.raises(veneer.VeneerError, match="no active adapter"):
        run(make_model(), tokenizer, commands, tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    with pytest.raises(veneer.VeneerError, match="not empty"):
        run(fresh(), tokenizer, commands, tmp_path / "full")
    with pytest.raises(veneer.VeneerError, match="no output folder"):
        veneer.train(fresh(), tokenizer, commands)


def test_a_disk_too_small_is_refused_before_anything_starts(tmp_path, tokenizer, commands, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 1000})())
    with pytest.raises(veneer.VeneerError, match="disk too small") as caught:
        run(fresh(), tokenizer, commands, tmp_path / "run")
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_or_killed_run_goes_on_with_resume(tmp_path, tokenizer, commands, number):
    folder = veneer.save_model(make_model(), tokenizer, tmp_path / "model")
    recipe = tmp_path / "r.yaml"
    out = tmp_path / "run"
    recipe.write_text(
        f"model: {folder}\nlora: {{r: 4}}\ndata: {{train: {commands}}}\ntrain: {{epochs: 400, batch_size: 1, save_every: 5, out: {out}}}\n"
    )
    command = [sys.executable, "-m", "veneer.cli", "train", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
    while not list((out / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    text = process.stderr.read()
    if number == signal.SIGINT:  # saves, and says what to do
        assert process.wait(60) == 130 and "--resume" in text and "Traceback" not in text
    else:
        assert process.wait(60) == -signal.SIGKILL
    stopped = newest_checkpoint(out / "checkpoints")[0]["step"]
    done = subprocess.run(
        [*command, "--resume", "--json", "--set", f"train.max_steps={stopped + 2}"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )  # fmt: skip
    assert json.loads(done.stdout)["steps"] == stopped + 2, done.stderr
    assert f"resumed after step {stopped}" in done.stderr
    assert [row["step"] for row in lines(out)] == list(range(1, stopped + 3))


def test_lora_plus_moves_b_faster_and_a_as_before(tmp_path, tokenizer, commands):
    found = []
    for ratio in (None, 16.0):
        model = fresh()
        settings = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-4, "lora_plus": ratio}
        run(model, tokenizer, commands, tmp_path / str(ratio), **settings)
        found.append(adapter_parameters(model, "default"))
    for name, parameter in found[0].items():
        times = 16 if "lora_B" in name else 1
        torch.testing.assert_close(found[1][name], times * parameter, rtol=1e-4, atol=1e-8)
        assert bool(parameter.any())


def test_a_checkpoint_of_another_making_is_refused_whole(tmp_path, tokenizer, commands):
    folder = veneer.save_model(make_model(), tokenizer, tmp_path / "model")
    data = veneer.DataConfig(train=str(commands))

    def go(steps, **more):
        model, tok = veneer.load(folder)
        veneer.attach(model, veneer.LoraConfig(r=4), seed=0)
        return run(model, tok, None, tmp_path / "run", data_config=data, max_steps=steps, **more)

    go(2)
    path = newest_checkpoint(tmp_path / "run" / "checkpoints")[1]
    place = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    factor = next(key for key in path if key.startswith("parameter/") and "lora_A" in key)
    moment = next(key for key in path if key.startswith("optimizer/exp_avg/") and "lora_B" in key)
    changed = {**path, factor: torch.full_like(path[factor], float("nan")), moment: path[moment][:1]}
    del changed["rng"]
    state = json.loads((place / "state.json").read_text())
    state["sha256"] = write_tensors(place / "state.safetensors", changed)
    (place / "state.json").write_text(json.dumps(state))
    with pytest.raises(veneer.VeneerError) as raised:
        go(4, resume=True)
    found = "\n".join(raised.value.problems)
    assert "expected numbers that are finite" in found and "exp_avg of" in found and "random numbers (rng)" in found
    (place / "state.json").write_text(json.dumps({"sha256": state["sha256"]}))
    with pytest.raises(veneer.VeneerError, match="found no step and settings"):
        go(4, resume=True)
