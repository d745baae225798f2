"""The quality benchmark's own parts, on a tiny model: every kind of cell, restarts, differences, the page."""

import json

import pytest
import torch
from conftest import make_model

import veneer
from benchmarks import quality, quality_report
from benchmarks.quality import BASE, CELLS, FULL, QLORA, QUICK, Cell, Options, Task
from veneer.errors import VeneerError

ROWS = [{"prompt": f"switch lamp {i} on", "completion": f"on {i % 7}"} for i in range(24)]
TASK = Task("home", "lamps", "Lamp to number.", 4, ROWS[:16], {"a": ROWS[16:20], "b": ROWS[20:]})


@pytest.fixture
def options(tmp_path, tokenizer):
    model = make_model(dtype=torch.bfloat16, fused=False, hidden_size=128, num_key_value_heads=4)
    veneer.save_model(model, tokenizer, tmp_path / "model")
    TASK.write(tmp_path / "work")
    return Options(**{**QUICK, "model": str(tmp_path / "model")})


def record(cell, correct, loss=1.0, **more):
    asked = {"a": {"exact_match": 0.5, "loss": loss, "tokens": 5, "correct": correct}}
    course = {"last_loss": 0.1, "largest_loss": 3.0, "largest_gradient": 2.0}
    settings = {"cell": {"name": cell}, "options": {"batch": 4, "lora_rate": 2e-3, "full_rate": 2e-4}}
    return {
        "settings": settings, "machine": "a machine", "asked": asked, "peak_bytes": 1e9, "seconds": 10.0, "bytes": 1e6,
        "trainable": 1000, **course, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [FULL, BASE, QLORA, "LoRA r64", "rsLoRA r64, alpha 32", "qv", "attention", "scaling 8"]
)
def test_every_kind_of_cell_is_measured(options, tmp_path, name):
    (cell,) = [cell for cell in CELLS if cell.name == name]
    found = quality.measure(
        options, cell, 0, {"system": TASK.system, "max_new_tokens": 4, "asked": ["a", "b"]}, str(tmp_path / "work")
    )
    assert found["steps"] == 4 and found["seconds"] > 0 and found["peak_bytes"] > 0 and found["not_applied"] == 0
    assert found["learning_rate"] == (2e-4 if name == FULL else 2e-3)
    total = sum(p.numel() for p in veneer.load(options.model)[0].parameters())
    assert (found["trainable"] == total) is (name == FULL)
    width = 2 if name == FULL else 4  # a bf16 model, or fp32 factors
    assert width * found["trainable"] < found["bytes"] < width * found["trainable"] + 20_000
    assert [len(part["correct"]) for part in found["asked"].values()] == [4, 4]
    assert not list((tmp_path / "work").glob("run-*"))


def test_the_cells_are_what_the_page_and_the_claims_name():
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names) == len({cell.slug for cell in CELLS})
    assert {name for claim in quality_report.CLAIMS for name in (claim.better, claim.worse)} <= set(names)
    assert {cell.name for cell in CELLS if cell.seeds == 3} == {FULL, BASE, QLORA}
    scalings = {cell.lora["alpha"] / cell.lora["r"] for cell in CELLS if cell.name.startswith("scaling")}
    assert scalings == set(quality.SCALINGS) and min(scalings) == 0.25 and max(scalings) == 8
    model = veneer.attach(make_model(hidden_size=64), veneer.LoraConfig(r=2, targets=quality.QV))
    assert veneer.count_parameters(model).trainable > 0
    assert not Cell("later", {"no_such_setting": 1}).known() and Cell(FULL, None).known()


def test_a_run_without_a_finite_loss_is_a_result(options, tmp_path, monkeypatch):
    def diverges(*args, **kwargs):
        raise VeneerError("step 3: no finite loss and gradient in 3 steps in a row; none of them was applied")

    monkeypatch.setattr(veneer, "train", diverges)
    task = {"system": "", "max_new_tokens": 4, "asked": ["a"]}
    found = quality.measure(options, CELLS[1], 0, task, str(tmp_path / "work"))
    assert found["diverged"].startswith("step 3") and "asked" not in found


def test_what_is_measured_is_not_measured_again(options, tmp_path, monkeypatch):
    done = []

    def process(options, cell, seed, task, work, limit):
        done.append((seed, cell.name))
        if cell.name == QLORA and len(done) < 4:
            return "exit 1: no memory"
        return {key: value for key, value in record(cell.name, "0101").items() if key != "settings"}

    monkeypatch.setattr(quality, "_process", process)
    cells = CELLS[:3]
    out = tmp_path / "out"
    failed = quality.run_cells(options, cells, [TASK], out, 1, 9)
    assert done == [(0, FULL), (0, BASE), (0, QLORA)] and failed == ["home, QLoRA r16, seed 0: exit 1: no memory"]
    assert quality.run_cells(options, cells, [TASK], out, 2, 9) == []
    assert done[3:] == [(0, QLORA), (1, FULL), (1, BASE), (1, QLORA)]
    with pytest.raises(SystemExit, match="made with other settings"):
        quality.run_cells(Options(model="other"), cells, [TASK], out, 1, 9)


