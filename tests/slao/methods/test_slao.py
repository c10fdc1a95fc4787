"""SLAO against an independent NumPy computation of Algorithm 1, its closed form, and each of its options."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from slao import SLAO
from slao.metrics import merge_weights
from slao.schedules import MergeStats
from slao_kernels.testing import tiny_model

State = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama"), LoraConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"]))


def live(method: SLAO) -> State:
    return {p.name: (p.A.detach().double().numpy().copy(), p.B.detach().double().numpy().copy()) for p in method.pairs}


def answers(method: SLAO) -> State:
    with method.merged():
        return live(method)


def pretend_training(method: SLAO, seed: int) -> None:
    """Move A and B as far as a task's training does."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in method.pairs:
            for tensor, size in ((pair.A, 0.1), (pair.B, 0.2)):
                tensor.add_(torch.randn(tensor.shape, generator=g) * size)


def run_tasks(method: SLAO, count: int, first: int = 0) -> list[tuple[State, State]]:
    """Per task what it started from and what it was fine-tuned to."""
    recorded = []
    for i in range(first, first + count):
        method.begin_task(f"task {i}")
        start = live(method)
        pretend_training(method, seed=i)
        recorded.append((start, live(method)))
        method.end_task()
    return recorded


def numpy_qr(A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    Q, R = np.linalg.qr(A.T)
    sign = np.where(np.diag(R) < 0, -1.0, 1.0)
    return (Q * sign).T, R * sign[:, None]


def close(found: State, expected: State, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        for a, b in zip(found[name], expected[name], strict=True):
            assert np.abs(a - b).max() <= tolerance, name


def test_four_tasks_equal_algorithm_1(model):
    method = SLAO(model)
    recorded = run_tasks(method, 4)
    B_merge: dict[str, np.ndarray] = {}
    for i, (start, tuned) in enumerate(recorded, start=1):
        for name, (_, B_ft) in tuned.items():
            if i > 1:
                A_last, B_last = recorded[i - 2][1][name]
                assert np.abs(start[name][0] - numpy_qr(A_last)[0]).max() <= 1e-6
                assert np.abs(start[name][0] @ start[name][0].T - np.eye(6)).max() <= 1e-6
                assert np.array_equal(start[name][1], B_last)
            B_merge[name] = B_ft if i == 1 else B_merge[name] + (B_ft - B_merge[name]) / math.sqrt(i)
    close(answers(method), {name: (recorded[-1][1][name][0], B_merge[name]) for name in B_merge})
    assert method.lambdas == pytest.approx([1, 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5])
    assert method.names == [f"task {i}" for i in range(4)]
    assert method.task == 4


@pytest.mark.parametrize("tasks", [1, 4, 15])
def test_merge_equals_the_closed_form(model, tasks):
    method = SLAO(model)
    recorded = run_tasks(method, tasks)
    weights = merge_weights(method.lambdas)
    assert sum(weights) == pytest.approx(1.0)
    if tasks == 4:
        assert weights == pytest.approx([0.062, 0.149, 0.289, 0.5], abs=5e-4)
    if tasks == 15:
        assert weights[0] == pytest.approx(0.0007, abs=5e-5)
        assert weights[-1] == pytest.approx(0.258, abs=5e-4)
    for name, (_, B) in answers(method).items():
        expected = sum(w * tuned[name][1] for w, (_, tuned) in zip(weights, recorded, strict=True))
        assert np.abs(B - expected).max() <= 1e-6


def test_training_goes_on_from_the_tuned_weights_not_the_merged_ones(model):
    method = SLAO(model)
    recorded = run_tasks(method, 3)
    close(live(method), recorded[-1][1], 0.0)


def test_while_a_task_runs_the_merge_is_that_of_the_tasks_before(model):
    method = SLAO(model)
    run_tasks(method, 3)
    before = answers(method)
    method.begin_task("next")
    pretend_training(method, 9)
    during = live(method)
    close(answers(method), before, 0.0)
    close(live(method), during, 0.0)


def test_merged_swaps_storages_and_restores_them_after_an_error(model):
    method = SLAO(model)
    run_tasks(method, 2)
    pointers = [t.data_ptr() for pair in method.pairs for t in pair.parameters]
    parameters = [id(p) for p in model.parameters()]
    with pytest.raises(KeyError), method.merged() as same:
        assert same is model
        inside = [t.data_ptr() for pair in method.pairs for t in pair.parameters]
        assert sum(a != b for a, b in zip(inside, pointers, strict=True)) == len(method.pairs)  # every B, no A
        raise KeyError
    assert [t.data_ptr() for pair in method.pairs for t in pair.parameters] == pointers
    assert [id(p) for p in model.parameters()] == parameters


INITS = [
    ("last_ft", True),
    ("last_ft", False),
    ("merged", True),
    ("merged", False),
    ("random", True),
    ("random", False),
    ("random_A", True),
    ("random_A", False),
]


@pytest.mark.parametrize(("init", "orthogonal"), INITS)
@pytest.mark.parametrize("merge", ["B", "A", "AB"])
def test_every_ablation_against_numpy(model, init, orthogonal, merge):
    method = SLAO(model, init=init, orthogonal=orthogonal, merge=merge, schedule=0.3)
    merged: dict[str, list[np.ndarray]] = {}
    previous: State = {}
    for i in range(3):
        method.begin_task(str(i))
        start = live(method)
        for name in start if i else ():
            A, B = merged[name] if init == "merged" else previous[name]
            if init.startswith("random"):
                last_B = previous[name][1]
                assert np.array_equal(start[name][1], 0 * last_B if init == "random" else last_B)
                assert np.linalg.matrix_rank(start[name][0]) == 6
                assert np.abs(start[name][0] - previous[name][0]).max() > 0.01
            else:
                assert np.abs(start[name][1] - B).max() <= 1e-6
                assert np.abs(start[name][0] - (numpy_qr(A)[0] if orthogonal else A)).max() <= 1e-5
            if orthogonal:
                assert np.abs(start[name][0] @ start[name][0].T - np.eye(6)).max() <= 2e-6
            elif init.startswith("random"):
                assert np.abs(start[name][0]).max() <= start[name][0].shape[1] ** -0.5
        pretend_training(method, i)
        previous = live(method)
        method.end_task()
        for name, factors in previous.items():
            old = merged.get(name, factors)
            merged[name] = [
                o + 0.3 * (new - o) if letter in merge else new
                for letter, o, new in zip("AB", old, factors, strict=True)
            ]
    close(answers(method), {name: tuple(value) for name, value in merged.items()})
    assert method.lambdas == [1.0, 0.3, 0.3]


def test_preserve_keeps_the_function(model):
    """B Rᵀ with Qᵀ is the same ΔW; without it the paper's init moves ΔW a lot."""
    deltas = {}
    for preserve in (True, False):
        method = SLAO(model, preserve=preserve)
        run_tasks(method, 1)
        before = {name: B @ A for name, (A, B) in live(method).items()}
        method.begin_task("next")
        deltas[preserve] = max(
            np.linalg.norm(B @ A - before[name]) / np.linalg.norm(before[name]) for name, (A, B) in live(method).items()
        )
    assert deltas[True] <= 1e-6
    assert deltas[False] > 0.1


def test_random_init_depends_on_its_seed_alone(model):
    starts = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        method = SLAO(model, init="random", seed=seed)
        method.begin_task("a")
        method.end_task()
        method.begin_task("b")
        starts.append(np.concatenate([A.ravel() for A, _ in live(method).values()]))
    assert np.array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])


