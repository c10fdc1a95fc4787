"""bench/reports.py: what tests and benches left, read again, and in few lines."""

from __future__ import annotations

import json

import reports


def line(name: str, info: dict, outcome: str = "passed", why: str = "") -> dict:
    return {"name": name, "fullname": f"bench/bench_x.py::{name}", "outcome": outcome, "why": why, "extra_info": info}


def test_lines_from_a_byte_on_and_no_half_of_one(tmp_path):
    path = tmp_path / "lines.jsonl"
    old = json.dumps(line("test_old", {"ours_ms": 1.0})) + "\n"
    path.write_text(old)
    start = path.stat().st_size
    with path.open("a") as file:
        for one in ({"options": {}}, line("test_a", {"ours_ms": 2.0}), line("test_b", {}, "failed", "Error: no")):
            file.write(json.dumps(one) + "\n")
        file.write(old[:20])  # what a killed process leaves
    measured, counts, how = reports.benchmarks(path, start)
    assert [bench["name"] for bench in measured] == ["test_a"]
    assert how == {"options": {}}
    assert (counts["passed"], counts["failed"], counts["reasons"]) == (1, 1, {"test_b": "Error: no"})
    assert reports.benchmarks(tmp_path / "none")[0] == []


JUNIT = """<testsuites><testsuite tests="4" skipped="1" failures="1" errors="1">
<testcase name="test_good"/><testcase name="test_left_out"><skipped/></testcase>
<testcase name="test_bad"><failure message="assert 3 == 4&#10; where"/></testcase>
<testcase name="test_lost"><error message="failed on teardown with &quot;CUDA error&quot;"/></testcase>
</testsuite></testsuites>"""


def test_outcomes_with_their_reasons(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(JUNIT)
    assert reports.outcomes(path) == {
        "passed": 1,
        "skipped": 1,
        "failed": 2,
        "failures": ["test_bad", "test_lost"],
        "reasons": {"test_bad": "assert 3 == 4", "test_lost": 'failed on teardown with "CUDA error"'},
    }
    assert reports.outcomes(tmp_path / "none.xml") == {}


LAYER = {"ours_ms": 1.5, "frozen ms": 1.0, "PEFT ms": 2.0, "PEFT / frozen": 2.0, "ours ms": 1.5, "ours / frozen": 1.5}
LAYER |= {"ours, base dtype / frozen": 1.4, "frozen, graph ms": 0.5, "frozen, graph / frozen": 0.5}
LAYER |= {"ours, graph ms": 0.6, "ours, graph / frozen": 0.6, "ours, graph / frozen, graph": 1.2, "ours share": 0.5}
MERGE = {"ours_ms": 2.0, "ours, graph ms": 0.2, "loop / ours": 4.0, "copy floor, graph / ours, graph": 0.5}
PRODUCT = {"ours_ms": 0.1, "rows": [{"us": 100.0, "torch us": 150.0, "torch / ours": 1.5, "GB/s": 1e3, "% roof": 60.0}]}


def test_columns():
    expected = {"frozen ms": 1.0, "PEFT": 2.0, "ours": 1.5, "ours, graph": 1.2, "overhead left": 0.5}
    assert reports.columns(LAYER) == expected
    assert reports.columns(LAYER | {"ours memory / PEFT": 0.25}) == expected | {"memory / PEFT": 0.25}
    expected = {"ours ms": 2.0, "graph ms": 0.2, "loop": 4.0, "copy floor, graph": 0.5}
    assert reports.columns(MERGE) == expected
    assert reports.columns(PRODUCT) == {"us": 100.0, "torch us": 150.0, "torch / ours": 1.5, "% roof": 60.0}


def part(benches: list[dict], failures: int = 0) -> dict:
    names = [f"test_{i}" for i in range(failures)]
    call = {"passed": 3, "skipped": 0, "failed": failures, "failures": names, "exit": 1, "seconds": 9.0, "limit": 60}
    call |= {"reasons": dict.fromkeys(names, "x" * 500), "wrong": {}}
    return {"calls": {"bench/bench_x.py": call}, "benchmarks": benches}


def test_brief_has_everything_where_there_is_room():
    found = {"parts": {"layers": part([line("test_layer[a]", LAYER)], 1), "rest": part([line("test_merge[b]", MERGE)])}}
    lines = reports.brief(found)
    assert lines[0] == "layers: bench/bench_x.py, 3 passed, 0 skipped, 1 failed, exit 1 after 9 s of 60"
    assert lines[2].startswith("FAILED layers: test_0: xxx")
    assert [one.split()[0] for one in lines[4::2]] == ["layer[a]", "merge[b]"]
    assert max(map(len, lines)) < 180


def test_brief_is_brief():
    benches = [line(f"test_layer[{i}]", LAYER) for i in range(100)]
    found = {"parts": {"tests": part([], failures=40), "layers": part(benches)}}
    lines = reports.brief(found)
    assert len(lines) == reports.MOST == 60
    assert "... and 25 more that failed" in lines
    assert lines[-1] == f"... and {2 + 15 + 1 + 101 - 59} lines more"
    assert reports.brief({}) == []
