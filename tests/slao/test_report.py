"""The table of small made-up results: what it says, and which results it refuses."""

import copy
import math
import re
import sys

import pytest
from made_results import SEQ, SLAO, TASKS, entry, two_methods

from slao.report import markdown, parse, table


@pytest.fixture
def results():
    return two_methods()


def test_the_table_has_a_row_for_each_method(results):
    lines = table(results).splitlines()
    assert lines[0] == "python_docs · MiniLM · accuracy · mean ± std over runs"
    header, rule, slao, seqlora = lines[2:]
    titles = [
        "method",
        "runs",
        "AA",
        "Inc-Acc",
        "BWT",
        "forgetting",
        "FWT",
        "zero-shot",
        "tokens/s",
        "s/task",
        "peak MB",
    ]
    assert re.split(r"  +", header) == titles
    assert set(rule) == {"-", " "}
    # AA of the second seed: (0.52 + 0.72 + 1.00) / 3.
    aa = [2.2 / 3, 2.24 / 3]
    cells = re.split(r"  +", slao)
    assert cells[:3] == ["slao", "2", f"{sum(aa) / 2:.3f} ± {(aa[1] - aa[0]) / math.sqrt(2):.3f}"]
    # Running averages .8, .75, 2.2/3 and .82, .77, 2.24/3; 3.25 s over three tasks.
    inc = [(0.8 + 0.75 + 2.2 / 3) / 3, (0.82 + 0.77 + 2.24 / 3) / 3]
    assert cells[3] == f"{sum(inc) / 2:.3f} ± {(inc[1] - inc[0]) / math.sqrt(2):.3f}"
    assert cells[7:] == ["0.200 ± 0.000", "1,250 ± 71", "1.08 ± 0.00", "641"]
    assert re.split(r"  +", seqlora)[4:6] == ["-0.500 ± 0.000", "0.500 ± 0.000"]
    assert not any(line.endswith(" ") for line in lines)


def test_one_seed_has_no_deviation_and_percent_scores_one_decimal(results):
    percent = [[100 * v for v in row] for row in SLAO]
    results["methods"] = {"slao": entry([percent])}
    assert re.split(r"  +", table(results).splitlines()[-1])[2:5] == ["73.3", "76.1", "-25.0"]


def test_missing_values_are_dashes_and_partial_ones_are_counted(results):
    results["methods"]["slao"]["FWT"] = None
    results["methods"]["seqlora"]["FWT"] = [0.125, None]
    results["methods"]["slao"]["peak_memory_mb"] = [None, None]
    slao, seqlora = (re.split(r"  +", line) for line in table(results).splitlines()[-2:])
    assert slao[6] == "–"
    assert slao[10] == "–"
    assert seqlora[6] == "0.125 (1 of 2 runs)"


def test_markdown_has_the_cells_of_the_table(results):
    results["methods"]["a|b"] = results["methods"].pop("slao")
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown(results).splitlines()]
    plain = [re.split(r"  +", line) for line in table(results).splitlines()[2:]]
    assert [[cell.strip().replace("\\|", "|") for cell in line] for line in lines[:1] + lines[2:]] == plain[:1] + plain[
        2:
    ]
    assert [cell.strip() for cell in lines[1]] == ["---"] + ["---:"] * 10


def test_columns_that_no_method_has_are_left_out(results):
    for method in results["methods"].values():
        method["FWT"] = None
    assert "FWT" not in table(results).splitlines()[2]


