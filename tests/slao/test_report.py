"""The table and the report of small made-up results: what they contain, escape, and refuse."""

import copy
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from slao import metrics, plots
from slao.report import markdown, parse, table, write_report

SLAO = [[0.80, 0.30, 0.10], [0.60, 0.90, 0.20], [0.50, 0.70, 1.00]]
SEQ = [[0.80, 0.25, 0.10], [0.40, 0.90, 0.15], [0.20, 0.50, 1.00]]
ZERO_SHOT = [0.2, 0.1, 0.3]
TASKS = ["agnews", "yelp", "dbpedia"]


def entry(matrices, lambdas=None, tasks=None):
    """One method's part of results.json, with its metrics worked out from the matrices."""
    size = len(matrices[0])
    found = {
        "seeds": list(range(len(matrices))),
        "matrix": matrices,
        "AA": [metrics.average_accuracy(m) for m in matrices],
        "BWT": [metrics.backward_transfer(m) for m in matrices],
        "forgetting": [metrics.forgetting(m) for m in matrices],
        "FWT": [metrics.forward_transfer(m, ZERO_SHOT[:size]) for m in matrices],
        "zero_shot": [ZERO_SHOT[:size] for _ in matrices],
        "tasks": tasks or [TASKS[:size] for _ in matrices],
        "tokens_per_second": [1200.0 + 100 * s for s in range(len(matrices))],
        "train_seconds": [3.25 for _ in matrices],
        "peak_memory_mb": [640.0 + s for s in range(len(matrices))],
    }
    if lambdas:
        found["lambdas"] = [lambdas for _ in matrices]
    return found


@pytest.fixture
def results():
    better = [[min(1.0, v + 0.02) for v in row] for row in SLAO]
    return {
        "stream": "python_docs",
        "model": "MiniLM",
        "methods": {
            "slao": entry([SLAO, better], [1 / math.sqrt(i) for i in (1, 2, 3)]),
            "seqlora": entry([SEQ, SEQ]),
        },
        "throughput": {"slao": {"tokens_per_second": 1250.0, "seconds_per_task": 1.1, "peak_memory_mb": 641.0}},
        "versions": {"slao_kernels": "0.1.0", "torch": "2.11.0"},
        "settings": {"rank": 8, "targets": ["q_proj", "v_proj"]},
        "metric": "accuracy",
    }


