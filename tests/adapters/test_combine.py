"""Combinations of adapters against dense references in float64, written here from the papers; identities; bad input."""

import itertools
import json
import math

import pytest
import torch
from conftest import make_mixture, make_model
from safetensors.torch import load_file
from torch import nn

import veneer
from veneer.adapters import algebra, sparsify
from veneer.adapters.algebra import RowBlocks
from veneer.adapters.attach import adapter_parameters, adapters, lora_layers
from veneer.adapters.combine import DELLA_WINDOW, METHODS, combine
from veneer.adapters.peft_format import read_adapter
from veneer.errors import RefusedError

IDS = torch.arange(3, 40)[None]
DIFFERENT = {
    "a": {"r": 3, "alpha": 7, "targets": ["q_proj", "down_proj"]},
    "b": {"r": 5, "alpha": 4, "rslora": True, "targets": ["q_proj", "v_proj"]},
    "c": {"r": 2, "targets": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"q_proj": 1.5}},
}
ALIKE = {name: {"r": 4, "alpha": 6, "targets": ["q_proj", "up_proj"]} for name in "abcd"}


def moved(model, name, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.3)


def folders(tmp_path, settings, make=make_model):
    found = []
    for seed, (name, config) in enumerate(settings.items()):
        model = veneer.attach(make(), veneer.LoraConfig(**config), seed=seed)
        moved(model, "default", seed + 20)
        found.append(veneer.save_adapter(model, tmp_path / name))
    return found


def updates(path):
    """Each layer's scaling * B A in fp64; of an expert parameter one by one."""
    found = {}
    for name, one in read_adapter(path).factors.items():
        experts = len(one.a) // one.r
        a, b = one.a.double().flatten(1), one.b.double().flatten(1)
        parts = [(b, a)]
        if experts > 1:
            a, b = a.view(experts, one.r, -1), b.view(len(b), one.r, experts)
            parts = [(b[:, :, e], a[e]) for e in range(experts)]
        for e, (left, right) in enumerate(parts):
            found[f"{name} {e}"] = one.scaling * left @ right
    return found


def summed(paths, weights):
    total = {}
    for path, weight in zip(paths, weights, strict=True):
        for name, d in updates(path).items():
            total[name] = total.get(name, 0) + weight * d
    return total


def nearest(m, rank):
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def close(found, expected, tolerance=2e-6):
    assert found.keys() == expected.keys()
    for name, d in expected.items():
        assert float((found[name] - d).norm()) <= tolerance * max(float(d.norm()), 1e-6), name


# ---- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (1, 1, 1), (1, -0.7, 0), (0, 0, -2)])
@pytest.mark.parametrize("method", ["linear", "cat"])
def test_sums_are_of_the_updates_whatever_their_ranks_scalings_and_targets(tmp_path, method, weights):
    paths = folders(tmp_path, DIFFERENT)
    report = combine(paths, tmp_path / "out", method=method, weights=weights)
    found, expected = updates(tmp_path / "out"), summed(paths, weights)
    close({k: found[k] for k in found}, {k: v for k, v in expected.items() if k in found})
    assert all(float(d.norm()) == 0 for name, d in expected.items() if name not in found)
    assert report["error"] < 1e-8 and (tmp_path / "out" / "combine_report.json").exists()
    model = veneer.load_adapter(make_model(), tmp_path / "out")  # every check of a base passes
    assert all(layer.scaling["default"] == 1 for layer in lora_layers(model).values())
    expected = make_model()
    for name, d in summed(paths, weights).items():
        expected.get_submodule(name.split()[0]).weight.data += d.float()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


