"""What settings and amounts of data give away before a run; pure functions."""

import pytest

import veneer
from veneer.config import read_recipe, shipped_recipes
from veneer.optim.schedule import default_learning_rate
from veneer.training.advice import Task, advise, errors_first, recommend

TASK = Task(
    rows=1000, learned_tokens=20_000, distinct=900, commonest=3, width=576, trained=4_884_480, steps=63, warmup=2
)


def codes(task=TASK, lora=None, train=None, severity="warning", method="lora"):
    lora = None if method == "full" else (lora or veneer.LoraConfig())
    return [f.code for f in advise(task, lora, train or veneer.TrainConfig()) if f.severity == severity]


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({}, []),
        ({"r": 16}, []),
        ({"r": 32, "alpha": 64}, []),
        ({"r": 16, "alpha": 16}, []),
        ({"r": 64}, ["rank-without-alpha"]),
        ({"r": 4}, ["rank-without-alpha", "scaling"]),
        ({"r": 64, "rslora": True}, []),
        ({"alpha": 16}, ["alpha-without-rank"]),
        ({"alpha": 128}, ["alpha-without-rank", "scaling"]),
        ({"r": 8, "alpha": 32}, []),
        ({"r": 8, "alpha": 33}, ["scaling"]),
        ({"r": 8, "alpha": 2}, []),
        ({"r": 8, "alpha": 1.9}, ["scaling"]),
        ({"r": 16, "alpha": 32, "rslora": True}, ["scaling"]),  # 32 / sqrt(16)
        ({"r": 16, "alpha": 32, "rank_pattern": {"q_proj": 4}}, ["scaling"]),
        ({"r": 16, "alpha": 32, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}}, []),
        ({"r": 16, "alpha": 32, "depth": [32, 8]}, []),  # keeps the scaling
    ],
)
def test_rank_and_alpha(lora, expected):
    assert codes(lora=veneer.LoraConfig(**lora)) == expected


def test_a_recipe_that_leaves_alpha_out_is_seen_too(tmp_path):
    (tmp_path / "r.yaml").write_text("lora: {r: 64}\ndata: {train: x.jsonl}\n")
    assert codes(lora=read_recipe(tmp_path / "r.yaml").lora) == ["rank-without-alpha"]


@pytest.mark.parametrize(
    ("kinds", "severity", "expected"),
    [
        ({"embeddings"}, "warning", ["only-embeddings"]),
        ({"head"}, "warning", ["only-head"]),
        ({"head", "embeddings"}, "warning", ["only-embeddings"]),
        ({"head", "other"}, "warning", []),
        ({"attention"}, "note", ["attention-only"]),
        ({"attention", "other"}, "note", []),
    ],
)
def test_which_layers(kinds, severity, expected):
    assert codes(TASK._replace(kinds=frozenset(kinds)), severity=severity) == expected


@pytest.mark.parametrize(
    ("changes", "lora", "expected"),
    [
        ({"rows": 128, "distinct": 128}, {}, []),
        ({"rows": 127, "distinct": 127}, {}, ["few-examples"]),
        ({"rows": 127, "distinct": 127}, {"r": 8, "alpha": 16}, []),
        ({"rows": 500, "distinct": 500}, {"r": 64, "alpha": 128}, ["few-examples"]),
        ({"learned_tokens": 9_768_960}, {}, []),
        ({"learned_tokens": 9_768_961}, {}, ["low-rank"]),
    ],
)
def test_rows_for_the_rank(changes, lora, expected):
    assert codes(TASK._replace(**changes), veneer.LoraConfig(**lora)) == expected


def test_the_rank_that_would_hold_it_is_named():
    (finding,) = advise(TASK._replace(learned_tokens=4 * 9_768_960), veneer.LoraConfig(), veneer.TrainConfig())
    assert finding.code == "low-rank" and "rank 64 would hold them" in finding.advice
    assert codes(lora=veneer.LoraConfig(r=128, alpha=256), severity="note") == ["high-rank"]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("width", [576, 4096])
