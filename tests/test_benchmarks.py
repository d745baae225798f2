"""The benchmarks' own parts: what makes a ratio void, and each training contender on a tiny model."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_model

import veneer
from benchmarks import (
    bases,
    c1_lora_step,
    c3_memory,
    c4_head,
    c6_quantize,
    c10_methods,
    c11_merge,
    data,
    follow,
    run,
    starts,
    training,
    ways,
)  # fmt: skip
from benchmarks.plan import QUICK, Agreement, Cell, Figure, Options, Result, ratio


def result(name, losses, seconds=1.0, norms=(1.0, 1.0)):
    record = {
        "losses": losses, "grad_norms": list(norms), "step_seconds": [seconds], "tokens": 100, "peak_bytes": 1e9,
        "steps_peak_bytes": 1e9,
    }  # fmt: skip
    return Result(Cell(name, "x:y"), [record, record])


LIMITS = Result(Cell("limits", "x:y"), [{"bf16_gflops": 600.0, "fp32_gflops": 60.0, "read_gbs": 10.0}] * 2)


@pytest.fixture
def options(tmp_path, tokenizer):
    model = make_model(dtype=torch.bfloat16, fused=False)
    veneer.save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "work").mkdir()
    rows = [{"instruction": f"switch lamp {i} on", "input": "", "output": f"on {i % 7}"} for i in range(20)]
    rows.insert(3, {**rows[0], "status": "too similar"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Options(
        work=str(tmp_path / "work"), model=str(tmp_path / "model"), data=str(tmp_path / "rows.jsonl"), rank=4
    )
    made = replace(made, **QUICK, learning_rate=1e-2)
    (tmp_path / "work" / "prepare.json").write_text(json.dumps(data.prepare(made)))
    return made


def test_options_survive_the_way_to_a_process(options):
    assert Options.from_json(options.to_json()) == options


def test_figures_and_ratios_are_taken_round_by_round():
    assert str(Figure([3.0, 1.0, 200.0])) == "3 (1..200)"
    assert ratio(Figure([2.0, 8.0]), Figure([1.0, 2.0])) == (2.0, 4.0)


def test_a_ratio_is_void_when_the_numbers_are_not_the_peers():
    peer, exact = result("PEFT bf16", [2.0, 1.0]), result("PEFT fp32", [2.0, 1.0])
    for losses, norms, good in (
        ([2.0, 1.004], (1.0, 1.0), True),
        ([2.0, 1.006], (1.0, 1.0), False),
        ([2.0, 1.0], (1.0, 1.03), False),
        ([2.0, float("nan")], (1.0, 1.0), False),
    ):
        ours = result("veneer bf16", losses, 0.5, norms)
        results = {r.name: r for r in (ours, peer, result("PEFT bf16 + checkpointing", [2.0, 1.0], 2.0), exact)}
        (table,) = c1_lora_step.report(results, LIMITS, Options())
        found = table.rows[0]["ratio to best peer"]
        assert (found == (2.0, 2.0)) if good else (found == "VOID"), losses
        assert any(note.startswith("VOID") for note in table.notes) != good
    # the peer's own bf16 and fp32 runs are apart: as much again is allowed, up to a bound
    assert Agreement(peer, result("PEFT fp32", [2.0, 1.005])).loss == pytest.approx(0.01)
    assert Agreement(peer, result("PEFT fp32", [2.0, 2.0])).loss == 0.02


def test_without_the_peers_bf16_run_its_fp32_run_is_what_to_agree_with():
    slow = Result(Cell("PEFT bf16", "x:y"), problem="failed: not done after 100 s")
    agreement = Agreement(slow, result("PEFT fp32", [2.0, 1.0]))
    assert agreement.loss == 0.005 and "PEFT bf16 was not measured" in agreement.note()
    assert agreement.void(result("veneer", [2.0, 1.004])) is None and agreement.void(result("veneer", [2.0, 1.01]))


def test_a_process_that_fails_is_reported(options):
    runner = run.Runner(options, 1, None, 60)
    found = runner.process(Cell("broken", "benchmarks.data:no_such_function"))
    assert isinstance(found, str) and "no_such_function" in found


def test_what_is_not_installed_is_skipped():
    cell = Cell("other", "x:y", needs=("no_such_package",))
    assert "no_such_package not installed" in (cell.missing() or "")
    results, _ = run.Runner(Options(), 0, None, 1).measure([cell], "c0")
    assert results[cell.key].problem == cell.missing()


@pytest.mark.parametrize(("calls", "rounds"), [(2, [1, 0]), (5, [1, 1]), (6, [2, 2])])
def test_ctrl_c_keeps_whole_rounds(monkeypatch, calls, rounds):
    """Each round is the machine's limits, a and b; in the first one single contenders count too."""
    cells, seen = [Cell("a", "x:a"), Cell("b", "x:b")], []

    def process(self, cell):
        if len(seen) == calls:
            raise KeyboardInterrupt
        seen.append(cell)
        return {"seconds": 1.0}

    monkeypatch.setattr(run.Runner, "process", process)
    results, limits = run.Runner(Options(), 4, None, 1).measure(cells, "c0")
    assert [len(results[cell.key].records) for cell in cells] == rounds and len(limits.records) == rounds[0]
    assert (results[cells[1].key].problem == "not measured: interrupted") == (rounds[1] == 0)
    seen.clear()
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        run.Runner(Options(), 4, None, 1).measure(cells, "c0")