def test_ranks_are_what_the_sum_needs(tmp_path):
    paths = folders(tmp_path, DIFFERENT)
    combine(paths, tmp_path / "linear", weights=(1, 1, 1))
    ranks = {name: one.r for name, one in read_adapter(tmp_path / "linear").factors.items()}
    assert {name.rpartition(".")[2]: r for name, r in ranks.items()} == {"q_proj": 14, "v_proj": 5, "down_proj": 5}
    combine([paths[0], paths[0]], tmp_path / "twice")
    assert {one.r for one in read_adapter(tmp_path / "twice").factors.values()} == {3}
    combine([paths[0], paths[0]], tmp_path / "cat", method="cat")
    assert {one.r for one in read_adapter(tmp_path / "cat").factors.values()} == {6}


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_svd_is_the_nearest_of_its_rank_and_says_how_near(tmp_path, rank):
    paths = folders(tmp_path, DIFFERENT)
    weights = (1, -0.5, 2)
    report = combine(paths, tmp_path / "out", method="svd", weights=weights, rank=rank)
    dense = summed(paths, weights)
    close(updates(tmp_path / "out"), {name: nearest(d, rank) for name, d in dense.items()})
    lost = sum(float((d - nearest(d, rank)).square().sum()) for d in dense.values())
    whole = sum(float(d.square().sum()) for d in dense.values())
    assert report["error"] == pytest.approx(math.sqrt(lost / whole), abs=1e-6)
    assert report["largest_error"] >= report["error"]


def test_an_error_chooses_the_ranks(tmp_path):
    paths = folders(tmp_path, DIFFERENT)
    report = combine(paths, tmp_path / "out", weights=(1, 1, 1), max_error=0.3)
    dense, found = summed(paths, (1, 1, 1)), updates(tmp_path / "out")
    ranks = {f"{name} 0": one.r for name, one in read_adapter(tmp_path / "out").factors.items()}
    for name, d in dense.items():
        error = float((found[name] - d).norm() / d.norm())
        assert error <= 0.3 and (ranks[name] == 1 or float((nearest(d, ranks[name] - 1) - d).norm() / d.norm()) > 0.3)
    assert report["largest_error"] <= 0.3 and len(report["ranks"]) > 1


# ---- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", DIFFERENT)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_with_itself_is_that_adapter(tmp_path, which, method):
    (path,) = folders(tmp_path, {which: DIFFERENT[which]})
    density = {"density": 1.0} if METHODS[method].prune else {}
    weights = [1, 1] if METHODS[method].elect else [0.25, 0.75]
    report = combine([path, path], tmp_path / "out", method=method, weights=weights, **density)
    close(updates(tmp_path / "out"), updates(path), 1e-5)
    assert report["error"] < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zero_takes_no_part(tmp_path, method):
    paths = folders(tmp_path, ALIKE)
    report = combine(paths[:2], tmp_path / "two", method=method, weights=(1, 0), rank=None if method == "cat" else 48)
    combine(paths[:1], tmp_path / "one", method=method, weights=(1,), rank=None if method == "cat" else 48)
    two, one = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys() and all(torch.equal(two[key], one[key]) for key in one)
    assert any("no part" in note for note in report["notes"])
    if METHODS[method].prune is None:
        close(updates(tmp_path / "two"), updates(paths[0]), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_changes_nothing(tmp_path, method):
    paths = folders(tmp_path, DIFFERENT)
    weights, files = dict(zip(paths, (0.5, -1, 0.7), strict=True)), []
    for number, order in enumerate(itertools.permutations(paths)):
        combine(order, tmp_path / str(number), method=method, weights=[weights[path] for path in order])
        files.append(load_file(tmp_path / str(number) / "adapter_model.safetensors"))
    assert all(torch.equal(file[key], files[0][key]) for file in files for key in files[0])


# ---- dense methods ----------------------------------------------------------------------------------------------------


def trimmed(d, density):
    k = int(density * d.numel())
    limit = d.abs().flatten().sort(descending=True)[0][k - 1] if k else math.inf
    return torch.where(d.abs() >= limit, d, 0.0)


def elected(ds, weights, sign):
    turned = torch.stack([d * (1 if w > 0 else -1) for d, w in zip(ds, weights, strict=True)])
    votes = turned.sum(0) if sign == "total" else turned.sign().sum(0)
    chosen = torch.where(votes >= 0, 1.0, -1.0)
    agrees = turned.sign() == chosen
    scaled = turned * torch.tensor([abs(w) for w in weights], dtype=torch.float64).view(-1, 1, 1)
    return (scaled * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (0.4, 1.5, -1, 0.2)])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.15, 0.5, 1.0])
