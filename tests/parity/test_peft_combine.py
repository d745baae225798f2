"""Combinations against PEFT's `add_weighted_adapter`: equal where PEFT is right, and where it is not, what is right."""

import pytest
import torch
from conftest import make_model

import veneer
from veneer import ops
from veneer.adapters.attach import adapter_parameters
from veneer.adapters.combine import combine
from veneer.adapters.peft_format import read_adapter

peft = pytest.importorskip("peft")
IDS = torch.arange(3, 40)[None]
NAMES = ["a", "b", "c"]


def written(tmp_path, seed, **settings):
    model = make_model(fused=False)
    veneer.attach(
        model, veneer.LoraConfig(**{"r": 4, "alpha": 6, "targets": ["q_proj", "up_proj"], **settings}), seed=seed
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "default").values():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)
    return veneer.save_adapter(model, tmp_path / f"source{seed}")


def theirs(paths, kind, weights, **more):
    model = peft.PeftModel.from_pretrained(make_model(fused=False), paths[0], adapter_name="a")
    for name, path in zip(NAMES[1:], paths[1:], strict=False):
        model.load_adapter(path, adapter_name=name)
    model.add_weighted_adapter(NAMES[: len(paths)], list(weights), "mixed", combination_type=kind, **more)
    model.set_adapter("mixed")
    return model.eval()(input_ids=IDS).logits


def ours(tmp_path, paths, method, weights, **more):
    combine(paths, tmp_path / "ours", method=method, weights=weights, replace=True, **more)
    return veneer.load_adapter(make_model(fused=False), tmp_path / "ours")(input_ids=IDS).logits


def apart(found, wanted):
    base = make_model(fused=False)(input_ids=IDS).logits
    return float((found - wanted).norm() / (wanted - base).norm())


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.3, 1.2, 0.5)])
@pytest.mark.parametrize(
    ("method", "kind", "more"),
    [
        ("svd", "svd", {}),
        ("cat", "cat", {}),
        ("ties", "ties_svd", {"density": 0.4}),
        ("ties", "ties_svd", {"density": 0.4, "sign": "frequency"}),
        ("magnitude_prune", "magnitude_prune_svd", {"density": 0.4}),
    ],
)
def test_ours_is_theirs_where_ranks_are_equal(tmp_path, method, kind, more, weights):
    paths = [written(tmp_path, seed) for seed in range(3)]
    there = {"majority_sign_method": more["sign"]} if "sign" in more else {}
    there |= {"density": more["density"]} if "density" in more else {}
    assert apart(ours(tmp_path, paths, method, weights, **more), theirs(paths, kind, weights, **there)) < 1e-3


@pytest.mark.parametrize(("method", "kind"), [("dare_linear", "dare_linear_svd"), ("dare_ties", "dare_ties_svd")])
def test_dare_is_theirs_under_the_same_masks(tmp_path, method, kind, monkeypatch):
    paths = [written(tmp_path, seed) for seed in range(3)]
    masked = []  # each update, and what is left of it here
    real = ops.sparse_sum

    def seen(parts, weights, limits, seeds, p, elect):
        alone = [real([part], [1.0], [0.0], [seed], p) for part, seed in zip(parts, seeds, strict=True)]
        masked.extend(zip(parts, alone, strict=True))
        return real(parts, weights, limits, seeds, p, elect)

    monkeypatch.setattr(ops, "sparse_sum", seen)
    found = ours(tmp_path, paths, method, (1, 0.5, 2), density=0.6)

    def same_mask(tensor, density, rescale):
        assert density == 0.6 and rescale
        alike = (
            after
            for before, after in masked
            if before.shape == tensor.shape and torch.allclose(before, tensor, atol=1e-5)
        )
        return next(alike)

    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", same_mask)
    assert apart(found, theirs(paths, kind, (1, 0.5, 2), density=0.6)) < 1e-3


def test_an_rslora_adapter_with_itself_is_another_one_there(tmp_path):
    paths = [written(tmp_path, 0, rslora=True)] * 2
    alone = veneer.load_adapter(make_model(fused=False), paths[0])(input_ids=IDS).logits
    assert apart(ours(tmp_path, paths, "svd", (0.5, 0.5)), alone) < 1e-4
    assert apart(theirs(paths, "svd", (0.5, 0.5)), alone) > 0.3  # times sqrt(r): use_rslora stays, alpha becomes r


def test_linear_adds_cross_terms_there(tmp_path):
    paths = [written(tmp_path, seed) for seed in range(2)]
    exact = theirs(paths, "cat", (1, 1))
    assert apart(ours(tmp_path, paths, "linear", (1, 1)), exact) < 1e-4
    assert apart(theirs(paths, "linear", (1, 1)), exact) > 0.3


def test_an_update_taken_away_votes_against_here(tmp_path):
    """TIES of a and b with weights 1 and -1 is TIES of a and -b: there the election does not see the sign."""
    paths = [written(tmp_path, seed) for seed in range(2)]
    turned = written(tmp_path, 7)
    file = read_adapter(paths[1])
    model = veneer.load_adapter(make_model(fused=False), paths[1])
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, "default").items():
            if "lora_B" in key:
                parameter.neg_()
    veneer.save_adapter(model, turned, replace=True)
    assert len(file.factors) == 4
    more = {"density": 0.5}
    assert (
        apart(
            ours(tmp_path, paths, "ties", (1, -1), **more), ours(tmp_path, [paths[0], turned], "ties", (1, 1), **more)
        )
        < 1e-4
    )
    assert (
        apart(theirs(paths, "ties_svd", (1, -1), **more), theirs([paths[0], turned], "ties_svd", (1, 1), **more)) > 0.1
    )
