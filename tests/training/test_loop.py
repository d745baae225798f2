import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import make_model

import veneer
from veneer.adapters.attach import adapter_parameters
from veneer.training import loop
from veneer.training.checkpoint import newest_checkpoint


def fresh(**config):
    model = make_model()
    veneer.attach(model, veneer.LoraConfig(**{"r": 4, **config}), seed=1)
    return model


def run(model, tokenizer, data, out, resume=False, data_config=None, **settings):
    config = veneer.TrainConfig(**{"batch_size": 4, "learning_rate": 0.01, "save_every": 3, **settings})
    return veneer.train(model, tokenizer, data, config, out=out, resume=resume, data_config=data_config, progress=False)


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


def test_gradient_checkpointing_gives_the_same_weights(tmp_path, tokenizer, commands):
    weights = []
    for flag in (False, True):
        model = fresh()
        run(model, tokenizer, commands, tmp_path / str(flag), max_steps=3, gradient_checkpointing=flag)
        weights.append(adapter_parameters(model, "default"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name])


def test_resume_is_the_run_that_was_not_interrupted(tmp_path, tokenizer, commands, monkeypatch):
    whole = fresh(dropout=0.1)
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
        run(fresh(dropout=0.1), tokenizer, commands, tmp_path / "cut", epochs=2)
    monkeypatch.setattr(loop._Run, "_step", original_step)
    seen.clear()
    again = fresh(dropout=0.1)
    result = run(again, tokenizer, commands, tmp_path / "cut", epochs=2, resume=True)
    assert seen[0] == (6, original(loop.Order(37, 4, 0), 6)) and result["steps"] == 20
    assert [row["step"] for row in lines(tmp_path / "cut")] == list(range(1, 21))
    for name, value in adapter_parameters(whole, "default").items():
        assert torch.equal(value, adapter_parameters(again, "default")[name])


def test_a_damaged_checkpoint_is_passed_over(tmp_path, tokenizer, commands):
    run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=7)
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-00000006", "step-00000007"]
    (folder / "step-00000007/state.safetensors").write_bytes(b"junk")
    state, _, problems = newest_checkpoint(folder)
    assert state["step"] == 6 and "step-00000007" in problems[0]


def test_resume_refuses_other_data_or_ranks(tmp_path, tokenizer, commands):
    run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=2)
    with pytest.raises(veneer.VeneerError, match="expected"):
        run(fresh(r=2), tokenizer, commands, tmp_path / "run", max_steps=4, resume=True)
    with pytest.raises(veneer.VeneerError, match="seed"):
        run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=4, resume=True, seed=5)


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
    with pytest.raises(veneer.RefusedError, match="disk too small"):
        run(fresh(), tokenizer, commands, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_and_exits_130_then_resume_goes_on(tmp_path, tokenizer, commands):
    folder = veneer.save_model(make_model(), tokenizer, tmp_path / "model")
    recipe = tmp_path / "r.yaml"
    out = tmp_path / "run"
    recipe.write_text(
        f"model: {folder}\nlora: {{r: 4}}\ndata: {{train: {commands}}}\ntrain: {{epochs: 400, batch_size: 1, out: {out}}}\n"
    )
    command = [sys.executable, "-m", "veneer.cli", "train", str(recipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
    for line in process.stderr:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    text = process.stderr.read()
    assert process.wait(60) == 130 and "--resume" in text and "Traceback" not in text
    stopped = newest_checkpoint(out / "checkpoints")[0]["step"]
    done = subprocess.run(
        [*command, "--resume", "--json", "--set", f"train.max_steps={stopped + 2}"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )  # fmt: skip
    assert json.loads(done.stdout)["steps"] == stopped + 2, done.stderr
    assert [row["step"] for row in lines(out)][stopped - 1 :] == [stopped, stopped + 1, stopped + 2]
