"""A run that was interrupted and resumed is, bit for bit, the run that was not: adapter, optimizer, random states, logs."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("fork_server.py")


def digests(out):
    """sha256 of all that has to be equal."""
    last = max((out / "checkpoints").glob("step-*"))
    files = [out / "adapter/adapter_model.safetensors", last / "state.safetensors", out / "metrics.jsonl"]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def serve(jobs, folder):
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, str(SERVER), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compare(tmp_path, data, points, steps, **more):
    def job(out, **settings):
        return {"out": str(tmp_path / out), "data": str(data), "steps": steps, **more, **settings}

    cases = [[job("whole")]]
    for step, batches in points:
        name = f"cut-{step}-{batches}"
        cases.append([job(name, stop=[step, batches]), job(name, resume=True)])
    serve(cases, tmp_path)
    expected = digests(tmp_path / "whole")
    assert len((tmp_path / "whole/metrics.jsonl").read_text().splitlines()) == steps
    wrong = [point for point in points if digests(tmp_path / f"cut-{point[0]}-{point[1]}") != expected]
    assert not wrong, f"{len(wrong)} of {len(points)}: {wrong}"


def test_forty_of_forty_points_of_a_run(tmp_path, commands):
    """Every step of 40, with dropout, shuffling, accumulation over 3 batches and packing, in its first, second or third batch."""
    compare(tmp_path, commands, [(step, step % 3) for step in range(40)], 40)


def test_batches_of_several_packed_sequences(tmp_path, commands):
    """In the first to fifth sequence of a step; the second and fourth are in the middle of a batch."""
    compare(tmp_path, commands, [(step, step % 5) for step in range(1, 7)], 9, budget=64)


@pytest.mark.parametrize("kind", [{"adalora": True}, {"dora": True}])
def test_other_methods_and_fused_layers(tmp_path, commands, kind):
    shape = {"dtype": "bfloat16", "hidden_size": 64}
    compare(tmp_path, commands, [(0, 1), (5, 2), (8, 0), (10, 1)], 12, lora=kind, shape=shape)


@pytest.mark.slow
def test_three_points_on_smollm2_in_nf4(tmp_path, commands):
    compare(tmp_path, commands, [(1, 2), (3, 1), (4, 0)], 6, model="smollm2", rate=1e-3, save_every=2)
