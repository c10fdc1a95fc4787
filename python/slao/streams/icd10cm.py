"""Stream "icd10cm": a medical coder that learns the ICD-10-CM chapter after chapter; one task a chapter.

The classification is in the public domain (US National Center for Health Statistics); the package simple-icd-10-cm
(MIT) carries it. A label is the title of one of a chapter's blocks, a row a text of the block's codes as it stands: a
description or an inclusion term. Left out are codes that only add an encounter (a seventh character), texts that differ
from another in the side or in words that say nothing alone ("unspecified", "NOS"), texts that two blocks share, and
blocks' titles.

Codes that are alike up to the first character after the point (H60.3: otitis externa of the right, the left, both
ears) are all in one split, so no test row is a training row in other words.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice, zip_longest
from typing import Any, TypeAlias

from slao.streams.base import Row, Splits, Stream

INSTRUCTION = "Which section of the classification does this diagnosis belong to?"
NAMES = (
    "infections", "neoplasms", "blood", "endocrine", "mental", "nervous", "eye", "ear", "circulatory", "respiratory",
    "digestive", "skin", "musculoskeletal", "genitourinary", "pregnancy", "perinatal", "congenital", "symptoms",
    "injury", "external causes", "health services", "special purposes",
)  # fmt: skip
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.125  # of a block's groups of codes, at least one group each
# Words, but for those that say nothing here.
_WORD = re.compile(r"\b(?!(?:right|left|bilateral|side|other|specified|unspecified|nos|nec|an?|and|in|of|or|the)\b)\w+")

Blocks: TypeAlias = "dict[str, dict[str, list[str]]]"  # title -> its groups of codes, such as "H60.3" -> their texts


def icd10cm(
    chapters: Sequence[int | str] = (1, 4, 5, 6, 9, 10, 11, 12, 13, 14),
    labels_per_task: int = 8,
    max_rows_per_label: int = 32,
    test_rows_per_label: int = 12,
    seed: int = 0,
) -> Stream:
    """A task a chapter, in the order of `chapters`; its labels are the chapter's largest blocks, at most so many.

    chapters: numbers (1 to 22), code ranges ("I00-I99") or names ("circulatory"). A chapter's rows do not depend on
    which others are chosen. seed: which codes are in which split, and which of their texts are taken.
    max_rows_per_label: training rows of a label at most. test_rows_per_label: test rows, and as many for validation.

    ValueError: an unknown chapter, one with fewer than two blocks to tell apart (22), or a number out of range.
    ImportError: no simple-icd-10-cm.
    """
    if labels_per_task < 2:
        raise ValueError(f"labels_per_task must be at least 2, not {labels_per_task}")
    for name, value in {"max_rows": max_rows_per_label, "test_rows": test_rows_per_label}.items():
        if value < 1:
            raise ValueError(f"{name}_per_label must be at least 1, not {value}")
    known = _read()
    places = [_place(chapter, list(known)) for chapter in chapters]
    if not places or len(set(places)) < len(places):
        raise ValueError(f"chapters must name at least one chapter, and none twice; got {list(chapters)}")
    tasks = []
    for place in places:
        blocks = _largest(list(known.values())[place], labels_per_task, place)
        rows = _split(blocks, max_rows_per_label, test_rows_per_label, seed)
        tasks.append(rows.task(NAMES[place], blocks, INSTRUCTION))
    return Stream("icd10cm", tuple(tasks))


def _place(chapter: int | str, ranges: list[str]) -> int:
    for names in ([str(number) for number in range(1, len(ranges) + 1)], ranges, NAMES):
        if str(chapter) in names:
            return names.index(str(chapter))
    raise ValueError(
        f"icd10cm has no chapter {chapter!r}; give a number from 1 to {len(ranges)}, a range of codes such as "
        f"{ranges[8]}, or one of {', '.join(NAMES)}"
    )


def _largest(blocks: Blocks, most: int, place: int) -> Blocks:
    """Those with most texts of the blocks that have a group of codes for each split, in the classification's order."""
    sizes = {title: sum(map(len, groups.values())) for title, groups in blocks.items() if len(groups) >= 3}
    if len(sizes) < 2:
        raise ValueError(f"chapter {place + 1} ({NAMES[place]}) has fewer than two blocks to tell apart; leave it out")
    kept = sorted(sizes, key=lambda title: -sizes[title])[:most]
    return {title: groups for title, groups in blocks.items() if title in kept}


def _split(blocks: Blocks, most: int, most_held: int, seed: int) -> Splits:
    splits = Splits()
    for title, texts in blocks.items():
        draw = random.Random(f"{seed}/{title}")
        groups = [draw.sample(own, len(own)) for own in texts.values()]
        draw.shuffle(groups)
        test = max(1, round(TEST_SHARE * len(groups)))
        held = test + max(1, round(VALIDATION_SHARE * len(groups)))
        splits.test += _rows(title, groups[:test], most_held)
        splits.validation += _rows(title, groups[test:held], most_held)
        splits.train += _rows(title, groups[held:], most)
    for rows in (splits.train, splits.validation, splits.test):
        random.Random(seed).shuffle(rows)
    return splits


def _rows(label: str, groups: list[list[str]], most: int) -> list[Row]:
    """A text of each group, then another of each: one group can hold hundreds (a fracture at every bone)."""
    turns = (text for turn in zip_longest(*groups) for text in turn if text is not None)
    return [Row(text, label) for text in islice(turns, most)]


@cache
def _read() -> Mapping[str, Blocks]:
    """Each chapter's range of codes -> its blocks, in the classification's order."""
    try:
        import simple_icd_10_cm as icd
    except ImportError as error:
        raise ImportError('the stream "icd10cm" needs simple-icd-10-cm: pip install "slao_kernels[icd]"') from error
    found: dict[str, dict[str, dict[str, tuple[str, str]]]] = {}
    for chapter in filter(icd.is_chapter, icd.get_all_codes()):
        codes = icd.get_description(chapter).rpartition("(")[2].rstrip(")")
        found[codes] = {
            re.sub(r" \(\w{3}-\w{3}\)$", "", icd.get_description(block)): _texts(icd, block)
            for block in icd.get_children(chapter)
        }
    owners = Counter(key for blocks in found.values() for texts in blocks.values() for key in texts)
    owners.update(_key(title) for blocks in found.values() for title in blocks)
    chapters: dict[str, Blocks] = {codes: {title: {} for title in blocks} for codes, blocks in found.items()}
    for codes, blocks in found.items():
        for title, texts in blocks.items():
            for key, (group, text) in texts.items():
                if owners[key] == 1:
                    chapters[codes][title].setdefault(group, []).append(text)
    return chapters


def _texts(icd: Any, block: str) -> dict[str, tuple[str, str]]:
    """What each text of the block's codes says -> (its group of codes, the text)."""
    found: dict[str, tuple[str, str]] = {}
    for code in icd.get_descendants(block):
        if not (icd.is_block(code) or icd.is_extended_subcategory(code)):
            for text in (icd.get_description(code), *icd.get_inclusion_term(code)):
                if key := _key(text):
                    found.setdefault(key, (code[:5], " ".join(text.split())))
    return found


def _key(text: str) -> str:
    return " ".join(sorted(set(_WORD.findall(text.casefold()))))
