"""Metrics against hand-computed numbers, and against direct double loops over the formulas."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slao import metrics

# Rows: after task 1, 2, 3. Columns: tasks 1, 2, 3.
HAND = [
    [0.8, 0.3, 0.1],
    [0.6, 0.9, 0.2],
    [0.5, 0.7, 1.0],
]
ZERO_SHOT = [0.2, 0.1, 0.4]

scores = st.floats(0, 1, allow_nan=False)
matrices = st.integers(1, 7).flatmap(
    lambda t: st.lists(st.lists(scores, min_size=t, max_size=t), min_size=t, max_size=t)
)


def test_average_accuracy_by_hand():
    assert metrics.average_accuracy(HAND) == pytest.approx(2.2 / 3)


def test_backward_transfer_by_hand():
    assert metrics.backward_transfer(HAND) == pytest.approx((-0.3 - 0.2) / 2)


def test_forgetting_by_hand():
    assert metrics.forgetting(HAND) == pytest.approx((0.3 + 0.2) / 2)


def test_forward_transfer_by_hand():
    assert metrics.forward_transfer(HAND, ZERO_SHOT) == pytest.approx((0.2 - 0.2) / 2)


def test_averages_after_each_by_hand():
    assert metrics.average_after_each(HAND) == pytest.approx([0.8, 0.75, 2.2 / 3])
    assert metrics.incremental_accuracy(HAND) == pytest.approx((0.8 + 0.75 + 2.2 / 3) / 3)


def test_forgetting_takes_the_best_earlier_score_not_the_diagonal():
    matrix = [[0.5, None, None], [0.9, 0.4, None], [0.6, 0.4, 0.7]]
    assert metrics.forgetting(matrix) == pytest.approx(0.3 / 2)
    assert metrics.backward_transfer(matrix) == pytest.approx(0.1 / 2)


def test_forgetting_counts_scores_from_before_the_task_was_trained():
    assert metrics.forgetting([[0.5, 0.9, 0.0], [0.5, 0.4, 0.0], [0.5, 0.4, 0.0]]) == pytest.approx(0.5 / 2)


def test_forgetting_is_negative_when_a_task_gains_later():
    assert metrics.forgetting([[0.5, None], [0.8, 0.4]]) == pytest.approx(-0.3)


@given(matrices, st.data())
def test_against_loops(matrix, data):
    size = len(matrix)
    zero = data.draw(st.lists(scores, min_size=size, max_size=size))
    a = {(t, i): matrix[t - 1][i - 1] for t in range(1, size + 1) for i in range(1, size + 1)}
    after = [sum(a[t, i] for i in range(1, t + 1)) / t for t in range(1, size + 1)]
    assert metrics.average_accuracy(matrix) == pytest.approx(after[-1])
    assert metrics.average_after_each(matrix) == pytest.approx(after)
    assert metrics.incremental_accuracy(matrix) == pytest.approx(sum(after) / size)
    if size == 1:
        assert metrics.backward_transfer(matrix) is None
        assert metrics.forgetting(matrix) is None
        assert metrics.forward_transfer(matrix, zero) is None
        return
    old = range(1, size)
    bwt = sum(a[size, i] - a[i, i] for i in old) / (size - 1)
    lost = sum(max(a[t, i] for t in range(1, size)) - a[size, i] for i in old) / (size - 1)
    fwt = sum(a[i - 1, i] - zero[i - 1] for i in range(2, size + 1)) / (size - 1)
    assert metrics.backward_transfer(matrix) == pytest.approx(bwt, abs=1e-12)
    assert metrics.forgetting(matrix) == pytest.approx(lost, abs=1e-12)
    assert metrics.forward_transfer(matrix, zero) == pytest.approx(fwt, abs=1e-12)
    assert lost >= -bwt - 1e-12  # the best earlier score is at least the one right after training


def test_an_unevaluated_upper_triangle_costs_only_forward_transfer():
    matrix = [[v if i <= t else None for i, v in enumerate(row)] for t, row in enumerate(HAND)]
    assert metrics.average_accuracy(matrix) == metrics.average_accuracy(HAND)
    assert metrics.backward_transfer(matrix) == metrics.backward_transfer(HAND)
    assert metrics.forgetting(matrix) == metrics.forgetting(HAND)
    assert metrics.incremental_accuracy(matrix) == metrics.incremental_accuracy(HAND)
    assert metrics.forward_transfer(matrix, ZERO_SHOT) is None


@pytest.mark.parametrize(
    ("hole", "aa", "bwt", "forgot", "after"),
    [
        ((2, 0), True, True, True, [False, False, True]),
        ((2, 2), True, False, False, [False, False, True]),
        ((1, 1), False, True, True, [False, True, False]),
        ((1, 0), False, False, True, [False, True, False]),
    ],
)
def test_a_missing_entry_makes_what_needs_it_none(hole, aa, bwt, forgot, after):
    matrix = [list(row) for row in HAND]
    matrix[hole[0]][hole[1]] = None
    assert (metrics.average_accuracy(matrix) is None) == aa
    assert (metrics.backward_transfer(matrix) is None) == bwt
    assert (metrics.forgetting(matrix) is None) == forgot
    assert [x is None for x in metrics.average_after_each(matrix)] == after
    assert metrics.incremental_accuracy(matrix) is None


def test_nan_is_a_missing_entry():
    assert metrics.average_accuracy([[1.0, 0.5], [math.nan, 0.5]]) is None


def test_forward_transfer_ignores_the_first_zero_shot_score_only():
    assert metrics.forward_transfer(HAND, [None, 0.1, 0.4]) == pytest.approx(0.0)
    assert metrics.forward_transfer(HAND, [0.2, None, 0.4]) is None


def test_numpy_matrices_are_taken():
    value = metrics.average_accuracy(np.array(HAND, dtype=np.float32))
    assert type(value) is float
    assert value == pytest.approx(2.2 / 3)


@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        ([[1.0, 2.0], [1.0]], "ragged: row 1 has 1 entries, row 0 has 2"),
        ([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], "not square: 2 rows of 3"),
        ([], "matrix is empty"),
        (None, "must be a list of rows"),
        ([0.5, 0.7], r"matrix\[0\] must be a list"),
        ([["0.5"]], r"matrix\[0\]\[0\] must be a number or None, got '0.5'"),
        ([[True]], "must be a number"),
    ],
)
@pytest.mark.parametrize(
    "metric",
    [
        metrics.average_accuracy,
        metrics.backward_transfer,
        metrics.forgetting,
        metrics.average_after_each,
        metrics.incremental_accuracy,
        lambda matrix: metrics.forward_transfer(matrix, [0.0]),
    ],
)
def test_a_bad_matrix_is_named(metric, matrix, says):
    with pytest.raises(ValueError, match=says):
        metric(matrix)


def test_a_zero_shot_of_another_length_is_named():
    with pytest.raises(ValueError, match="zero_shot has 2 scores, the matrix has 3 tasks"):
        metrics.forward_transfer(HAND, [0.1, 0.2])


def test_order_deviation_by_hand():
    runs = [{"a": 0.5, "b": 0.7}, {"b": 0.9, "a": 0.4}, {"a": 0.8, "b": 0.8}]
    got = metrics.order_deviation(runs)
    assert got.per_task == pytest.approx({"a": 0.4, "b": 0.2})
    assert got.maximum == pytest.approx(0.4)
    assert got.mean == pytest.approx(0.3)


def test_order_deviation_with_missing_scores_or_one_run():
    assert metrics.order_deviation([{"a": 0.5, "b": None}, {"a": 0.4, "b": 0.1}])[1:] == (None, None)
    assert metrics.order_deviation([{"a": 0.5}]) == ({"a": None}, None, None)
    assert metrics.order_deviation([]) == ({}, None, None)


def test_order_deviation_wants_the_same_tasks():
    with pytest.raises(ValueError, match="run 1 is not over the tasks of run 0: only one of them has b, c"):
        metrics.order_deviation([{"a": 0.5, "b": 0.1}, {"a": 0.4, "c": 0.2}])


def test_merge_weights_of_the_published_schedule():
    four = metrics.merge_weights([1 / math.sqrt(i) for i in range(1, 5)])
    assert [round(w, 3) for w in four] == [0.062, 0.149, 0.289, 0.5]
    assert sum(four) == pytest.approx(1.0)
    fifteen = metrics.merge_weights([1 / math.sqrt(i) for i in range(1, 16)])
    assert (round(fifteen[0], 4), round(fifteen[-1], 3)) == (0.0007, 0.258)


def test_merge_weights_of_one_over_i_are_a_plain_mean():
    assert metrics.merge_weights([1 / i for i in range(1, 8)]) == pytest.approx([1 / 7] * 7)


@given(st.lists(st.floats(0, 1.5), max_size=9))
def test_merge_weights_unroll_the_update(lambdas):
    basis = np.eye(len(lambdas))
    merged = np.zeros(len(lambdas))
    for lam, task in zip(lambdas, basis, strict=True):
        merged = merged + lam * (task - merged)
    assert metrics.merge_weights(lambdas) == pytest.approx(list(merged), abs=1e-12)


@pytest.mark.parametrize("bad", [[1.0, math.inf], [1.0, math.nan], [1.0, None]])
def test_merge_weights_wants_finite_numbers(bad):
    with pytest.raises(ValueError, match=r"lambdas\[1\] must be finite"):
        metrics.merge_weights(bad)
