"""bench/report.py and what it is made of, on the JSON of a small real run of the benches."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from importlib.util import find_spec

import cases
import gpu
import plots
import pytest
import report
import reports
import results
import scrub
import tables
from environment import environment as of_this


def named(runs):
    return {f"{case.bench} {case.label}": case for run in runs for case in run.cases}


# Reading


def test_cases_are_what_the_benches_recorded(measured, whole):
    (run,) = results.read(measured)
    assert len(run.cases) == len(whole["benchmarks"])
    for case, bench in zip(run.cases, whole["benchmarks"], strict=True):
        info = bench["extra_info"]
        assert case.bench in bench["fullname"]
        assert case.ms["ours"] == pytest.approx(info["ours_ms"])
        if case.bench == "scaled_merge":
            assert case.floor == "copy floor"
            assert case.roof["ours"] == pytest.approx(100 * info["copy floor ms"] / info["ours_ms"])
            peers = {name for name in case.ms if name not in ("ours", "copy floor")}
            assert case.over_ours == pytest.approx({name: info[f"{name} ms"] / info["ours_ms"] for name in peers})
        if case.bench == "lora_linear":
            (race,) = info["races"]
            assert case.floor == "frozen"
            assert case.over_floor["PEFT"] == pytest.approx(race["PEFT"] / race["frozen"])
            assert case.over_ours["PEFT"] == pytest.approx(race["PEFT"] / race["ours"])
            narrow = race["ours, base dtype"]  # mm+addmm_'s adapters are of the base's dtype
            assert case.over_ours["mm+addmm_"] == pytest.approx(race["mm+addmm_"] / narrow)
        if case.bench == "lora_kernels":
            (row,) = info["rows"]
            assert case.roof["ours"] == row["% roof"]
            assert case.roof["torch"] == pytest.approx(row["% roof"] / row["torch / ours"])
    assert dict(run.about)["threads"] == "1"
    assert "worth little" in dict(run.about)["rounds"]
    assert "torch " in dict(run.about)["versions"]


def test_what_cannot_be_read_is_one_line_that_names_it(measured, whole, tmp_path, capsys):
    def said(text):
        path = tmp_path / "wrong.json"
        path.write_text(text)
        assert report.main([str(path)]) == 2
        line = capsys.readouterr().err
        assert re.fullmatch(r"report: [^\n]*wrong\.json[^\n]*\n", line), line
        return line

    assert "cannot be read as JSON" in said("{")
    assert "an object is expected" in said("[]")
    assert "neither pytest-benchmark's" in said("{}")
    assert "no bench ran" in said(json.dumps(whole | {"benchmarks": []}))
    without, infinite = copy.deepcopy(whole), copy.deepcopy(whole)
    del without["benchmarks"][0]["extra_info"]["ours_ms"]
    assert "lacks 'ours_ms'" in said(json.dumps(without))
    infinite["benchmarks"][0]["extra_info"]["ours_ms"] = math.inf
    assert "'ours_ms' is not a number but inf" in said(json.dumps(infinite))
    assert report.main([str(tmp_path / "none.json")]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_a_bench_with_a_wrong_answer_is_left_out(whole):
    before = len(results.parse(whole, "here")[0].cases)
    bench = whole["benchmarks"][0]
    bench["extra_info"]["wrong"] = {"triton": "is off by 1.0e-01"}
    (run,) = results.parse(whole, "here")
    assert len(run.cases) == before - 1
    assert run.left_out[bench["name"]] == "triton is off by 1.0e-01"


def test_the_best_of_several_races_is_one_race_s_ratio(whole):
    bench = copy.deepcopy(next(bench for bench in whole["benchmarks"] if "races" in bench["extra_info"]))
    (race,) = bench["extra_info"]["races"]
    bench["extra_info"]["races"] = [race, race | {"PEFT": 3 * race["ours"]}, race | {"PEFT": 2 * race["ours"]}]
    assert cases.case(bench, "here").over_ours["PEFT"] == pytest.approx(max(3, race["PEFT"] / race["ours"]))


# What is published


def test_a_scrubbed_file_names_nobody(whole, monkeypatch):
    whole["machine_info"]["node"] = "annas-tower"
    whole["commit_info"] |= {"project": "annas-fork", "branch": "anna/wip", "author_time": "now"}
    info = whole["benchmarks"][0]["extra_info"]
    reasons = {
        "Axolotl": "cannot be imported: OSError: /home/anna/.venv/lib/libx.so: no such file",
        "Unsloth": "no 'C:\\Users\\anna\\My data\\x.dll' on annas-tower, only ~/anna/x at 3 GB/s and PEFT / ours",
    }
    info["left out"] = reasons
    whole["benchmarks"][0]["fullname"] = "/home/anna/main/bench/bench_fold.py::test_fold"
    kept = scrub.scrub(whole)
    text = json.dumps(kept)
    assert "anna" not in text
    assert '"data"' not in text
    assert kept["benchmarks"][0]["fullname"] == "bench/bench_fold.py::test_fold"
    assert kept["benchmarks"][0]["extra_info"]["left out"] == {
        "Axolotl": "cannot be imported: OSError: <path>: no such file",
        "Unsloth": "no <path> on <host>, only <path> at 3 GB/s and PEFT / ours",
    }
    assert scrub.scrub(kept) == kept
    assert kept["datetime"] == whole["datetime"]
    assert kept["machine_info"]["slao_kernels"] == whole["machine_info"]["slao_kernels"]
    for before, after in zip(whole["benchmarks"], kept["benchmarks"], strict=True):
        assert after["stats"]["median"] == pytest.approx(before["stats"]["median"], rel=1e-5)
        assert after["extra_info"]["ours_ms"] == pytest.approx(before["extra_info"]["ours_ms"], rel=1e-5)


def test_a_scrubbed_file_gives_the_same_tables(measured, whole):
    (before,), (after,) = results.read(measured), results.parse(scrub.scrub(whole), "scrubbed")
    assert after.about == before.about
    for old, new in zip(before.cases, after.cases, strict=True):
        assert new.label == old.label
        assert new.over_ours == pytest.approx(old.over_ours, rel=1e-5)
        assert new.roof == pytest.approx(old.roof, rel=1e-5)


def test_kept_once_and_not_written_over(publishable, measured, repository, capsys):
    readme, folder = repository
    assert report.main(["--keep", str(publishable), "--no-plots", "--device", "Some CPU @ 2.1 GHz"]) == 0
    date = results.read(measured)[0].date
    assert {path.name for path in folder.iterdir()} == {f"{date}-some.json", f"{date}-some.md"}
    assert json.loads((folder / f"{date}-some.json").read_text()) == scrub.scrub(json.loads(publishable.read_text()))
    assert f"bench/results/{date}-some.md" in readme.read_text()
    assert report.main(["--keep", str(publishable), "--device", "some"]) == 2
    assert "exists: remove it, or give this one another name" in capsys.readouterr().err
    assert report.main(["--keep", str(measured), "--device", "other"]) == 2
    assert "ran with --rounds" in capsys.readouterr().err
    assert len(list(folder.iterdir())) == 2


def test_a_device_s_name_in_a_file_s():
    assert scrub.device_word("Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz") == "intel-xeon-platinum-8480c"
    assert scrub.device_word("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# Pages and plots


def test_a_page_has_every_case_and_its_plots(measured):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report.write(measured)
    page = measured.with_suffix(".md").read_text()
    (run,) = results.read(measured)
    for case in run.cases:
        section = page.partition(f"\n## {case.bench}\n")[2].partition("\n## ")[0]
        row = next(line for line in section.splitlines() if line.startswith("| ") and f"{case.label} |" in line)
        ours = row.split(" | ")[1]
        assert ours.partition(" ")[0] == tables.digits(case.ms["ours"])
    links = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert set(links) == {f"bench/{path.name}" for path in measured.with_suffix("").iterdir()}
    assert {"bench/orthogonal_init-time.png", "bench/lora_linear-ratio.png", "bench/scaled_merge-roof.png"} <= set(
        links
    )
    # Its only peer is a package that few have.
    assert ("bench/transition-ratio.png" in links) == (find_spec("backpropagate") is not None)
    for link in links:
        image = (measured.parent / link).read_bytes()
        assert image.startswith(b"\x89PNG")
        assert 2_000 < len(image) < 100_000


@pytest.mark.parametrize("kind", plots.KINDS, ids=lambda kind: kind.stem)
def test_a_plot_shows_the_figures_against_the_size(kind, measured):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (run,) = results.read(measured)
    own = [case for case in run.cases if case.bench == "orthogonal_init"]
    (axes,) = plots.figure("orthogonal_init", own, kind).axes
    lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["r 16", "r 64", "r 256"]
    for name in kind.of(own[0]):
        assert lines[name] == {case.params["r"]: kind.of(case)[name] for case in own if name in kind.of(case)}


def test_without_matplotlib_a_page_without_plots(measured, tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    path.write_text(measured.read_text())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(path)]) == 0
    assert re.fullmatch(r"report: without plots: plots need matplotlib: .*\n", capsys.readouterr().err)
    assert {entry.name for entry in tmp_path.iterdir()} == {"bench.json", "bench.md"}
    assert "](" not in path.with_suffix(".md").read_text()


def test_a_file_of_make_gpu(measured, tmp_path):
    """Written as bench/gpu.py does, with what it keeps of a bench; only the card's name is made up."""
    benches, _, how = reports.benchmarks(measured.with_suffix(".jsonl"))
    environment = of_this("abc") | {"device": {"name": "Some GPU", "count": 1, "capability": "9.0"}}
    part = {"environment": environment, "benchmarks": benches, "slao_kernels": how, "exit": 0}
    part["calls"] = {"bench/bench_fold.py": {"passed": 4, "skipped": 0, "failed": 0, "failures": [], "exit": 0}}
    out = tmp_path / "gpu.json"
    gpu.write(out, {"parts": {"rest": part, "tests": part | {"benchmarks": []}}})
    rest, tests = results.read(out)
    assert (rest.part, rest.gpu, rest.device, tests.cases) == ("rest", True, "Some GPU", [])
    assert dict(rest.about)["bench/bench_fold.py"] == "4 passed, 0 skipped, 0 failed, exit 0"
    labels = {name: case.over_ours for name, case in named([rest]).items()}
    assert labels == {name: case.over_ours for name, case in named(results.read(measured)).items()}
    assert "| `make gpu`, rest |" in report.page(out)


def test_digits():
    expected = {0.0123456: "0.0123", 0.1: "0.100", 0.99951: "1.00", 9.996: "10.0", 99.96: "100", 1234.5: "1,234"}
    assert {value: tables.digits(value) for value in expected} == expected
