"""Every fault the guards look for, provoked; and healthy runs, about which they say nothing."""

import json
import math
import os
import random
import signal
import threading
import time
from pydoc_data.topics import topics

import pytest
import torch
from conftest import make_model
from training.test_loop import data_step, wrong_loss

import veneer
from veneer.adapters.attach import adapter_parameters
from veneer.training import loop, signals
from veneer.training.guard import ENOUGH, TRIES, Guard, overfitting, update_share


def base():
    """Weights as large as those of trained models of this width."""
    return make_model(initializer_range=0.14)


def fresh(**config):
    model = base()
    veneer.attach(model, veneer.LoraConfig(**{"r": 4, **config}), seed=1)
    return model


def run(model, tokenizer, data, out, resume=False, data_config=None, method="lora", **settings):
    config = veneer.TrainConfig(**{"batch_size": 4, "learning_rate": 0.005, "save_every": 1000, **settings})
    return veneer.train(
        model, tokenizer, data, config, method=method, out=out, data_config=data_config, resume=resume, progress=False
    )


def log(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def codes(result):
    return [finding["code"] for finding in result["findings"]]


# ---- what is a jump -------------------------------------------------------------------------------------------------


def seen(losses):
    guard = Guard(100)
    for step, loss in enumerate(losses):
        guard.passed(step, loss)
    return guard


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("level", [0.3, 2.0])
def test_a_loss_of_twenty_times_is_a_jump_and_noise_is_not(spread, level):
    g = random.Random(0)
    losses = [level * math.exp(g.gauss(0, spread)) for _ in range(400)]
    guard = Guard(100)
    for step, loss in enumerate(losses):
        assert guard.judge(loss, 1.0) is None, step
        guard.passed(step, loss)
        if step >= (ENOUGH if spread < 0.2 else 50):
            assert guard.judge(20 * level, 1.0) == "spike"


def test_wild_but_healthy_losses_are_no_jump():
    g = random.Random(1)
    for spread, trend in ((0.8, 0.0), (0.5, 0.01), (1.0, 0.005)):
        guard = Guard(100)
        for step in range(1000):
            loss = 3 * math.exp(g.gauss(0, spread) - trend * step)
            assert guard.judge(loss, 1.0) is None
            guard.passed(step, loss)
    tiny = seen([1e-4] * 60)
    assert tiny.judge(0.3, 1.0) is None and tiny.judge(2.0, 1.0) == "spike"  # half a nat is where it starts to matter


def test_a_loss_as_high_as_guessing_is_a_jump_where_the_model_knew_better():
    guessing = math.log(49152)  # SmolLM2 says 2.9 on usual text: guessing is not four times as much
    g = random.Random(0)
    guard, blind = Guard(100, guessing=guessing), Guard(100)
    for step in range(40):
        loss = 2.9 * math.exp(g.gauss(0, 0.05))
        for one in (guard, blind):
            one.passed(step, loss)
    assert guard.judge(10.8, 1.0) == "spike" and blind.judge(10.8, 1.0) is None
    assert guard.judge(6.0, 1.0) is None  # a hard batch
    guard.passed(40, 6.0)
    assert guard.judge(10.2, 1.0) == "spike"  # it went up by and by
    wild = Guard(100, guessing=guessing)  # single answers of a word or two
    for step in range(500):
        loss = min(12.0, 1.0 * math.exp(g.gauss(0, 0.9)))
        assert wild.judge(loss, 1.0) is None
        wild.passed(step, loss)
    new = seen([guessing] * 20)
    new.guessing = guessing
    assert new.judge(1.05 * guessing, 1.0) is None  # it never knew better


def test_single_hard_rows_do_not_use_up_the_learning_rate():
    guard = seen([0.02] * 30)
    for step in range(100, 1000, 60):
        assert guard.judge(0.75, 1.0) == "spike"
        guard.back("spike", step, step // 10 * 10, 0.75, 1.0)
        guard.passed(step, 0.02)
    assert guard.scale == 1
    guard.back("spike", 1000, 1000, 9.0, 1.0)
    guard.back("spike", 1005, 1000, 9.0, 1.0)
    assert guard.scale == 0.5
    for step in range(1005, 1106):
        guard.passed(step, 0.02)
    assert guard.scale == 1  # a hundred steps without one


def test_without_the_guard_the_learning_rate_stays():
    guard = Guard(100, on=False)
    for step in (3, 4, 5):
        guard.back("not-finite", step, step, math.nan, 1.0)
    assert guard.scale == 1


def test_a_longer_run_leaves_no_batch_for_another_that_it_will_come_to():
    short = seen([1.0] * 20)
    short.back("spike", 12, 10, 20.0, 1.0)
    longer = Guard(300)
    longer.load(short.state())
    longer.back("spike", 40, 40, 20.0, 1.0)
    assert longer.data_step(40) == 300 and longer.data_step(12) == 100


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 1.0)])
def test_what_is_not_finite_never_passes(loss, norm):
    assert Guard(100, on=False).judge(loss, norm) == "not-finite"
    assert Guard(100, on=False).judge(1e9, 1.0) is None


