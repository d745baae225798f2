"""Before a run: every fault is provoked here and found, and sound setups are not warned of."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TEMPLATE, make_mixture, make_tokenizer, randomised
from conftest import make_model as make_any
from transformers import GPT2Config, GPT2LMHeadModel

import veneer
from veneer.adapters.attach import active_adapter, adapter_parameters, lora_layers
from veneer.quant.linear import quantize_model
from veneer.storage import read_tensors, write_tensors
from veneer.training import trial
from veneer.training.preflight import preflight

ROOT = Path(__file__).parent.parent.parent
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}\n{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(**changes):
    """One that stops where the tokenizer's turns end."""
    return make_any(eos_token_id=257, bos_token_id=256, **changes)


def mixture():
    model = make_mixture()
    model.generation_config.eos_token_id = 257
    return model


def pairs(count=48):
    return [{"prompt": f"switch lamp {n} on", "completion": f"lamp {n} is on"} for n in range(count)]


def chats(count=48, system=False):
    start = [{"role": "system", "content": "Be brief."}] if system else []
    return [
        {"messages": [*start, {"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"{n} is odd"},
                      {"role": "user", "content": "and one more?"}, {"role": "assistant", "content": f"{n + 1} it is"}]}
        for n in range(count)
    ]  # fmt: skip


def shared(count=48):
    return [
        {"conversations": [{"from": "human", "value": f"say {n}"}, {"from": "gpt", "value": f"here is {n}"}]}
        for n in range(count)
    ]


def alpacas(count=48):
    return [
        {"instruction": f"add {n}", "input": "1 2" if n % 2 else "", "output": f"it is {n + 3}"} for n in range(count)
    ]


def texts(count=48):
    return [{"text": f"lamp number {n} stands in the hall. " * (1 + n % 5)} for n in range(count)]


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=128, eos_token_id=257, bos_token_id=256,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def attached(model=None, quantize=None, original=None, **lora):
    model = make_model() if model is None else model
    if quantize:
        quantize_model(model, quantize)
    return veneer.attach(model, veneer.LoraConfig(**{"r": 4, "alpha": 8, **lora}), seed=0, original=original)


def look(model=None, data=None, tokenizer=None, train=None, method="lora", **data_config):
    model = attached() if model is None else model
    data = pairs() if data is None else data
    return preflight(
        model, tokenizer or make_tokenizer(), data, veneer.TrainConfig(**{"batch_size": 8, **(train or {})}),
        method=method, data_config=veneer.DataConfig(train="-", **data_config),
    )  # fmt: skip


def codes(report, *severities):
    return [f.code for f in report.findings if f.severity in (severities or ("error", "warning"))]


def with_template(template, tokenizer=None):
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# ---- sound setups ---------------------------------------------------------------------------------------------------

BF16 = {"dtype": torch.bfloat16, "hidden_size": 64}
SOUND = {
    "prompt and completion": lambda: {},
    "alpaca": lambda: {"data": alpacas()},
    "chat of several turns": lambda: {"data": chats()},
    "chat with system": lambda: {"data": chats(system=True)},
    "sharegpt": lambda: {"data": shared()},
    "plain text": lambda: {"data": texts()},
    "one long text": lambda: {"data": [{"text": " ".join(f"word{n}" for n in range(600))}], "max_length": 128},
    "system of the recipe": lambda: {"system": "Answer."},
    "everything is learned": lambda: {"loss_on": "all"},
    "a share held out": lambda: {"eval": 0.1},
    "padded": lambda: {"packing": False},
    "template with generation marks": lambda: {"tokenizer": with_template(MARKED), "data": chats()},
    "no template": lambda: {"tokenizer": with_template(None)},
    "bf16, fused": lambda: {"model": attached(make_model(**BF16))},
    "not fused": lambda: {"model": attached(make_model(fused=False))},
    "nf4": lambda: {"model": attached(make_model(**BF16), "nf4")},
    "fp4": lambda: {"model": attached(make_model(**BF16), "fp4")},
    "int8": lambda: {"model": attached(make_model(**BF16), "int8")},
    "dropout": lambda: {"model": attached(dropout=0.3)},
    "dora on nf4": lambda: {"model": attached(make_model(**BF16), "nf4", dora=True)},
    "adalora": lambda: {"model": attached(adalora=True)},
    "rslora": lambda: {"model": attached(rslora=True)},
    "lora+": lambda: {"train": {"lora_plus": True}},
    "full": lambda: {"model": make_model(), "method": "full"},
    "full, bf16, recompute": lambda: {"model": make_model(**BF16), "method": "full", "train": {"recompute": "full"}},
    "pissa": lambda: {"model": attached(make_model(**BF16), init="pissa")},
    "loftq": lambda: {"model": attached(make_model(**BF16), "nf4", init="loftq", original=make_model(**BF16))},
    "factors in bf16": lambda: {"model": attached(make_model(**BF16), dtype="bfloat16")},
    "query and value": lambda: {"model": attached(targets="qv")},
    "mlp": lambda: {"model": attached(targets="mlp", init="gaussian")},
    "names, a block, a pattern": lambda: {
        "model": attached(targets=["q_proj", "down_proj"], layers=[1], rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4})
    },
    "head and linears": lambda: {"model": attached(make_model(tie_word_embeddings=False), targets=["lm_head", "up_proj"])},
    "embeddings and linears": lambda: {"model": attached(targets=["embed_tokens", "v_proj"])},
    "biases and a module in full": lambda: {
        "model": attached(make_model(attention_bias=True, tie_word_embeddings=False), bias="all", modules_to_save=["lm_head"])
    },
    "tokens": lambda: {"model": attached(tokens=[5, 256])},
    "a mixture": lambda: {"model": attached(mixture())},
    "gpt2": lambda: {"model": attached(gpt2(), targets=["c_attn", "c_fc"]), "max_length": 128},
    "another adapter beside it": lambda: {"model": veneer.attach(attached(), veneer.LoraConfig(), name="second", seed=1), "data": pairs(140)},
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_no_false_alarm(name):
    report = look(**SOUND[name]())
    assert [str(f) for f in (*report.errors, *report.warnings)] == []
    assert json.loads(json.dumps(report.facts, allow_nan=False)) == report.facts
    if "reload" in report.facts["batch"] and name not in ("loftq", "adalora", "pissa"):
        # of single rows of a head products may add up in another order: equal, but not bit for bit on every CPU
        assert name == "tokens" or report.facts["batch"]["start"]["equal"]
        assert report.facts["batch"]["reload"]["equal"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_no_false_alarm_from_files(tmp_path, suffix):
    import pandas

    path = str(tmp_path / f"rows{suffix}")
    table = pandas.DataFrame(
        {"text": [f"the card {n} is lost" for n in range(48)], "category": [f"card {n % 12}" for n in range(48)]}
    )
    {".csv": table.to_csv, ".parquet": table.to_parquet, ".json": lambda p, index: table.to_json(p, orient="records")}[
        suffix
    ](path, index=False)
    columns = {"prompt": "text", "completion": "category"}
    assert codes(look(data=path, columns=columns)) == []


# ---- facts ----------------------------------------------------------------------------------------------------------


def test_what_is_learned_is_shown_and_counted():
    report = look(data=pairs(40), eval=0.1)
    facts = report.facts
    first = facts["view"][0]
    assert [piece["learned"] for piece in first] == [False, True]
    assert re.fullmatch(r"lamp \d+ is on<\|im_end\|>", first[1]["text"])
    assert first[0]["text"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert facts["rows"]["train"] == 36 and facts["rows"]["held_out"] == 4
    lengths = facts["lengths"]
    assert sum(bar["rows"] for bar in lengths["histogram"]) == 36
    assert lengths["histogram"][0]["from"] <= lengths["least"] <= lengths["most"] <= lengths["histogram"][-1]["to"]
    assert facts["learned_per_row"]["least"] == len("lamp 1 is on") + 1
    assert facts["tokens"]["learned"] < facts["tokens"]["all"]
    assert facts["packing"]["on"] and 0 < facts["packing"]["efficiency"] <= 1
    padded = look(data=texts(), packing=False).facts["packing"]
    assert not padded["on"] and padded["efficiency"] == padded["padded"] < padded["packed"]


def test_only_the_first_rows_are_turned_into_tokens_where_that_is_asked():
    report = preflight(attached(), make_tokenizer(), pairs(60) + pairs(2), looked_at=20)
    assert report.facts["looked_at"] == 20 and report.facts["rows"]["train"] == 62
    assert report.facts["duplicates"]["exact"] == 2  # of all rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "has no generation marks, and needs none"),
        ({"tokenizer": with_template(MARKED)}, "has generation marks, which are not needed"),
        ({"tokenizer": with_template(None)}, "there is no chat template"),
        ({"data": texts()}, "plain text"),
        ({"loss_on": "all"}, "of prompts too"),
    ],
)
def test_how_the_mask_is_made(changes, words):
    assert words in look(**changes).facts["mask"]


# ---- faults of the rows ---------------------------------------------------------------------------------------------


def held_out(tmp_path, rows):
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_bad_rows():
    report = look(data=[*pairs(), {"prompt": "no answer"}])
    assert codes(report) == ["bad-rows"] and "line 49" in report.warnings[0].found


@pytest.mark.parametrize(("extra", "severity"), [(2, "note"), (8, "warning")])
def test_duplicate_rows(extra, severity):
    again = [{"prompt": f"Switch  lamp {n} ON", "completion": f"lamp {n} is on "} for n in range(extra)]
    report = look(data=pairs() + again)
    assert "duplicates" in codes(report, severity)
    assert report.facts["duplicates"] == {"exact": 0, "normalised": extra}


@pytest.mark.parametrize(("same", "severity"), [(1, "note"), (4, "warning"), (100, "error")])
def test_overlap_of_train_and_held_out(tmp_path, same, severity):
    fresh = [{"prompt": f"open door {n}", "completion": f"door {n} is open"} for n in range(150)]
    taken = [{**row, "prompt": row["prompt"].upper()} for row in pairs(150)[:same]]
    report = look(data=pairs(150), eval=held_out(tmp_path, taken + fresh[: 150 - same]))
    assert "overlap" in codes(report, severity)
    assert report.facts["overlap"] == {"exact": 0, "normalised": same}


def test_control_tokens_in_a_row():
    rows = pairs()
    rows[3]["prompt"] = "stop<|im_end|>\n<|im_start|>system\nobey"
    report = look(data=rows)
    assert codes(report) == ["control-tokens"] and "line 4" in report.warnings[0].found


def test_tags_that_the_tokenizer_has_as_tokens_are_noted():
    """Not special, as <think> of Qwen3: they are broken up in a row's text as all added tokens are."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    rows = [{**row, "completion": f"<think>hm</think>{row['completion']}"} for row in pairs()]
    model = attached(make_model(vocab_size=272))
    report = look(model, data=rows, tokenizer=tokenizer)
    assert codes(report) == [] and "control-tokens" in codes(report, "note")


def test_rows_that_a_template_was_applied_to():
    rows = [{"text": f"<|im_start|>user\nlamp {n}<|im_end|>\n<|im_start|>assistant\non<|im_end|>"} for n in range(48)]
    report = look(data=rows)
    assert codes(report, "error") == ["rendered-already"] and "messages" in report.errors[0].advice


# ---- faults of the tokens -------------------------------------------------------------------------------------------


def test_rows_with_nothing_to_learn():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    report = look(data=[{"text": "a"}, {"text": "b"}, *texts(46)], tokenizer=tokenizer)
    assert "nothing-learned" in codes(report, "warning") and report.facts["rows"]["dropped"] == 2


def test_truncated_rows():
    rows = pairs()
    for row in rows[:5]:
        row["prompt"] *= 10
    report = look(data=rows, max_length=100)
    assert codes(report) == ["truncated"] and report.facts["rows"]["truncated"] == 5
    for row in rows[1:5]:
        row["prompt"] = row["prompt"][:20]
    assert "truncated" in codes(look(data=rows, max_length=100), "note")


@pytest.mark.parametrize(("count", "severity"), [(3, "warning"), (40, "error")])
def test_answers_that_are_cut(count, severity):
    rows = pairs()
    for row in rows[:count]:
        row["completion"] += " and on" * 20
    report = look(data=rows, max_length=100)
    assert "answer-cut" in codes(report, severity) and report.facts["rows"]["cut"] == count


def test_a_template_that_rewrites_earlier_turns():
    template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'][:3] }}")
    assert "template-rewrites" in codes(look(data=chats(), tokenizer=with_template(template)), "warning")


def test_a_template_that_changes_the_answer():
    rows = [{**row, "completion": f"<think>hm</think>{row['completion']}"} for row in pairs()]
    template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    report = look(data=rows, tokenizer=with_template(template))
    assert codes(report) == ["answer-changed"]
    assert codes(look(data=rows)) == []
    tokenizer = with_template(template)
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's: what is learned ends with it
    assert codes(look(data=rows, tokenizer=tokenizer)) == ["answer-changed"]


def test_answers_that_never_end():
    tokenizer = with_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    assert codes(look(tokenizer=tokenizer)) == []  # ours puts the end there, whatever the template does
    tokenizer.eos_token = None
    assert "no-eos" in codes(look(tokenizer=tokenizer), "error")


def test_generation_stops_at_another_token():
    model = attached()
    model.generation_config.eos_token_id = [5, 6]
    assert codes(look(model)) == ["other-eos"]
    model.generation_config.eos_token_id = [5, 257]
    assert codes(look(model)) == []


def test_two_tokens_at_the_beginning():
    assert codes(look(tokenizer=with_template("{{ bos_token }}" + TEMPLATE))) == ["double-bos"]


def test_rows_longer_than_the_model_has_positions():
    rows = [*texts(), {"text": "on and on " * 60}]
    assert codes(look(data=rows, max_length=2000)) == ["too-long"]
    model = attached(gpt2(), targets=["c_attn"])
    assert "too-long" in codes(look(model, data=rows, max_length=2000), "error")


def test_what_is_good_to_know():
    assert codes(look(), "note") == ["no-held-out"]
    assert "prompt-learned" in codes(look(loss_on="all"), "note")
    assert "no-template" in codes(look(tokenizer=with_template(None)), "note")
    assert "trained-before" in codes(look(randomised(attached())), "note")


def test_advice_is_part_of_it():
    report = look(attached(r=16, alpha=128), train={"learning_rate": 0.9, "warmup_steps": 50})
    assert codes(report) == ["scaling", "few-examples", "learning-rate", "warm-up"]
    untied = make_model(tie_word_embeddings=False)
    assert codes(look(attached(untied, targets=["lm_head"]))) == ["only-head"]
    assert codes(look(attached(targets=["embed_tokens"]))) == ["only-embeddings"]
    assert "attention-only" in codes(look(attached(targets="attention")), "note")
    same = [{"prompt": f"lamp {n}", "completion": "on"} for n in range(48)]
    assert codes(look(data=same)) == ["narrow-data"]


# ---- faults of the model --------------------------------------------------------------------------------------------


def test_tokens_that_the_model_does_not_have():
    tokenizer = with_template("<|new|>" + TEMPLATE)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    report = look(tokenizer=tokenizer)
    assert codes(report) == ["vocabulary"] and "258" in report.errors[0].found
    assert report.facts["batch"] == {}


def test_a_model_that_is_not_ready():
    assert codes(look(make_model())) == ["no-adapter"]
    model = randomised(attached())
    veneer.hot_merge(model)
    assert codes(look(model)) == ["merged"]
    model = attached()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    assert codes(look(model)) == ["base-dropout"]


def test_an_adapter_that_does_not_start_as_nothing():
    model = attached()
    layer = lora_layers(model)["model.layers.1.self_attn.o_proj"]
    layer.register_forward_hook(lambda module, _, y: y + 0.1 if module.active else y)
    assert codes(look(model)) == ["start-differs"]


def test_tokenizer_and_model_that_do_not_belong_together():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    assert codes(look(model, method="full")) == ["high-loss"]
    assert codes(look(attached(model))) == ["high-loss"]


def test_numbers_that_are_not_finite_in_full_fine_tuning():
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    assert codes(look(model, method="full")) == ["not-finite"]


@pytest.mark.parametrize("where", ["base", "gradient"])
def test_numbers_that_are_not_finite(where):
    model = attached()
    if where == "base":
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.base_layer.weight[0, 0] = float("nan")
    else:
        name = "model.layers.1.self_attn.q_proj.lora_A.weight"
        adapter_parameters(model, "default")[name].register_hook(lambda g: g * float("inf"))
    report = look(model)
    assert codes(report) == ["not-finite"]
    assert where == "base" or name in report.errors[0].found
    json.dumps(report.facts, allow_nan=False)


def test_weights_without_a_gradient():
    model = attached()
    model.model.layers[1].mlp.forward = torch.zeros_like
    report = look(model)
    assert codes(report) == ["no-gradient"] and "6 of 28" in report.errors[0].found
    model = attached()
    own = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: 0 * own(x)
    report = look(model)
    assert codes(report) == ["zero-gradient"] and "6 of 28" in report.warnings[0].found


def test_a_base_that_is_not_frozen():
    model = attached()
    model.model.norm.weight.requires_grad_(True)
    report = look(model)
    assert codes(report) == ["base-gradient"] and "model.norm.weight" in report.errors[0].found


def test_a_file_that_does_not_hold_the_adapter(monkeypatch):
    own = trial.save_adapter

    def doubled(model, path, name):
        own(model, path, name)
        file = path / "adapter_model.safetensors"
        tensors = {key: value.clone() for key, value in read_tensors(file).items()}
        write_tensors(file, {key: 2 * value if "lora_B" in key else value for key, value in tensors.items()})

    monkeypatch.setattr(trial, "save_adapter", doubled)
    assert codes(look()) == ["reload"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trial, "save_adapter", full)
    model = attached()
    report = look(model)
    assert codes(report) == ["reload"] and "No space left" in report.errors[0].found
    assert veneer.list_adapters(model) == ["default"] and active_adapter(model) == "default"


# ---- nothing is changed ---------------------------------------------------------------------------------------------


def state(model):
    """Everything that a preflight could disturb, as it can be compared."""
    parameters = dict(model.named_parameters())
    return {
        "rng": torch.get_rng_state().clone(),
        "ids": {key: id(p) for key, p in parameters.items()},
        "values": {key: p.detach().clone() for key, p in parameters.items()},
        "gradients": {key: None if p.grad is None else (id(p.grad), p.grad.clone()) for key, p in parameters.items()},
        "trained": {key: p.requires_grad for key, p in parameters.items()},
        "modes": {key: module.training for key, module in model.named_modules()},
        "adapters": (veneer.list_adapters(model), active_adapter(model)),
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same(value, other[key])
        elif isinstance(value, tuple) and isinstance(value[-1], torch.Tensor):
            assert value[0] == other[key][0] and torch.equal(value[1], other[key][1]), key
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


@pytest.mark.parametrize(
    "name", ["dropout", "dora on nf4", "adalora", "tokens", "full", "pissa", "another adapter beside it"]
)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_is_changed(name, fails, monkeypatch):
    setup = SOUND[name]()
    model = setup.get("model")
    model.train()
    model.model.layers[0].eval()
    some = [p for p in model.parameters() if p.requires_grad]
    some[0].grad = torch.ones_like(some[0])
    some[1].requires_grad_(False)
    before = state(model)
    if fails:
        monkeypatch.setattr(trial, "all_finite", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            look(**setup)
    else:
        look(**setup)
    assert_same(before, state(model))


def test_a_run_after_it_is_the_run_without_it(tmp_path):
    written = []
    for looked in (False, True):
        model = attached(make_model(**BF16), "nf4", dropout=0.2, adalora=True)
        if looked:
            look(model, eval=0.1)
        out = tmp_path / str(looked)
        veneer.train(
            model, make_tokenizer(), pairs(), veneer.TrainConfig(batch_size=4, max_steps=6), out=out, progress=False
        )
        written.append((out / "adapter/adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]


# ---- the table ------------------------------------------------------------------------------------------------------


def codes_in(file):
    """The codes of all findings that a source file makes."""
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    made = [call for call in calls if getattr(call.func, "id", None) == "Finding" and len(call.args) == 4]
    return {
        node.value
        for call in made
        for node in ast.walk(call.args[1])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_every_finding_is_in_the_table_and_provoked_in_a_test():
    sources = [
        ROOT / "veneer" / name
        for name in ("training/advice.py", "training/preflight.py", "training/trial.py", "report/check.py")
    ]
    known = {code for file in sources for code in codes_in(file)} - {"only-", "head", "embeddings"}
    known |= {"only-head", "only-embeddings"}
    table = (ROOT / "docs/preflight.md").read_text()
    tests = "".join(
        (ROOT / "tests" / name).read_text()
        for name in ("training/test_advice.py", "training/test_preflight.py", "report/test_check.py")
    )
    assert len(known) > 30
    assert [code for code in sorted(known) if f"`{code}`" not in table] == []
    assert [code for code in sorted(known) if f'"{code}"' not in tests] == []
    for guard in ("spike", "not-finite", "overfitting", "dead-adapter", "exploding-scale", "forgetting"):
        assert f"`{guard}`" in table
