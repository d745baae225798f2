import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import veneer
from veneer import cli
from veneer.cli import app


def call(*arguments, stdin=""):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
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
        "eval", folder, "--adapter", adapter, "--data", str(commands), "--limit", "5", "--max-new-tokens", "4", "--json"
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


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model, its 4-bit copy and an adapter trained on that, to be damaged in copies."""
    path = tmp_path_factory.mktemp("good")
    veneer.save_model(make_model(), make_tokenizer(), path / "model")
    model, tokenizer = veneer.load(path / "model", quantize="nf4")
    veneer.save_model(model, tokenizer, path / "four")
    veneer.attach(model, veneer.LoraConfig(r=4), seed=0)
    veneer.save_adapter(model, path / "adapter")
    return path


def test_a_merge_that_is_told_to_stop_leaves_nothing(good, tmp_path):
    """It is held where all weights are written and nothing is under its name yet."""
    held = "import time, veneer.cli, veneer.models.merging as m; m._write_rest = lambda *_: time.sleep(60); veneer.cli.main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", held, "merge", good / "model", good / "adapter", "--out", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment)
    while not list(tmp_path.glob(".out.*/model.safetensors")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_comes_in_a_destructor_is_not_lost(number, code):
    """Python drops what is raised there: without more the verb would go on, here for a minute."""
    held = f"""
import os, signal, sys, time, veneer.cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # which who starts the tests in the background turns off
class Held:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.1)
def verb():
    Held()
    time.sleep(60)
veneer.cli.app = verb
veneer.cli.main()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", held], stderr=subprocess.PIPE, text=True, env=environment, timeout=50)
    assert done.returncode == code and "Traceback" not in done.stderr and "ignored" not in done.stderr