def test_a_batch_that_is_left_out_has_another_in_its_place_and_the_rate_is_halved_the_second_time():
    guard = seen([1.0] * 30)
    first = guard.back("spike", 12, 10, 20.0, 1.0)
    assert "went back to step 10" in first["what"] and "learning rate" not in first["what"] and guard.scale == 1
    assert [guard.data_step(step) for step in (11, 12, 13)] == [11, 100, 13]
    second = guard.back("spike", 12, 10, 20.0, 1.0)
    assert guard.scale == 0.5 and "0.5 of the learning rate" in second["what"]
    assert [guard.data_step(step) for step in (11, 12, 13)] == [11, 101, 13]
    again = Guard(100)
    again.load(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()
    for _ in range(TRIES - 2):
        guard.back("spike", 12, 10, 20.0, 1.0)
    with pytest.raises(veneer.VeneerError, match=rf"step 13: .* in {TRIES} tries(.|\n)*halved 4 times"):
        guard.back("spike", 12, 10, 20.0, 1.0)
    for step in range(10, 13):
        again.passed(step, 1.0)
    assert again.tries == 0


# ---- in a run -------------------------------------------------------------------------------------------------------


def test_a_jump_is_gone_back_from_and_the_run_ends_as_without_it(tmp_path, tokenizer, commands, monkeypatch):
    plain = run(fresh(), tokenizer, commands, tmp_path / "plain", epochs=6)
    wrong_loss(monkeypatch, lambda run: data_step(run) == 34, 20.0)
    found = run(fresh(), tokenizer, commands, tmp_path / "jump", epochs=6)
    assert codes(found) == ["spike"] and found["skipped_steps"] == 1 and found["steps"] == plain["steps"] == 60
    assert "went back to step 30" in found["findings"][0]["what"] and found["findings"][0]["step"] == 35
    assert found["train_loss"] == pytest.approx(plain["train_loss"], rel=0.02)
    rows = log(tmp_path / "jump")
    assert [row["step"] for row in rows if "event" not in row] == list(range(1, 61))
    event = next(row for row in rows if "event" in row)
    assert (event["code"], event["step"], event["found_at"], event["back_to"]) == ("spike", 30, 35, 30)
    assert rows[:30] == log(tmp_path / "plain")[:30]


def test_the_run_after_a_jump_is_the_run_that_had_another_batch_there(tmp_path, tokenizer, commands, monkeypatch):
    weights = []
    for jumps in (True, False):
        model = fresh(dropout=0.1)
        with monkeypatch.context() as patched:
            if jumps:
                wrong_loss(patched, lambda run: data_step(run) == 34, 20.0)
            else:
                patched.setattr(Guard, "data_step", lambda self, step: 60 if step == 34 else step)
            run(model, tokenizer, commands, tmp_path / str(jumps), epochs=6)
        weights.append(adapter_parameters(model, "default"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_fault_that_stays_is_met_with_half_the_learning_rate(tmp_path, tokenizer, commands, monkeypatch):
    """As after an update that was too far: the batch is innocent, and the next one's loss is as bad."""
    wrong_loss(monkeypatch, lambda run: run.done >= 25 and run.guard.scale == 1, 20.0)
    found = run(fresh(), tokenizer, commands, tmp_path / "run", epochs=6)
    assert codes(found) == ["spike", "spike"] and found["steps"] == 60
    assert all("went back to step 20" in finding["what"] for finding in found["findings"])
    assert found["findings"][1]["what"].endswith("at 0.5 of the learning rate")
    rates = {row["step"]: row["learning_rate"] for row in log(tmp_path / "run") if "event" not in row}
    assert rates[21] < 0.52 * rates[20]


def test_full_fine_tuning_goes_back_to_a_checkpoint(tmp_path, tokenizer, commands, monkeypatch):
    wrong_loss(monkeypatch, lambda run: data_step(run) == 26, 20.0)
    found = run(base(), tokenizer, commands, tmp_path / "run", epochs=3, method="full", save_every=6,
                learning_rate=1e-3)  # fmt: skip
    assert codes(found) == ["spike"] and "went back to step 24" in found["findings"][0]["what"]
    assert [row["step"] for row in log(tmp_path / "run") if "event" not in row] == list(range(1, 31))


@pytest.mark.parametrize("points", [[(23, 1)], [(24, 0)], [(25, 0)], [(25, 1)], [(24, 0), (25, 0)], [(1, 0)]])
def test_full_fine_tuning_goes_back_to_the_same_one_after_an_interruption(
    tmp_path, tokenizer, commands, monkeypatch, points
):
    """Told to stop in these batches of these steps; the loss of step 26 is wrong, the last good point is step 24."""
    stops: list = []

    def bad(run):
        if stops and (run.done, len(run.losses)) == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return data_step(run) == 26

    def go(out, resume=False):
        model = base()
        run(model, tokenizer, commands, tmp_path / out, resume, epochs=3, method="full", save_every=6, batch_size=2,
            grad_accumulation=2, learning_rate=1e-3, keep_last=1)  # fmt: skip
        return dict(model.named_parameters())

    wrong_loss(monkeypatch, bad, 20.0)
    whole = go("whole")
    assert "went back to step 24" in log(tmp_path / "whole")[24]["what"]
    stops += points
    for number in range(len(points)):
        with pytest.raises(SystemExit):
            go("cut", resume=number > 0)
        assert len([*(tmp_path / "cut/checkpoints").glob("step-*")]) <= 2
    for name, value in go("cut", resume=True).items():
        assert torch.equal(value, whole[name]), name
    assert log(tmp_path / "whole") == log(tmp_path / "cut")
    assert len([*(tmp_path / "cut/checkpoints").glob("step-*")]) == 1


def test_nan_is_not_applied_and_too_often_stops(tmp_path, tokenizer, commands, monkeypatch):
    with monkeypatch.context() as patched:
        wrong_loss(patched, lambda run: data_step(run) == 2, math.nan)
        result = run(fresh(), tokenizer, commands, tmp_path / "one", max_steps=4)
    assert codes(result) == ["not-finite"] and result["skipped_steps"] == 1 and math.isfinite(result["train_loss"])
    assert [row["step"] for row in log(tmp_path / "one") if "event" not in row] == [1, 2, 3, 4]
    wrong_loss(monkeypatch, lambda run: data_step(run) >= 2, math.nan)
    with pytest.raises(
        veneer.VeneerError, match=f"step 3: .* in {TRIES} tries, each with another batch: found loss nan"
    ):
        run(fresh(), tokenizer, commands, tmp_path / "all", max_steps=9)


def test_without_the_guard_a_jump_is_trained_on(tmp_path, tokenizer, commands, monkeypatch):
    wrong_loss(monkeypatch, lambda run: data_step(run) == 20, 20.0)
    result = run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=24, epochs=3, guard=False)
    assert codes(result) == [] and result["general_loss"] is None and max(r["loss"] for r in log(tmp_path / "run")) > 20


def test_a_rising_held_out_loss_ends_the_run_with_the_best_adapter(tmp_path, tokenizer, commands, monkeypatch):
    losses = iter([3.0, 2.0, 2.1, 2.2, 1.0])
    held = veneer.DataConfig(train=str(commands), eval=0.2)
    original = loop.evaluation_loss
    monkeypatch.setattr(
        loop,
        "evaluation_loss",
        lambda m, s, *a: original(m, s, *a) if len(s) == 8 else {"loss": next(losses), "tokens": 1},
    )
    model = fresh()
    result = run(model, tokenizer, None, tmp_path / "run", data_config=held, epochs=9, eval_every=2)
    assert codes(result) == ["overfitting"] and result["stopped_early"] and result["steps"] == 8
    assert result["eval_loss"] == 2.0
    best = loop.newest_checkpoint(tmp_path / "run/checkpoints/best")
    assert best[0]["step"] == 4
    for name, value in adapter_parameters(model, "default").items():
        assert torch.equal(value, best[1][f"parameter/{name}"])
    again = run(fresh(), tokenizer, None, tmp_path / "run", data_config=held, epochs=9, eval_every=2, resume=True)
    assert again["stopped_early"] and again["steps"] == 8 and codes(again) == ["overfitting"]


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([3, 2, 1.9], False),
        ([2, 2.2], False),
        ([2, 1, 1.01, 1.02], False),
        ([2, 1, 1.2, 1.1], False),
        ([2, 1, 1.1, 1.2], True),
    ],
)
def test_what_overfitting_is(losses, found):
    assert (overfitting(losses, 7) is not None) == found


