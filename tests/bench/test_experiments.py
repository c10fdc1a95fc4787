"""bench/experiments.py: the page of the experiments says what the kept results say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import experiments


def test_the_page_says_what_the_files_say():
    text = experiments.PAGE.read_text("utf-8")
    names = [found[2] for found in experiments.MARK.finditer(text)]
    assert len(names) >= 5
    assert sorted(set(names)) == sorted(path.stem for path in experiments.KEPT.glob("*.json"))
    assert experiments.page(text) == text
    drawn = sorted(path.stem for path in experiments.KEPT.glob("*.svg"))
    assert drawn == sorted(found[1] for found in re.finditer(r"\(experiments/(\w+)\.svg\)", text))
    assert "clinc150" in drawn
    # And would not if a number changed.
    name = names[0]
    entry = next(iter(json.loads((experiments.KEPT / f"{name}.json").read_text("utf-8"))["methods"].values()))
    assert f"{sum(entry['AA']) / len(entry['AA']):.3f}" in text


def test_a_kept_file_has_no_path_and_no_losses(tmp_path, monkeypatch):
    method = {
        "seeds": [0], "tasks": [["a", "b"]], "matrix": [[[0.5, 0.123456], [0.5, 1.0]]], "zero_shot": [[0.1, 0.1]],
        "AA": [0.75], "BWT": [0.0], "forgetting": [0.0], "FWT": [0.0], "tokens_per_second": [1.0],
        "train_seconds": [1.0], "peak_memory_mb": [1.0], "losses": [[[1.0], [2.0]]],
    }  # fmt: skip
    run = tmp_path / "mine"
    run.mkdir()
    settings = {"stream": {"name": "jsonl", "path": "/home/me/data"}}
    content = {"stream": "s", "model": "m", "metric": "accuracy", "methods": {"slao": method}, "settings": settings}
    (run / "results.json").write_text(json.dumps(content))
    monkeypatch.setattr(experiments, "KEPT", tmp_path / "kept")
    kept = json.loads(experiments.keep([run]).read_text("utf-8"))
    assert "losses" not in kept["methods"]["slao"]
    assert kept["methods"]["slao"]["matrix"] == [[[0.5, 0.1235], [0.5, 1.0]]]
    assert kept["settings"]["stream"] == {"name": "jsonl"}
    assert experiments.page("<!-- mine -->\nold\n<!-- end -->").splitlines()[1].startswith("| method | runs | AA |")
    with pytest.raises(ValueError, match="no other.json in kept/"):
        experiments.page("<!-- other -->\n<!-- end -->")


def test_runs_of_further_orders_are_one_experiment():
    def run(order, **settings):
        methods = {"slao": {"seeds": [0], "orders": [order], "AA": [0.1 * order]}}
        told = {"seeds": [0], "orders": [order], "methods": {"slao": {}}, "lora": {"r": 8}}
        return {"stream": "s", "model": "m", "metric": "accuracy", "methods": methods, "settings": told | settings}

    both = experiments.joined([run(1), run(2, methods={"slao": {}, "ewc": {}})])
    assert both["methods"]["slao"] == {"seeds": [0, 0], "orders": [1, 2], "AA": [0.1, 0.2]}
    assert (both["settings"]["orders"], list(both["settings"]["methods"])) == ([1, 2], ["slao", "ewc"])
    with pytest.raises(ValueError, match=r"no one experiment: settings\.lora differ"):
        experiments.joined([run(1), run(2, lora={"r": 4})])
    with pytest.raises(ValueError, match="slao was trained twice at one seed and order"):
        experiments.joined([run(1), run(1)])


def test_differences_to_a_method_are_paired(tmp_path, monkeypatch):
    """slao is .1, .2, .3 above seqlora: .2 on average, within 4.303 * .1 / sqrt(3) of it by Student's t."""
    ends = {"slao": (0.5, 0.7, 0.9), "seqlora": (0.4, 0.5, 0.6)}
    entry = {key: [0.0] * 3 for key in ("BWT", "forgetting", "FWT", "tokens_per_second", "train_seconds")}
    entry |= {"seeds": [0, 1, 2], "tasks": [["a", "b"]] * 3, "zero_shot": [[0.1, 0.1]] * 3, "peak_memory_mb": [1.0] * 3}
    methods = {
        name: {**entry, "AA": list(AA), "matrix": [[[0.1, 0.1], [value, value]] for value in AA]}
        for name, AA in ends.items()
    }
    content = {"stream": "s", "model": "m", "metric": "accuracy", "methods": methods, "settings": {}}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    monkeypatch.setattr(experiments, "KEPT", tmp_path)
    *_, row, _ = experiments.page("<!-- mine against seqlora -->\nold\n<!-- end -->").splitlines()
    assert row == "| slao | 3 | +0.200 ± 0.248 | within noise | +0.000 | equal |"
    with pytest.raises(ValueError, match="differences to 'ewc': the run has slao, seqlora"):
        experiments.page("<!-- mine against ewc -->\n<!-- end -->")
