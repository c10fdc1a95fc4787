"""OPCM against its formulas with every delta written out and dense SVDs."""

from __future__ import annotations

import pytest
import torch

from slao import OPCM
from slao.methods.opcm import added
from slao_kernels.testing import error_ratio


def dense(old: torch.Tensor, new: torch.Tensor, factor: float, alpha: float, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(old)
    C = U.T @ new @ Vh.T
    k = int((S.cumsum(0) / S.sum() <= alpha + 1e-12).sum()) if alpha < 1 else rank
    C[:k, :k] = 0
    C.diagonal()[:rank] = 0  # beyond the rank of `old` its singular vectors are arbitrary
    return factor * old + U @ C @ Vh


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("m", "n", "R", "r"), [(20, 12, 4, 4), (12, 20, 9, 3), (6, 5, 8, 4), (7, 7, 1, 1)])
def test_a_step_is_the_dense_formula(m, n, R, r, alpha):
    """fp64; 1e-12 leaves room for two decompositions. (6, 5, 8): more columns than rows."""
    g = torch.Generator().manual_seed(m + R)
    A_old, B_old, A, B = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((R, n), (m, R), (r, n), (m, r)))
    A_new, B_new = added(A_old, B_old, A, B, 1.7, alpha)
    rank = min(R, m, n)
    assert len(A_new) == rank + r
    assert error_ratio(B_new @ A_new, dense(B_old @ A_old, B @ A, 1.7, alpha, rank)) <= 1e-12
    projected = B_new @ A_new - 1.7 * B_old @ A_old
    assert abs((projected * (B_old @ A_old)).sum()) <= 1e-10 * (B @ A).norm() * (B_old @ A_old).norm()
    # The top left singular vectors meet it nowhere in the block.
    U, S, Vh = torch.linalg.svd(B_old @ A_old)
    k = int((S.cumsum(0) <= alpha * S.sum()).sum())
    assert (U[:, :k].T @ projected @ Vh[:k].T).norm() <= 1e-10 * (B @ A).norm()


def test_the_merge_over_tasks_is_the_formula_and_as_large_as_the_mean_task(lab):
    method = lab.make(OPCM)
    taus: list[list[torch.Tensor]] = []
    merged: list[torch.Tensor] = []
    factor = 1.0
    for index in range(4):
        lab.begin(method, index)
        if index:
            assert not any(pair.B.any() for pair in method.pairs)
        lab.train(method, shift=index)
        taus.append(lab.deltas(method))
        lab.end(method, index)
        if index == 0:
            merged = taus[0]
        else:
            alpha = 0.5
            sums = [dense(a, b, factor, alpha, 4 * index) for a, b in zip(merged, taus[-1], strict=True)]
            mean = sum(torch.cat([t.flatten() for t in task]).norm() for task in taus) / len(taus)
            factor = float(torch.cat([t.flatten() for t in sums]).norm() / mean)
            merged = [t / factor for t in sums]
            whole = torch.cat([t.flatten() for t in merged]).norm()
            assert float(whole) == pytest.approx(float(mean), rel=1e-12)
        assert method.lambdas[-1] == pytest.approx(1 / factor, rel=1e-9)
        with method.merged():
            assert method.pairs[0].layer.lora_A["default"].weight.shape[0] == 4 * (index + 1)
            for a, b in zip(lab.deltas(method), merged, strict=True):
                assert error_ratio(a, b) <= 1e-9
    assert method.lambdas[0] == 1.0
    assert len(set(method.lambdas)) == 4


def test_tasks_that_change_nothing(lab):
    method = lab.make(OPCM)
    for index in range(3):
        lab.begin(method, index)
        lab.end(method, index)
    with method.merged():
        assert not any(delta.any() for delta in lab.deltas(method))
    assert method.lambdas == [1.0, 1.0, 1.0]


def test_refusals(lab):
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], not 1.5"):
        lab.make(OPCM, alpha=1.5)
    method = lab.make(OPCM)
    with pytest.raises(ValueError, match="the saved merge of .*q_proj does not fit its A"):
        method._load_state({f"{method.pairs[0].name}.A_merged": torch.ones(4, 32)})