def test_an_adapter_without_a_gradient_is_found(tmp_path, tokenizer, commands):
    model = fresh()
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.base_layer.weight)
    model.model.layers[1].mlp.down_proj.lora_A["default"].data.zero_()
    result = run(model, tokenizer, commands, tmp_path / "run", max_steps=21, epochs=3)
    assert codes(result) == ["dead-adapter"]
    assert (
        "layers.1.mlp.down_proj.lora_A" in result["findings"][0]["what"] or "gate_proj" in result["findings"][0]["what"]
    )


def test_an_update_larger_than_its_weight_is_found(tmp_path, tokenizer, commands):
    result = run(fresh(alpha=4000), tokenizer, commands, tmp_path / "run", max_steps=12, guard=True)
    assert "exploding-scale" in codes(result)


def test_the_share_of_an_update():
    b, a, w = torch.randn(30, 4), torch.randn(4, 20), torch.randn(30, 20)
    assert update_share(b, a, 0.5, float(w.norm())) == pytest.approx(float((0.5 * b @ a).norm() / w.norm()), rel=1e-4)


def test_forgetting_is_measured_and_told(tmp_path, tokenizer, commands):
    """A model that has learned general text, then learns something else far too long."""
    model = base()
    config = veneer.TrainConfig(batch_size=8, epochs=30, learning_rate=3e-3, guard=False)
    rows = [{"text": text} for text in loop.guards.GENERAL_TEXT]
    general = veneer.DataConfig(train="-", format="text", max_length=512)
    veneer.train(
        model, tokenizer, rows, config, data_config=general, method="full", out=tmp_path / "base", progress=False
    )
    veneer.attach(model, veneer.LoraConfig(r=16), seed=0)
    result = run(model, tokenizer, commands, tmp_path / "run", epochs=4, learning_rate=0.02)
    before, after = result["general_loss"]["before"], result["general_loss"]["after"]
    assert after > 1.2 * before and "forgetting" in codes(result)