def test_inputs_are_the_rows_marked_usable(options, tmp_path):
    assert len((tmp_path / "work/train.jsonl").read_text().splitlines()) == 8
    assert len(data.chat(options, "train")) == 8 and len(data.chat(options, "validation")) == 4
    assert "too similar" not in (tmp_path / "work/train.jsonl").read_text()


@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize("source", ["blocks", "chat"])
def test_contenders_take_the_same_steps(options, base, source):
    pytest.importorskip("peft")
    ours, theirs, checked = (
        training.steps(options, by, base, recompute, source)
        for by, recompute in (("veneer", "none"), ("peft", "none"), ("peft", "full"))
    )
    tolerance = 1e-5 if base == "fp32" else 1e-2
    assert ours["trainable"] == theirs["trainable"] and len(ours["losses"]) == 2 and min(ours["grad_norms"]) > 1e-3
    for other in (theirs, checked):
        assert ours["losses"] == pytest.approx(other["losses"], rel=tolerance)
        assert ours["grad_norms"] == pytest.approx(other["grad_norms"], rel=5 * tolerance)


def test_methods_take_turns_and_dora_is_what_the_peer_trains(options):
    pytest.importorskip("peft")
    cells = [cell for cell in c10_methods.CELLS if "bf16" in cell.name]
    records = {cell.name: c10_methods.steps(options, **cell.arguments) for cell in cells}
    ours, theirs = records["veneer bf16"], records["PEFT bf16"]
    assert list(ours) == list(c10_methods.METHODS) and list(theirs) == ["LoRA", "DoRA"]
    for method in theirs:
        assert ours[method]["losses"] == pytest.approx(theirs[method]["losses"], rel=1e-2)
        assert ours[method]["grad_norms"] == pytest.approx(theirs[method]["grad_norms"], rel=5e-2)
    (exact,) = (cell for cell in c10_methods.CELLS if cell.once)
    exact = c10_methods.exact_steps(options, **exact.arguments)
    assert list(exact) == ["DoRA"] and exact["DoRA"]["losses"] != theirs["DoRA"]["losses"]
    assert exact["DoRA"]["losses"] == pytest.approx(theirs["DoRA"]["losses"], rel=1e-2)
    for record in ours.values():
        timed = c10_methods.MORE * options.steps
        assert len(record["losses"]) == options.warmup + 1 + options.steps and len(record["step_seconds"]) == timed
    # the same start, other steps: what each method is shows in its losses
    assert len({record["losses"][-1] for record in ours.values()}) == len(ours)
    assert ours["LoRA"]["losses"][0] == ours["LoRA+"]["losses"][0] != ours["rsLoRA"]["losses"][0]


