import gc
import threading

import torch

from veneer.machine import current_bytes
from veneer.ops import arena
from veneer.ops.arena import Arena, empty

SIZE = 1 << 20


def addresses(tensor):
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())


def overlap(a, b):
    return max(a.start, b.start) < min(a.stop, b.stop)


def test_blocks_never_overlap_while_they_live_and_all_room_comes_back():
    pool = Arena(SIZE)
    g = torch.Generator().manual_seed(0)
    held = []
    for _ in range(2000):
        if held and torch.rand((), generator=g) < 0.5:
            held.pop(int(torch.randint(len(held), (), generator=g)))
        block = pool.take(int(torch.randint(1, SIZE // 8, (), generator=g)))
        if block is None:
            held.pop(0)
            continue
        tensor = torch.frombuffer(block, dtype=torch.uint8)
        del block
        assert not any(overlap(addresses(tensor), addresses(other)) for other in held)
        held.append(tensor)
    held.clear()
    del tensor
    pool.places.collect()
    assert pool.places.free == [(0, SIZE)] and not pool.places.owners


def test_a_block_lives_as_long_as_the_last_view_on_it():
    pool = Arena(SIZE)
    view = torch.frombuffer(pool.take(4096), dtype=torch.float32).view(32, 32)[3:5].t()
    view.fill_(7)
    other = torch.frombuffer(pool.take(4096), dtype=torch.float32).fill_(1)
    assert not overlap(addresses(view), addresses(other)) and bool((view == 7).all())


def test_no_room_is_none_and_empty_then_falls_to_malloc(monkeypatch):
    pool = Arena(SIZE)
    assert pool.take(SIZE + 1) is None
    monkeypatch.setattr(arena, "_arena", pool)
    big = empty((SIZE,), torch.float32)
    assert big.shape == (SIZE,) and not pool.places.owners
    assert empty((4, 8), torch.bfloat16).shape == (4, 8) and not pool.places.owners  # small: malloc's


def test_empty_is_an_ordinary_tensor(monkeypatch):
    pool = Arena(SIZE)
    monkeypatch.setattr(arena, "_arena", pool)
    x = empty((128, 512), torch.bfloat16)
    assert pool.places.owners and x.is_contiguous() and x.dtype == torch.bfloat16
    x.fill_(2)
    assert torch.equal(x.clone().float(), torch.full((128, 512), 2.0))
    y = x * torch.ones(512, dtype=torch.bfloat16, requires_grad=True)  # saved by autograd: alive until it is done
    del x
    pool.places.collect()
    assert pool.places.owners
    y.float().sum().backward()
    del y
    gc.collect()
    pool.places.collect()
    assert not pool.places.owners


def test_tensors_may_die_in_another_thread():
    pool = Arena(SIZE)
    held = [torch.frombuffer(pool.take(4096), dtype=torch.uint8) for _ in range(50)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    while thread.is_alive():
        assert pool.take(64) is not None
    thread.join()
    pool.places.collect()
    assert pool.places.free == [(0, SIZE)]


def test_release_gives_pages_back(monkeypatch):
    pool = Arena(256 << 20)
    monkeypatch.setattr(arena, "_arena", pool)
    kept = empty((1 << 20,), torch.uint8).fill_(3)
    big = empty((128 << 20,), torch.uint8).fill_(1)
    before = current_bytes()
    del big
    arena.release()
    assert before - current_bytes() > 120 << 20
    assert bool((kept == 3).all())


def test_uninitialised_memory_is_nan_when_torch_is_asked_to_show_it(monkeypatch):
    pool = Arena(SIZE)
    monkeypatch.setattr(arena, "_arena", pool)
    torch.use_deterministic_algorithms(True)
    try:
        assert empty((128, 512), torch.bfloat16).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_an_arena_it_is_torch_empty(monkeypatch):
    monkeypatch.setattr(arena, "_arena", False)
    assert empty((1 << 17,), torch.uint8).shape == (1 << 17,)