HEALTHY = [
    {}, {"r": 1}, {"r": 16}, {"rslora": True}, {"dora": True}, {"adalora": True}, {"targets": "attention"},
    {"targets": "qv"}, {"dropout": 0.2}, {"alpha": 4}, {"lr": 0.001}, {"lr": 0.01}, {"batch_size": 1, "epochs": 2},
    {"batch_size": 16, "epochs": 12}, {"grad_accumulation": 3}, {"schedule": "constant"}, {"lora_plus": 16.0, "lr": 0.001},
    {"method": "full", "lr": 0.001}, {"quantize": True}, {"weight_decay": 0.1}, {"seed": 5}, {"max_steps": 1}, {"max_steps": 2},
]  # fmt: skip


@pytest.mark.parametrize("case", HEALTHY, ids=str)
def test_a_healthy_run_is_left_alone(tmp_path, tokenizer, commands, case):
    case = {**case}
    method, lr = case.pop("method", "lora"), case.pop("lr", 0.005)
    settings = {"epochs": 4} | {key: case.pop(key) for key in [*case] if key in veneer.TrainConfig.model_fields}
    model = base()
    if case.pop("quantize", False):
        from veneer.quant.linear import quantize_model

        quantize_model(model)
    if method == "lora":
        veneer.attach(model, veneer.LoraConfig(**{"r": 4, **case}), seed=1)
    held = veneer.DataConfig(train=str(commands), eval=0.2)
    result = run(
        model, tokenizer, None, tmp_path / "run", data_config=held, method=method, learning_rate=lr, **settings
    )
    assert codes(result) == [] and result["skipped_steps"] == 0