@pytest.fixture
def main(good, tmp_path, monkeypatch, capsys):
    """The command line in this process, in a folder with a fresh copy of the good files: exit code, stdout, stderr."""
    shutil.copytree(good, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["veneer", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def config(file, **changes):
    def change():
        with open(file, encoding="utf-8") as handle:
            value = json.load(handle)
        with open(file, "w", encoding="utf-8") as handle:
            json.dump({k: v for k, v in {**value, **changes}.items() if v != "absent"}, handle)

    return change


def text(file, content):
    def change():
        with open(file, "w", encoding="utf-8") as handle:
            handle.write(content)

    return change


def model(**changes):
    return config("model/config.json", **changes)


def adapter(**changes):
    return config("adapter/adapter_config.json", **changes)


def tensors(change_one):
    def change():
        file = "adapter/adapter_model.safetensors"
        loaded = load_file(file)
        key = next(iter(loaded))
        change_one(loaded, key)
        save_file(loaded, file)

    return change


def pickled(file):
    def change():
        with open(file, "wb") as handle:
            pickle.dump({"a": 1}, handle)

    return change


def cut_short(file):
    return lambda: os.truncate(file, os.path.getsize(file) // 2)


WEIGHTS, ADAPTER = "model/model.safetensors", "adapter/adapter_model.safetensors"
BAD_MODELS = {
    "found model_type None": model(model_type="absent"),
    "found model_type 'llamma'": model(model_type="llamma"),
    "'hidden_size' expected int": model(hidden_size="x"),
    "not a llama that transformers can build": model(hidden_size=-1),
    "not a llama that": model(num_attention_heads=0),
    "transformers can build": model(vocab_size=10),
    "quantization ['nf4']": model(quantization_config=["nf4"]),
    "quantization 'gptq'": model(quantization_config={"quant_method": "gptq"}),
    "found a pickle file": lambda: os.rename(WEIGHTS, "model/pytorch_model.bin"),
    "is not a valid safetensors file": pickled(WEIGHTS),
    "damaged or incomplete": cut_short(WEIGHTS),
    "is not valid JSON": text("model/config.json", "{"),
    "found a JSON list": text("model/config.json", "[]"),
}
BAD_WHEN_LOADED = {
    "found (258, 48), expected (300, 48)": model(vocab_size=300),
    "left over": model(num_hidden_layers=1),
    "generation_config.json is not valid JSON": text("model/generation_config.json", "{"),
    "generation_config.json: found a JSON list": text("model/generation_config.json", "[]"),
    "tokenizer_config.json: found a JSON list": text("model/tokenizer_config.json", "[]"),
    "its tokenizer cannot be read": text("model/tokenizer.json", "[]"),
}
BAD_ADAPTERS = {
    "r: found 0, expected a whole number from 1": adapter(r=0),
    "r: found 'x'": adapter(r="x"),
    "r: found None": adapter(r=None),
    "lora_alpha: found 'x'": adapter(lora_alpha="x"),
    "lora_alpha: found inf": adapter(lora_alpha=float("inf")),
    "lora_dropout: found 1.5": adapter(lora_dropout=1.5),
    "target_modules: found 5": adapter(target_modules=5),
    "target_modules: found None": adapter(target_modules="absent"),
    "target_modules: found '('": adapter(target_modules="("),
    "exclude_modules: found '('": adapter(exclude_modules="("),
    "exclude_modules: found 5": adapter(exclude_modules=5),
    "layers_to_transform: found 'x'": adapter(layers_to_transform="x"),
    "rank_pattern: found [4]": adapter(rank_pattern=[4]),
    "rank_pattern: found {'(': 4}": adapter(rank_pattern={"(": 4}),
    "rank_pattern: found {'(?i)q_proj': 4}": adapter(rank_pattern={"(?i)q_proj": 4}),
    "rank_pattern: found {'q_proj': 'x'}": adapter(rank_pattern={"q_proj": "x"}),
    "alpha_pattern: found {'q_proj': 'x'}": adapter(alpha_pattern={"q_proj": "x"}),
    "2 problems": adapter(alpha_pattern=5, use_qalora=True),
    "found (4, 48), expected (8, in)": adapter(r=8),
    "found NaN or Inf": tensors(lambda t, k: t[k].fill_(float("nan"))),
    "no lora_A and lora_B tensors": tensors(lambda t, k: (t.clear(), t.update(x=torch.zeros(1)))),
    "found no lora_A": tensors(lambda t, k: t.pop(k.replace("lora_B", "lora_A"))),
    "found a pickle file": lambda: os.rename(ADAPTER, "adapter/adapter_model.bin"),
    "is not a valid safetensors file": pickled(ADAPTER),
    "damaged or incomplete": cut_short(ADAPTER),
}
CHAT = ("chat", "model", "--adapter", "adapter")
SET = ("--set",)
ROWS = text("rows.jsonl", "".join(f'{{"prompt": "hello {i}", "completion": "yes"}}\n' for i in range(40)))
MERGE = ("merge", "four", "adapter", "--out")
NOTHING = lambda: None  # noqa: E731
BAD_INPUTS = [
    (("train", "none.yaml"), NOTHING, "shipped recipes"),
    (("train", "quick", *SET, "train.ephocs=2"), NOTHING, "did you mean 'epochs'"),
    (
        ("train", "quick", *SET, "data.train=none.jsonl", *SET, "model=model", *SET, "train.out=o"),
        NOTHING,
        "no such file",
    ),
    (("train", "quick", *SET, "data.train=none.jsonl", *SET, "model=none", *SET, "train.out=o"), NOTHING, "none.jsonl"),
    (("train", "quick", *SET, "data.eval=no.csv", *SET, "data.train=rows.jsonl", *SET, "train.out=o"), ROWS, "no.csv"),
    (("eval", "model", "--data", "none.jsonl"), NOTHING, "no such file"),
    (("eval", "model", "--data", "rows.jsonl", "--column", "completion"), ROWS, "expected OURS=THEIRS"),
    (("eval", "model", "--data", "x.csv"), text("x.csv", "text,label\na,b\n"), "--column completion=label"),
    (("chat", "adapter"), NOTHING, "it holds an adapter: give its base model"),
    (("inspect", "."), NOTHING, "found no config.json"),
    (("eval", "model", "--data", "rows.jsonl", "--adapter", "none"), ROWS, "no such folder"),
    (("eval", "model", "--data", "rows.jsonl", "--quantize", "int3"), ROWS, "expected nf4, fp4, int8 or None"),
    (("merge", "model", "none", "--out", "out"), NOTHING, "no such folder"),
    (("quantize", "model", "--out", "model"), NOTHING, "not empty"),
    (("quantize", "model", "--out", "o", "--to", "int3"), NOTHING, "expected nf4, fp4, int8"),
    (("inspect", "none/of/this"), NOTHING, "no such folder"),
    (("chat", "w.pt"), NOTHING, "pickle"),
    *((("inspect", "model"), change, words) for words, change in BAD_MODELS.items()),
    *((("chat", "model"), change, words) for words, change in (BAD_MODELS | BAD_WHEN_LOADED).items()),
    *((("inspect", "adapter"), change, words) for words, change in BAD_ADAPTERS.items()),
    (CHAT, adapter(r=0, lora_alpha="x"), "2 problems"),
    ((*MERGE, "out", "--onto", "16-bit"), NOTHING, "there is no 16-bit base in it"),
    ((*MERGE, "out", "--onto", "int8"), NOTHING, "there is no int8 base in it"),
    ((*MERGE, "out", "--onto", "int3"), NOTHING, "expected auto, 16-bit, nf4, fp4, int8"),
    ((*MERGE, "model/config.json/out"), NOTHING, "model/config.json, which is not a folder"),
    ((*MERGE, "/proc/out"), NOTHING, "nothing can be written in /proc"),
    (("quantize", "model", "--out", "model/config.json/out"), NOTHING, "model/config.json, which is not a folder"),
    (("train", "quick", *SET, "train.out=model/config.json/out"), NOTHING, "model/config.json, which is not a folder"),
    (("demo", "--out", "model/config.json"), NOTHING, "model/config.json, which is not a folder"),
    (("inspect", "lab/not-cached"), NOTHING, "not in the local cache"),
    (("inspect", "model", "--plot", "x.png"), NOTHING, "are for adapters"),
    (("inspect", "adapter", "--plot", "x.pdf"), NOTHING, "ending in .png or .svg"),
    (("inspect", "adapter", "--model", "none"), NOTHING, "no such folder"),
    (("inspect", "adapter", "--model", "model"), cut_short(WEIGHTS), "damaged or incomplete"),
    (("ranks",), NOTHING, "expected a MODEL or a --preset"),
    (("ranks", "--preset", "gtp3"), NOTHING, "did you mean 'gpt3'"),
    (("ranks", "model", "--rank", "0"), NOTHING, "expected whole numbers from 1"),
    (("ranks", "lab/not-cached"), NOTHING, "not in the local cache"),
    (("ranks", "model"), model(hidden_size=-1), "not a llama that transformers can build"),
]


@pytest.mark.parametrize(("arguments", "change", "words"), BAD_INPUTS, ids=[f"{a[0]}: {w}" for a, _, w in BAD_INPUTS])
def test_bad_input_is_one_message(main, arguments, change, words):
    change()
    code, out, err = main(*arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("veneer: ") and err.count("veneer: ") == 1 and "Traceback" not in err
    assert words in err, err


REFUSED = {
    "use_qalora is True, which changes the result": adapter(use_qalora=True),
    "2 problems": adapter(use_qalora=True, layer_replication=[[0, 1]]),
}


@pytest.mark.parametrize(("words", "change"), REFUSED.items(), ids=REFUSED)
def test_what_would_not_be_exact_is_refused_with_its_own_code(main, words, change):
    change()
    for verb in (("inspect", "adapter"), ("merge", "model", "adapter", "--out", "out")):
        code, out, err = main(*verb)
        assert (code, out) == (3, "") and words in err and "Traceback" not in err, err


RUN = ("train", "quick", *SET, "model=model", *SET, "data.train=rows.jsonl", *SET, "train.out=run", *SET, "lora.r=4")


def test_a_run_that_does_not_fit_is_refused_and_one_that_does_says_what_was_planned(main, monkeypatch):
    ROWS()
    run = (*RUN, *SET, "train.max_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr("veneer.planning.plan.available_bytes", lambda: 0)
        code, out, err = main(*run)
        assert (
            (code, out) == (3, "")
            and "does not fit into memory" in err
            and "--force" in err
            and not os.path.exists("run")
        )
        code, out, err = main(*run, "--force", "--json")
    found = json.loads(out)
    assert code == 0 and found["planned_bytes"] > 0, err
    code, out, err = main(*run, "--resume")
    assert code == 0 and "(planned: " in out, err


def test_a_long_run_says_beforehand_how_long_it_will_take(main, monkeypatch):
    ROWS()
    monkeypatch.setattr("veneer.report.plan.LONG_RUN", 2)
    monkeypatch.setattr("veneer.planning.speed.SECONDS", 0.2)
    code, out, err = main(*RUN, *SET, "train.max_steps=2")
    assert code == 0 and " free, " in err and out.count("(planned: ") == 2, err
    code, out, err = main(*RUN, *SET, "train.max_steps=1", *SET, "train.out=short", "--json")
    assert code == 0 and " free, " not in err and json.loads(out)["planned_seconds"] is None, err


def test_a_recipe_is_planned_with_its_settings_changed(main):
    ROWS()
    text("recipe.yaml", "model: model\ndata: {train: rows.jsonl}\n")()
    ranks = []
    for change in ((), (*SET, "lora.r=2", *SET, "method=lora")):
        code, out, err = main("plan", "recipe.yaml", *change, "--json")
        assert code == 0, err
        ranks.append(json.loads(out)["rank"])
    assert ranks[0] != 2 and ranks[1] == 2
    code, _, err = main("plan", "model", *SET, "lora.r=2")
    assert code == 2 and "none was given" in err
    code, _, err = main("plan", "recipe.yaml", "--rank", "2")
    assert code == 2 and "--rank: of no use" in err


def test_resuming_another_run_is_refused(main):
    ROWS()
    run = RUN
    code, out, err = main(*run, *SET, "train.max_steps=1", *SET, "data.system=Say it's so.")
    assert code == 0, err
    command = shlex.split(out.rpartition("try it:")[2])
    assert command[-1] == "Say it's so." and command[:4] == ["veneer", "chat", "model", "--adapter"]
    run += (*SET, "data.system=Say it's so.")
    code, _, err = main(*run)
    assert code == 2 and "run is not empty" in err and "--resume goes on with the run in it" in err
    code, out, err = main(*run, *SET, "train.max_steps=2", *SET, "lora.alpha=8", "--resume")
    assert (code, out) == (3, "") and "lora.alpha: the checkpoint has 32.0, this run 8.0" in err
    code, _, err = main(*run, *SET, "train.max_steps=2", "--resume")
    assert code == 0 and "resumed after step 1" in err


def test_eval_says_how_many_rows_were_cut(main):
    text(
        "long.jsonl", '{"prompt": "%s", "completion": "yes"}\n' % ("a" * 90) + '{"prompt": "b", "completion": "no"}\n'
    )()
    score = ("eval", "model", "--data", "long.jsonl", "--no-generate")
    code, out, err = main(*score, "--max-length", "64")
    assert code == 0 and "truncated 1: longer than 64 tokens" in out, err
    assert "truncated" not in main(*score)[1]
    assert json.loads(main(*score, "--max-length", "64", "--json")[1])["truncated"] == 1


def test_an_adapter_of_a_four_bit_folder(main):
    code, out, err = main(*MERGE, "merged", "--json")
    assert code == 0 and json.loads(out)["onto"] == "nf4", err
    code, out, err = main("merge", "model", "adapter", "--out", "onto16", "--onto", "16-bit", "--json")
    assert code == 0 and json.loads(out)["onto"] == "16-bit" and "--onto nf4 takes the one" in err
    ROWS()
    for base, said in (("model", True), ("four", False)):
        code, _, err = main("eval", base, "--adapter", "adapter", "--data", "rows.jsonl", "--no-generate")
        assert code == 0 and ("--quantize nf4 takes the one it was trained on" in err) is said, err


@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_the_other_quantisations_go_all_the_way(main, commands, kind):
    code, out, err = main("quantize", "model", "--out", "small", "--to", kind, "--no-double-quant", "--json")
    assert code == 0 and json.loads(out)["quantization"] == kind, err
    run = ("train", "quick", *SET, f"data.train={commands}", *SET, "train.out=run", *SET, "train.max_steps=2", "--json")
    code, out, err = main(*run, *SET, "model=model", *SET, f"quantize={kind}", *SET, "double_quant=false")
    assert code == 0, err
    adapter = json.loads(out)["adapter"]
    for base in (("model", "--quantize", kind), ("small",)):
        code, out, err = main(
            "eval", *base, "--adapter", adapter, "--data", str(commands), "--limit", "4", "--no-generate"
        )
        assert code == 0 and "note:" not in err, err
    code, out, err = main(
        "eval", "four", "--adapter", adapter, "--data", str(commands), "--limit", "4", "--no-generate"
    )
    assert code == 0 and f"was trained on the base in {kind}, this base is nf4" in err
    code, out, err = main("merge", "model", adapter, "--out", "merged", "--json")
    assert code == 0 and json.loads(out)["onto"] == kind, err


def test_kernels_and_an_unknown_isa(monkeypatch):
    rows = json.loads(call("kernels", "--json").stdout)["operations"]
    assert {row["operation"] for row in rows} >= {"quantize_4bit", "dequantize_4bit", "quantize_int8"}
    monkeypatch.setenv("VENEER_ISA", "mmx")
    assert call("kernels").returncode == 2


def test_help_of_every_verb():
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        done = CliRunner().invoke(app, [name, "--help"])
        assert done.exit_code == 0 and command.callback.__doc__.split(".")[0][:30] in done.output


def test_inspect_says_it_in_words_and_in_json(main):
    code, out, err = main("inspect", "adapter", "--model", "model")
    assert code == 0 and "rank that was enough   0 for 95%" in out and "of the norm of the weights" in out, err
    assert sum(line.startswith("model.layers.") for line in out.splitlines()) == 14
    found = json.loads(main("inspect", "adapter", "--json")[1])
    assert found["layers"] == 14 and len(found["by_layer"]) == 14 and found["ranks"] == [4]
    assert found["base"] == found["base_model"] and not found["notes"]


def test_ranks_in_words_and_in_json(main):
    code, out, err = main("ranks", "model", "--rank", "2", "--rank", "4")
    assert (
        code == 0 and [line.split()[0] for line in out.splitlines() if line[:6].strip().isdigit()] == ["2", "4"] * 4
    ), err
    table = json.loads(main("ranks", "model", "--json")[1])
    row = next(row for row in table["rows"] if (row["targets"], row["r"]) == ("qv", 4))
    assert row["parameters"] == 2 * 4 * (48 + 48 + 48 + 24)


def test_combine_merge_and_export(main):
    code, out, err = main("combine", "adapter", "adapter", "--out", "twice", "--weights", "0.5,0.5", "--json")
    assert code == 0 and json.loads(out)["error"] < 1e-6 and json.loads(out)["out"] == "twice", err
    code, out, err = main("combine", "adapter", "adapter", "--out", "t", "--method", "ties", "--density", "0.4")
    assert code == 0 and "ties of 2 adapters: t" in out and "left out by the rank" in out, err
    code, out, err = main("combine", "adapter", "twice", "--analyze")
    assert code == 0 and "cosine" in out and "A-B" in out, err
    code, out, err = main("combine", "adapter", "twice", "--analyze", "--json")
    assert code == 0 and len(json.loads(out)["pairs"]) == 1, err
    code, out, err = main("merge", "model", "adapter", "twice", "--out", "both", "--json")
    assert code == 0 and json.loads(out)["adapters"] == ["adapter", "twice"], err
    code, out, err = main("merge", "model", "adapter", "--out", "small", "--requantize", "nf4", "--residual-rank", "2")
    assert code == 0 and "with the residual adapter of rank 2 (small/residual)" in out, err
    code, out, err = main("inspect", "small", "--json")
    assert json.loads(out)["quantization"] == "nf4"
    text("prose.txt", "Some words.\n\nAnd some more of them.\n")()
    code, out, err = main("merge", "model", "adapter", "--out", "m", "--text", "prose.txt", "--json")
    assert code == 0 and json.loads(out)["tokens"] == len("Some words.And some more of them."), err
    code, out, err = main("export", "adapter", "--for", "vllm", "--out", "v", "--json")
    assert code == 0 and json.loads(out)["form"] == "adapter", err
    code, out, err = main("export", "adapter", "--for", "vllm", "--out", "w", "--merged", "--model", "model")
    assert code == 0 and "merged model for vllm: w" in out, err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("combine", "adapter", "--out", "o", "--weights", "a,b"), 2, "--weights: found 'a,b'"),
        (("combine", "adapter"), 2, "--out: found none"),
        (("combine", "adapter", "--out", "o", "--plot", "x.png"), 2, "--plot: found without --analyze"),
        (("combine", "adapter", "none", "--out", "o"), 2, "no such folder"),
        (("combine", "adapter", "--out", "o", "--method", "mean"), 2, "expected linear, cat"),
        (("merge", "model", "adapter", "--out", "o", "--onto", "nf5"), 2, "--onto: found 'nf5'"),
        (("merge", "model", "adapter", "--out", "o", "--requantize", "nf5"), 2, "--requantize: found 'nf5'"),
        (("merge", "model", "adapter", "--out", "o", "--text", "none.txt"), 2, "none.txt"),
        (
            ("merge", "model", "adapter", "--out", "o", "--onto", "16-bit", "--tolerance", "0"),
            3,
            "too far from base and adapter",
        ),
        (("merge", "model", "adapter", "--out", "adapter"), 2, "is not empty"),
        (("export", "adapter", "--for", "gpt", "--out", "o"), 2, "--for: found 'gpt'"),
        (("export", "adapter", "--for", "llama.cpp", "--out", "o"), 2, "--model: found none"),
        (("export", "adapter", "--for", "peft", "--out", "o", "--onto", "x"), 2, "--onto: found 'x'"),
    ],
)
def test_bad_merges_combinations_and_exports(main, arguments, code, message):
    found, out, err = main(*arguments)
    assert (found, out) == (code, "") and message in err and "Traceback" not in err
    assert not os.path.exists("o")


def test_a_merge_above_the_tolerance_is_written_by_force(main):
    code, out, err = main(
        "merge", "model", "adapter", "--out", "o", "--onto", "16-bit", "--tolerance", "0", "--force", "--json"
    )
    assert code == 0 and json.loads(out)["kl"] > 0, err


def test_check_says_what_would_go_wrong(main, commands, monkeypatch):
    config("model/generation_config.json", eos_token_id=257)()
    sound = ("check", "quick", *SET, "model=model", *SET, f"data.train={commands}", *SET, "lora={r: 4, alpha: 8}")
    sound += (*SET, "data.eval=0.1", *SET, "train.learning_rate=auto")
    code, out, err = main(*sound)
    assert code == 0 and out.endswith("0 errors, 0 warnings\n") and "\x1b" not in out, err
    code, out, err = main(*sound, "--json")
    assert code == 0 and json.loads(out)["facts"]["rows"]["train"] == 33, err
    code, out, err = main(*sound, *SET, f"data.eval={commands}", "--json")
    assert code == 2 and json.loads(out)["findings"][0]["code"] == "overlap", err
    assert not os.path.exists("runs")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\x1b[32m" in main(*sound)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in main(*sound)[1]


def test_train_looks_first_and_is_not_changed_by_it(main, commands):
    run = (*RUN, *SET, "lora.dropout=0.2", *SET, "train.max_steps=3", *SET, f"data.train={commands}")
    code, _, err = main(*run)
    assert code == 0 and "warning: scaling: alpha / r is 8 (rank 4, alpha 32)" in err, err
    code, _, err = main(*run, *SET, "train.out=other", "--no-check")
    assert code == 0 and "warning: " not in err, err
    weights = "adapter/adapter_model.safetensors"
    with open(f"run/{weights}", "rb") as one, open(f"other/{weights}", "rb") as other:
        assert one.read() == other.read()
    wrong = (*run, *SET, "train.out=third", *SET, f"data.eval={commands}")
    code, out, err = main(*wrong)
    assert (code, out) == (2, "") and "overlap: 37 of 37 held-out rows" in err and not os.path.exists("third"), err
    assert main(*wrong, "--no-check")[0] == 0
