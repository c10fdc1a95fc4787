"""bench/race.py: what it records, of graphs too, and what becomes of a peer that fails; the clock is the host's."""

from __future__ import annotations

from types import SimpleNamespace

import cases
import pytest
import race
import torch


class Benchmark:
    """pytest-benchmark's fixture, as far as the races use it."""

    def __init__(self) -> None:
        self.extra_info: dict[str, object] = {}

    def pedantic(self, function, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            function()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Each call takes the milliseconds that it returns; a call from a graph a tenth."""
    monkeypatch.setattr(race, "clock", lambda function, device, calls=1: calls * function() / 1e3)
    monkeypatch.setattr(race, "graphed", lambda function: lambda: function() / 10)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")


def info_of(peers, device="cuda", ours=lambda: 2.0):
    benchmark = Benchmark()
    race.race(benchmark, ours, peers, device, rounds=3)
    return benchmark.extra_info


def test_ours_and_the_floor_are_replayed_from_graphs(as_on_a_gpu):
    info = info_of({"copy floor": lambda: 1.0, "loop": lambda: 8.0, "triton": lambda: 3.0})
    times = {name.removesuffix(" ms"): value for name, value in info.items() if name.endswith(" ms")}
    assert times == pytest.approx(
        {"copy floor": 1, "loop": 8, "triton": 3, "ours, graph": 0.2, "copy floor, graph": 0.1, "triton, graph": 0.3}
    )
    assert info["ours_ms"] == pytest.approx(2)
    ratios = {name: value for name, value in info.items() if " / " in name}
    of_calls = {"copy floor / ours": 0.5, "loop / ours": 4, "triton / ours": 1.5}
    of_graphs = {"copy floor, graph / ours, graph": 0.5, "triton, graph / ours, graph": 1.5}
    assert ratios == pytest.approx(of_calls | of_graphs)


def test_reports_take_graphs_against_graphs(as_on_a_gpu):
    info = info_of({"copy floor": lambda: 1.0, "loop": lambda: 8.0, "triton": lambda: 3.0})
    case = cases.case(
        {"name": "test_fold[x]", "fullname": "bench/bench_fold.py::test_fold", "extra_info": info}, "here"
    )
    assert case.floor == "copy floor"
    assert case.over_floor == pytest.approx({"ours": 2, "loop": 8, "triton": 3, "ours, graph": 2, "triton, graph": 3})
    assert case.over_ours == pytest.approx({"loop": 4, "triton": 1.5, "triton, graph": 1.5})


def test_what_cannot_be_captured_is_left_out_with_its_reason(as_on_a_gpu, monkeypatch):
    def waits(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(race, "graphed", waits)
    info = info_of({"copy floor": lambda: 1.0})
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert info["left out"] == {"ours, graph": reason, "copy floor, graph": reason}
    assert info["copy floor / ours"] == pytest.approx(0.5)
    assert cases.case({"name": "test_x", "fullname": "bench/bench_x.py", "extra_info": info}, "here").roof


def test_a_cpu_has_no_graphs_and_says_so():
    info = info_of({"copy floor": lambda: None}, "cpu", lambda: None)
    assert info["left out"] == {"graphs": "a CPU has none"}
    assert not any("graph" in name for name in info)


def broken():
    raise ValueError("no such thing")


def test_a_peer_that_raises_is_left_out_on_a_gpu(as_on_a_gpu):
    info = info_of({"copy floor": lambda: 1.0, "loop": broken})
    assert info["left out"] == {"loop": "ValueError: no such thing"}
    assert "wrong" not in info
    assert "loop ms" not in info
    info = info_of({"copy floor": lambda: 1.0, "triton": broken})
    assert info["wrong"] == {"triton": "ValueError: no such thing"}
    with pytest.raises(ValueError, match="no such thing"):
        info_of({"loop": broken}, "cpu", lambda: None)


def test_the_first_lap_is_none_of_the_figures(as_on_a_gpu):
    """Compiling, learning addresses: what only the first call does."""
    laps = iter([1e9] + [2.0] * 99)
    assert info_of({"copy floor": lambda: 1.0}, ours=lambda: next(laps))["ours_ms"] == pytest.approx(2)


@pytest.mark.parametrize("error", [2.0, float("nan")])
def test_a_wrong_answer(error):
    note = SimpleNamespace(extra_info={})
    race.checker(note, "cuda")("ours", error <= 1.0, f"is off by {error:.1e}")
    assert note.extra_info == {"wrong": {"ours": f"is off by {error:.1e}"}}
    with pytest.raises(AssertionError, match="ours is off by"):
        race.checker(note, "cpu")("ours", error <= 1.0, f"is off by {error:.1e}")
