"""One bench's figures, checked and in one form for all benches, for whoever tabulates, draws or quotes them.

A ratio is taken as the bench recorded it, both sides from one race; none is made of medians of different races.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Physical floors, and in bench_transition the calls that the whole transition cannot do without.
FLOORS = ("frozen", "copy floor", "in-place read+write", "its calls")
AGAIN = "write it again with `make bench` or `make gpu`"


@dataclass(frozen=True)
class Case:
    """One bench with one set of parameters. Every dictionary is by contestant, and holds what was recorded.

    ms: medians. over_floor: multiples of the floor's time. over_ours: a peer's time in multiples of ours, adapters of
    one dtype on both sides. roof: per cent of the speed that the floor, or the nearer of the measured roofs, allows.
    share: what is left of PEFT's overhead over the frozen model. memory: GB of a step at its peak.
    """

    bench: str  # "lora_linear" of bench/bench_lora_linear.py
    test: str
    params: dict[str, Any]
    ms: dict[str, float]
    floor: str | None
    over_floor: dict[str, float]
    over_ours: dict[str, float]
    roof: dict[str, float]
    share: dict[str, float]
    memory: dict[str, float]

    @property
    def label(self) -> str:
        """What tells it from the other cases of its test, for a reader."""
        named = "r", "weight", "adapter"  # their values alone would not say what they are
        words = [f"{name} {value}" if name in named else str(value) for name, value in self.shown.items()]
        return times(", ".join(words)) or self.test.replace("_", " ")

    @property
    def shown(self) -> dict[str, Any]:
        """The parameters without those that only say how it was measured."""
        return {name: value for name, value in self.params.items() if name != "rounds"}


def times(text: str) -> str:
    """2048x4096 with the sign that belongs there."""
    return re.sub(r"(?<=\d)x(?=\d)", "×", text)


def order(name: str) -> tuple[Any, ...]:
    """Sorts contestants: ours, PEFT, the others by name, floors; PEFT's default precision and plain calls first."""
    family = 0 if name.split(",")[0] == "ours" else 1 if name.startswith("PEFT") else 2
    return (3 if is_floor(name) else family, name.count(","), name.lower(), name)


def is_floor(name: str) -> bool:
    return name.removesuffix(", graph") in FLOORS


def of_same_dtype(peer: str, names: Container[str]) -> str:
    """Which of ours a peer is compared with: PEFT's fp32 adapters with ours, whatever else has the base's dtype."""
    narrow = not peer.startswith("PEFT") or ", base dtype" in peer
    return "ours, base dtype" if narrow and "ours, base dtype" in names else "ours"


def need(mapping: Any, key: str, where: str, kind: type | tuple[type, ...] = object) -> Any:
    """mapping[key], checked."""
    if not isinstance(mapping, dict) or key not in mapping:
        raise ValueError(f"{where} lacks {key!r}: {AGAIN}")
    if not isinstance(mapping[key], kind):
        raise ValueError(f"{where}: {key!r} is a {type(mapping[key]).__name__}: {AGAIN}")
    return mapping[key]


def number(mapping: Any, key: str, where: str, positive: bool = True) -> float:
    """A finite number, and unless it may be anything, more than 0."""
    value = need(mapping, key, where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {key!r} is not a number but {value!r}: {AGAIN}")
    if positive and value <= 0:
        raise ValueError(f"{where}: {key!r} is {value!r}, more than 0 is expected: {AGAIN}")
    return float(value)


def case(bench: dict[str, Any], where: str) -> Case:
    """The case of one entry of a file's benchmarks. ValueError of one line that begins with `where` if it is none."""
    file = str(need(bench, "fullname", where)).partition("::")[0]
    test = str(need(bench, "name", where)).partition("[")[0].removeprefix("test_")
    info = bench["extra_info"]
    number(info, "ours_ms", where)
    rows = info.get("rows") or []
    taken = _of_a_kernel(rows[0], where) if rows and "us" in rows[0] else _of_a_race(info, where)
    lines = {row["contestant"]: row for row in rows if "contestant" in row}

    def of_rows(key: str, positive: bool) -> dict[str, float]:
        return {name: number(row, key, where, positive) for name, row in lines.items() if row.get(key) is not None}

    memory = of_rows("step GB", True)
    share = of_rows("overhead left", False)
    if not share:  # on a CPU there are no rows
        recorded = [key for key in info if key.startswith("ours share")]
        share = {key.replace(" share", ""): number(info, key, where, False) for key in recorded}
    params = bench.get("params") or {}
    return Case(Path(file).stem.removeprefix("bench_"), test, params, **taken, share=share, memory=memory)


def _of_a_kernel(row: dict[str, Any], where: str) -> dict[str, Any]:
    us, torchs, roof = (number(row, key, where) for key in ("us", "torch us", "% roof"))
    return {
        "ms": {"ours": us / 1e3, "torch": torchs / 1e3},
        "floor": None,
        "over_floor": {},
        "over_ours": {"torch": number(row, "torch / ours", where)},
        "roof": {"ours": roof, "torch": roof * us / torchs},
    }


def _of_races(info: dict[str, Any], peers: list[str], names: Container[str], where: str) -> dict[str, float]:
    """As the benches do: of several races, the best one's ratio."""
    races = need(info, "races", where, list)
    return {
        peer: 1 / min(number(race, of_same_dtype(peer, names), where) / number(race, peer, where) for race in races)
        for peer in peers
    }


def _of_a_race(info: dict[str, Any], where: str) -> dict[str, Any]:
    names = [key.removesuffix(" ms") for key in info if key.endswith(" ms")]
    ms = {"ours": number(info, "ours_ms", where)} | {name: number(info, f"{name} ms", where) for name in names}
    floor = next((name for name in FLOORS if name in ms), None)
    over_floor, over_ours = {}, {}
    peers = [name for name in ms if not is_floor(name) and name.split(",")[0] != "ours"]
    if floor is not None and "races" not in info:  # recorded against ours, what was replayed from graphs against theirs
        for suffix in ["", ", graph"] if f"{floor}, graph / ours, graph" in info else [""]:
            mine = f"ours{suffix}"
            base = number(info, f"{floor}{suffix} / {mine}", where)
            own = [name for name in peers if name.endswith(", graph") == bool(suffix)]
            over_ours |= {name: number(info, f"{name} / {mine}", where) for name in own}
            over_floor |= {name: over_ours[name] / base for name in own} | {mine: 1 / base}
    elif floor is not None:  # recorded against the floor
        graphs = {name for name in ms if name.endswith(", graph")}
        for name in ms:
            against = f"{floor}, graph" if name in graphs else floor
            if name != against and f"{name} / {against}" in info:
                over_floor[name] = number(info, f"{name} / {against}", where)
        over_ours = _of_races(info, peers, ms, where)
    elif "races" in info:  # without a floor
        over_ours = _of_races(info, peers, ms, where)
    else:
        over_ours = {name: number(info, f"{name} / ours", where) for name in peers}
    roof = {name: 100 / ratio for name, ratio in over_floor.items()}
    return {"ms": ms, "floor": floor, "over_floor": over_floor, "over_ours": over_ours, "roof": roof}
