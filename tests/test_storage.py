import contextlib
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from veneer import machine, storage
from veneer.errors import VeneerError
from veneer.machine import MappedFiles


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_file(_):
    with open("taken", "w") as file:
        file.write("mine")


def make_full(_):
    os.makedirs("taken")
    open("taken/notes.txt", "w").close()


def make_link(_):
    os.symlink("nowhere", "taken")


def make_read_only(monkeypatch):
    """Permission bits do not stop root, so the system's own answer is put in."""

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage.tempfile, "mkdtemp", refuse)


@pytest.mark.parametrize(
    ("make", "path", "words"),
    [
        (make_file, "taken", "taken, which is not a folder"),
        (make_file, "taken/out", "taken, which is not a folder"),
        (make_file, "taken/deep/er/out", "taken, which is not a folder"),
        (make_link, "taken/out", "taken, which is not a folder"),
        (make_full, "taken", "is not empty"),
        (make_read_only, "out", "nothing can be written in .*: Permission denied"),
        (lambda _: None, "/proc/out", "nothing can be written in /proc"),
    ],
)
def test_an_output_folder_that_cannot_be_made_is_refused(in_folder, monkeypatch, make, path, words):
    make(monkeypatch)
    before = sorted(os.listdir())
    with pytest.raises(VeneerError, match=words):
        storage.require_empty_folder(path)
    assert sorted(os.listdir()) == before


def test_a_new_or_empty_output_folder_is_fine_and_nothing_is_left_in_it(in_folder):
    (in_folder / "empty").mkdir()
    for path in ("empty", "new", "new/er", in_folder / "empty" / "x"):
        storage.require_empty_folder(path)
    assert [path.name for path in in_folder.rglob("*")] == ["empty"]


@contextlib.contextmanager
def small_files():
    """No file of this process may grow past 4 kB: writing fails half-way, as on a full disk.

    Inside the test, not a fixture: pytest writes its own progress before a fixture ends, and that may be a long file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tensors_that_cannot_be_written_are_one_plain_error(tmp_path):
    words = r"x\.safetensors could not be written: .*free, expected 0\.4 MB"
    with small_files(), pytest.raises(VeneerError, match=words) as caught:
        storage.write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(100_000)})
    assert "another disk" in str(caught.value) and not os.listdir(tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.safetensors"
    storage.write_tensors(path, {"a": torch.ones(2)})
    with small_files(), pytest.raises(VeneerError):
        storage.write_tensors(path, {"a": torch.zeros(100_000)})
    assert storage.read_tensors(path)["a"].tolist() == [1, 1] and os.listdir(tmp_path) == ["x.safetensors"]


def test_disk_too_small_says_what_was_found(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 8, 2_000_000))
    with pytest.raises(VeneerError, match=r"for 2 checkpoints: found 2\.0 MB free at .*, expected 3\.5 MB"):
        storage.require_disk_space(tmp_path / "not" / "there", 3_500_000, "2 checkpoints")
    storage.require_disk_space(tmp_path, 2_000_000, "2 checkpoints")


def test_the_same_tensors_give_the_same_bytes_that_everybody_reads(tmp_path):
    tensors = {
        "half": torch.arange(7).bfloat16(), "turned": torch.arange(12.0).view(3, 4).T, "none": torch.empty(0, 3),
        "one": torch.tensor(2.5), "yes": torch.tensor([True, False]), "bytes": torch.arange(5, dtype=torch.uint8),
    }  # fmt: skip
    metadata = {key: key.upper() for key in "hgfedcba"}
    digests = {storage.write_tensors(tmp_path / f"{n}.safetensors", tensors, metadata) for n in range(4)}
    other = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    digests.add(storage.write_tensors(tmp_path / "other.safetensors", *other))
    assert digests == {storage.sha256(tmp_path / "other.safetensors")}
    found = load_file(tmp_path / "other.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], x) and found[key].dtype == x.dtype for key, x in tensors.items())
    with safe_open(tmp_path / "other.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not say what is resident")
@pytest.mark.parametrize("how", ["TensorFile", "MappedFiles"])
def test_pages_of_a_mapped_file_are_let_go_of_and_can_be_read_again(tmp_path, how):
    file = tmp_path / "a.safetensors"
    storage.write_tensors(file, {"x": torch.arange(1 << 20, dtype=torch.float32), "y": torch.ones(1 << 18)})

    def resident():
        text = Path("/proc/self/smaps").read_text()
        parts = [part for part in text.split("VmFlags") if str(file) in part]
        return sum(int(line.split()[1]) for part in parts for line in part.splitlines() if line.startswith("Rss:"))

    opened = storage.TensorFile(file)
    x = opened.read("x") if how == "TensorFile" else storage.read_tensors(file)["x"]
    total = float(x.sum())
    before = resident()
    if how == "TensorFile":
        opened.release("x")
    else:
        MappedFiles([tmp_path / "other"]).release(x)
        assert resident() == before
        MappedFiles([file]).release(x)
    assert before >= 4096 and resident() <= before - 4000
    assert float(x.sum()) == total and torch.equal(x[:3], torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/job/step", {"job/memory.max": "1000", "job/memory.current": "400", "job/memory.stat": "anon 1\ninactive_file 50",
                          "job/step/memory.max": "max", "job/step/memory.current": "100", "job/step/memory.stat": ""}, [650]),
        ("0::/", {"memory.max": "1000", "memory.current": "2000", "memory.stat": "inactive_file 0"}, [0]),
        ("4:cpu,memory:/docker/ab\n0::/", {"memory/memory.limit_in_bytes": "900", "memory/memory.usage_in_bytes": "100",
                                           "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 20"}, [820]),
        ("0::/", {}, []),
    ],
)  # fmt: skip
def test_a_containers_limit_is_what_is_free(tmp_path, groups, files, left):
    (tmp_path / "groups").write_text(groups + "\n")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert machine._left_by_limits(tmp_path / "groups", tmp_path / "root") == left


def test_what_is_free_is_not_more_than_there_is(monkeypatch):
    free = machine.available_bytes()
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(machine, "_left_by_limits", lambda *_: [free // 2, 10**15])
    assert machine.available_bytes() == free // 2


def test_free_pages_as_macos_tells_them():
    said = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:      100.\nPages active:   900.\nPages inactive:  50.\n"
    assert machine._free_pages(said) == 150 * 16384 and machine._free_pages("") == 0


def test_a_folder_that_another_process_writes_into(tmp_path):
    handle = storage.lock_folder(tmp_path)
    with pytest.raises(VeneerError, match="another process writes into it"):
        storage.lock_folder(tmp_path)
    os.close(handle)
    os.close(storage.lock_folder(tmp_path))