@pytest.fixture
def run(tmp_path):
    """Writes results into a run directory and reports on them; returns the directory and the HTML text."""

    def write(results):
        (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
        page = write_report(tmp_path)
        assert page == tmp_path / "report.html"
        return tmp_path, page.read_text(encoding="utf-8")

    return write


class Page(HTMLParser):
    """Collects the tags, links and text of a page, and checks that tags are closed in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def check_png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 5000


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


def test_the_report_says_what_to_install(run, results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'slao_kernels\[train\]'"):
        run(results)


def test_the_report_is_complete_and_self_contained(run, results):
    directory, text = run(results)
    page = Page(text)
    words = " ".join(page.text)
    for expected in ("slao", "seqlora", "MiniLM", "q_proj", "2.11.0", "agnews → yelp → dbpedia", "0.733"):
        assert expected in words
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "://" not in text
    assert "script" not in page.tags
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    names = ["averages.png", "matrix_seqlora.png", "matrix_slao.png", "speed.png", "weights.png"]
    assert sorted(path.name for path in (directory / "report").iterdir()) == names
    assert len(page.links) == len(names)
    for name in names:
        check_png(directory / "report" / name)
    assert len(re.findall(r"<tr><th scope=\"row\">slao</th><td>[01]</td>", text)) == 4  # per seed, and its order


def test_no_weights_are_drawn_without_lambdas(run, results):
    del results["methods"]["slao"]["lambdas"]
    directory, _ = run(results)
    assert not (directory / "report" / "weights.png").exists()


def test_retention_and_costs_are_drawn_where_they_are_known(run, results, monkeypatch):
    """The lines' points are the rises; joint training has two of them. An older result has neither."""
    drawn = {}
    monkeypatch.setattr(plots, "write_png", lambda figure, path: drawn.update({path.stem: figure}))
    slao, joint = results["methods"]["slao"], entry([[[None] * 3, [None] * 3, [0.8, 0.7, 0.9]]])
    slao |= {"cross_entropy": [[3.0, 3.1, 3.3, 3.2], [3.0, 3.3, 3.3, 3.4]], "state_mb": [[1.0, 2.0, 2.0]] * 2}
    joint |= {"cross_entropy": [[3.0, 3.5]], "state_mb": [[1.0]]}
    results["methods"] = {"slao": slao, "seqlora": results["methods"]["seqlora"], "joint": joint}
    plots.draw(parse(results), "accuracy", Path())
    assert {"retention", "costs"} <= drawn.keys()
    rises, whole = drawn["retention"].axes[0].lines[0], drawn["retention"].axes[0].containers[1].lines[0]
    assert rises.get_ydata() == pytest.approx([0, 0.2, 0.3, 0.3])
    assert list(rises.get_xdata()) == [0, 1, 2, 3]
    assert whole.get_ydata() == pytest.approx([0, 0.5])
    assert list(whole.get_xdata()) == [0, 3]
    memory, forgetting = drawn["costs"].axes
    points = [container.lines[0].get_xydata()[0] for container in memory.containers]
    assert points == [pytest.approx([2.0, np.mean(slao["AA"])]), pytest.approx([1.0, 0.8])]
    (point,) = [container.lines[0].get_xydata()[0] for container in forgetting.containers]
    assert point == pytest.approx([np.mean(slao["BWT"]), np.mean(slao["AA"])])


@pytest.mark.parametrize("odd", [[3.0], [3.0, 3.1, 3.2], [3.0, 3.1], [3.0] * 5])
def test_a_cross_entropy_of_another_length_is_named(results, odd):
    results["methods"]["slao"]["cross_entropy"] = [[3.0, 3.1, 3.2, 3.3], odd]
    count = len(odd)
    with pytest.raises(
        ValueError, match=rf"methods.slao.cross_entropy\[1\] has {count} entries for 3 tasks and before"
    ):
        parse(results)


def test_everything_from_outside_is_escaped(run, results):
    evil = "<script>alert('x')</script>&$x_1$"
    odd = [[evil, "yelp", "dbpedia"]] * 2
    results["methods"] = {evil: entry([SLAO, SLAO], [1.0, 0.5, 0.5], odd), "a/../b": entry([SEQ])}
    results |= {"stream": evil, "model": evil, "metric": evil, "versions": {evil: evil}, "settings": {evil: evil}}
    directory, text = run(results)
    assert "<script" not in text
    assert "script" not in Page(text).tags
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;$x_1$ → yelp" in text
    assert len(list((directory / "report").iterdir())) == 5


def test_methods_whose_file_names_would_collide_both_get_a_picture(run, results):
    results["methods"] = {"a b": entry([SLAO]), "a/b": entry([SEQ]), "a?b": entry([SEQ])}
    directory, text = run(results)
    names = {path.name for path in (directory / "report").glob("matrix_*")}
    assert names == {"matrix_a_b.png", "matrix_a_b_1.png", "matrix_a_b_2.png"}
    assert len(Page(text).links) == 5


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_task(run, results, seeds):
    results["methods"] = {"slao": entry([[[0.5]]] * seeds, [1.0])}
    directory, _ = run(results)
    check_png(directory / "report" / "matrix_slao.png")


def test_holes_other_orders_and_unequal_lengths(run, results):
    lower = [[v if i <= t else None for i, v in enumerate(row)] for t, row in enumerate(SLAO)]
    orders = [TASKS, TASKS[::-1]]
    results["methods"] = {
        "slao": entry([lower, lower], [1.0, 0.7, 0.6], orders),
        "short": entry([[[0.5, 0.2], [0.4, 0.6]]], [1.0, 0.5]),
        "nothing": entry([[[None] * 3] * 3]),
    }
    results["methods"]["nothing"]["tokens_per_second"] = None
    directory, text = run(results)
    assert "dbpedia → yelp → agnews" in text
    assert text.count("Seeds train in different orders") == 1
    for path in (directory / "report").iterdir():
        check_png(path)


def test_reporting_twice_gives_the_same_page(run, results):
    assert run(results)[1] == run(results)[1]


def test_a_run_directory_without_results(tmp_path):
    with pytest.raises(ValueError, match=r"there is no directory .*absent: give the output directory"):
        write_report(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"has no results\.json: let its `slao run` finish"):
        write_report(str(tmp_path))


@pytest.mark.parametrize("content", [b'{"stream": ', b"", b"\xff\xfe\x00"])
def test_unreadable_results(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read .* write it again with `slao run`") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["stream", "model", "methods", "metric"])
def test_a_missing_key_is_named(run, results, key):
    del results[key]
    with pytest.raises(ValueError, match=f"results.json: the results lacks? '{key}'; write it again"):
        run(results)


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
