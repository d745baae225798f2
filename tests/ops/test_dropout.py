"""The masks of dropout: each bit the same in every form, and as random as they should be."""

import itertools

import pytest
import torch

from veneer.ops import native, reference


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (67, 101), (130, 576)])
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.99999])
def test_native_equals_the_definition_bit_for_bit(isa, nan_empties, shape, p):
    g = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=g).bfloat16() for _ in range(2))
    for seed in (0, 12345, 2**32 - 1):
        assert torch.equal(native.masked(x, p, seed), reference.masked(x, p, seed))
        assert torch.equal(native.masked(x, p, seed, residual), reference.masked(x, p, seed, residual))
        here = x.clone()
        assert native.masked(here, p, seed, residual, out=here) is here
        assert torch.equal(here, reference.masked(x, p, seed, residual))


def test_what_is_dropped_is_zero_whatever_it_was(isa):
    x = torch.full((9, 33), torch.nan).bfloat16()
    kept = reference.kept(9, 33, 0.5, 3)
    assert torch.equal(native.masked(x, 0.5, 3).isnan(), kept) and 0 < int(kept.sum()) < kept.numel()


def test_masks_are_the_same_in_every_version():
    """A resumed run, and one on another machine, meets the masks it would have met."""
    bits = reference.kept(4, 16, 0.5, 1).long() @ (1 << torch.arange(16))
    assert bits.tolist() == [25092, 40594, 59678, 23097]


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.9])
def test_the_share_kept(p):
    n, width = 512, 1000
    for seed in (0, 1, 2, 1 << 16, 1 << 31, 2**32 - 1):
        kept = reference.kept(n, width, p, seed).double()
        spread = (p * (1 - p)) ** 0.5
        assert abs(float(kept.mean()) - (1 - p)) < 5 * spread / (n * width) ** 0.5 + 1e-5
        for dim in (0, 1):  # each row and each column: as spread as binomial counts are
            z = (kept.mean(dim) - (1 - p)) / (spread / kept.shape[dim] ** 0.5)
            assert float(z.abs().max()) < 7 and 0.8 < float(z.square().mean()) < 1.2
    assert reference.drop_scale(p) == pytest.approx(1 / (1 - p), rel=1e-4)


def test_masks_are_independent():
    """No correlation between seeds, rows, columns (two share one hash) or shifted copies beyond that of chance."""
    n, width, p = 256, 768, 0.3
    masks = torch.stack([reference.kept(n, width, p, s) for s in (0, 1, 2, 3, 7, 1 << 20, 0x9E3779B9, 2**32 - 1)])
    z = (masks.double() - (1 - p)) / (p * (1 - p)) ** 0.5
    pairs = [(z[i], z[j]) for i, j in itertools.combinations(range(len(z)), 2)]
    pairs += [(z[:, k:], z[:, :-k]) for k in (1, 2, 3, 16, 64)]
    pairs += [(z[..., k:], z[..., :-k]) for k in (1, 2, 3, 16, 32, 64)]
    pairs += [(z[..., 1::2], z[..., 0::2]), (z[:-1, 1:], z[1:, :-1])]
    for number, (a, b) in enumerate(pairs):
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5, number


def test_dropout_is_unbiased():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([reference.masked(x, 0.2, seed) for seed in range(4000)]).mean(0) * reference.drop_scale(0.2)
    assert float((mean - x).abs().max() / x.abs().max()) < 0.03
