"""Checkpoints under fire: killed at every file operation and at random instants, cut off, bits turned, disks full."""

import builtins
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from veneer import storage
from veneer.errors import RefusedError, VeneerError
from veneer.storage import read_json, remove_leftovers, write_json
from veneer.training import checkpoint
from veneer.training.checkpoint import captured, newest_checkpoint, random_states, restore, save_checkpoint
from veneer.training.weights import Masters

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}  # of `sys.audit`


def masters(value=0.0, size=5000):
    weights = Masters({"a": torch.nn.Parameter(torch.full((size,), float(value)))})
    optimizer = torch.optim.AdamW(weights.parameters.values())
    weights.parameters["a"].grad = torch.ones(size)
    optimizer.step()
    weights.parameters["a"].data.fill_(value)
    return weights, optimizer


def save(folder, step, keep=2):
    """No arithmetic: in a forked process torch's threads are gone, and it would wait for them."""
    kinds = ("parameter", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    tensors = {f"{kind}/a": torch.full((5000,), float(step)) for kind in kinds}
    tensors |= {"optimizer/step/a": torch.tensor(float(step))} | random_states(torch.device("cpu"))
    return save_checkpoint(folder, step, tensors, {"settings": {}}, keep)


def whole(folder):
    """The step of the newest checkpoint, which holds what was saved in it."""
    checkpoint._whole.clear()  # as in a new process
    state, tensors, problems = newest_checkpoint(folder)
    assert not problems, problems
    assert torch.equal(tensors["parameter/a"], torch.full((5000,), float(state["step"])))
    return state["step"]


class Counted:
    """The file operations of this process: at number `stop` `act` is called in its middle."""

    def __init__(self, stop, act):
        self.count, self.stop, self.act = 0, stop, act

    def tick(self):
        self.count += 1
        if self.count == self.stop:
            self.act()

    def install(self, monkeypatch=None):
        put = monkeypatch.setattr if monkeypatch else setattr
        opened, fsync, exchange = builtins.open, os.fsync, storage._exchange

        def open_(path, mode="r", *args, **kwargs):
            if "w" not in mode and "a" not in mode:
                return opened(path, mode, *args, **kwargs)
            self.tick()
            file = opened(path, mode, *args, **kwargs)
            return Written(file, self)

        def half_written(path, text, **kwargs):
            write_text(path, text[: len(text) // 2], **kwargs)
            self.tick()
            return write_text(path, text, **kwargs)

        def counted(function):
            return lambda *args, **kwargs: (self.tick(), function(*args, **kwargs))[1]

        if monkeypatch:  # a kill hears of these from `sys.audit`
            write_text = Path.write_text
            put(Path, "write_text", half_written)
            for owner, name in (
                (tempfile, "mkstemp"),
                (tempfile, "mkdtemp"),
                (Path, "replace"),
                (Path, "chmod"),
                (Path, "mkdir"),
            ):
                put(owner, name, counted(getattr(owner, name)))
        put(storage, "open", open_, **({"raising": False} if monkeypatch else {}))
        put(os, "fsync", lambda number: (self.tick(), fsync(number))[1])
        put(storage, "_exchange", lambda one, other: (self.tick(), exchange(one, other), self.tick())[1])


class Written:
    def __init__(self, file, counted):
        self.file, self.counted = file, counted

    def write(self, data):
        half = len(data) // 2
        self.file.write(data[:half])
        self.counted.tick()
        return half + self.file.write(data[half:])

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def in_a_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def killed(child):
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_killed_after_every_file_operation_of_a_save(tmp_path, again):
    """Another process resumes from the old checkpoint or the new one, whole, and no part of one is under a final name."""
    number = new = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        for step in (1, 2, 3):
            save(folder, step)

        def work(folder=folder, number=number):
            counted = Counted(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            counted.install()
            sys.addaudithook(lambda event, _: counted.tick() if event in EVENTS else None)
            save(folder, 3 if again else 4)

        dead = killed(in_a_child(work))
        step = whole(folder)
        assert step in ((3,) if again else (3, 4)), number
        new += step == 4
        for path in folder.glob("step-*"):
            checkpoint.require_whole(path)
        assert len(list(folder.glob("step-*"))) >= 2
        remove_leftovers(folder)
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        save(folder, step + 1)  # a run goes on
        assert whole(folder) == step + 1
        shutil.rmtree(folder)
        if not dead:
            break
    assert number > 25 and (again or 0 < new < number)


def test_killed_at_300_random_instants(tmp_path):
    g, newest, dead = random.Random(1), 1, 0
    save(tmp_path, 1)
    for _ in range(300):

        def work(first=newest + 1):
            for step in range(first, first + 1000):
                save(tmp_path, step)

        child = in_a_child(work)
        time.sleep(g.random() * 0.1)
        os.kill(child, signal.SIGKILL)
        dead += killed(child)
        step = whole(tmp_path)
        assert step >= newest
        newest = step
        for path in tmp_path.glob("step-*"):
            checkpoint.require_whole(path)
    assert dead == 300 and newest > 20
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) in (2, 3)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_every_truncation_and_every_turned_bit_is_seen(tmp_path, name):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content, g = (path / name).read_bytes(), random.Random(0)
    cuts = {0, 1, len(content) - 1, *g.sample(range(2, len(content) - 1), min(61, len(content) - 3))}
    assert len(cuts) == min(64, len(content))
    for cut in cuts:
        (path / name).write_bytes(content[:cut])
        damaged(tmp_path, name)
    for place in g.sample(range(8 * len(content)), 200):
        at, bit = divmod(place, 8)
        turned = bytearray(content)
        turned[at] ^= 1 << bit
        (path / name).write_bytes(turned)
        damaged(tmp_path, name)
    (path / name).write_bytes(content + b" ")
    damaged(tmp_path, name)
    (path / name).unlink()
    damaged(tmp_path, name)
    (path / name).write_bytes(content)
    assert whole(tmp_path) == 2


def damaged(folder, name):
    """The checkpoint before it is used, and what is damaged is named."""
    checkpoint._whole.clear()
    state, _, problems = newest_checkpoint(folder)
    assert state["step"] == 1 and "step-00000002/" in problems[0] and name in problems[0], problems


def test_a_full_disk_at_every_operation_leaves_the_old_checkpoints(tmp_path, monkeypatch):
    number = errors = 0

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    while True:
        number += 1
        folder = tmp_path / str(number)
        for step in (1, 2):
            save(folder, step)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        counted = Counted(number, full)
        with monkeypatch.context() as patched:
            counted.install(patched)
            try:
                save(folder, 3)
            except VeneerError as error:
                errors += 1
                assert "could not be written" in str(error) and "free some space" in str(error)
        if counted.count < number:
            break
        if whole(folder) == 2:
            assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        else:  # all was written, and the folder that holds it could not be synced
            assert whole(folder) == 3
        assert not [path for path in folder.iterdir() if not path.name.startswith("step-")]
    assert errors > 20 and whole(folder) == 3


def test_a_small_disk(tmp_path):
    """A real one, where it may be made."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        for step in (1, 2):
            save(tmp_path, step)
        (tmp_path / "rest").write_bytes(b"x" * (shutil.disk_usage(tmp_path).free - 8192))
        with pytest.raises(VeneerError, match="disk too small"):
            save(tmp_path, 3)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                checkpoint, "require_disk_space", lambda *_: None
            )  # it is filled by somebody else meanwhile
            with pytest.raises(VeneerError, match="could not be written"):
                save(tmp_path, 3)
        assert whole(tmp_path) == 2 and len(list(tmp_path.iterdir())) == 3
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_so_many_that_are_whole_are_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-00000003/state.safetensors").write_bytes(b"junk")
    save(tmp_path, 4, keep=3)
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["1", "2", "3", "4"]
    save(tmp_path, 5, keep=3)
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["2", "3", "4", "5"]


def test_a_checkpoint_from_the_future_or_the_past(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    for name in ("state.json", "manifest.json"):
        write_json(path / name, read_json(path / name) | {"format": checkpoint.FORMAT + 1, "more": []})
    with pytest.raises(RefusedError, match="a newer version of Veneer wrote it\nupdate Veneer"):
        newest_checkpoint(tmp_path)
    for name in ("state.json", "manifest.json"):
        write_json(path / name, read_json(path / name) | {"format": 2})
    with pytest.raises(RefusedError, match="an older version of Veneer wrote it"):
        newest_checkpoint(tmp_path)
    write_json(path / "state.json", read_json(path / "state.json") | {"format": 9})  # they do not agree: damage
    assert newest_checkpoint(tmp_path)[0]["step"] == 1


def test_other_things_in_the_folder_are_no_checkpoints(tmp_path):
    """A copy that somebody made is neither gone on from nor counted nor removed."""
    save(tmp_path, 1)
    for name in ("step-00000001-keep", "step-best", "step-9", "step-00000007.old"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    (tmp_path / "step-x").write_text("a file")
    for step in (2, 3, 4):
        save(tmp_path, step)
    assert whole(tmp_path) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001-keep", "step-00000003", "step-00000004", "step-00000007.old", "step-9", "step-best", "step-x"
    ]  # fmt: skip


def test_what_is_put_back_is_what_was_taken(tmp_path):
    weights, optimizer = masters(3)
    weights.parameters["a"].grad = torch.randn(5000)
    tensors = captured(weights, optimizer) | random_states(torch.device("cpu"))
    tensors["gradient/a"] = gradient = weights.parameters["a"].grad.clone()
    save_checkpoint(tmp_path, 1, tensors, {"settings": {}}, 1, batches=2)
    expected = torch.rand(3)
    state, found, _ = newest_checkpoint(tmp_path)
    again, other = masters(0)
    restore(found, again, other)
    assert state["batches"] == 2 and torch.equal(torch.rand(3), expected)
    assert torch.equal(again.parameters["a"].grad, gradient) and float(again.parameters["a"][0]) == 3
    moments = [next(iter(x.state.values())) for x in (optimizer, other)]
    assert all(torch.equal(value, moments[1][key]) for key, value in moments[0].items())
    found["gradient/a"] = found["gradient/a"][:5]
    with pytest.raises(VeneerError, match=r"gradient of a: found \(5,\), expected \(5000,\)"):
        restore(found, again, other)