def test_ties_is_the_papers(tmp_path, density, sign, weights):
    paths = folders(tmp_path, ALIKE)
    each = [updates(path) for path in paths]
    expected = {n: elected([trimmed(u[n], density) for u in each], weights, sign) for n in each[0]}
    combine(paths, tmp_path / "out", method="ties", weights=weights, density=density, sign=sign, rank=48)
    close(updates(tmp_path / "out"), expected, 2e-5)
    report = combine(paths, tmp_path / "low", method="ties", weights=weights, density=density, sign=sign, rank=6)
    close(updates(tmp_path / "low"), {name: nearest(d, 6) for name, d in expected.items()}, 1e-3)
    lost = sum(float((d - nearest(d, 6)).square().sum()) for d in expected.values())
    assert report["error"] == pytest.approx(
        math.sqrt(lost / sum(float(d.square().sum()) for d in expected.values())), abs=1e-5
    )


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_pruning_sees_the_true_updates_whatever_their_ranks_and_scalings(tmp_path, method):
    same = {name: {**settings, "targets": ["q_proj", "down_proj"]} for name, settings in DIFFERENT.items()}
    paths, weights = folders(tmp_path, same), (1, 0.5, -1)
    each = [updates(path) for path in paths]
    combine(paths, tmp_path / "out", method=method, weights=weights, density=0.4, rank=64)
    cut = {name: [trimmed(u[name], 0.4) for u in each] for name in each[0]}
    if method == "ties":
        expected = {name: elected(ds, weights, "total") for name, ds in cut.items()}
    else:
        expected = {name: sum(w * d for w, d in zip(weights, ds, strict=True)) for name, ds in cut.items()}
    close(updates(tmp_path / "out"), expected, 2e-5)


def test_masks_of_two_adapters_and_of_two_layers_are_independent(tmp_path):
    kept = []
    for number, path in enumerate(folders(tmp_path, ALIKE)[:2]):
        combine([path], tmp_path / str(number), method="dare_linear", weights=(1,), density=0.5, rank=48)
        found = updates(tmp_path / str(number))
        kept += [found[name].abs() > 1e-3 * found[name].abs().max() for name in sorted(found) if "q_proj" in name]
    for one, other in itertools.combinations(kept, 2):
        assert float((one == other).double().mean()) == pytest.approx(0.5, abs=0.05)


def test_magnitude_prune_is_the_sum_of_the_largest(tmp_path):
    paths, weights = folders(tmp_path, ALIKE), (1, -2, 0.5, 0.1)
    each = [updates(path) for path in paths]
    expected = {name: sum(w * trimmed(u[name], 0.3) for w, u in zip(weights, each, strict=True)) for name in each[0]}
    combine(paths, tmp_path / "out", method="magnitude_prune", weights=weights, density=0.3, rank=48)
    close(updates(tmp_path / "out"), expected, 2e-5)


@pytest.mark.parametrize("density", [0.1, 0.7])
def test_dare_keeps_a_share_at_random_and_divides_by_it(tmp_path, density):
    paths = folders(tmp_path, ALIKE)[:1]
    d, kept, mean = updates(paths[0]), [], {}
    for seed in range(12):
        out = tmp_path / str(seed)
        combine(paths, out, method="dare_linear", weights=(1,), density=density, seed=seed, rank=48)
        for name, found in updates(out).items():
            here = found.abs() > 1e-3 * d[name].abs()
            large = d[name].abs() > 0.05 * d[name].abs().max()
            kept.append(here[large].double().mean())
            assert float((found - d[name] * here / density)[large].norm()) < 1e-3 * float(d[name].norm() / density)
            mean[name] = mean.get(name, 0) + found / 12
    assert float(torch.stack(kept).mean()) == pytest.approx(density, abs=0.02)
    for name in d:  # the expectation is the update: 12 draws are as far from it as chance says
        assert float((mean[name] - d[name]).norm() / d[name].norm()) < 1.3 * math.sqrt((1 / density - 1) / 12)
    combine(paths, tmp_path / "again", method="dare_linear", weights=(1,), density=density, seed=3, rank=48)
    again, before = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "3"))
    assert all(torch.equal(again[key], before[key]) for key in again)
    third, fourth = updates(tmp_path / "3"), updates(tmp_path / "4")
    assert not any(torch.equal(third[name], fourth[name]) for name in third)


