"""The title of a report, on results made by hand: what is clear, what is noise, and which way forgetting goes."""

import math

import pytest
from made_results import TASKS, entry, two_methods

from slao.report import parse
from slao.report.finding import Difference, difference, differences, runner_up, t_quantile, title


def ends(*runs):
    """The results of runs of two tasks: (score on the first when trained, at the end; score on the second)."""
    return entry([[[first, None], [last, second]] for first, last, second in runs]) | {"FWT": [None] * len(runs)}


def told(**methods):
    results = two_methods() | {"stream": "clinc150", "settings": {}, "methods": methods}
    return title(results, parse(results))


def test_a_clear_difference():
    """AA .75, .77, .79 against .70, .73, .74; BWT -.10 against -.20, -.20, -.22."""
    slao = ends((0.8, 0.7, 0.8), (0.8, 0.7, 0.84), (0.8, 0.7, 0.88))
    seqlora = ends((0.8, 0.6, 0.8), (0.8, 0.6, 0.86), (0.8, 0.58, 0.9))
    assert told(seqlora=seqlora, slao=slao) == (
        "slao ends at 0.770 ± 0.020 after 2 tasks, 0.047 above seqlora, and forgets 0.107 less; "
        "clinc150, 3 runs a method"
    )


def test_the_interval_is_students():
    from scipy import stats

    results = two_methods() | {"methods": {
        "slao": ends((0.8, 0.7, 0.8), (0.8, 0.7, 0.84), (0.8, 0.7, 0.88)),
        "seqlora": ends((0.8, 0.6, 0.8), (0.8, 0.6, 0.86), (0.8, 0.58, 0.9)),
    }}  # fmt: skip
    slao, seqlora = parse(results)
    found = difference(slao, seqlora, "AA")
    test = stats.ttest_rel(slao.values["AA"], seqlora.values["AA"])
    low, high = test.confidence_interval(0.95)
    assert (found.pairs, found.mean) == (3, pytest.approx((0.05 + 0.04 + 0.05) / 3))
    assert found.mean - found.margin == pytest.approx(low, abs=1e-5)
    assert found.mean + found.margin == pytest.approx(high, abs=1e-5)
    assert found.verdict == ("clear" if test.pvalue < 0.05 else "within noise") == "clear"
    for freedom in (*range(1, 40), 1000):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4)


def test_a_difference_within_noise_is_said_to_be():
    """AA .02 higher, .01 lower, .02 higher; BWT .04 higher, .02 lower, .04 higher."""
    slao = ends((0.8, 0.7, 0.8), (0.8, 0.7, 0.8), (0.8, 0.7, 0.8))
    seqlora = ends((0.8, 0.66, 0.8), (0.8, 0.72, 0.8), (0.8, 0.66, 0.8))
    assert told(seqlora=seqlora, slao=slao) == (
        "slao ends at 0.750 ± 0.000 after 2 tasks, within noise of seqlora (0.010 above), and forgets 0.020 less "
        "(within noise); clinc150, 3 runs a method"
    )


def test_one_run_has_no_noise_to_speak_of():
    assert told(seqlora=ends((0.8, 0.5, 0.8)), slao=ends((0.8, 0.7, 0.8))) == (
        "slao ends at 0.750 after 2 tasks, 0.100 above seqlora, and forgets 0.200 less; clinc150, one run a method, "
        "so noise is unknown"
    )


@pytest.mark.parametrize(
    ("slao", "seqlora", "says"),
    [
        ((0.9, 0.7, 0.9), (0.7, 0.6, 0.8), "and forgets 0.100 more;"),  # BWT -.2 against -.1
        ((0.6, 0.7, 0.9), (0.7, 0.6, 0.8), "and forgets 0.200 less;"),  # +.1 against -.1
        ((0.6, 0.7, 0.9), (0.6, 0.65, 0.8), "and gains 0.050 more on earlier tasks;"),
        ((0.7, 0.7, 0.9), (0.6, 0.65, 0.8), "and gains 0.050 less on earlier tasks;"),
    ],
)
def test_the_sign_of_bwt(slao, seqlora, says):
    assert says in told(slao=ends(slao), seqlora=ends(seqlora))


def test_differences_that_are_all_the_same_prove_nothing():
    """Two runs that differ by the same two test rows have no spread, and so no interval."""
    better = told(slao=ends((0.8, 0.7, 0.8), (0.8, 0.7, 0.9)), seqlora=ends((0.8, 0.6, 0.8), (0.8, 0.6, 0.9)))
    assert "0.050 above seqlora (by the same amount in every run), and forgets 0.100 less (by the same" in better
    same = told(slao=ends((0.8, 0.7, 0.8), (0.8, 0.7, 0.9)), seqlora=ends((0.8, 0.7, 0.8), (0.8, 0.7, 0.9)))
    assert same == (
        "slao ends at 0.775 ± 0.035 after 2 tasks, as seqlora does in every run of both, and forgets as much; "
        "clinc150, 2 runs a method"
    )


