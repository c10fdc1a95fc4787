"""InfLoRA: the space of old inputs, the A that avoids it, and DualGPM's two ways of keeping it."""

from __future__ import annotations

import logging

import pytest
import torch

from slao import InfLoRA
from slao.methods.dual_gpm import Basis, empty, largest_first
from slao_kernels.testing import error_ratio


def inputs(method: InfLoRA, index: int, lab) -> list[torch.Tensor]:
    """What every layer sees of the task's tokens, padding left out."""
    seen: list[torch.Tensor] = []
    handles = [
        pair.layer.register_forward_pre_hook(lambda module, x: seen.append(x[0][0, :-2].detach()))
        for pair in method.pairs
    ]
    with torch.no_grad():
        (batch,) = lab.batches(index)
        method.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return seen


def projector(basis: Basis) -> torch.Tensor:
    inside = basis.vectors @ basis.vectors.T
    return torch.eye(len(inside), dtype=inside.dtype) - inside if basis.complement else inside


@pytest.mark.parametrize("threshold", [0.6, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_the_space_is_gradient_projection_memorys(tasks, threshold):
    """Against the plain definition with SVDs of the inputs, never switching to the complement (fp64)."""
    g = torch.Generator().manual_seed(tasks)
    n, basis, M = 16, empty(16), torch.zeros(16, 0, dtype=torch.float64)
    for _ in range(tasks):
        x = torch.randn(n, 6, generator=g, dtype=torch.float64) * torch.tensor(
            [9, 5, 3, 2, 1, 0.5], dtype=torch.float64
        )
        basis = basis.extended(x @ x.T, threshold)
        rest = x - M @ (M.T @ x)
        U, S, _ = torch.linalg.svd(rest, full_matrices=False)
        held, count = x.square().sum() - rest.square().sum(), 0
        while held < (threshold - 1e-12) * x.square().sum():
            held, count = held + S[count] ** 2, count + 1
        M = torch.cat([M, U[:, :count]], 1)
        assert basis.vectors.shape[1] == min(M.shape[1], n - M.shape[1])
        assert basis.complement == (2 * M.shape[1] > n)
        assert error_ratio(projector(basis), M @ M.T) <= 1e-10
        k = basis.vectors.shape[1]
        assert (basis.vectors.T @ basis.vectors - torch.eye(k, dtype=torch.float64)).abs().sum() <= 1e-12
        P = torch.eye(n, dtype=torch.float64) - M @ M.T
        gram = torch.randn(n, n, generator=g, dtype=torch.float64)
        gram = gram @ gram.T
        assert (basis.off(gram) - P @ gram @ P).norm() <= 1e-10 * gram.norm()


def test_nothing_seen_takes_nothing_up():
    assert empty(5).extended(torch.zeros(5, 5, dtype=torch.float64), 0.9).vectors.shape == (5, 0)


def test_A_is_the_main_directions_off_the_old_space_and_stays(lab):
    method = lab.make(InfLoRA)
    for index in range(3):
        seen = inputs(method, index, lab)
        lab.begin(method, index)
        for pair, basis, x in zip(method.pairs, method.bases, seen, strict=True):
            off = torch.eye(32, dtype=torch.float64) - projector(basis)
            U, S, _ = torch.linalg.svd(off @ x.T, full_matrices=False)
            found = min(4, int((1e-10 * x.square().sum() < S**2).sum()))
            assert found == 4
            assert error_ratio(3 * pair.A.T @ pair.A, U[:, :4] @ U[:, :4].T) <= 1e-6  # gaps of singular values
            assert (projector(basis) @ pair.A.T).norm() <= 1e-10
            assert error_ratio(pair.A @ pair.A.T, torch.eye(4, dtype=torch.float64) / 3) <= 1e-12
            assert not pair.B.any()
        before = [pair.A.clone() for pair in method.pairs]
        lab.train(method, shift=index)
        for pair, A in zip(method.pairs, before, strict=True):
            assert torch.equal(pair.A, A)
            assert pair.B.abs().max() > 1e-3
        seen = inputs(method, index, lab)
        old = method.bases
        lab.end(method, index)
        for basis, last, x in zip(method.bases, old, seen, strict=True):
            held = (projector(basis) @ x.T).square().sum() / x.square().sum()
            assert held >= 0.95 - 1e-9
            if not last.complement:
                assert (projector(basis) @ last.vectors - last.vectors).norm() <= 1e-9  # it only grows
    assert method.bases[0].vectors.shape[1] > 0


def test_a_new_task_leaves_what_the_space_holds(lab):
    """In the first adapted layers, whose inputs training does not move: the new pair is blind to all they held."""
    method = lab.make(InfLoRA)
    lab.task(method, 0)
    basis = method.bases[0]
    held = projector(basis) @ inputs(method, 0, lab)[0].T
    lab.begin(method, 1)
    lab.train(method, shift=1)
    pair = method.pairs[0]
    assert (pair.B @ pair.A @ held).norm() <= 1e-10 * held.norm()
    assert (pair.B @ pair.A @ inputs(method, 1, lab)[0].T).norm() > 1e-3


def test_too_few_directions_are_said_and_zero(lab, caplog):
    method = lab.make(InfLoRA, threshold=1.0, lora={"r": 16})
    with caplog.at_level(logging.WARNING, "slao"):
        lab.begin(method, 0)  # 14 tokens
    assert "fewer directions than r in" in caplog.text
    assert "(14 of 16)" in caplog.text
    assert not method.pairs[0].A[14:].any()
    assert method.pairs[0].A[13].any()


def test_it_runs_under_slao_train(tiny, tmp_path):
    """Stopped after each task and resumed: bitwise the same."""
    for kind in ("bert", "llama"):
        config = tiny.sgd(batch_size=4)
        whole, folder = tiny.Job(kind, InfLoRA), tmp_path / kind
        result = whole.train(config)
        assert len(result.matrix) == 3
        assert all(basis.vectors.shape[1] > 0 for basis in whole.method.bases)

        class Stop(Exception):
            pass

        def stop(index, result, stopped=Stop):
            raise stopped

        for _ in range(2):
            with pytest.raises(Stop):
                tiny.Job(kind, InfLoRA).train(config, state_dir=folder, on_task=stop)
        resumed = tiny.Job(kind, InfLoRA)
        assert resumed.train(config, state_dir=folder).matrix == result.matrix
        assert tiny.differing(resumed.weights(), whole.weights()) == []
        assert all(torch.equal(t, resumed.method._state()[key]) for key, t in whole.method._state().items())


def test_refusals(lab):
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\], not 0"):
        lab.make(InfLoRA, threshold=0.0)
    method = lab.make(InfLoRA)
    with pytest.raises(ValueError, match=r"call observe\(batches\) before begin_task"):
        method.begin_task("a")
    lab.begin(method, 0)
    with pytest.raises(ValueError, match=r"call observe\(batches\) before end_task"):
        method.end_task()
    assert method.in_task
    with pytest.raises(ValueError, match="the saved input space of .*q_proj does not fit its A"):
        method._load_state({})


def test_eigenvalues_come_largest_first():
    values, vectors = largest_first(torch.diag(torch.tensor([1.0, 3.0, -1e-9, 2.0], dtype=torch.float64)))
    assert values.tolist() == [3.0, 2.0, 1.0, 0.0]
    assert vectors.abs().argmax(0).tolist() == [1, 3, 0, 2]