def test_dare_ties_elects_among_what_dare_left(tmp_path):
    paths, weights = folders(tmp_path, ALIKE), (1, 0.5, 2, -1)
    alone = []
    for number, path in enumerate(paths):
        combine([path], tmp_path / str(number), method="dare_linear", weights=(1,), density=0.6, rank=48)
        ds = updates(tmp_path / str(number))
        alone.append({name: torch.where(d.abs() < 1e-4 * d.abs().max(), 0.0, d) for name, d in ds.items()})
    expected = {name: elected([ds[name] for ds in alone], weights, "total") for name in alone[0]}
    combine(paths, tmp_path / "out", method="dare_ties", weights=weights, density=0.6, rank=48)
    found = updates(tmp_path / "out")
    for name, d in expected.items():  # where a value near zero decides an election, the two may differ
        assert float(((found[name] - d).abs() > 1e-3 * d.abs().max()).double().mean()) < 0.01


def test_della_keeps_the_large_of_each_row_more_often():
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(64, 4, generator=g), torch.randn(4, 513, generator=g)
    rule = sparsify.Rule("della", "total", 0.5, 0.4)
    d, kept, total = b @ a, torch.zeros(64, 513), torch.zeros(64, 513)
    for seed in range(60):
        matrix = sparsify.dense_sum([sparsify.Update(b, a, 1.0, b"x")], rule, seed)
        found = torch.cat([rows for _, rows in matrix])
        kept += found != 0
        total += found
    order = d.abs().argsort(1).argsort(1)
    small, large = kept[order < 50].mean() / 60, kept[order > 462].mean() / 60
    assert float(small) == pytest.approx(0.3, abs=0.04) and float(large) == pytest.approx(0.7, abs=0.04)
    assert float(kept.mean() / 60) == pytest.approx(0.5, abs=0.01)
    assert float((total / 60 - d).norm() / d.norm()) < 0.2  # divided by what each was kept with


def test_della_elects_among_what_it_kept_divided_by_its_chance(tmp_path):
    paths, weights, density = folders(tmp_path, ALIKE), (1, 0.5, 2, -1), 0.6
    window = DELLA_WINDOW
    alone = []
    for number, path in enumerate(paths):
        combine([path], tmp_path / str(number), method="della", weights=(1,), density=density, rank=48)
        pruned = {}
        for name, found in updates(tmp_path / str(number)).items():
            d = updates(path)[name]
            order = d.abs().argsort(1).argsort(1) / (d.shape[1] - 1)
            chance = density - window * (0.5 - order)
            kept = (found * chance / d - 1).abs() < 0.02
            zero = found.abs() < 1e-4 * found.abs().max()
            assert float((kept | zero).double().mean()) > 0.995 and 0.3 < float(zero.double().mean()) < 0.5
            pruned[name] = torch.where(zero, 0.0, d / chance)
        alone.append(pruned)
    expected = {name: elected([ds[name] for ds in alone], weights, "total") for name in alone[0]}
    combine(paths, tmp_path / "out", method="della", weights=weights, density=density, rank=48)
    found = updates(tmp_path / "out")
    for name, d in expected.items():  # where a value near zero decides an election, the two may differ
        assert float(((found[name] - d).abs() > 1e-3 * d.abs().max()).double().mean()) < 0.01


# ---- block by block -----------------------------------------------------------------------------------------------------


def blocks(m, rows):
    return RowBlocks(tuple(m.shape), rows, lambda start, stop: m[start:stop].clone())


@pytest.mark.parametrize("rows", [1, 7, 40, 64])
def test_the_k_th_largest_is_exact_in_any_blocks(rows):
    m = torch.randn(61, 33, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 3, 61)[:, None]
    m[3:9] = 0
    ordered = m.abs().flatten().sort(descending=True)[0]
    for k in (1, 2, 500, 1500, 61 * 33 - 6 * 33, 61 * 33):
        assert sparsify.largest(blocks(m, rows), k) == float(ordered[k - 1])
    assert sparsify.largest(blocks(m, rows), 0) == math.inf


