"""The HTML page of small made-up results, and of a large one: what it contains, escapes, and needs from elsewhere."""

import itertools
import json
import re
import sys
from urllib.parse import unquote

import numpy as np
import pytest
from made_results import SEQ, SLAO, TASKS, Page, entry, two_methods

from slao.report import write_report
from slao.report.canvas import CARD, COLOURS, DARK, INK, SOFT


@pytest.fixture
def results():
    return two_methods()


@pytest.fixture
def run(tmp_path):
    """Writes results into a run directory and reports on them; returns the directory and the HTML text."""

    def write(results):
        (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
        page = write_report(tmp_path)
        assert page == tmp_path / "report.html"
        return tmp_path, page.read_text(encoding="utf-8")

    return write


def figures(directory):
    return sorted(path.name for path in (directory / "report").iterdir())


def test_the_report_says_what_to_install(run, results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'slao_kernels\[train\]'"):
        run(results)


def test_the_report_is_complete_and_self_contained(run, results):
    directory, text = run(results)
    page = Page(text)
    for expected in ("slao", "seqlora", "MiniLM", "q_proj", "2.11.0", "agnews → yelp → dbpedia", "0.733"):
        assert expected in page.words
    names = ["averages.svg", "ends.svg", "times.svg", "trade.svg", "weights.svg"]
    assert figures(directory) == names
    assert len(page.links) == len(names)
    # Nothing comes from elsewhere: neither into the page nor into a figure, whose only address names its language.
    assert all(link.startswith("data:image/svg+xml,") for link in page.links)
    for part in (text, *map(unquote, page.links)):
        assert "://" not in re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/(2000/svg|1999/xlink)"', "", part)
        assert not re.search(r"<script|@import|url\((?!#|%23)|<!DOCTYPE svg|<image", part)
    assert "script" not in page.tags
    for name in names:
        file = (directory / "report" / name).read_text(encoding="utf-8")
        assert file.startswith("<svg")
        assert file.strip() in [unquote(link).partition(",")[2] for link in page.links]
    assert len(re.findall(r"<tr><th scope=\"row\">slao</th><td>[01]</td>", text)) == 4  # per run, and its order


def test_headings_captions_and_scopes(run, results):
    _, text = run(results)
    page = Page(text)
    assert dict(page.attributes[0][1]) == {"lang": "en"}
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.tags.count("table") == page.tags.count("caption") > 0
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.attributes if tag == "th")
    assert re.search(r"<title>(.*?)</title>", text)[1] == re.search(r"<h1>(.*?)</h1>", text)[1]
    assert "prefers-color-scheme: dark" in text
    # The ground of a figure is what is drawn first, so that it can be read on its own, too.
    assert all("prefers-color-scheme:dark" in unquote(link) for link in page.links)


def luminance(colour):
    parts = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return float(np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))


def contrast(one, other):
    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_contrasts_in_light_and_dark(run, results):
    """WCAG 2: 4.5 to 1 of text, 3 to 1 of a line."""
    for text in (INK, SOFT):
        assert contrast(text, CARD) >= 4.5
        assert contrast(DARK[text], DARK[CARD]) >= 4.5
    for line in COLOURS:
        assert contrast(line, CARD) >= 3
        assert contrast(DARK[line], DARK[CARD]) >= 3
    _, style = run(results)
    heat = re.findall(r"\.h\d\{background:(#\w+);color:(#\w+)\}", style)
    assert len(heat) == 9
    assert all(contrast(*pair) >= 4.5 for pair in heat)
    # The page has the colours of its figures.
    assert all(f": {colour};" in style for name in (INK, SOFT, CARD) for colour in (name, DARK[name]))


def test_alternative_texts_have_the_figures(run, results):
    results["methods"]["slao"] |= {
        "cross_entropy": [[3.0, 3.1, 3.3, 3.2], [3.0, 3.3, 3.3, 3.4]],
        "state_mb": [[1.0, 2.0, 2.0]] * 2,
        "losses": [[[2.0, 1.0], [1.5, 0.5], [3.0, 0.25]]] * 2,
    }
    results["methods"]["seqlora"]["state_mb"] = [[1.0, 1.0, 1.0]] * 2
    alts = dict(alt.split(". ", 1) for alt in Page(run(results)[1]).alts)
    # AA .7333 and .7467; BWT -.25 twice, for all of a seed's scores are higher but the one that is 1 already.
    assert "slao: AA 0.740 ± 0.009, BWT -0.250 ± 0.000; seqlora: AA 0.567 ± 0.000, BWT -0.500" in alts.pop(
        "Where each method ends, and what it forgets"
    )
    assert alts.pop("Mean accuracy over the tasks seen so far") == (
        "slao: 0.810 after task 1, 0.740 after task 3; seqlora: 0.800 after task 1, 0.567 after task 3."
    )
    assert alts.pop("Accuracy against kept memory and forgetting") == (
        "slao: AA 0.740 ± 0.009, 2.00 MB, BWT -0.250 ± 0.000; seqlora: AA 0.567 ± 0.000, 1.00 MB, BWT -0.500 ± 0.000."
    )
    assert alts.pop("Training loss, task after task") == "slao: from 2 to 0.25."
    # w = λ_j Π (1 − λ_k) of 1, 1/√2, 1/√3.
    assert alts.pop("λ by task, and each task's weight in the final merge") == (
        "slao: λ 1.000, 0.707, 0.577; weights 0.124, 0.299, 0.577."
    )
    assert alts.pop("Where the time of a run goes") == "slao: training 3.2 ± 0.0 s; seqlora: training 3.2 ± 0.0 s."
    assert alts.pop("How much less likely a text that no task is about has become") == (
        "slao: 0.300 ± 0.141 nats a token at the end."
    )
    assert alts == {}


