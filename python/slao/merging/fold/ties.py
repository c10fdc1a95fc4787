"""Parameters that share their memory, above all the head and the input embedding: changed alike, or one by one."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...folders import Source
from ..skeleton import Skeleton
from .arithmetic import Change


def settle(changes: dict[str, Change], source: Source, skeleton: Skeleton, untie: bool) -> str | None:
    """Complete `changes` where one of several tied parameters has one. source: the adapter that has what stands beside
    A and B. Returns the head's name where it has to be untied from the input embedding.

    Raises ValueError where a tie would break that `untie` does not allow, or cannot mend.
    """
    entry, head = skeleton.embeddings()
    split = None
    for group in skeleton.groups:
        touched = [name for name in group if name in changes]
        if not touched:
            continue
        together = _together(group, changes, source, entry)
        if together is not None:
            changes |= dict.fromkeys(group, together)
            continue
        if set(group) != {entry, head}:
            raise ValueError(
                f"{' and '.join(group)} are one parameter, and the adapter changes {touched[0]} apart from the rest: "
                "no plain checkpoint of this model can hold both"
            )
        more = [name for name in touched if changes[name].low or _own_copy(name, source)]
        if more and any(changes[name].rows for name in touched):
            raise ValueError(
                f"{entry} and {head} are one parameter (tie_word_embeddings), of which the adapter trains tokens, and "
                f"{more[0]} besides: PEFT has no one answer to which of both the tokens' rows are; train one of them"
            )
        if not untie:
            one = "both, differently" if len(touched) > 1 else f"{touched[0]} alone"
            raise ValueError(
                f"{entry} and {head} are one parameter (tie_word_embeddings), and the adapter changes {one}: folded "
                "into both it would be another model; --untie (untie=True) writes them apart and sets "
                "tie_word_embeddings to false"
            )
        split = head
    if untie and split is None:
        raise ValueError("untie would do nothing: no tied embedding is changed apart from its head; leave it out")
    return split


def _together(group: list[str], changes: dict[str, Change], source: Source, entry: str | None) -> Change | None:
    """The one change of all, if training kept them one parameter: what has its own A and B, or its own copy
    (modules_to_save), was trained apart, unless PEFT tied it again (ensure_weight_tying). PEFT keeps the tokens of a
    tied head the embedding's, but not the other way round."""
    touched = [name for name in group if name in changes]
    if _tied_again(touched, source):
        return changes[touched[0]]
    if any(changes[name].low or changes[name].plus for name in touched):
        return None
    if len(touched) < len(group) and any(_own_copy(name, source) for name in touched):
        return None
    found = [changes[name] for name in touched]
    values = [change for change in found if change.value is not None]
    if any(not _equal(values[0], other) for other in values[1:]):
        return None
    rows = [change.rows for change in found if change.rows is not None]
    if rows and (changes.get(str(entry), Change()).rows is None or any(_own_copy(name, source) for name in touched)):
        return None
    if any(indices != rows[0][1] or not torch.equal(part(), rows[0][0]()) for part, indices in rows[1:]):
        return None
    return replace((values or found)[0], rows=rows[0] if rows else None)


def _tied_again(touched: list[str], source: Source) -> bool:
    """Whether PEFT ties what it made of them: by ensure_weight_tying, where it knows them by its own names."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    known = any(name.removesuffix(".weight").rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in touched)
    return known and bool(source.config.get("ensure_weight_tying"))


def _own_copy(name: str, source: Source) -> bool:
    module = name.rpartition(".")[0]
    return any(module.endswith(each) for each in source.config.get("modules_to_save") or ())


def _equal(one: Change, other: Change) -> bool:
    assert one.value is not None
    assert other.value is not None
    mine, theirs = one.value(), other.value()
    return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