def test_c11_compares_the_same_work_and_the_peer_with_the_definition(options):
    pytest.importorskip("peft")
    results = {}
    for cell in c11_merge.CELLS:
        function = getattr(c11_merge, cell.function.partition(":")[2])
        results[cell.name] = Result(cell, [function(options, **cell.arguments)])
    for by in ("veneer", "peft"):
        assert results[f"{by}: {c11_merge.MERGE}"].records[0]["error_over_rounding"] < (1.01 if by == "veneer" else 4)
        for method in ("svd", "ties"):
            record = results[f"{by}: {method}"].records[0]
            assert 0 < record["error"] < 1 and -1e-6 < record["above_best"] < 1e-3
    assert results[f"veneer: {c11_merge.HOT}"].records[0]["exact"]
    merging, combining = c11_merge.report(results, LIMITS, options)
    assert len(merging.rows) == 2 and [row["work"] for row in combining.rows] == list(c11_merge.METHODS)
    assert merging.rows[0].keys() == merging.rows[1].keys()


def test_ways_measures_every_way_against_the_one_that_was_trained(options):
    results = {
        cell.name: Result(cell, [ways.measure(options, **cell.arguments)])
        for cell in ways.CELLS
        if cell.name in (ways.BASE, ways.TRAINED, ways.WANTED, "merged onto the 4-bit base, decoded")
    }
    assert results[ways.TRAINED].records[0]["kl"] == 0 < results[ways.BASE].records[0]["kl"]
    assert results[ways.WANTED].records[0]["error"]["with residual"] < 1e-3
    assert results[ways.WANTED].records[0]["kl"] < results[ways.BASE].records[0]["kl"]
    missing = {cell.name: Result(cell, problem="not run") for cell in ways.CELLS}
    (table,) = ways.report({**missing, **results}, LIMITS, options)
    assert len(table.rows) == len(ways.WAYS)
    good, bad = ({**results[ways.TRAINED].records[0], "exact_match": share} for share in (0.8, 0.6))
    made = {ways.BASE: {**good, "exact_match": 0.0}, ways.TRAINED: good, ways.WANTED: {**bad, "error": None}}
    (table,) = ways.report({n: Result(Cell(n, "x:y"), [r]) for n, r in made.items()}, LIMITS, Options())
    assert table.notes[0].startswith("NOT MET: in 4 bits, residual rank 16: 75% of the gain")


def test_a_method_that_costs_too_much_is_named():
    def contender(name, **times):
        record = {
            method: {**result("", [2.0, 1.0], seconds).records[0], "peak_bytes": 1e9}
            for method, seconds in times.items()
        }
        return Result(Cell(name, "x:y"), [record, record])

    results = {cell.name: Result(cell, problem="skipped: not installed") for cell in c10_methods.CELLS}
    results["PEFT bf16"] = contender("PEFT bf16", LoRA=4.0, DoRA=6.0)
    slow = {"LoRA": 1.0, "DoRA": 1.09, "LoRA+": 1.06, "AdaLoRA, ranks moving": 1.06, "AdaLoRA, settled": 1.02}
    results["veneer bf16"] = contender("veneer bf16", **slow)
    (table,) = c10_methods.report(results, LIMITS, Options())
    rows = {(row["contender"], row["method"]): row["of plain LoRA's"] for row in table.rows}
    assert rows["veneer bf16", "DoRA"] == (1.09, 1.09) and rows["PEFT bf16", "DoRA"] == (1.5, 1.5)
    assert rows["veneer bf16", "AdaLoRA"] == pytest.approx((1.048, 1.048))
    assert rows["veneer nf4", "AdaLoRA"] is rows["veneer nf4", "DoRA"] is rows["veneer bf16", "rsLoRA"] is None
    assert [note.split(":")[2].strip() for note in table.notes if note.startswith("NOT MET")] == ["LoRA+"]
    results["PEFT bf16"].records[0]["DoRA"]["losses"] = [2.0, 1.1]
    (table,) = c10_methods.report(results, LIMITS, Options())
    assert "VOID" in {row["of plain LoRA's"] for row in table.rows}
    run.show([table])