def test_the_matrix_is_a_table_of_the_means(run, results):
    _, text = run(results)
    table = next(part for part in text.split("<table") if "<caption><span>slao.<" in part)
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table)
    assert [name for name, _ in rows] == ["1 agnews", "2 yelp", "3 dbpedia"]
    cells = [re.findall(r'<td class="h(\d)( unseen)?">(.*?)</td>', row) for _, row in rows]
    assert [[float(score) for *_, score in row] for row in cells] == [
        [0.81, 0.31, 0.11],
        [0.61, 0.91, 0.21],
        [0.51, 0.71, 1.0],
    ]
    assert [[bool(unseen) for _, unseen, _ in row] for row in cells] == [
        [False, True, True],
        [False, False, True],
        [False] * 3,
    ]
    # Of both methods' scores the lowest is seqlora's .1, the highest 1.
    assert cells[2][2][0] == "8"
    assert cells[0][2][0] == str(round(8 * 0.01 / 0.9))


def test_everything_from_outside_is_escaped(run, results):
    evil = "<script>alert('x')</script>&$x_1$"
    odd = [[evil, "yelp", "dbpedia"]] * 2
    results["methods"] = {evil: entry([SLAO, SLAO], [1.0, 0.5, 0.5], odd), "a/../b": entry([SEQ])}
    results |= {"stream": evil, "model": evil, "metric": evil, "versions": {evil: evil}, "settings": {evil: evil}}
    results |= {"failed": {evil: evil}, "unfinished": {evil: [0, 3]}}
    directory, text = run(results)
    page = Page(text)
    assert "<script" not in text
    assert "script" not in page.tags
    assert all("<script" not in unquote(link) for link in page.links)
    assert f"{evil} → yelp" in page.words
    assert figures(directory) == ["averages.svg", "ends.svg", "times.svg", "trade.svg", "weights.svg"]


def test_failed_trainings_are_said(run, results):
    results["failed"] = {"ewc seed 0": "task 'yelp' diverged"}
    assert "failed: ewc seed 0: task 'yelp' diverged" in Page(run(results)[1]).words


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_task(run, results, seeds):
    results["methods"] = {"slao": entry([[[0.5]]] * seeds, [1.0])}
    _, text = run(results)
    assert "slao ends at 0.500" in text
    assert "BWT, change of" not in unquote(text)


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
    assert text.count("Runs train in different orders") == 1
    assert "nothing: AA no value" in text
    assert len(figures(directory)) == 5


def test_reporting_twice_gives_the_same_page(run, results):
    assert run(results)[1] == run(results)[1]


def half_of_a_large_run():
    """6 methods, 2 seeds in 2 orders, 10 tasks, 24 layers: half of what the preset clinc150 gives."""
    rng = np.random.default_rng(0)
    tasks = [f"domain number {k}" for k in range(10)]
    layers = [f"encoder.layer.{k}.attention.self.{kind}" for k in range(12) for kind in ("query", "value")]
    shapes = {"A": [[8, 384]] * 24, "B": [[384, 8]] * 24}
    methods = {}
    for name in ("slao", "seqlora", *(f"method {k}" for k in range(4))):
        matrices = [
            [[score or None for score in row] for row in np.tril(rng.uniform(0.6, 0.95, (10, 10))).tolist()]
            for _ in range(4)
        ]
        alike = {factor: rng.uniform(0, 1, (24, 10, 10)).tolist() for factor in "AB"}
        alike = {"tasks": tasks, "layers": layers, "shapes": shapes, "cosine": alike, "overlap": alike}
        methods[name] = entry(matrices, list(rng.uniform(0.1, 1, 10)), [tasks, tasks[::-1]] * 2) | {
            "seeds": [0, 0, 1, 1],
            "orders": [0, 1, 0, 1],
            "losses": rng.uniform(0.1, 3, (4, 10, 40)).tolist(),
            "state_mb": rng.uniform(0.1, 9, (4, 10)).tolist(),
            "score_seconds": [30.0] * 4,
            "merge_seconds": [1.0] * 4,
            "cross_entropy": rng.uniform(3, 4, (4, 11)).tolist(),
            "similarity": [alike] * 4,
        }
    return two_methods() | {"stream": "clinc150", "methods": methods}


def test_the_report_of_a_large_run_stays_below_a_megabyte(run):
    directory, text = run(half_of_a_large_run())
    assert len(figures(directory)) == 7 + 6
    assert len(Page(text).links) == 7 + 6
    assert len(text.encode()) < 500_000


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
