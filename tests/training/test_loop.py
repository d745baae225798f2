import errno
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
from veneer.storage import sha256, write_tensors
from veneer.training import checkpoint, loop
from veneer.training.checkpoint import captured, newest_checkpoint, random_states, restore, save_checkpoint
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


def loss_of(patched, change):
    """Every loss of training is what change(run, loss) makes of it, where loss() is the real one."""
    original, start, seen = loop.batch_loss, loop._Run.run, {}

    def runs(self):
        seen["run"] = self
        return start(self)

    def changed(model, batch, items):
        if not model.training:
            return original(model, batch, items)
        return change(seen["run"], lambda: original(model, batch, items))

    patched.setattr(loop._Run, "run", runs)
    patched.setattr(loop, "batch_loss", changed)


def wrong_loss(patched, bad, factor):
    """The loss of every batch for which bad(run) holds, times `factor`: in training alone."""
    loss_of(patched, lambda run, loss: loss() * (factor if bad(run) else 1))


def data_step(run):
    return run.guard.data_step(run.done)


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

    def dies(self, stop):
        if self.done == 8:
            raise SystemExit  # killed between two checkpoints
        return original_step(self, stop)

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
    monkeypatch.setattr(
        loop._Run, "_step", lambda self, stop: original_step(self, stop) if self.done < 2 else sys.exit()
    )
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
    weights = Masters(parameters)
    tensors = captured(weights, optimizer) | random_states(torch.device("cuda:0"))
    save_checkpoint(tmp_path, 1, tensors, {"settings": {}}, 1)
    expected = torch.rand(3, device="cuda")
    restore(newest_checkpoint(tmp_path)[1], weights, optimizer)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_a_later_checkpoint_of_a_run_gone_back_is_removed(tmp_path):
    parameters = {"a": torch.nn.Parameter(torch.zeros(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    for step in (2, 4, 9, 6):
        save_checkpoint(tmp_path, step, captured(Masters(parameters), optimizer), {"settings": {}}, 2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000006"]


def test_a_factor_without_a_gradient_stops_the_run(tmp_path, tokenizer, commands):
    model = fresh()
    model.model.layers[1].mlp.forward = torch.zeros_like
    with pytest.raises(veneer.VeneerError, match=r"6 of 28 adapter weights .*layers\.1\.mlp\.gate_proj\.lora_A"):
        run(model, tokenizer, commands, tmp_path / "run", max_steps=1)


def test_steps_that_get_a_line_in_the_log(tmp_path, tokenizer, commands):
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    run(fresh(), tokenizer, None, tmp_path / "run", data_config=data, max_steps=7, log_every=3, eval_every=4)
    assert [row["step"] for row in lines(tmp_path / "run")] == [3, 4, 6, 7]


def test_early_stopping_keeps_the_best(tmp_path, tokenizer, commands, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(loop, "evaluation_loss", lambda *a: {"loss": next(losses), "tokens": 1})
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    model = fresh()
    result = run(model, tokenizer, None, tmp_path / "run", data_config=data, epochs=9, eval_every=2, early_stopping=2,
                 guard=False)  # fmt: skip
    assert result["stopped_early"] and result["steps"] == 8 and result["eval_loss"] == 2.0
    best = newest_checkpoint(tmp_path / "run/checkpoints/best")
    assert best[0]["step"] == 4
    for name, value in adapter_parameters(model, "default").items():
        assert torch.equal(value, best[1][f"parameter/{name}"])
    log = (tmp_path / "run/metrics.jsonl").read_text()
    again = fresh()
    resumed = run(again, tokenizer, None, tmp_path / "run", data_config=data, epochs=9, eval_every=2, early_stopping=2,
                  resume=True, guard=False)  # fmt: skip
    assert resumed["stopped_early"] and resumed["steps"] == 8 and resumed["eval_loss"] == 2.0
    assert (tmp_path / "run/metrics.jsonl").read_text() == log
    for name, value in adapter_parameters(again, "default").items():
        assert torch.equal(value, best[1][f"parameter/{name}"])


def test_a_held_out_loss_that_is_not_finite_is_never_the_best(tmp_path, tokenizer, commands, monkeypatch):
    losses = iter([float("nan"), 3.0, float("-inf"), float("nan")])
    monkeypatch.setattr(loop, "evaluation_loss", lambda *a: {"loss": next(losses), "tokens": 1})
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    result = run(fresh(), tokenizer, None, tmp_path / "run", data_config=data, epochs=9, eval_every=1, early_stopping=2,
                 guard=False)  # fmt: skip
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
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
    if number != signal.SIGKILL:  # saves, and says what to do
        assert (
            process.wait(60) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
            and "--resume" in text
            and "Traceback" not in text
        )
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


def vouch(place):
    """A manifest that fits: what is wrong then is no damage."""
    digests = {name: sha256(place / name) for name in ("state.safetensors", "state.json")}
    (place / "manifest.json").write_text(checkpoint._manifest(place, digests))


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
    write_tensors(place / "state.safetensors", changed)
    vouch(place)
    with pytest.raises(veneer.VeneerError) as raised:
        go(4, resume=True)
    found = "\n".join(raised.value.problems)
    assert "expected numbers that are finite" in found and "exp_avg of" in found and "random numbers (rng)" in found
    (place / "state.json").write_text("{}")
    vouch(place)
    with pytest.raises(veneer.VeneerError, match="found no step and settings"):
        go(4, resume=True)


# ---- what a run may meet when it goes on -----------------------------------------------------------------------------


def stopping(patched, *points):
    """SIGTERM in the batches (step, batches done) of the runs that follow, one a run."""
    left = [*points]

    def told(run):
        if left and (run.done, len(run.losses)) == left[0]:
            left.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    loss_of(patched, lambda run, loss: told(run) or loss())


def same(one, other):
    return all(
        torch.equal(value, adapter_parameters(other, "default")[name])
        for name, value in adapter_parameters(one, "default").items()
    )


def test_a_step_that_is_cut_otherwise_begins_again(tmp_path, tokenizer, monkeypatch):
    """max_length decides how many packed sequences a batch is: one that was done counts only where they are as they were."""
    rows = [{"text": chr(97 + n) * 200} for n in range(32)]
    monkeypatch.setattr("veneer.config.TOKEN_BUDGET", 512)
    wide = {"model": {"max_position_embeddings": 8192}}

    def go(out, length, resume=False):
        model = fresh(**wide)
        data = veneer.DataConfig(train="-", max_length=length)
        run(model, tokenizer, rows, tmp_path / out, resume, data, batch_size=16, max_steps=2)
        return model

    whole = go("whole", 4096)
    stopping(monkeypatch, (1, 1))
    with pytest.raises(SystemExit):
        go("cut", 512)
    state = newest_checkpoint(tmp_path / "cut/checkpoints")[0]
    assert state["step"] == 1 and len(state["losses"]) == 2
    resumed = go("cut", 4096, resume=True)
    for name, value in adapter_parameters(whole, "default").items():
        torch.testing.assert_close(adapter_parameters(resumed, "default")[name], value, rtol=1e-3, atol=1e-5)
    assert lines(tmp_path / "cut")[1]["loss"] == pytest.approx(lines(tmp_path / "whole")[1]["loss"], rel=1e-4)


@pytest.mark.parametrize("points", [[(25, 1)], [(27, 0)], [(25, 0), (26, 1)], [(24, 1)]])
def test_a_jump_after_an_interruption_is_gone_back_from_as_without_it(
    tmp_path, tokenizer, commands, monkeypatch, points
):
    """Checkpoints at 25, which no good point falls together with by itself; the loss of step 27 is wrong."""

    def go(out, *stops, resume=False):
        model = fresh(dropout=0.2, model={"initializer_range": 0.14})
        with monkeypatch.context() as patched:
            wrong_loss(patched, lambda run: data_step(run) == 27, 20)
            stopping(patched, *stops)
            run(model, tokenizer, commands, tmp_path / out, resume, batch_size=2, grad_accumulation=2, epochs=4, save_every=25,
                learning_rate=0.005)  # fmt: skip
        return model

    whole = go("whole")
    assert any("went back to step 25" in row.get("what", "") for row in lines(tmp_path / "whole"))
    for number, point in enumerate(points):
        with pytest.raises(SystemExit):
            go("cut", point, resume=number > 0)
    assert same(whole, go("cut", resume=True)) and lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_killed_after_a_checkpoint_and_then_a_jump(tmp_path, tokenizer, commands, monkeypatch):
    """The point to go back to is the checkpoint itself, though it was written before the kill."""

    def go(out, *stops, kill=None, resume=False):
        model = fresh(model={"initializer_range": 0.14})

        def bad(run):
            if run.done == kill:
                raise ConnectionError("killed")
            return data_step(run) == 27

        with monkeypatch.context() as patched:
            wrong_loss(patched, bad, 20)
            stopping(patched, *stops)
            run(model, tokenizer, commands, tmp_path / out, resume, epochs=4, save_every=25, learning_rate=0.005,
                keep_last=1)  # fmt: skip
        return model

    whole = go("whole")
    with pytest.raises(ConnectionError):
        go("cut", kill=26)
    with pytest.raises(SystemExit):  # and its checkpoint is the only one then
        go("cut", (26, 0), resume=True)
    assert same(whole, go("cut", resume=True)) and lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_a_signal_in_the_last_batch_is_one_checkpoint_and_a_signal_at_the_end_is_heard(
    tmp_path, tokenizer, commands, monkeypatch
):
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    asked = {"max_steps": 6, "save_every": 3, "eval_every": 3, "batch_size": 2, "grad_accumulation": 2}
    whole, cut = fresh(), fresh()
    run(whole, tokenizer, None, tmp_path / "whole", data_config=data, **asked)
    saves = []
    original = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda *a, **k: saves.append(a[0].name) or original(*a, **k))
    with monkeypatch.context() as patched:
        stopping(patched, (3, 1))
        with pytest.raises(SystemExit):
            run(fresh(), tokenizer, None, tmp_path / "cut", data_config=data, **asked)
    assert saves == ["best", "checkpoints"]  # of step 3's evaluation, and of the signal; none of step 3 itself
    run(cut, tokenizer, None, tmp_path / "cut", True, data, **asked)
    assert same(whole, cut) and lines(tmp_path / "whole") == lines(tmp_path / "cut")
    with monkeypatch.context() as patched:
        stopping(patched, (5, 1))
        with pytest.raises(SystemExit) as ended:
            run(fresh(), tokenizer, None, tmp_path / "last", data_config=data, **asked)
    assert ended.value.code == 143 and not (tmp_path / "last/adapter").exists()
    with monkeypatch.context() as patched:
        written = loop.AdapterWeights.save
        patched.setattr(loop.AdapterWeights, "save", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), written(*a))[1])
        with pytest.raises(SystemExit) as ended:
            run(fresh(), tokenizer, None, tmp_path / "last", True, data, **asked)
    assert ended.value.code == 143 and (tmp_path / "last/adapter/adapter_model.safetensors").is_file()


def test_an_evaluation_that_is_broken_off_is_made_again(tmp_path, tokenizer, commands, monkeypatch):
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    asked = {"max_steps": 6, "eval_every": 3}
    whole, cut = fresh(), fresh()
    run(whole, tokenizer, None, tmp_path / "whole", data_config=data, **asked)
    original, first = loop.evaluation_loss, []

    def slow(*given):
        if len(given[1]) < 10 and not first:  # the held-out rows, not the general text
            first.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        return original(*given)

    assert len(loop.guards.GENERAL_TEXT) < 10 and original is loop.evaluation_loss
    monkeypatch.setattr("veneer.training.signals.PATIENCE", 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "_general_loss", lambda self: None)
        patched.setattr(loop, "evaluation_loss", slow)
        began = time.monotonic()
        with pytest.raises(SystemExit):
            run(fresh(), tokenizer, None, tmp_path / "cut", data_config=data, **asked)
    assert first and time.monotonic() - began < 10
    assert newest_checkpoint(tmp_path / "cut/checkpoints")[0]["pending"]["row"]["step"] == 3
    run(cut, tokenizer, None, tmp_path / "cut", True, data, **asked)
    assert same(whole, cut) and lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_a_second_signal_does_not_wait(tmp_path, tokenizer, commands, monkeypatch):
    original = loop.batch_loss

    def slow(model, batch, items):
        if model.training:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            time.sleep(20)
        return original(model, batch, items)

    monkeypatch.setattr(loop, "batch_loss", slow)
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:  # the first one's exit code
        run(fresh(), tokenizer, commands, tmp_path / "run")
    assert ended.value.code == 143 and time.monotonic() - began < 10


def test_when_nobody_reads_what_is_told_the_run_goes_on(tmp_path, tokenizer, commands, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        result = veneer.train(
            fresh(), tokenizer, commands, veneer.TrainConfig(max_steps=2, batch_size=4), out=tmp_path / "run"
        )
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            pipe.flush()
        with pytest.raises(BrokenPipeError):
            pipe.close()
    assert result["steps"] == 2


def test_checkpoints_that_are_there_need_no_more_space(tmp_path, tokenizer, commands, monkeypatch):
    run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=6)
    there = sum(file.stat().st_size for file in (tmp_path / "run/checkpoints").rglob("*.safetensors"))
    wanted = []
    monkeypatch.setattr(loop, "require_disk_space", lambda path, needed, what: wanted.append(needed))
    run(fresh(), tokenizer, commands, tmp_path / "run", True, max_steps=7)
    run(fresh(), tokenizer, commands, tmp_path / "new", max_steps=1)
    assert wanted[1] - wanted[0] == there > 0


def test_damaged_best_weights_are_told_and_the_last_ones_written(tmp_path, tokenizer, commands, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(loop, "evaluation_loss", lambda *a: {"loss": next(losses), "tokens": 1})
    data = veneer.DataConfig(train=str(commands), eval=0.2)
    asked = {"epochs": 9, "eval_every": 2, "early_stopping": 2, "guard": False}
    run(fresh(), tokenizer, None, tmp_path / "run", data_config=data, **asked)
    file = next((tmp_path / "run/checkpoints/best").glob("step-*/state.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    checkpoint._whole.clear()
    result = run(fresh(), tokenizer, None, tmp_path / "run", True, data, **asked)
    assert result["steps"] == 8 and "the best weights are lost" in result["notes"][-1]
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("quantize", [False, True])
def test_another_base_of_the_same_shapes_is_refused(tmp_path, tokenizer, commands, quantize):
    run(fresh(quantize), tokenizer, commands, tmp_path / "run", max_steps=2)
    other = make_model(seed=5)
    if quantize:
        quantize_model(other)
    veneer.attach(other, veneer.LoraConfig(r=4), seed=1)
    with pytest.raises(veneer.RefusedError, match=r"base \(sha256"):
        run(other, tokenizer, commands, tmp_path / "run", True, max_steps=4)
    assert run(fresh(quantize), tokenizer, commands, tmp_path / "run", True, max_steps=4)["steps"] == 4


def test_other_held_out_rows_are_not_compared_with_the_earlier_ones(tmp_path, tokenizer, commands, monkeypatch):
    """Else the second half would look like overfitting, or be left for the first half's best."""
    rows = [json.loads(line) for line in commands.read_text().splitlines()]
    for name, some in (("a", rows[:6]), ("b", rows[6:12])):
        (tmp_path / name).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    losses = iter([1.0, 0.9, 1.5, 1.6])
    monkeypatch.setattr(loop, "evaluation_loss", lambda *a: {"loss": next(losses), "tokens": 1})
    monkeypatch.setattr(loop._Run, "_general_loss", lambda self: None)
    results = []
    for name, steps in (("a", 2), ("b", 4)):
        data = veneer.DataConfig(train=str(commands), eval=str(tmp_path / f"{name}.jsonl"))
        results.append(
            run(
                fresh(),
                tokenizer,
                None,
                tmp_path / "run",
                name == "b",
                data,
                max_steps=steps,
                eval_every=1,
                learning_rate=1e-4,
            )
        )
    assert results[1]["steps"] == 4 and results[1]["findings"] == [] and results[1]["eval_loss"] == 1.6
    assert any("other rows are held out" in note for note in results[1]["notes"])


def test_a_merged_adapter_is_not_trained(tmp_path, tokenizer, commands):
    model = fresh()
    veneer.hot_merge(model)
    with pytest.raises(veneer.VeneerError, match=r"merged into the weights(.|\n)*unmerge"):
        run(model, tokenizer, commands, tmp_path / "run")
    veneer.unmerge(model)
    assert run(model, tokenizer, commands, tmp_path / "run", max_steps=1)["findings"] == []


def test_a_run_folder_is_one_processs(tmp_path, tokenizer, commands, monkeypatch):
    original = loop._Run._step
    refused = []

    def step(self, stop):
        if not refused:
            with pytest.raises(veneer.VeneerError, match="another process writes into it"):
                run(fresh(), tokenizer, commands, tmp_path / "run", True)
            refused.append(1)
        return original(self, stop)

    monkeypatch.setattr(loop._Run, "_step", step)
    assert run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=2)["steps"] == 2
    assert run(fresh(), tokenizer, commands, tmp_path / "run", True, max_steps=3)["steps"] == 3


def test_out_of_memory_is_said_in_words(tmp_path, tokenizer, commands, monkeypatch):
    def out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(loop, "batch_loss", out)
    monkeypatch.setattr(loop._Run, "_general_loss", lambda self: None)
    with pytest.raises(veneer.VeneerError, match=r"step 1: out of memory: CUDA(.|\n)*batch_size"):
        run(fresh(), tokenizer, commands, tmp_path / "run")


def test_a_model_that_is_broken_in_the_end_has_forgotten(tmp_path, tokenizer, commands, monkeypatch):
    found = iter([2.0, float("nan")])
    monkeypatch.setattr(loop._Run, "_general_loss", lambda self: next(found))
    result = run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=1)
    assert [x["code"] for x in result["findings"]] == ["forgetting"]
    assert result["general_loss"] == {"before": 2.0, "after": "nan"} and json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("which", ["metrics.jsonl", "recipe.yaml", "old log"])
def test_a_full_disk_is_said_in_words_wherever_a_run_writes(tmp_path, tokenizer, commands, monkeypatch, which):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    if which == "old log":
        run(fresh(), tokenizer, commands, out, max_steps=3)
        monkeypatch.setattr("veneer.training.progress.atomic_file", full)
    elif which == "recipe.yaml":
        monkeypatch.setattr(loop, "atomic_file", full)
    else:
        monkeypatch.setattr("veneer.training.progress.open", full, raising=False)
    with pytest.raises(veneer.VeneerError, match="could not be written: No space left"):
        veneer.train(
            fresh(), tokenizer, commands, veneer.TrainConfig(max_steps=4, batch_size=4, learning_rate=0.01, save_every=3),
            out=out, recipe="model: x", resume=which == "old log", progress=False,
        )  # fmt: skip
    monkeypatch.undo()
    assert run(fresh(), tokenizer, commands, out, which == "old log" or out.exists(), max_steps=4)["steps"] == 4


def test_on_a_slow_disk_nothing_is_waited_for(tmp_path, tokenizer, commands, monkeypatch):
    """The next checkpoint will need all ten seconds."""
    original = loop.batch_loss

    def slow(model, batch, items):
        if model.training and sleeping.run.done == 4:
            sleeping.began = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        return original(model, batch, items)

    sleeping, start = type("", (), {})(), loop._Run.run
    monkeypatch.setattr(loop._Run, "_saving", lambda self: 9.0)
    monkeypatch.setattr(loop, "batch_loss", slow)
    monkeypatch.setattr(loop._Run, "run", lambda self: (setattr(sleeping, "run", self), start(self))[1])
    with pytest.raises(SystemExit):
        run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=8)
    assert time.monotonic() - sleeping.began < 3  # PATIENCE is 4
    assert newest_checkpoint(tmp_path / "run/checkpoints")[0]["step"] == 4


def test_how_long_a_checkpoint_takes_is_known_from_the_last_one(tmp_path, tokenizer, commands, monkeypatch):
    runs, written = [], loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda *a, **k: (time.sleep(0.2), written(*a, **k))[1])
    start = loop._Run.run
    monkeypatch.setattr(loop._Run, "run", lambda self: (runs.append(self), start(self))[1])
    run(fresh(), tokenizer, commands, tmp_path / "run", max_steps=3)
    assert 0.1 < runs[0]._saving() < 5
