"""The figures of a report: where their points lie, and what becomes of matplotlib's SVG."""

import numpy as np
import pytest
from made_results import SEQ, SLAO, entry, two_methods

from slao.report import parse
from slao.report.canvas import COLOURS, looks
from slao.report.compare import kind_of
from slao.report.figures import draw


@pytest.fixture
def drawn(monkeypatch):
    """Name -> matplotlib's figure, of results."""
    from matplotlib.figure import Figure

    def figures(results):
        kept, save = [], Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1])
        return {plot.name: figure for plot, figure in zip(draw(results, parse(results)), kept, strict=True)}

    return figures


def test_retention_and_what_accuracy_costs_are_drawn_where_they_are_known(drawn):
    """The lines' points are the rises; joint training has two of them. An older result has neither, nor what
    is kept."""
    results = two_methods()
    slao, joint = results["methods"]["slao"], entry([[[None] * 3, [None] * 3, [0.8, 0.7, 0.9]]])
    older = drawn(results)
    assert "retention" not in older
    assert [axes.get_xlabel() for axes in older["trade"].axes] == ["BWT (left of 0: forgotten)"]
    slao |= {"cross_entropy": [[3.0, 3.1, 3.3, 3.2], [3.0, 3.3, 3.3, 3.4]], "state_mb": [[1.0, 2.0, 2.0]] * 2}
    joint |= {"cross_entropy": [[3.0, 3.5]], "state_mb": [[1.0]]}
    results["methods"] = {"slao": slao, "seqlora": results["methods"]["seqlora"], "joint": joint}
    found = drawn(results)
    rises, whole = (found["retention"].axes[0].containers[k].lines[0] for k in (0, 1))
    assert rises.get_ydata() == pytest.approx([0, 0.2, 0.3, 0.3])
    assert list(rises.get_xdata()) == [0, 1, 2, 3]
    assert whole.get_ydata() == pytest.approx([0, 0.5])
    assert list(whole.get_xdata()) == [0, 3]
    kept, forgotten = (
        [container.lines[0].get_xydata()[0] for container in axes.containers] for axes in found["trade"].axes
    )
    aa = [np.mean(slao["AA"]), np.mean([sum(r) for r in SEQ[2:]]) / 3]
    assert kept == [pytest.approx([2.0, aa[0]]), pytest.approx([1.0, 0.8])]
    assert forgotten == [pytest.approx([-0.25, aa[0]]), pytest.approx([-0.5, aa[1]])]  # joint training has no BWT
    memory = found["trade"].axes[0]
    assert (memory.get_xscale(), memory.get_xlabel()) == ("linear", "MB kept at the end")  # 1 and 2: no power between
    results["methods"]["slao"]["state_mb"] = [[1.0, 8.0, 16.0]] * 2
    memory = drawn(results)["trade"].axes[0]
    assert (memory.get_xscale(), memory.get_xlabel()) == ("log", "MB kept at the end (log scale)")
    assert [text.get_text() for text in found["trade"].legends[0].get_texts()] == ["slao", "joint", "seqlora"]
    # AA and BWT with one deviation to each side; joint training has no BWT.
    aa, bwt = found["ends"].axes
    assert [c.lines[0].get_xdata()[0] for c in aa.containers] == pytest.approx(
        [0.74, np.mean([sum(r) for r in SEQ[2:]]) / 3, 0.8]
    )
    assert [c.lines[0].get_xdata()[0] for c in bwt.containers] == pytest.approx([-0.25, -0.5])
    low, high = (c.get_xdata()[0] for c in aa.containers[0].lines[1])
    assert (low, high) == pytest.approx((0.74 - 0.01 * 2 / 3 * 2**0.5, 0.74 + 0.01 * 2 / 3 * 2**0.5))


def test_no_weights_are_drawn_without_lambdas(drawn):
    results = two_methods()
    assert "weights" in drawn(results)
    del results["methods"]["slao"]["lambdas"]
    assert "weights" not in drawn(results)