def test_a_callable_schedule_sees_the_task_and_may_answer_per_layer(model):
    seen: list[MergeStats] = []

    def schedule(i: int, stats: MergeStats) -> list[float]:
        seen.append(stats)
        assert stats.task == i == len(stats.lambdas) + 1
        cosines = stats.cosine()
        for cosine, A, B, Am, Bm in zip(cosines, stats.A, stats.B, stats.A_merged, stats.B_merged, strict=True):
            first, second = (B.double() @ A.double()).flatten(), (Bm.double() @ Am.double()).flatten()
            dense = torch.nn.functional.cosine_similarity(first, second, dim=0)
            assert cosine == pytest.approx(dense.item(), abs=1e-9)
        return [0.1 * (index + 1) for index in range(len(stats.layers))]

    method = SLAO(model, schedule=schedule)
    recorded = run_tasks(method, 2)
    assert [stats.name for stats in seen] == ["task 1"]
    for index, (name, (_, B)) in enumerate(answers(method).items()):
        first, second = recorded[0][1][name][1], recorded[1][1][name][1]
        assert np.abs(B - (first + 0.1 * (index + 1) * (second - first))).max() <= 1e-6
    assert method.lambdas[1] == pytest.approx([0.1 * (i + 1) for i in range(len(method.pairs))])


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor, lambda value: torch.full((6,), value)])
def test_a_schedule_may_answer_as_arrays_do(model, kind, tmp_path):
    method = SLAO(model, schedule=lambda i, stats: kind(0.5), seed=np.int64(3))
    for task in "ab":
        method.begin_task(task)
        method.end_task()
    assert method.lambdas[1] in (0.5, [0.5] * len(method.pairs))
    method.save(tmp_path)  # as JSON