def test_a_learning_rate_far_from_the_usual_one(method, width):
    usual = default_learning_rate(width, method)
    task = TASK._replace(width=width)
    for times, expected in ((1, []), (7.9, []), (1 / 31, []), (8.1, ["learning-rate"]), (1 / 33, ["learning-rate"])):
        train = veneer.TrainConfig(learning_rate=times * usual)
        assert codes(task, train=train, method=method) == expected, times
    assert codes(task, train=veneer.TrainConfig(), method=method) == []


def test_a_warm_up_that_never_ends():
    assert codes(TASK._replace(warmup=63)) == ["warm-up"] and codes(TASK._replace(warmup=62)) == []
    assert codes(TASK._replace(warmup=1, steps=1)) == []


@pytest.mark.parametrize(
    ("rows", "distinct", "commonest", "severity", "expected"),
    [
        (40, 1, 40, "warning", ["narrow-data"]),
        (1000, 77, 600, "warning", ["narrow-data"]),
        (1000, 9, 130, "warning", ["narrow-data"]),
        (1000, 30, 40, "warning", []),
        (1000, 30, 40, "note", ["narrow-data"]),
        (1000, 800, 40, "note", []),
        (40, 7, 6, "warning", []),
    ],
)
def test_narrow_data(rows, distinct, commonest, severity, expected):
    task = TASK._replace(rows=rows, distinct=distinct, commonest=commonest)
    assert codes(task, veneer.LoraConfig(r=4, alpha=8), severity=severity) == expected


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
@pytest.mark.parametrize(("width", "trained"), [(576, 4_884_480), (4096, 41_943_040)])
def test_shipped_recipes_are_not_warned_of(name, width, trained):
    """On 2,400 rows, as the demo has; `production` with its 100 steps of warm-up is for that many and more."""
    recipe = read_recipe(name)
    task = TASK._replace(rows=2400, width=width, trained=trained, distinct=2000, steps=150, warmup=100)
    assert codes(task, recipe.lora, recipe.train) == []


def test_what_is_recommended():
    few, some, many = (recommend(TASK._replace(rows=rows)) for rows in (100, 500, 1000))
    assert [found["r"] for found in (few, some, many)] == [8, 16, 64]
    assert recommend(TASK._replace(width=4096))["r"] == 32
    for found in (few, some, many):
        assert (
            found["alpha"] == 2 * found["r"] and found["targets"] == "all-linear" and found["why"].keys() < found.keys()
        )
        lora = veneer.LoraConfig(**{key: found[key] for key in ("r", "alpha", "targets")})
        train = veneer.TrainConfig(learning_rate=found["learning_rate"])
        rows = 100 if found is few else 1000
        assert codes(TASK._replace(rows=rows), lora, train) == []  # what is recommended is not warned of
    for rows in range(1, 128):
        r = recommend(TASK._replace(rows=rows))["r"]
        found = codes(TASK._replace(rows=rows, learned_tokens=rows), veneer.LoraConfig(r=r, alpha=2 * r))
        assert "few-examples" not in found or r == 1
    full = recommend(TASK, "full")
    assert "r" not in full and full["learning_rate"] == default_learning_rate(576, "full")


def test_errors_come_first():
    found = advise(
        TASK._replace(kinds=frozenset({"attention"}), steps=2), veneer.LoraConfig(r=64), veneer.TrainConfig()
    )
    assert [f.severity for f in errors_first(found)] == ["warning", "warning", "note"]
    assert str(errors_first(found)[0]).startswith("rank-without-alpha: lora.r is 64 and lora.alpha was left at 32")


def test_a_recipes_rank_that_is_changed_alone(tmp_path):
    """The file sets both; who changes one of them on the command line may have forgotten the other."""
    file = tmp_path / "r.yaml"
    file.write_text("model: m\nlora: {r: 64, alpha: 128}\ndata: {train: rows.jsonl}\n")
    for change, found in (
        ([], []), (["lora.r=32"], ["rank-without-alpha"]), (["lora.alpha=64"], ["alpha-without-rank"]),
        (["lora.r=32", "lora.alpha=64"], []), (["lora.r=32", "lora.rslora=true"], ["scaling"]),
    ):  # fmt: skip
        assert codes(lora=read_recipe(file, change).lora) == found
