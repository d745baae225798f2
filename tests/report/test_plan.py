"""Planning a recipe before it runs: on its own rows, refused where it does not fit."""

import json

import pytest
from conftest import make_model, make_tokenizer

import veneer
from veneer.config import parse_recipe
from veneer.errors import RefusedError
from veneer.planning import plan as planning
from veneer.report.plan import WIDTH, describe, plan_recipe, plot
from veneer.training.batches import largest_pass


@pytest.fixture
def recipe(tmp_path):
    """A tiny model, rows of 40 to 120 tokens, and a recipe with changes."""
    veneer.save_model(make_model(), make_tokenizer(), tmp_path / "model")
    rows = [{"text": "x" * (40 + 8 * (n % 11))} for n in range(33)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(data=(), **changes):
        values = {
            "model": str(tmp_path / "model"), "lora": {"r": 4},
            "data": {"train": str(tmp_path / "rows.jsonl"), **dict(data)},
            "train": {"batch_size": 8, "out": str(tmp_path / "out")},
        }  # fmt: skip
        return parse_recipe({**values, **changes})

    return make


def test_the_largest_pass_is_of_the_runs_own_rows(recipe):
    plan, tokenizer = recipe(), make_tokenizer()
    rows, passes, held_out = largest_pass(tokenizer, plan.data, plan.train, packs=True)
    assert held_out == 0 and passes == 1 and 1 < len(rows) <= 8 and 8 * 41 <= sum(rows) <= 8 * 121
    padded, passes, _ = largest_pass(tokenizer, plan.data, plan.train, packs=False)
    assert passes == 1 and len(set(padded)) == 1 and len(padded) == 8 and sum(padded) >= sum(rows)
    short = recipe(data={"max_length": 64}, train={"batch_size": 33, "grad_accumulation": 2})
    rows, passes, _ = largest_pass(tokenizer, short.data, short.train, packs=True)
    assert max(rows) == 64 and 1000 < sum(rows) <= 2048 and passes == 2  # 33 rows of 64 tokens
    rows, passes, _ = largest_pass(
        tokenizer, short.data, recipe(train={"batch_size": 3, "grad_accumulation": 4}).train, True
    )
    assert passes == 4 and rows == (64, 64, 64)


def test_a_recipe_is_planned_before_its_model_is_loaded(recipe, monkeypatch):
    found = plan_recipe(recipe())
    assert found["fits"] and found["batch_size"] == 8 and found["rank"] == 4
    assert "it fits" in describe(found)
    more = plan_recipe(recipe(train={"batch_size": 33, "grad_accumulation": 4}))
    assert more["phases"]["train"] > found["phases"]["train"]
    monkeypatch.setattr(planning, "available_bytes", lambda: 10**6)
    with pytest.raises(RefusedError, match=r"does not fit into memory: found .* free, expected(.|\n)*--force"):
        plan_recipe(recipe())
    forced = plan_recipe(recipe(), force=True)
    assert not forced["fits"] and "does NOT fit" in describe(forced)


def test_a_start_of_the_weights_is_planned(recipe):
    found, plain = plan_recipe(recipe(lora={"r": 4, "init": "pissa"})), plan_recipe(recipe())
    assert found["parts"]["second base"] > 0 and found["peak_bytes"] > plain["peak_bytes"]


def test_evaluation_is_planned_where_rows_are_held_out(recipe):
    assert "evaluate" not in plan_recipe(recipe())["phases"]
    assert "evaluate" in plan_recipe(recipe(data={"eval": 0.2}))["phases"]


def test_the_time_of_a_run_is_of_all_its_rows(recipe, monkeypatch):
    monkeypatch.setattr("veneer.planning.speed.SECONDS", 0.2)
    once, thrice = (plan_recipe(recipe(train={"batch_size": 8, "epochs": n}), time=True) for n in (1, 3))
    assert (once["steps"], thrice["steps"]) == (5, 15)
    whole = sum(40 + 8 * (n % 11) + 1 for n in range(33))  # tokens: a byte is one, and one ends a row
    assert once["seconds"] == pytest.approx(whole / once["tokens_per_second"], rel=0.08)  # steps are rounded up to 64
    few = plan_recipe(recipe(train={"batch_size": 8, "max_steps": 1}), time=True)
    assert few["steps"] == 1 and few["seconds"] < once["seconds"]
    assert "5 steps" in describe(once) and "tokens/s" in describe(once)


def test_the_time_of_padded_rows_is_of_their_padding_too(recipe, monkeypatch):
    monkeypatch.setattr("veneer.planning.speed.SECONDS", 0.2)
    found = plan_recipe(recipe(data={"packing": False}), time=True)
    whole = sum(40 + 8 * (n % 11) + 1 for n in range(33))
    assert found["seconds"] > 1.2 * whole / found["tokens_per_second"]
    held = plan_recipe(recipe(data={"packing": False, "eval": 0.2}), time=True)
    assert held["seconds"] > 0 and held["phases"]["evaluate"] > held["phases"]["save"]


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_told_to_change_makes_it_fit(recipe, monkeypatch, packing):
    """Each change alone, put into the recipe, in the words that `train` says it."""
    train = {"batch_size": 32, "grad_accumulation": 2}
    data = {"packing": packing, "max_length": 128}
    monkeypatch.setattr("veneer.planning.memory.LOADED", 0)  # else loading is the peak of so small a model
    whole = plan_recipe(recipe(train=train, data=data))
    assert (whole["batch_size"], whole["grad_accumulation"]) == (32, 2)
    room = whole["peak_bytes"] - 200_000
    monkeypatch.setattr(planning, "available_bytes", lambda: room)
    monkeypatch.setattr(planning, "current_bytes", lambda: 0)
    tight = plan_recipe(recipe(train=train, data=data), force=True)
    tried = 0
    for change in tight["changes"]:
        words = change["change"].split(", ")
        if words[0].startswith("batch_size"):
            new = recipe(train={key: int(value) for key, value in map(str.split, words)}, data=data)
        elif words[0].startswith("recompute"):
            new = recipe(train={**train, "recompute": words[0].split()[1]}, data=data)
        elif words[0].startswith("max_length"):
            new = recipe(train=train, data={**data, "max_length": int(words[0].split()[1])})
        elif words[0] == "packing":
            new = recipe(train=train, data={**data, "packing": True})
        else:
            continue
        tried += 1
        assert plan_recipe(new, force=True)["fits"], change
    assert not tight["fits"] and tried >= 2


def test_a_budgets_machine_decides_the_device(recipe):
    made = recipe()
    assert plan_recipe(made, budget="rtx-4090")["device"] == "cuda"
    assert plan_recipe(made, budget="pc-16gb")["device"] == plan_recipe(made, budget="1GB")["device"] == "cpu"
    with pytest.raises(veneer.VeneerError, match="no memory for device cpu"):
        plan_recipe(recipe(device="cpu"), budget="t4")
    assert plan_recipe(recipe(device="cuda"), budget="t4")["host"]["fits"]


def test_what_does_not_fit_is_not_timed(recipe, monkeypatch):
    monkeypatch.setattr(planning, "available_bytes", lambda: 10**6)
    found = plan_recipe(recipe(), force=True, time=True)
    assert "seconds" not in found and "not measured" in found["notes"][-1]


def test_full_fine_tuning_of_a_base_stored_in_4_bits_is_refused(recipe, tmp_path):
    model, tokenizer = veneer.load(tmp_path / "model", quantize="nf4")
    veneer.save_model(model, tokenizer, tmp_path / "four")
    values = recipe(model=str(tmp_path / "four")).model_dump(exclude={"lora"})
    with pytest.raises(veneer.VeneerError, match="stored in nf4"):
        plan_recipe(parse_recipe({**values, "method": "full"}))


def test_the_bar_is_as_long_as_what_is_there(recipe):
    found = plan_recipe(recipe())
    room = 2 * (found["process_bytes"] + found["phases"]["train"])
    bar = next(
        line
        for line in describe({**found, "budget_bytes": room}).splitlines()
        if line.endswith("there") and "|" in line
    )
    assert bar.index("|") == WIDTH and abs(bar.count("·") - WIDTH // 2) <= 1
    tight = describe({**found, "budget_bytes": room // 4, "fits": False})
    bar = next(line for line in tight.splitlines() if line.endswith("there") and "|" in line)
    assert abs(bar.index("|") - WIDTH // 2) <= 1 and "·" not in bar


@pytest.mark.parametrize("name", ["p.png", "p.svg"])
def test_the_plot(recipe, tmp_path, name):
    pytest.importorskip("matplotlib")
    start = {"p.png": b"\x89PNG", "p.svg": b"<?xml"}[name]
    assert plot(plan_recipe(recipe()), tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(veneer.VeneerError, match=r"\.png or \.svg"):
        plot(plan_recipe(recipe()), tmp_path / "p.pdf")


@pytest.mark.parametrize(
    "lora",
    [
        {"dora": True, "dropout": 0.1},
        {"adalora": True},
        {"init": "eva"},
        {"tokens": [3, 5]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_all_kinds_of_adapters_are_planned(recipe, lora):
    found = plan_recipe(recipe(lora={"r": 4, **lora}))
    assert found["peak_bytes"] > 0


def test_what_the_adapter_asks_wrongly_is_said_before_loading(recipe):
    with pytest.raises(veneer.VeneerError, match=r"lora\.targets"):
        plan_recipe(recipe(lora={"r": 4, "targets": ["nothing_like_it"]}))


def test_a_base_that_is_stored_in_4_bits_is_planned_so(recipe, tmp_path):
    model, tokenizer = veneer.load(tmp_path / "model", quantize="nf4")
    veneer.save_model(model, tokenizer, tmp_path / "four")
    stored = plan_recipe(recipe(model=str(tmp_path / "four")))
    made = plan_recipe(recipe(quantize="nf4"))
    dense = plan_recipe(recipe())
    assert stored["parts"]["weights"] == made["parts"]["weights"] < dense["parts"]["weights"]