def test_from_the_command_line(options, tmp_path, monkeypatch):
    """In processes of their own, on a folder of BANKING77's form, and the page."""
    monkeypatch.setattr(quality, "home_task", lambda options: TASK)
    bank = tmp_path / "bank"
    bank.mkdir()
    for name, count in (("train", 40), ("test", 20)):
        rows = "".join(f'"where is my card, {i}?",card_{i % 3}\n' for i in range(count))
        (bank / f"{name}.csv").write_text("text,category\n" + rows)
    arguments = ["--quick", "--model", options.model, "--out", str(tmp_path / "out"), "--only", f"^({FULL}|{BASE})$"]
    assert quality.main([*arguments, "--data", str(bank)]) == 0
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").glob("*/*-s0.json"))
    assert files == [f"{task}/{cell}-s0.json" for task in ("banking77", "home") for cell in ("full", "lora-r16")]
    page = (tmp_path / "out/methods.md").read_text()
    assert "A quick run: the figures mean nothing" in page and page.index("## lamps") < page.index("## BANKING77")
    assert len(json.loads((tmp_path / "out/banking77/full-s0.json").read_text())["asked"]["messages"]["correct"]) == 6
    train = [json.loads(line) for line in (tmp_path / "out/banking77/data/train.jsonl").read_text().splitlines()]
    assert len(train) == 16 and all(row["completion"].startswith("card_") for row in train)
    assert quality.main([*arguments[1:3], "--out", str(tmp_path / "out"), "--report", str(tmp_path / "docs")]) == 0
    assert (tmp_path / "docs/methods.md").read_text() == page


def test_other_folders_are_refused_and_clinc_is_read(tmp_path):
    with pytest.raises(SystemExit, match="found neither"):
        quality.intent_task(tmp_path, Options())
    values = {part: [[f"{part} {i}", f"intent {i % 3}"] for i in range(9)] for part in ("train", "test")}
    (tmp_path / "data_full.json").write_text(json.dumps(values))
    task = quality.intent_task(tmp_path, Options(other=(5, 3)))
    assert task.name == "clinc150" and len(task.train) == 5 and len(task.asked["messages"]) == 3
    assert all(row["prompt"].startswith("train") for row in task.train)


def test_differences_are_taken_row_by_row():
    a = [record("a", "1111000000"), record("a", "1111100000")]
    b = [record("b", "1110000000")]
    apart, error = quality_report.difference(a, b)
    assert apart == pytest.approx(15.0) and error == pytest.approx(10.67, abs=0.01)
    assert quality_report.difference(a, a) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("apart", "error", "bound", "expected"),
    [(-1, 0.5, 3, "confirmed"), (-1, 2, 3, "open"), (-9, 2, 3, "refuted"), (2, 0.5, 0, "confirmed"), (0, 0, 0, "open"),
     (0.5, 0.5, 0, "open"), (-2, 0.5, 0, "refuted")],
)  # fmt: skip
def test_verdicts(apart, error, bound, expected):
    assert quality_report.verdict(apart, error, bound) == expected


def test_the_page_says_what_came_out(tmp_path):
    folder = tmp_path / "out/home"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"title": "lamps", "train": 1200}))
    half, good = "10" * 50, "1" * 90 + "0" * 10
    for name, seed, correct in ((FULL, 0, good), (FULL, 1, half), (BASE, 0, good), (QLORA, 0, half), ("qv", 0, half)):
        more = {"trainable": 100_000, "peak_bytes": 4e9} if name == FULL else {}
        (folder / f"{name.split()[0].lower()}-s{seed}.json").write_text(json.dumps(record(name, correct, **more)))
    bad = {key: value for key, value in record("scaling 8", "1").items() if key != "asked"} | {"diverged": "step 9"}
    (folder / "scaling-8-s0.json").write_text(json.dumps(bad))
    written = quality_report.write_report(tmp_path / "out", tmp_path / "docs")
    page = written[0].read_text()
    assert "| full | 100,000 | 70.0 (50.0..90.0) |" in page and "| scaling 8 | 1,000 | diverged |" in page
    assert '- **refuted**: "QLoRA [...] typically' in page and "QLoRA r16 less LoRA r16: -40.0" in page
    assert '- **confirmed**: "LoRA with r = 16 applied to all' in page and "figures mean nothing" not in page
    assert "99.0% at r 16" in page and "LoRA 75%" in page
    order = [page.index(f"| {name} |") for name in (FULL, BASE, QLORA, "qv", "scaling 8")]
    assert order == sorted(order)


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    usable = {cell.name: [record(cell.name, "10" * (3 + number))] for number, cell in enumerate(CELLS)}
    assert quality_report._plot(usable, "lamps", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "p.png").stat().st_size < 200_000
