"""bench/scaling.py: the exponent and the table that it prints, and every axis once at its smallest."""

from __future__ import annotations

import json

import pytest
import scaling
import torch


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_exponent_of_the_larger_half(power):
    sizes = (2, 5, 10, 20, 50)
    times = {size: 3e-3 * size**power for size in sizes}
    times |= {2: 9.0, 5: 9.0}  # start-up costs, which the larger sizes do not show
    assert scaling.exponent(times) == pytest.approx(power, abs=1e-12)


def test_table_is_in_milliseconds_and_against_the_first():
    lines = scaling.table("rank", {"ours": {4: 1e-3, 64: 4e-3}, "PEFT": {4: 2e-3, 64: 8e-3}}).splitlines()
    assert lines[0] == "| rank, ms | 4 | 64 | exponent | over ours |"
    assert lines[2:] == ["| ours | 1.00 | 4.00 | 0.50 | 1.00 |", "| PEFT | 2.00 | 8.00 | 0.50 | 2.00 |"]


@pytest.mark.parametrize("axis", ["tokens", "rank", "layers", "tasks"])
def test_every_axis_runs(axis, monkeypatch):
    if axis == "tasks":
        monkeypatch.setattr(scaling, "TASKS", (1, 2))
    else:
        monkeypatch.setitem(scaling.SIZES, axis, scaling.SIZES[axis][:1])
    found = scaling.measure(axis, "cpu", 1)
    assert len(found) >= 2
    assert all(seconds > 0 for of in found.values() for seconds in of.values())


def test_what_is_kept(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(scaling, "SIZES", {"layers": (2, 4)})
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["scaling.py", "layers", "--rounds", "1", "--out", str(tmp_path / "kept")])
    try:
        assert scaling.main() == 0
    finally:
        torch.set_num_threads(threads)
    page, plot, seconds = (next((tmp_path / "kept").glob(f"*{suffix}")) for suffix in (".md", ".png", ".json"))
    found = json.loads(seconds.read_text())
    assert found["seconds"]["layers"].keys() == {"ours", "qr loop, _foreach_lerp_"}
    assert (
        scaling.table("layers", {k: {int(n): s for n, s in of.items()} for k, of in found["seconds"]["layers"].items()})
        in page.read_text()
    )
    assert f"({plot.name})" in page.read_text()
    assert capsys.readouterr().out.startswith("| layers, ms | 2 | 4 | exponent | over ours |")


def test_an_unknown_axis_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scaling.py", "width"])
    with pytest.raises(SystemExit) as caught:
        scaling.main()
    assert caught.value.code == 2
    assert "no such axis: width; there are tokens, rank, layers, tasks" in capsys.readouterr().err