@pytest.mark.parametrize("shape", [(90, 140), (140, 90), (33, 33)])
def test_factors_of_a_matrix_that_is_never_whole(shape, monkeypatch):
    g = torch.Generator().manual_seed(2)
    m = torch.randn(shape[0], 12, generator=g) @ torch.randn(12, shape[1], generator=g)
    m += 0.3 * torch.randn(shape, generator=g)  # twelve directions above a flat floor, as sparse updates have
    for limit in (algebra.DIRECT, 0):
        monkeypatch.setattr(algebra, "DIRECT", limit or 8)
        monkeypatch.setattr(algebra, "OVERSAMPLED", 6)
        found = algebra.nearest_factors(blocks(m, 16), rank=8)
        best = float((m.double() - nearest(m.double(), 8)).norm())
        error = float((m.double() - found.b.double() @ found.a.double()).norm())
        assert error < best * (1 + 1e-4)
        assert found.lost == pytest.approx(error**2, rel=1e-3) and found.squared == pytest.approx(
            float(m.double().square().sum())
        )
        assert found.a.shape == (8, shape[1]) and found.b.shape == (shape[0], 8)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
@pytest.mark.parametrize("rank", [20, 29, 31, 50, 60, 1000])
def test_ranks_near_the_width_of_a_matrix_that_is_never_whole(shape, rank, monkeypatch):
    monkeypatch.setattr(algebra, "DIRECT", 8)
    m = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = algebra.nearest_factors(blocks(m, 7), rank)
    k = min(rank, *shape)
    assert found.a.shape == (k, shape[1]) and found.b.shape == (shape[0], k)
    best = float((m.double() - nearest(m.double(), k)).norm())
    error = float((m.double() - found.b.double() @ found.a.double()).norm())
    assert error <= 1.02 * best + 1e-4 * float(m.norm()) and found.lost == pytest.approx(error**2, rel=1e-2, abs=1e-3)


def test_small_blocks_combine_as_one(tmp_path, monkeypatch):
    paths = folders(tmp_path, ALIKE)
    combine(paths, tmp_path / "one", method="ties", density=0.3, rank=5)
    monkeypatch.setattr(sparsify, "BLOCK", 48 * 5)
    combine(paths, tmp_path / "many", method="ties", density=0.3, rank=5)
    close(updates(tmp_path / "many"), updates(tmp_path / "one"), 1e-4)


# ---- other layers, other parts --------------------------------------------------------------------------------------------


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.line = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.line(self.conv(x).tanh().mean((2, 3)))


@pytest.mark.parametrize("method", ["linear", "svd", "ties"])
def test_convolutions_and_embeddings(tmp_path, method):
    for kind, make, targets in (
        ("conv", Pictures, ["conv", "line"]),
        ("embedding", make_model, ["embed_tokens", "v_proj"]),
    ):
        paths = folders(tmp_path / kind, {n: {"r": 2, "targets": targets} for n in "ab"}, make)
        more = {} if method == "linear" else {"rank": 4}
        more |= {"density": 1.0} if method == "ties" else {}
        combine(paths, tmp_path / kind / "out", method=method, weights=(1, -0.5), **more)
        if method != "ties":
            close(updates(tmp_path / kind / "out"), summed(paths, (1, -0.5)), 1e-5)
        model = veneer.load_adapter(make(), tmp_path / kind / "out")
        dense = summed([tmp_path / kind / "out"], (1,))
        for path, layer in lora_layers(model).items():
            found = layer.delta("default").double()
            expected = dense[f"{path} 0"]
            expected = expected.T if kind == "embedding" and "embed" in path else expected.view(found.shape)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "dare_ties"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts(tmp_path, kind, method):
    configs = {"a": {"r": 2}, "b": {"r": 3, "alpha": 5}}
    paths = folders(
        tmp_path, {n: {**c, "targets": "all-linear"} for n, c in configs.items()}, lambda: make_mixture(kind)
    )
    more = {"density": 1.0} if method == "dare_ties" else {}
    combine(paths, tmp_path / "out", method=method, weights=(1, 1), **more)
    ours = updates(tmp_path / "out")
    expected = summed(paths, (1, 1))
    if method == "svd":
        expected = {name: nearest(d, 3) for name, d in expected.items()}
    if method == "dare_ties":
        each = [updates(path) for path in paths]
        expected = {n: nearest(elected([u[n] for u in each], (1, 1), "total"), 3) for n in each[0]}
    close(ours, expected, 1e-4 if method in ("dare_ties",) else 1e-5)
    veneer.load_adapter(make_mixture(kind), tmp_path / "out")