def test_orders_give_mopd_and_what_is_kept_its_growth(results):
    """Two seeds in two orders: the range of each task's final score over the orders of one seed."""
    first = [[0.8, 0.3, 0.1], [0.6, 0.9, 0.2], [0.5, 0.7, 1.0]]  # agnews .5, yelp .7, dbpedia 1.0
    turned = [[1.0, 0.3, 0.1], [0.6, 0.9, 0.2], [0.7, 0.6, 0.9]]  # dbpedia .7, agnews .6, yelp .9
    other = [TASKS[2], TASKS[0], TASKS[1]]
    method = entry([first, turned, first, first], tasks=[TASKS, other, TASKS, other])
    # Seed 0: ranges .1, .2, .3. Seed 1, the same matrix: agnews .5/.7, yelp .7/1.0, dbpedia 1.0/.5.
    method |= {"seeds": [0, 0, 1, 1], "orders": [0, 1, 0, 1], "state_mb": [[1.0, 1.5, 2.0]] * 4}
    results["methods"] = {"slao": method, "seqlora": entry([SEQ]) | {"state_mb": [[1.0, 1.0, 1.0]]}}
    lines = [re.split(r"  +", line) for line in table(results).splitlines()[2:]]
    slao = dict(zip(lines[0], lines[2], strict=True))
    assert slao["runs"] == "4"
    assert slao["MOPD"] == f"0.400 ± {0.2 / math.sqrt(2):.3f}"
    assert slao["AOPD"] == f"{(0.2 + 1 / 3) / 2:.3f} ± {(1 / 3 - 0.2) / math.sqrt(2):.3f}"
    assert slao["kept MB"] == "1.00 → 2.00"
    seqlora = dict(zip(lines[0], lines[3], strict=True))
    assert (seqlora["MOPD"], seqlora["kept MB"]) == ("–", "1.00")


def test_the_table_needs_no_matplotlib(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "slao" in table(results)


@pytest.mark.parametrize("odd", [[3.0], [3.0, 3.1, 3.2], [3.0, 3.1], [3.0] * 5])
def test_a_cross_entropy_of_another_length_is_named(results, odd):
    results["methods"]["slao"]["cross_entropy"] = [[3.0, 3.1, 3.2, 3.3], odd]
    count = len(odd)
    with pytest.raises(
        ValueError, match=rf"methods.slao.cross_entropy\[1\] has {count} entries for 3 tasks and before"
    ):
        parse(results)


@pytest.mark.parametrize("key", [key for key in entry([SLAO]) if key != "lambdas"])
def test_a_missing_key_of_a_method_is_named(results, key):
    del results["methods"]["slao"][key]
    with pytest.raises(ValueError, match=f"methods.slao lacks '{key}'"):
        table(results)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (["methods"], {}, "methods must be an object with at least one method"),
        (["methods"], [], "methods must be an object"),
        (["versions"], ["torch"], "versions must be an object"),
        (["settings"], ["rank"], "settings must be an object"),
        (
            ["methods", "slao", "losses"],
            [3, []],
            r"slao.losses\[0\] must be a list with one entry for each trained task",
        ),
        (["methods", "slao", "losses"], [[["x"]], []], r"slao.losses\[0\]\[0\]\[0\] must be a number or None"),
        (["methods", "slao"], [], "methods.slao must be an object, got list"),
        (["methods", "slao", "seeds"], [], "at least one seed"),
        (["methods", "slao", "AA"], [0.5], "slao.AA must be a list with one entry for each of the 2 seeds"),
        (["methods", "slao", "AA"], [0.5, "high"], r"slao.AA\[1\] must be a number or None, got 'high'"),
        (["methods", "slao", "matrix", 1, 0], [0.5], r"slao.matrix\[1\] is ragged: row 1 has 3 entries, row 0"),
        (["methods", "slao", "matrix", 1], [[0.5]], r"slao.matrix\[1\] has 1 tasks, matrix\[0\] has 3"),
        (["methods", "slao", "matrix", 0], [], r"slao.matrix\[0\] is empty"),
        (["methods", "slao", "tasks", 1], ["a"], r"slao.tasks\[1\] must name the 3 tasks"),
        (["methods", "slao", "zero_shot", 0], [0.1], r"slao.zero_shot\[0\] has 1 entries for 3 tasks"),
        (["methods", "slao", "lambdas", 1], [1.0], r"slao.lambdas\[1\] has 1 entries for 3 tasks"),
        (["methods", "slao", "lambdas", 1], [1.0, None, 0.5], "slao.lambdas must be finite"),
    ],
)
def test_results_that_do_not_fit_together(results, path, value, says):
    broken = part = copy.deepcopy(results)
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ValueError, match=says) as caught:
        table(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [[], None, 3, "text"])
def test_results_that_are_not_an_object(value):
    with pytest.raises(ValueError, match="the results must be an object"):
        table(value)
