"""bench/quote.py, and report.py --readme and --check: what the README says of the results."""

from __future__ import annotations

import json

import pytest
import quote
import report
import results
import scrub
import tables


def test_this_repository_says_what_its_results_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err
    readme = (report.ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- bench:cpu headline -->" in readme
    assert "<!-- bench:experiment icd10cm -->" in readme
    assert len(readme.splitlines()) <= 120
    for path in report.RESULTS.glob("*.json"):
        whole = json.loads(path.read_text(encoding="utf-8"))
        assert scrub.scrub(whole) == whole, f"{path.name} is not scrubbed: put it there by report.py --keep"
        cases = sum(len(run.cases) for run in results.read(path))
        assert path.stat().st_size < 1_000 * cases  # medians, no laps


def test_a_block_is_filled_checked_and_put_right(publishable, repository, capsys):
    readme, folder = repository
    assert report.main(["--check"]) == 0  # no results, empty blocks
    assert report.main(["--keep", str(publishable), "--no-plots"]) == 0
    assert report.main(["--check"]) == 0
    text = readme.read_text()
    before, _, after = text.partition("b\n<!-- bench:gpu")
    assert before.startswith("# A\n<!-- bench:cpu summary -->\n| ")
    assert after == " summary -->\n<!-- /bench -->\n"  # no GPU's result
    (page,) = folder.glob("*.md")
    ratios = [
        case.over_ours["loop lerp_(.float())"]
        for case in results.read(publishable)[0].cases
        if "loop lerp_(.float())" in case.ms
    ]
    assert f"loop lerp_(.float()) {tables.digits(*ratios)} " in text
    for file in (readme, page):
        right = file.read_text()
        file.write_text(right.replace("| ---", "|  ---"))
        capsys.readouterr()
        assert report.main(["--check"]) == 1
        assert capsys.readouterr().err.startswith(f"report: {file.name} is not what bench/results/ says")
        assert report.main(["--readme"]) == 0
        assert file.read_text() == right


def test_the_newest_result_of_a_kind_is_quoted(publishable, repository):
    _, folder = repository
    scrubbed = scrub.scrub(json.loads(publishable.read_text()))
    folder.mkdir()
    for name in ("2026-01-02-b", "2025-12-31-z", "2026-01-02-a"):
        (folder / f"{name}.json").write_text(json.dumps(scrubbed))
    path, runs = quote.newest("cpu", folder)
    assert path.stem == "2026-01-02-b"
    assert len(runs) == 1
    assert quote.newest("gpu", folder) is None


def test_a_bench_can_be_quoted_alone(publishable, repository):
    _, folder = repository
    target = scrub.keep(publishable, folder)
    text = quote.text("cpu", "scaled_merge", folder, "results")
    (case,) = (case for case in results.read(target)[0].cases if case.test == "scaled_merge" and case.label == "fp32")
    assert f"| fp32 | {tables.digits(case.over_ours['_foreach_lerp_'])} | " in text
    with pytest.raises(ValueError, match="no_such -->: .* has headline, summary, .*scaled_merge"):
        quote.text("cpu", "no_such", folder, "results")


def test_the_headline_names_one_peer_an_operation(publishable, repository):
    _, folder = repository
    runs = results.read(scrub.keep(publishable, folder))
    values = [
        case.over_ours["_foreach_lerp_"]
        for run in runs
        for case in run.cases
        if case.test == "scaled_merge" and "_foreach_lerp_" in case.over_ours
    ]
    text = quote.text("cpu", "headline", folder, "results")
    assert f"| B merged in all layers | `_foreach_lerp_` | {quote.spread(values)} | {len(values)} |" in text


def test_an_experiment_is_quoted_from_its_file(tmp_path):
    kept = {"AA": [0.5, 0.7], "BWT": [None, None], "state_mb": [[1.0, 2.0], [1.0, 3.0]]}
    once = {"AA": [0.25], "BWT": [-0.125], "state_mb": [[0.5, 0.5]]}
    (tmp_path / "experiments").mkdir()
    written = tmp_path / "experiments" / "two.json"
    written.write_text(json.dumps({"methods": {"slao": once, "elsewhere": once, "seqlora": kept}}))
    lines = quote.text("experiment", "two", tmp_path / "results", "").splitlines()
    assert lines[2:] == [
        "| `seqlora` | 0.600 ± 0.141 | – | 2.50 | 2 |",
        "| `slao` | 0.250 | -0.125 | 0.50 | 1 |",
    ]
    (tmp_path / "experiments" / "other.json").write_text(json.dumps({"methods": {"slao": kept, "osf": once}}))
    lines = quote.text("experiment", "two,other", tmp_path / "results", "").splitlines()
    assert lines[0].startswith("|  | two: AA | two: BWT | two: kept, MB | other: AA |")
    assert lines[2:] == [
        "| `slao` | 0.250 | -0.125 | 0.50 | 0.600 ± 0.141 | – | 1.00 → 2.50 |",
        "| `elsewhere` | 0.250 | -0.125 | 0.50 | – | – | – |",
        "| `seqlora` | 0.600 ± 0.141 | – | 1.00 → 2.50 | – | – | – |",
        "| `osf` | – | – | – | 0.250 | -0.125 | 0.50 |",
    ]
    with pytest.raises(ValueError, match="bench:experiment three -->: there is no three.json"):
        quote.text("experiment", "three", tmp_path / "results", "")


@pytest.mark.parametrize(
    ("readme", "said"),
    [
        ("nothing", "at least one pair"),
        ("<!-- bench:cpu summary -->\n", "at least one pair"),
        ("<!-- bench:cpu summary -->\n<!-- /bench -->\n<!-- /bench -->\n", "markers are pairs"),
        ("<!-- bench:cpu summary -->\n<!-- bench:gpu summary -->\n<!-- /bench -->\n", "markers are pairs"),
        ("<!-- bench:cpu -->\n<!-- /bench -->\n", "markers are pairs"),
        ("<!-- bench:tpu summary -->\n<!-- /bench -->\n", "cpu, gpu or experiment is expected, not tpu"),
    ],
)
def test_wrong_markers(readme, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        quote.filled(readme, tmp_path, "results")