def test_a_difference_of_nothing_is_neither_above_nor_less():
    """One run each, BWT 0 in both: nothing is forgotten, and nothing gained."""
    one = ends((0.8, 0.8, 0.8))
    assert "after 2 tasks, level with seqlora, and forgets as much; clinc150" in told(slao=one, seqlora=one)
    gained = ends((0.6, 0.7, 0.9), (0.6, 0.7, 0.8))
    assert "as seqlora does in every run of both, and gains as much on earlier tasks;" in told(
        slao=gained, seqlora=gained
    )


def test_the_next_best_may_be_above_where_both_have_a_value():
    methods = parse(two_methods() | {"methods": {
        "slao": ends((0.5, 0.5, 0.5), (0.9, 0.9, 0.9)), "ewc": ends((0.6, 0.6, 0.6), (0.6, 0.6, None)),
        "seqlora": ends((0.1, 0.1, 0.1), (0.1, 0.1, 0.1))}})  # fmt: skip
    assert runner_up(methods) == "Next is ewc, 0.100 above slao."


def test_the_name_of_an_order_is_not_what_pairs_runs():
    plain, named = ends((0.8, 0.7, 0.8)), ends((0.8, 0.5, 0.8)) | {"orders": [0]}
    found = difference(*parse(two_methods() | {"methods": {"a": plain, "b": named}}), "AA")
    assert (found.pairs, found.mean) == (1, pytest.approx(0.1))


def test_runs_are_paired_by_seed_and_order():
    """Another order of the methods' runs changes nothing, and other orders of the tasks leave no pair."""
    slao, seqlora = ends((0.8, 0.7, 0.8), (0.8, 0.6, 0.8)), ends((0.8, 0.65, 0.8), (0.8, 0.5, 0.8))
    turned = {k: v[::-1] if isinstance(v, list) else v for k, v in seqlora.items()}
    assert told(slao=slao, seqlora=seqlora) == told(slao=slao, seqlora=turned)
    other = seqlora | {"tasks": [TASKS[1::-1]] * 2}
    assert "0.037 above seqlora (no seed and order in common, so not tested)" in told(slao=slao, seqlora=other)


def test_whom_the_best_is_held_against():
    slao, seqlora = ends((0.8, 0.7, 0.8)), ends((0.8, 0.5, 0.8))
    ewc, joint = ends((0.8, 0.66, 0.8)), entry([[[None, None], [0.9, 0.9]]])
    results = two_methods() | {"methods": {"joint": joint, "ewc": ewc, "slao": slao, "plain": seqlora}}
    results["settings"] = {"methods": {"plain": {"method": "seqlora"}, "slao": {}, "ewc": {}, "joint": {}}}
    methods = parse(results)
    # Joint training is no rival, and SeqLoRA is known by its kind.
    assert title(results, methods).startswith("slao ends at 0.750 after 2 tasks, 0.100 above plain,")
    assert runner_up(methods) == "Next is ewc, 0.020 below slao."
    anchor, rows = differences(methods)
    assert anchor == "slao"
    assert [row[:3] for row in rows.rows] == [
        ["joint", "1", "+0.150"],
        ["ewc", "1", "-0.020"],
        ["plain", "1", "-0.100"],
    ]
    assert [row[3:] for row in rows.rows][1:] == [
        ["noise unknown", "-0.040", "noise unknown"],
        ["noise unknown", "-0.200", "noise unknown"],
    ]
    assert rows.rows[0][4:] == ["–", "–"]
    # SeqLoRA itself ahead: the next best. Joint training alone: that.
    assert "0.090 above ewc" in told(seqlora=ends((0.9, 0.9, 0.8)) | {"AA": [0.82]}, ewc=ewc | {"AA": [0.73]})
    assert told(joint=joint) == "joint ends at 0.900 after 2 tasks; clinc150, one run a method, so noise is unknown"
    assert "with a BWT of -0.100" in told(slao=slao)


def test_swept_values_are_held_against_their_own():
    methods = {
        "slao (r=2)": ends((0.8, 0.7, 0.8)),
        "seqlora (r=2)": ends((0.8, 0.4, 0.8)),
        "seqlora (r=4)": ends((0.8, 0.5, 0.8)),
    }
    results = two_methods() | {"methods": methods, "settings": {"methods": {"slao": {}, "seqlora": {}}}}
    assert "0.150 above seqlora (r=2)" in title(results, parse(results))


def test_nothing_finished():
    assert told(slao=entry([[[0.5, 0.1], [None, None]]])) == "No method has a score on all of its 2 tasks; clinc150"
    results = two_methods() | {"unfinished": {"seqlora seed 0": [1, 3]}}
    results["methods"]["seqlora"] = entry([[[0.8, None, None], [None] * 3, [None] * 3]])
    assert title(results, parse(results)) == (
        "slao ends at 0.740 ± 0.009 after 3 tasks, with a BWT of -0.250 ± 0.000; python_docs, unfinished, "
        "2 runs a method"
    )


def test_verdicts():
    assert Difference(4, 0.05, 0.04).verdict == "clear"
    assert Difference(4, -0.05, 0.06).verdict == "within noise"
    assert Difference(1, 0.05, None).verdict == Difference(3, 0.05, None).verdict == "noise unknown"
    assert Difference(3, 0.0, None).verdict == "equal"
    assert math.isnan(
        difference(*parse(two_methods() | {"methods": {"a": entry([[[0.5]]]), "b": entry([[[0.5]]])}}), "BWT").mean
    )
