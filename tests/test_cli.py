import json
import os
import subprocess
import sys

import pytest
from conftest import make_model
from typer.testing import CliRunner

import veneer
from veneer.cli import app


def call(*arguments, stdin=""):
    environment = {**os.environ, "PYTHONPATH": "."}
    return subprocess.run(
        [sys.executable, "-m", "veneer.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        env=environment,
    )


@pytest.fixture
def folder(tmp_path, tokenizer):
    return veneer.save_model(make_model(), tokenizer, tmp_path / "model")


def test_the_whole_life_from_the_command_line(folder, tmp_path, commands):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {folder}\nquantize: nf4\nlora: {{r: 4}}\ndata: {{train: {commands}, eval: 0.1}}\n"
        f"train: {{max_steps: 4, batch_size: 4, out: {tmp_path}/run}}\n"
    )
    done = call("train", recipe, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 4 and result["eval_loss"] > 0
    assert {
        "out",
        "adapter",
        "steps",
        "train_loss",
        "eval_loss",
        "tokens_per_second",
        "peak_bytes",
        "seconds",
    } <= result.keys()
    adapter = result["adapter"]
    shown = call("inspect", adapter, "--json")
    assert json.loads(shown.stdout)["trained_on"] == "nf4" and json.loads(shown.stdout)["layers"] == 14
    scored = call(
        "eval", folder, "--adapter", adapter, "--data", commands, "--limit", "5", "--max-new-tokens", "4", "--json"
    )
    assert json.loads(scored.stdout)["rows"] == 5, scored.stderr
    merged = call("merge", folder, adapter, "--out", tmp_path / "merged", "--json")
    assert json.loads(merged.stdout)["onto"] == "nf4" and json.loads(merged.stdout)["max_logit_difference"] < 0.5, (
        merged.stderr
    )
    assert json.loads(call("inspect", tmp_path / "merged", "--json").stdout)["architecture"] == "LlamaForCausalLM"
    small = call("quantize", folder, "--out", tmp_path / "four", "--json")
    assert json.loads(small.stdout)["quantization"] == "nf4"
    talk = call("chat", tmp_path / "four", "--max-new-tokens", "3", stdin="hello\n")
    assert talk.returncode == 0 and talk.stdout.endswith("\n"), talk.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "none.yaml"], "shipped recipes"),
        (["train", "quick", "--set", "train.ephocs=2"], "did you mean 'epochs'"),
        (["train", "quick", "--set", "data.train=none.jsonl", "--set", "model={model}"], "no such file"),
        (["eval", "{model}", "--data", "none.jsonl"], "no such file"),
        (["eval", "{model}", "--data", "{data}", "--adapter", "none"], "no such folder"),
        (["eval", "{model}", "--data", "{data}", "--quantize", "int3"], "expected 'nf4'"),
        (["merge", "{model}", "none", "--out", "{out}"], "no such folder"),
        (["quantize", "{model}", "--out", "{model}"], "not empty"),
        (["inspect", "none/of/this"], "no such folder"),
        (["chat", "w.pt"], "pickle"),
    ],
)
def test_bad_input_exits_2_with_one_message(folder, tmp_path, commands, arguments, words):
    names = {"model": folder, "data": commands, "out": tmp_path / "out"}
    done = call(*(argument.format(**names) for argument in arguments))
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""


def test_kernels_and_an_unknown_isa(monkeypatch):
    rows = json.loads(call("kernels", "--json").stdout)["operations"]
    assert {row["operation"] for row in rows} >= {"nf4_quantize", "nf4_dequantize"}
    monkeypatch.setenv("VENEER_ISA", "mmx")
    assert call("kernels").returncode in (0, 2)


def test_help_of_every_verb():
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        done = CliRunner().invoke(app, [name, "--help"])
        assert done.exit_code == 0 and command.callback.__doc__.split(".")[0][:30] in done.output