def test_losses_are_drawn_task_after_task(drawn):
    """Each task's over one unit, joint training's over the whole; what was logged once only is no curve."""
    results = two_methods()
    joint = entry([[[None] * 3, [None] * 3, [0.8, 0.7, 0.9]]]) | {"losses": [[[4.0, 2.0]]]}
    results["methods"]["slao"]["losses"] = [[[3.0, 1.0], [2.0], [5.0, 5.0, 5.0]], [[5.0, 3.0], [2.0], [5.0, 5.0]]]
    results["methods"]["joint"] = joint
    axes = drawn(results)["losses"].axes[0]
    slao, whole = axes.lines[:2]
    x, y = slao.get_xdata(), slao.get_ydata()
    first = y[x < 1]
    assert (first[0], first[-1]) == pytest.approx((4.0, 2.0))
    assert np.isnan(y[(x > 1) & (x < 2)]).all()
    assert y[x > 2] == pytest.approx(np.full(16, 5.0))
    assert np.nanmin(whole.get_xdata()) < 0.2
    assert np.nanmax(whole.get_xdata()) > 2.8
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["slao", "joint"]


def test_the_time_is_split(drawn):
    results = two_methods()
    results["methods"]["slao"] |= {"score_seconds": [2.0, 4.0], "merge_seconds": [0.5, 0.5]}
    training, scoring, merging = drawn(results)["times"].axes[0].containers
    assert [bar.get_width() for bar in training] == [3.25, 3.25]
    assert [bar.get_width() for bar in scoring] == [3.0, 0.0]
    assert [(bar.get_x(), bar.get_width()) for bar in merging] == [(6.25, 0.5), (3.25, 0.0)]


def test_texts_of_a_figure_keep_their_digits():
    """Places are cut to a hundredth of a point, tick labels are not."""
    results = two_methods()
    results["methods"] = {"slao": entry([[[0.5012, None], [0.5012, 0.5031]]])}
    svg = next(plot.svg for plot in draw(results, parse(results)) if plot.name == "averages")
    assert ">0.5012<" in svg
    assert 'd="M' in svg
    assert not any(
        len(part.split(".")[1].rstrip("0")) > 2 for part in svg.partition('d="')[2].split('"')[0].split() if "." in part
    )


def test_colours_tell_methods_and_dashes_runs():
    results = two_methods()
    of = {"kind": "slao", "variant": ""}
    slao, seqlora = results["methods"].values()
    results["methods"] = {
        f"{label} · {run}": found | {"of": of | {"label": label, "run": run}}
        for run in "ab" for label, found in (("slao", slao), ("seqlora", seqlora))
    }  # fmt: skip
    styles = looks(parse(results))
    assert [style["color"] for style in styles] == [*COLOURS[:2]] * 2
    assert [style["linestyle"] for style in styles] == ["-", "-", "--", "--"]
    many = parse(two_methods() | {"methods": {f"m{k}": entry([SLAO]) for k in range(14)}})
    assert len({(style["color"], style["linestyle"]) for style in looks(many)}) == 14


def test_the_kind_of_a_label():
    settings = {"methods": {"slao": {}, "slao (fast)": {"method": "clora"}, "plain": {"method": "seqlora"}}}
    assert kind_of("slao", settings) == ("slao", "")
    assert kind_of("slao (r=2)", settings) == ("slao", "r=2")
    assert kind_of("slao (fast)", settings) == ("clora", "")
    assert kind_of("plain (r=2, rows=3)", settings) == ("seqlora", "r=2, rows=3")
    assert kind_of("ewc", None) == ("ewc", "")


def test_names_that_would_collide(drawn):
    table = {"tasks": ["a", "b"], "layers": ["x.0.q"], "shapes": {"A": [[2, 4]], "B": [[4, 2]]}}
    table |= {measure: {factor: [[[1.0, 0.5], [0.5, 1.0]]] for factor in "AB"} for measure in ("cosine", "overlap")}
    results = two_methods()
    results["methods"] = {name: entry([SLAO]) | {"similarity": [table]} for name in ("a b", "a/b", "a?b")}
    names = [name for name in drawn(results) if name.startswith("similarity")]
    assert names == ["similarity_a_b", "similarity_a_b_1", "similarity_a_b_2"]
