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
    assert sorted(names) == sorted(path.stem for path in experiments.KEPT.glob("*.json"))
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
    kept = json.loads(experiments.keep(run).read_text("utf-8"))
    assert "losses" not in kept["methods"]["slao"]
    assert kept["methods"]["slao"]["matrix"] == [[[0.5, 0.1235], [0.5, 1.0]]]
    assert kept["settings"]["stream"] == {"name": "jsonl"}
    assert experiments.page("<!-- mine -->\nold\n<!-- end -->").splitlines()[1].startswith("| method | runs | AA |")
    with pytest.raises(ValueError, match="no other.json in kept/"):
        experiments.page("<!-- other -->\n<!-- end -->")