def test_targets_that_differ_are_named_one_by_one(tmp_path):
    paths = folders(tmp_path, {"a": {"targets": ["q_proj"], "layers": [1]}, "b": {"targets": "mlp"}})
    combine(paths, tmp_path / "out")
    model = veneer.load_adapter(make_model(), tmp_path / "out")
    names = {path.removeprefix("model.layers.") for path in lora_layers(model)}
    assert names == {"1.self_attn.q_proj"} | {f"{n}.mlp.{k}_proj" for n in (0, 1) for k in ("gate", "up", "down")}


def test_dora_with_itself_and_averaged(tmp_path):
    paths = folders(tmp_path, {n: {"r": 3, "dora": True, "targets": ["q_proj"]} for n in "ab"})
    combine([paths[0], paths[0]], tmp_path / "same", weights=(0.3, 0.7))
    ours = veneer.load_adapter(make_model(), tmp_path / "same")(input_ids=IDS).logits
    alone = veneer.load_adapter(make_model(), paths[0])(input_ids=IDS).logits
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)
    report = combine(paths, tmp_path / "average")
    assert any("DoRA" in note for note in report["notes"])
    for method, weights in (("ties", None), ("linear", (1, 1))):
        with pytest.raises(RefusedError, match=r"use_dora: found in .*weights sum to 1"):
            combine(paths, tmp_path / "no", method=method, weights=weights)
    (plain,) = folders(tmp_path, {"plain": {"r": 3, "targets": ["q_proj"]}})
    with pytest.raises(RefusedError, match="use_dora"):
        combine([paths[0], plain], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_values_are_averaged_or_refused(tmp_path):
    settings = {"r": 2, "targets": ["q_proj"], "modules_to_save": ["norm"], "tokens": [4, 9], "lora_bias": False}
    paths = folders(tmp_path, {"a": settings, "b": {**settings, "alpha": 3}})
    combine(paths, tmp_path / "out", weights=(0.25, 0.75))
    models = [veneer.load_adapter(make_model(), path) for path in (*paths, tmp_path / "out")]
    a, b, out = (adapters(model)["default"].replaced["model.norm.weight"] for model in models)
    torch.testing.assert_close(out, 0.25 * a + 0.75 * b)
    a, b, out = (
        next(v for k, v in adapter_parameters(model, "default").items() if "tokens_delta" in k) for model in models
    )
    torch.testing.assert_close(out, 0.25 * a + 0.75 * b)
    (plain,) = folders(tmp_path, {"plain": {"r": 3, "targets": ["q_proj"]}})
    with pytest.raises(
        RefusedError, match=r"modules_to_save or bias: found in(.|\n)*trainable_token_indices: found in"
    ):
        combine([*paths, plain], tmp_path / "no")


def test_what_takes_no_part_says_nothing_of_the_result(tmp_path):
    settings = {"r": 2, "targets": ["q_proj"]}
    paths = folders(tmp_path, {"full": {**settings, "modules_to_save": ["norm"]}, "plain": settings})
    for number, (order, weights) in enumerate(((paths, (0, 1)), (paths[::-1], (0, 1)), (paths[::-1], (1, 0)))):
        combine(order, tmp_path / str(number), weights=weights)
        model = veneer.load_adapter(make_model(), tmp_path / str(number))
        alone = veneer.load_adapter(make_model(), order[weights.index(1)])
        torch.testing.assert_close(model(input_ids=IDS).logits, alone(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_biases_keep_the_names_that_peft_reads(tmp_path):
    peft = pytest.importorskip("peft")
    make = lambda: make_model(attention_bias=True, fused=False)  # noqa: E731
    settings = {"r": 2, "targets": ["q_proj"], "bias": "all"}
    paths = folders(tmp_path, {"a": settings, "b": settings}, make)
    combine(paths, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == load_file(paths[0] / "adapter_model.safetensors").keys()
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "out").eval()(input_ids=IDS).logits
    ours = veneer.load_adapter(make(), tmp_path / "out")(input_ids=IDS).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_a_tiny_a_beside_a_huge_b_is_not_lost():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 30, generator=g), torch.randn(20, 8, generator=g)
    uneven = torch.cat([a[:4], a[4:] * 1e-9]), torch.cat([b[:, :4], b[:, 4:] * 1e9], 1)
    found = algebra.truncated(*uneven, rank=6)
    close({"x": found.b.double() @ found.a.double()}, {"x": nearest(b.double() @ a.double(), 6)}, 1e-5)


def test_an_error_is_kept_on_a_matrix_that_is_never_whole(monkeypatch):
    monkeypatch.setattr(algebra, "DIRECT", 8)
    monkeypatch.setattr(algebra, "OVERSAMPLED", 2)
    m = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    found = algebra.nearest_factors(blocks(m, 16), max_error=0.05)
    assert float((m.double() - found.b.double() @ found.a.double()).norm() / m.double().norm()) <= 0.05


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "average"}, "method: found 'average', expected linear, cat"),
        ({"weights": (1,)}, "weights: found 1, expected one for each of 2"),
        ({"weights": (1, math.nan)}, "found nan, expected a finite number"),
        ({"weights": (0, 0)}, "found zeros alone"),
        ({"rank": 0}, "rank: found 0, expected a whole number from 1"),
        ({"rank": True}, "rank: found True"),
        ({"rank": 1_000_000}, "rank: found 1000000"),
        ({"method": "cat", "rank": 4}, "for a lower one take svd"),
        ({"method": "ties", "density": 0}, "density: found 0, expected a share above 0"),
        ({"method": "ties", "density": 1.2}, "density: found 1.2"),
        ({"density": 0.5}, "which linear does not take"),
        ({"method": "ties", "sign": "most"}, "sign: found 'most', expected total, frequency"),
        ({"max_error": 1}, "max_error: found 1"),
        ({"weights": 0.5}, "weights: found 0.5, expected a list"),
        ({"method": "dare_ties", "density": 1e-17}, "expected at least 1/65,536"),
        ({"method": "cat", "weights": (1e39, 1)}, "q_proj: the result holds NaN or Inf"),
        ({"method": "ties", "weights": (1e39, 1)}, "q_proj: the result holds NaN or Inf"),
    ],
)
def test_settings_that_cannot_be(tmp_path, more, message):
    paths = folders(tmp_path, {n: {"r": 2, "targets": ["q_proj"]} for n in "ab"})
    with pytest.raises(veneer.VeneerError, match=message):
        combine(paths, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_all_problems_of_all_adapters_at_once(tmp_path):
    (good,) = folders(tmp_path, {"good": {"r": 2, "targets": ["q_proj"]}})
    (other,) = folders(tmp_path, {"other": {"r": 2, "targets": ["q_proj"]}}, lambda: make_model(hidden_size=32))
    (tmp_path / "empty").mkdir()
    with pytest.raises(veneer.VeneerError, match=r"missing file(.|\n)*no such folder"):
        combine([good, tmp_path / "empty", tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(veneer.VeneerError, match=r"q_proj: found \(out, in\) \(32, 32\), expected \(48, 48\)"):
        combine([good, other], tmp_path / "out")
    with pytest.raises(veneer.VeneerError, match=r"no such folder(.|\n)*q_proj: found \(out, in\) \(32, 32\)"):
        combine([good, tmp_path / "nowhere", other], tmp_path / "out")


def test_other_base_models_by_name(tmp_path):
    paths = folders(tmp_path, {n: {"r": 2, "targets": ["q_proj"]} for n in "ab"})
    config = json.loads((paths[1] / "adapter_config.json").read_text())
    (paths[1] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "some/model"}))
    config = json.loads((paths[0] / "adapter_config.json").read_text())
    (paths[0] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/model"}))
    with pytest.raises(veneer.VeneerError, match="name different base models: 'other/model', 'some/model'"):
        combine(paths, tmp_path / "out")
    combine(paths, tmp_path / "out", any_base=True)


def test_what_the_user_may_not_mean_is_said(tmp_path):
    paths = folders(tmp_path, {n: {"r": 2, "targets": ["q_proj"]} for n in "ab"})
    report = combine(paths, tmp_path / "sum", weights=(5, 1))
    assert any("sum to 6" in note for note in report["notes"]) and any("above 4" in note for note in report["notes"])
    report = combine([paths[0], paths[0]], tmp_path / "nothing", weights=(1, -1))
    assert any("no update at all" in note for note in report["notes"]) and report["error"] == 0
    model = veneer.load_adapter(make_model(), tmp_path / "nothing")
    assert torch.equal(model(input_ids=IDS).logits, make_model()(input_ids=IDS).logits)
    with pytest.raises(veneer.VeneerError, match="is not empty"):
        combine(paths, tmp_path / "sum")
    combine(paths, tmp_path / "sum", replace=True)
