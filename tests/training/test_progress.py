import json
import sys

import pytest

from veneer.training import progress
from veneer.training.progress import Metrics, Progress, drop_metrics_after, number


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_of_steps_that_will_be_done_again_are_dropped(tmp_path):
    metrics = Metrics(tmp_path)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": 1.0}, {"seconds": 1.0})
        if step in (2, 3):
            metrics.event({"step": step, "event": step - 1, "code": "spike"})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed while it wrote
    drop_metrics_after(tmp_path, 3, events=1)  # the checkpoint knows of one
    assert steps(tmp_path) == [1, 2, 2, 3]
    assert [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()] == [
        {"step": step, "seconds": 1.0} for step in (1, 2, 3)
    ]
    drop_metrics_after(tmp_path / "nothing there", 3)


def test_without_tensorboard_the_file_is_all(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    metrics = Metrics(tmp_path)
    metrics.write({"step": 1, "loss": number(float("nan"))}, {})
    metrics.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "speed.jsonl"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == "nan"


@pytest.mark.parametrize(
    ("done", "more", "said"),
    [(1, {}, True), (2, {}, False), (2, {"eval_loss": 2.5}, True), (9, {}, True)],
)
def test_off_a_terminal_few_steps_get_a_line(capsys, done, more, said):
    say = Progress(True, 9)
    row = {"loss": 1.0, "learning_rate": 1e-4, "applied": True}
    if done > 1:
        say.step(1, row, 10.0)
        capsys.readouterr()
    say.step(done, {**row, **more}, 10.0)
    err = capsys.readouterr().err
    assert (f"step {done}/9" in err) is said
    assert ("held-out loss 2.5000" in err) is ("eval_loss" in more)
    Progress(False, 9).step(9, row, 10.0)
    assert capsys.readouterr().err == ""


def test_a_counter_speaks_after_two_seconds_and_counts_from_its_first_call(monkeypatch, capsys):
    clock = iter([100.0, 101.0, 103.0, 104.0, 110.0])  # the first call is not the moment it was made
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    tell = progress.counter("things done")
    for done in range(1, 6):
        tell(done, 5)
    assert capsys.readouterr().err == "3 of 5 things done, 3 s left\n5 of 5 things done, 0 s left\n"
