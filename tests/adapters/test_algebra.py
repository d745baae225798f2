import math

import pytest
import torch

from veneer.adapters import algebra


def factors(r=4, rows=9, width=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, width, generator=generator), torch.randn(rows, r, generator=generator)


@pytest.mark.parametrize(("r", "rows", "width"), [(4, 9, 13), (1, 5, 3), (16, 9, 13), (7, 7, 7), (20, 3, 50)])
@pytest.mark.parametrize("scaling", [1.0, 0.25, -2.0])
def test_the_svd_of_the_factors_is_that_of_the_dense_update(r, rows, width, scaling):
    a, b = factors(r, rows, width)
    dense = scaling * (b.double() @ a.double())
    u, s, vh = algebra.factored_svd(a, b, scaling)
    k = min(r, rows, width)
    assert (u.shape, s.shape, vh.shape) == ((rows, k), (k,), (k, width))
    torch.testing.assert_close(u * s @ vh, dense, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(s, torch.linalg.svdvals(dense)[:k], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(algebra.singular_values(a, b, scaling), s, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(u.T @ u, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    assert algebra.frobenius_norm(s) == pytest.approx(float(dense.norm()))


def test_a_convolution_is_the_matrix_of_its_flattened_factors():
    a, b = torch.randn(3, 4, 2, 2), torch.randn(6, 3, 1, 1)
    dense = torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    assert algebra.frobenius_norm(algebra.singular_values(a, b)) == pytest.approx(float(dense.norm()), rel=1e-5)


def test_effective_rank_counts_equal_values_and_one_that_dominates():
    assert algebra.effective_rank(torch.full((5,), 3.0)) == pytest.approx(5)
    assert algebra.effective_rank(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
    p = [0.5, 0.25, 0.25]  # Roy & Vetterli: exp of the Shannon entropy of s / sum(s)
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert algebra.effective_rank(torch.tensor([4.0, 2.0, 2.0])) == pytest.approx(expected)


def test_stable_rank_and_the_rank_that_keeps_a_share():
    s = torch.tensor([10.0, 3.0, 1.0, 0.0])  # squares 100, 9, 1 of 110: 90.9%, 99.1%, 100%
    assert algebra.stable_rank(s) == pytest.approx(1.1)
    assert [algebra.rank_keeping(s, share) for share in (0.9, 0.95, 0.99, 0.995, 1.0)] == [1, 2, 2, 3, 3]
    assert algebra.rank_keeping(torch.ones(16), 1.0) == 16 and algebra.rank_keeping(torch.ones(16), 0.95) == 16
    assert algebra.rank_keeping(torch.ones(100), 0.95) == 95


def test_no_update_has_no_rank():
    s = algebra.singular_values(torch.randn(4, 9), torch.zeros(7, 4))
    assert (algebra.effective_rank(s), algebra.stable_rank(s), algebra.rank_keeping(s, 0.95)) == (0.0, 0.0, 0)


def test_the_truncated_update_keeps_the_share_that_the_rank_promises():
    a, b = factors(12, 40, 30)
    u, s, vh = algebra.factored_svd(a, b)
    k = algebra.rank_keeping(s, 0.95)
    dense = b.double() @ a.double()
    cut = u[:, :k] * s[:k] @ vh[:k]
    fewer = u[:, : k - 1] * s[: k - 1] @ vh[: k - 1]
    assert float(cut.norm() ** 2 / dense.norm() ** 2) >= 0.95 > float(fewer.norm() ** 2 / dense.norm() ** 2)