@pytest.mark.slow
def test_a_jump_in_a_real_run_costs_little(tmp_path, monkeypatch):
    """SmolLM2 in NF4 on Python's own language reference, the loss of one batch times 20. What is left of it is that another
    batch stands in its place: a run that jumped is, bit for bit, the run that had that one there (above)."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    rows = [{"text": text[at : at + 100]} for at in range(0, len(text) - 100, 100)]
    rows = random.Random(0).sample(rows, 150)
    results = []
    for jumps in (False, True):
        model, tokenizer = veneer.load("smollm2", quantize="nf4")
        veneer.attach(model, veneer.LoraConfig(r=8), seed=0)
        with monkeypatch.context() as patched:
            if jumps:
                wrong_loss(patched, lambda run: data_step(run) == 10, 20.0)
            data = veneer.DataConfig(train="-", eval=0.1)
            results.append(
                run(model, tokenizer, rows, tmp_path / str(jumps), data_config=data, batch_size=8, learning_rate=1e-3)
            )
    plain, jumped = results
    assert codes(plain) == [] and codes(jumped) == ["spike"] and jumped["steps"] == plain["steps"]
    assert jumped["train_loss"] == pytest.approx(plain["train_loss"], rel=0.01)
    assert jumped["eval_loss"] == pytest.approx(plain["eval_loss"], rel=0.01)


def test_a_learning_rate_that_is_far_too_high_is_gone_back_from(tmp_path, tokenizer, commands):
    """No injection: a model that has learned these rows is driven off by its adapter, as the rate rises."""
    model = make_model()
    run(model, tokenizer, commands, tmp_path / "base", method="full", batch_size=8, learning_rate=0.01, epochs=30)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    losses, at = {}, 0
    for guard in (True, False):
        model = make_model()
        model.load_state_dict(weights)
        veneer.attach(model, veneer.LoraConfig(r=4), seed=1)
        result = run(
            model, tokenizer, commands, tmp_path / str(guard), guard=guard, epochs=3, learning_rate=0.1, schedule="constant",
            warmup_steps=30,
        )  # fmt: skip
        losses[guard] = [row["loss"] for row in log(tmp_path / str(guard)) if "event" not in row]
        assert ("spike" in codes(result)) == guard
        if guard:
            at = result["findings"][0]["step"] - 1
    assert sum(losses[True][at : at + 6]) < sum(losses[False][at : at + 6]) / 2


# ---- signals --------------------------------------------------------------------------------------------------------


def test_sigterm_in_a_batch_that_takes_too_long_saves_the_start_of_the_step(tmp_path, tokenizer, commands, monkeypatch):
    whole = fresh(dropout=0.2)
    run(whole, tokenizer, commands, tmp_path / "whole", max_steps=6, batch_size=2, grad_accumulation=2)
    original = loop.batch_loss

    def slow(model, batch, items):
        if model.training and torch.initial_seed() == 0 and slow.run.done == 3 and slow.run.losses:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            value = original(model, batch, items)
            began = time.monotonic()
            while time.monotonic() - began < 20:
                time.sleep(0.01)
            return value
        return original(model, batch, items)

    start = loop._Run.run

    def runs(self):
        slow.run = self
        return start(self)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "batch_loss", slow)
        patched.setattr(loop._Run, "run", runs)
        patched.setattr(signals, "PATIENCE", 0.2)
        began = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            run(
                fresh(dropout=0.2),
                tokenizer,
                commands,
                tmp_path / "cut",
                max_steps=6,
                batch_size=2,
                grad_accumulation=2,
            )
    assert ended.value.code == 143 and time.monotonic() - began < 10
    assert signals.PATIENCE <= 10 / 2  # whoever sends SIGTERM waits ten seconds, and the checkpoint is written after it
    state = loop.newest_checkpoint(tmp_path / "cut/checkpoints")[0]
    assert (state["step"], state["losses"]) == (3, [])
    again = fresh(dropout=0.2)
    run(again, tokenizer, commands, tmp_path / "cut", max_steps=6, batch_size=2, grad_accumulation=2, resume=True)
    for name, value in adapter_parameters(whole, "default").items():
        assert torch.equal(value, adapter_parameters(again, "default")[name]), name
    assert log(tmp_path / "whole") == log(tmp_path / "cut")


def test_a_run_that_ends_beyond_this_one_is_refused(tmp_path, tokenizer, commands):
    run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=6)
    with pytest.raises(veneer.RefusedError, match="from after step 6, but this run ends with step 4"):
        run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=4, resume=True)