def test_reports_can_be_printed_and_written(options, capsys):
    pytest.importorskip("bitsandbytes")
    c4 = {cell.name: Result(cell, [c4_head.measure(options, **cell.arguments)]) for cell in c4_head.CELLS}
    c6 = {cell.name: Result(cell, [c6_quantize.measure(options, **cell.arguments)]) for cell in c6_quantize.CELLS}
    cells = (*c3_memory.BENCHMARK.cells, *follow.CELLS)
    steps = {cell.name: result(cell.name, [1.0, 1.0]) for cell in cells}
    small = replace(options, follow_steps=2)
    tables = [
        *c4_head.report(c4, LIMITS, options),
        *c6_quantize.report(c6, LIMITS, options),
        *c3_memory.report(steps, LIMITS, options),
        *follow.report({cell.name: steps[cell.name] for cell in follow.CELLS}, LIMITS, small),
        *bases.report(
            {cell.name: Result(cell, [bases.measure(small, **cell.arguments)]) for cell in bases.CELLS}, LIMITS, small
        ),
    ]
    run.show(tables)
    text = run.markdown(["now"], tables)
    json.dumps([table.to_json() for table in tables])
    assert "bit-equal: codes" in text and "VOID" not in text and "C4 frozen head" in capsys.readouterr().out


def test_int4_is_the_nearest_of_fifteen_steps():
    w = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    w[0] = 0
    rounded = bases.int4(w)
    step = torch.nn.functional.pad(w.view(-1), (0, 34)).view(-1, 64).abs().amax(1).repeat_interleave(64)[:350] / 7
    assert rounded.shape == w.shape and bool(((w - rounded).abs().view(-1) <= step * 0.5001).all())
    assert rounded.view(-1)[70:128].unique().numel() <= 15 and torch.equal(bases.int4(rounded), rounded)


def test_bases_that_are_not_ordered_as_wanted_are_named():
    def table(**changes):
        values = {name: 2.0 for name in bases.ARGUMENTS} | {bases.NF4: 2.1, bases.NF4_PLAIN: 2.1}
        values |= {bases.FP4: 2.2, bases.FP4_PLAIN: 2.2, bases.INT4: 2.3} | changes
        results = {}
        for cell in bases.CELLS:
            losses = [values[cell.name] + block / 10 for block in range(4)]
            record = {"losses": losses, "tokens": 100, "bits": 4.5, "footprint": 1e6}
            results[cell.name] = Result(cell, [record])
        return bases.report(results, LIMITS, Options(data="rows.json"))[0]

    def found(table):
        return [note for note in table.notes if note.startswith("NOT MET")]

    assert not found(table()) and len(table().rows) == len(bases.CELLS)
    assert len(found(table(**{bases.INT4: 2.05}))) == 1 and "int4" in found(table(**{bases.INT4: 2.05}))[0]
    assert len(found(table(**{bases.NF4: 2.15}))) == 1  # double quantisation costs something


def test_starts_are_compared_before_and_after_the_first_steps(options):
    errors = {name: starts.measure_error(options, 4, start) for name, start in starts.STARTS.items()}
    assert errors["QLoRA"]["frobenius"] == pytest.approx(1, abs=1e-6)
    assert all(record["frobenius"] < 1 and record["loss"] > 0 for name, record in errors.items() if name != "QLoRA")
    matrix = torch.randn(6, 9)
    assert starts.nuclear_norm(matrix) == pytest.approx(float(torch.linalg.svdvals(matrix).sum()), rel=1e-4)
    ran = starts.measure_run(options, None, {"init": "eva"})
    assert len(ran["held"]) >= 2 and len(ran["losses"]) == ran["steps"] == 3 * options.follow_steps
    results = {name: Result(cell, []) for name, cell in ((cell.name, cell) for cell in starts.CELLS)}
    for name, record in errors.items():
        results[f"{name}, r 16"].records.append(record)
    results["16-bit: EVA"].records.append(ran)
    results["PiSSA, r 64"].records.append({**errors["PiSSA"], "frobenius": 1.5})
    first, second = starts.report(results, LIMITS, options)
    assert [note for note in first.notes if note.startswith("NOT MET")] == [
        note for note in first.notes if "PiSSA, r 64" in note
    ]
    assert len(first.notes) == 1 and len(first.rows) == len(starts.ERRORS) and len(second.rows) == len(starts.RUNS)