def test_inverse_schedule_is_the_plain_mean(model):
    method = SLAO(model, schedule="inverse")
    recorded = run_tasks(method, 5)
    for name, (_, B) in answers(method).items():
        assert np.abs(B - np.mean([tuned[name][1] for _, tuned in recorded], axis=0)).max() <= 1e-6


def test_memory_does_not_grow_with_the_tasks(model):
    def floats(method: SLAO) -> int:
        return sum(t.numel() for tensors in method._merged.values() for t in tensors or [])

    method = SLAO(model)
    run_tasks(method, 2)
    after_two = floats(method)
    run_tasks(method, 48, first=2)
    assert floats(method) == after_two == sum(pair.B.numel() for pair in method.pairs)


def test_a_diverged_task_is_refused_and_changes_nothing(model):
    method = SLAO(model)
    run_tasks(method, 2)
    before = answers(method)
    method.begin_task("bad")
    good = method.pairs[3].B.detach().clone()
    method.pairs[3].B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"task 'bad' diverged: NaN or infinite adapter weights in 1 layers"):
        method.end_task()
    close(answers(method), before, 0.0)
    assert method.in_task
    method.pairs[3].B.data.copy_(good)
    method.end_task()
    assert method.task == 3


def test_weights_that_broke_between_tasks_are_refused_and_nothing_changes(model):
    method = SLAO(model)
    run_tasks(method, 2)
    before = answers(method)
    good = method.pairs[2].A.detach().clone()
    with torch.no_grad():
        method.pairs[2].A[0, 0] = float("inf")
    others = [pair.A.detach().clone() for pair in method.pairs]
    with pytest.raises(ValueError, match=rf"NaN or infinite adapter weights in 1 layers \({method.pairs[2].name}"):
        method.begin_task("next")
    assert all(torch.equal(pair.A, other) for pair, other in zip(method.pairs, others, strict=True))
    with torch.no_grad():
        method.pairs[2].A.copy_(good)
    assert not method.in_task
    close(answers(method), before, 0.0)


def test_large_finite_weights_are_not_taken_for_broken(model):
    method = SLAO(model)
    method.begin_task("large")
    with torch.no_grad():
        method.pairs[0].B.fill_(3e38)  # finite, though their sum is not
    method.end_task()
    assert method.lambdas == [1.0]


def test_the_copy_of_a_task_reuses_the_last_ones_memory(model):
    method = SLAO(model)
    run_tasks(method, 2)
    method.begin_task("third")
    kept = [tensor.data_ptr() for tensor in method._merged["A"]]
    with torch.no_grad():
        for pair in method.pairs:
            pair.A.add_(0.01)
    method.end_task()
    method.begin_task("fourth")
    assert [tensor.data_ptr() for tensor in method._merged["A"]] == kept
    for pair, copy in zip(method.pairs, method._merged["A"], strict=True):
        assert not torch.equal(pair.A, copy)


def test_dependent_rows_are_completed_and_logged(model, caplog):
    method = SLAO(model)
    method.begin_task("a")
    with torch.no_grad():
        method.pairs[1].A[2].copy_(method.pairs[1].A[0])
    method.end_task()
    method.begin_task("b")
    A = method.pairs[1].A.detach().double()
    assert (A @ A.T - torch.eye(6)).abs().max() <= 5e-6
    assert (
        f"linearly dependent rows in 1 layers, completed to an orthonormal set: {method.pairs[1].name}" in caplog.text
    )
