"""Parameters that share their memory, above all the head and the input embedding: changed alike, or one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..folders import Source
from .fold_apply import Change
from .fold_skeleton import Skeleton


def settle(changes: dict[str, Change], sources: Sequence[Source], skeleton: Skeleton, untie: bool) -> str | None:
    """Complete `changes` where one of several tied parameters has one. Returns the head's name where it has to be
    untied from the input embedding.

    Raises ValueError where a tie would break that `untie` does not allow, or cannot mend.
    """
    split = None
    groups: dict[str, list[str]] = {}
    for name, owner in skeleton.tied.items():
        groups.setdefault(owner, [owner]).append(name)
    for owner, members in groups.items():
        touched = [name for name in members if name in changes]
        if not touched:
            continue
        change = changes[touched[0]]
        if _shared(touched[0], change, owner, sources) or (
            len(touched) == len(members) and all(_equal(change, changes[name]) for name in touched[1:])
        ):
            changes |= dict.fromkeys(members, change)
            continue
        entry, head = skeleton.embeddings()
        if {owner, *members} != {entry, head}:
            raise ValueError(
                f"{' and '.join(members)} are one parameter, and the adapter changes {touched[0]} apart from the rest: "
                "no plain checkpoint of this model can hold both"
            )
        if not untie:
            one = "both, differently" if len(touched) > 1 else f"{touched[0]} alone"
            raise ValueError(
                f"{entry} and {head} are one parameter (tie_word_embeddings), and the adapter changes {one}: folded "
                "into both it would be another model; --untie (untie=True) writes them apart and sets "
                "tie_word_embeddings to false"
            )
        split = head
    entry, head = skeleton.embeddings()
    if untie and split is None:
        raise ValueError("untie would do nothing: no tied embedding is changed apart from its head; leave it out")
    return split


def _shared(name: str, change: Change, owner: str, sources: Sequence[Source]) -> bool:
    """Whether training changes the shared parameter itself: biases do, and what PEFT ties again."""
    config = sources[-1].config
    bias = name.endswith(".bias") and config.get("bias") not in (None, "none")
    tokens = change.rows is not None and not change.low and change.value is None and name == owner
    several = isinstance(config.get("trainable_token_indices"), dict) and len(config["trainable_token_indices"]) > 1
    return bias or (tokens and not several) or bool(config.get("ensure_weight_tying"))


def _equal(one: Change, other: Change) -> bool:
    if one.low or other.low or one.value is None or other.value is None:
        return False
    mine, theirs = one.value(), other.value()
    return mine.dtype == theirs.dtype and torch.equal(mine, theirs) and one.rows is None and other.rows is None
