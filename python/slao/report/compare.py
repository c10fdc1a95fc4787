"""Several runs as one: every run's methods side by side, and what differs between the runs' settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..identity import flat
from ..reading import read_json
from .results import kind_of, load, parse
from .tables import MISSING, Table

# Settings by which other rows, or rows among other choices, would be scored, and what they are unless said.
_SCORED_BY = {"objective.eval_candidates": None, "train.score_on": "test", "test_rows": None}


def load_all(run_dirs: Sequence[str | Path]) -> Any:
    """The object in results.json of one run; of several one object like it, in which "slao" of the folder "a" is called
    "slao · a" and "runs" holds each run's own object by its name.

    ValueError of one line for a run without readable results, and for runs of other tasks, rows or scores, which it
    names: their scores have nothing to do with each other.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    found = {}
    for name, folder in zip(_names(folders), folders, strict=True):
        found[name] = load(folder)
        try:
            parse(found[name])
        except ValueError as error:
            raise ValueError(f"{folder / 'results.json'}: {error}; write it again with `slao run`") from None
    if len(folders) == 1:
        return found.popitem()[1]
    first, *others = found
    data = {name: _test_rows(folder) for name, folder in zip(found, folders, strict=True)}
    for name in others:
        if told := _clash(found[first], found[name], data[first], data[name]):
            raise ValueError(f"{first} and {name} cannot be compared: {told}; report on them one by one")
    return _joined(found)


def _names(folders: Sequence[Path]) -> list[str]:
    """What tells the runs from each other: their folders' names, or as many of the parents' as that takes."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1)
        raise ValueError(f"{twice} is given twice: a run is compared with other runs")
    for count in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _test_rows(folder: Path) -> dict[str, Any]:
    """The checksums of what is scored, by task, as the run's record holds them; empty without one."""
    try:
        data = read_json(folder / "identity.json")["data"]
        return {key: value for key, value in data.items() if key.endswith((", test rows", ", labels"))}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _clash(one: Any, other: Any, rows: Mapping[str, Any], others_rows: Mapping[str, Any]) -> str | None:
    """What of two runs makes their scores incomparable, the first thing that is found."""
    for key in ("stream", "metric"):
        if one[key] != other[key]:
            return f"the {key} is {one[key]!r} there and {other[key]!r} here"
    mine, theirs = (
        {t for m in each["methods"].values() for order in m["tasks"] for t in order} for each in (one, other)
    )
    if mine != theirs:
        odd = sorted(mine ^ theirs)
        more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
        return f"only one of them has the task{'s' * (len(odd) > 1)} {', '.join(map(repr, odd[:4]))}{more}"
    settings = [flat(each.get("settings") or {}) for each in (one, other)]
    for key, default in _SCORED_BY.items():
        there, here = (each.get(key, default) for each in settings)
        if there != here:
            return f"{key} is {there!r} there and {here!r} here, so their scores are of other rows or choices"
    for key in rows:
        if rows[key] != others_rows.get(key, rows[key]):
            return f"the {key.rpartition(', ')[2]} of {key.rpartition(', ')[0]} are not the same"
    return None


def _joined(runs: Mapping[str, Any]) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    for name, results in runs.items():
        for label, entry in results["methods"].items():
            kind, variant = kind_of(label, results.get("settings"))
            of = {"run": name, "label": label, "kind": kind, "variant": variant}
            methods[f"{label} · {name}"] = {**entry, "of": of}
    first = next(iter(runs.values()))
    return {
        "stream": first["stream"],
        "model": " / ".join(dict.fromkeys(str(results["model"]) for results in runs.values())),
        "metric": first["metric"],
        "methods": methods,
        **{
            key: {f"{title} · {name}": v for name, r in runs.items() for title, v in (r.get(key) or {}).items()}
            for key in ("failed", "unfinished")
        },
        "runs": dict(runs),
    }


def settings_table(runs: Mapping[str, Any], differing: bool = False) -> Table:
    """A row for every setting with its value in each run, and then what else bears on the figures: versions, threads.

    differing: only those that are not the same in all.
    """
    sections = [_told(results) for results in runs.values()]
    keys = dict.fromkeys(key for section in sections for key in section)
    rows = [[key, *(section.get(key, MISSING) for section in sections)] for key in keys]
    return Table(["setting", *runs], [row for row in rows if not differing or len(set(row[1:])) > 1])


def _told(results: Mapping[str, Any]) -> dict[str, str]:
    told = {"model": results["model"], **flat(results.get("settings") or {})}
    told |= {key: results[key] for key in ("threads", "processes") if key in results}
    told |= {f"version of {name}": version for name, version in (results.get("versions") or {}).items()}
    return {key: _value(value) for key, value in told.items()}


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = ", ".join(map(_value, value))
    if value is None or value == {} or value == "":
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
