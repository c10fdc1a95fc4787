"""Saved adapters, checked against each other before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slao_kernels.ops.checks import Problems

from ..folders import Source

_SAME = ("base_model_name_or_path", "revision", "layer_replication", "fan_in_fan_out")


def check(
    sources: Sequence[Source],
    same_rank: bool,
    same_scaling: bool,
    method: str,
    *,
    union: bool = False,
    same_base: Sequence[str] = (),
) -> None:
    """That the adapters belong to one base and have the same layers, of ranks and scalings that `method` can take.

    union: their layers may differ. same_base: texts "A=B", two names of one base.
    Raises ValueError that names every offender.
    """
    problems = Problems("merge")
    one = _aliases(problems, sources, same_base)
    first = sources[0]
    for source in sources[1:]:
        for key in _SAME:
            mine, other = (_plain(each.config.get(key)) for each in (source, first))
            if key == "base_model_name_or_path" and mine != other:
                if one.get(mine, mine) != one.get(other, other):
                    problems.add(
                        str(source.folder),
                        f"{key} is {mine!r}, that of {first.folder} {other!r} (if these are one model: --same-base "
                        f"{other}={mine})",
                    )
            elif mine != other:
                problems.add(str(source.folder), f"{key} is {mine!r}, that of {first.folder} {other!r}")
        # In a file two parameters of one module are told apart by how deep their wrappers are nested alone.
        mine, other = (sorted(each.config.get("target_parameters") or []) for each in (source, first))
        if mine != other:
            problems.add(str(source.folder), f"target_parameters are {mine}, those of {first.folder} {other}")
        apart = sorted(source.layers.keys() ^ first.layers.keys())
        if apart and not union:
            owner = source if apart[0] in source.layers else first
            problems.add(
                str(source.folder),
                f"does not have the layers of {first.folder}: {len(apart)} are in one only, such as {apart[0]} in "
                f"{owner.folder} (--union counts an absent one as zero)",
            )
    holders: dict[str, Source] = {}
    for source in sources:
        for name in source.layers:
            if (holder := holders.setdefault(name, source)) is not source:
                _compare(problems, source, holder, name, same_rank, same_scaling, method)
    problems.raise_if_any()


def _aliases(problems: Problems, sources: Sequence[Source], same_base: Sequence[str]) -> dict[str, str]:
    """Name -> the one that stands for all that are of the same base."""
    known = {_plain(source.config.get("base_model_name_or_path")) for source in sources}
    one: dict[str, str] = {}
    for pair in same_base:
        names = [_plain(name.strip()) for name in pair.split("=")]
        if len(names) != 2 or not all(names):
            problems.add("same_base", f"takes two names, A=B, not {pair!r}")
            continue
        for name in names:
            if name not in known:
                said = ", ".join(sorted(repr(each) for each in known))
                problems.add("same_base", f"{name!r} is no adapter's base; theirs are {said}")
        left, right = (one.get(name, name) for name in names)
        one |= dict.fromkeys([*names, *(name for name, found in one.items() if found == right)], left)
    return one


def _plain(value: Any) -> Any:
    """Unset, None and False say the same; a folder's name may end with a slash."""
    return value.rstrip("/") if isinstance(value, str) else value or None


def _compare(
    problems: Problems, source: Source, first: Source, name: str, same_rank: bool, same_scaling: bool, method: str
) -> None:
    mine, other = source.layers[name], first.layers[name]
    sides = [(each.shapes[0][1:], each.shapes[1][:1], each.experts) for each in (mine, other)]
    if sides[0] != sides[1]:
        problems.add(str(source.folder), f"{name}: A and B are {mine.shapes}, those of {first.folder} {other.shapes}")
    elif same_rank and mine.rank != other.rank:
        problems.add(
            str(source.folder),
            f"{name} has rank {mine.rank}, in {first.folder} {other.rank}: {method} combines A with A and B with B, "
            "which takes one rank; svd takes any, and so do magmax, opcm and knots",
        )
    elif same_scaling and mine.scaling != other.scaling:
        problems.add(
            str(source.folder),
            f"{name} has scaling {mine.scaling:g}, in {first.folder} {other.scaling:g}: {method} merges the B of one "
            "adapter through time, which has one alpha; svd takes any",
        )
