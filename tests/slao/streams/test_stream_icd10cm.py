"""The stream out of the ICD-10-CM: whose texts the rows are, which codes are in which split, and what is refused."""

import re
import sys
from collections import Counter, defaultdict
from itertools import islice

import pytest

from slao.streams import make_stream
from slao.streams.icd10cm import INSTRUCTION, NAMES, icd10cm

icd = pytest.importorskip("simple_icd_10_cm", reason='needs simple-icd-10-cm: pip install "slao_kernels[icd]"')
SPLITS = ("train", "validation", "test")
ALL = tuple(range(1, 22))


@pytest.fixture(scope="module")
def whole():
    """Every chapter with blocks to tell apart, and every text of the eight largest blocks."""
    return icd10cm(chapters=ALL, max_rows_per_label=10_000, test_rows_per_label=10_000)


@pytest.fixture(scope="module")
def homes():
    """(block's title, text) -> the codes, cut after the first character behind the point, that say it."""
    found = defaultdict(set)
    for block in filter(icd.is_block, icd.get_all_codes()):
        title = re.sub(r" \(\w{3}-\w{3}\)$", "", icd.get_description(block))
        for code in icd.get_descendants(block):
            for text in (icd.get_description(code), *icd.get_inclusion_term(code)):
                found[title, " ".join(text.split())].add(code[:5])
    return found


def rows_of(task):
    return task.train + task.validation + task.test


def counts(task):
    return [Counter(row.answer for row in getattr(task, split)) for split in SPLITS]


def test_ten_chapters_of_at_most_eight_blocks():
    stream = make_stream("icd10cm")
    assert len(stream.tasks) == 10
    assert stream.tasks[4].name == "circulatory"
    assert stream.tasks[4].labels[1] == "Ischemic heart diseases"
    assert [len(task.labels) for task in stream.tasks] == [8] * 10
    assert len(stream.labels) == 80
    for task in stream.tasks:
        assert (task.instruction, task.metric) == (INSTRUCTION, "accuracy")
        assert task.name not in task.instruction
        train, validation, test = counts(task)
        for label in task.labels:
            assert 12 <= train[label] <= 32
            assert 1 <= validation[label] <= 12
            assert 2 <= test[label] <= 12
    sizes = [sum(len(getattr(task, split)) for task in stream.tasks) for split in SPLITS]
    assert sizes == pytest.approx([2461, 783, 906], rel=0.03)  # of April 2026: each release moves a few


def test_every_row_is_a_text_of_its_block_as_it_stands(whole, homes):
    rows = [row for task in whole.tasks for row in rows_of(task)]
    assert len(rows) > 25_000
    assert all(homes[row.answer, row.prompt] for row in rows)


def test_codes_alike_up_to_the_first_character_after_the_point_share_a_split(whole, homes):
    for task in whole.tasks:
        split_of = defaultdict(set)
        for split in SPLITS:
            for row in getattr(task, split):
                if len(groups := homes[row.answer, row.prompt]) == 1:
                    split_of[(row.answer, *groups)].add(split)
        assert len(split_of) > 100
        assert {len(splits) for splits in split_of.values()} == {1}


def test_every_label_of_every_chapter_has_rows_in_each_split(whole):
    assert [task.name for task in whole.tasks] == [NAMES[chapter - 1] for chapter in ALL]
    for task in whole.tasks:
        train, validation, test = counts(task)
        assert set(train) == set(validation) == set(test) == set(task.labels)


def test_no_text_stands_twice_in_other_letters_sides_or_words_that_say_nothing(whole):
    def said(text):
        return tuple(sorted(set(re.findall(r"\w+", text.lower())) - {"right", "left", "unspecified", "nos", "other"}))

    prompts = [row.prompt for task in whole.tasks for row in rows_of(task)]
    assert max(Counter(map(said, prompts)).values()) == 1
    assert not {said(label) for label in whole.labels} & set(map(said, prompts))
    assert not [prompt for prompt in prompts if ", initial encounter" in prompt]


def test_the_seed_draws_the_splits_and_nothing_else():
    first, again, other = (icd10cm([9, 10], max_rows_per_label=999, seed=seed) for seed in (3, 3, 4))
    assert first == again
    for one, two in zip(first.tasks, other.tasks, strict=True):
        assert one.labels == two.labels
        assert set(one.train) != set(two.train)
        assert set(one.test) != set(two.test)


def test_a_chapter_has_the_same_rows_whatever_the_others_are():
    alone, both = icd10cm([9]), icd10cm(["J00-J99", "circulatory"])
    assert [task.name for task in both.tasks] == ["respiratory", "circulatory"]
    assert both.tasks[1] == alone.tasks[0]
    assert icd10cm(["9"]) == alone


def test_few_labels_are_the_largest_and_their_rows_come_from_many_codes(homes):
    few = icd10cm(["musculoskeletal"], labels_per_task=2, max_rows_per_label=16, test_rows_per_label=6).tasks[0]
    assert few.labels == ("Inflammatory polyarthropathies", "Other osteopathies")
    assert [dict(count) for count in counts(few)] == [dict.fromkeys(few.labels, most) for most in (16, 6, 6)]
    for label in few.labels:
        mine = [homes[label, row.prompt] for row in few.train if row.answer == label]
        assert len({next(islice(groups, 1)) for groups in mine}) >= 15


def test_train_rows_are_not_sorted_by_label():
    assert len({row.answer for row in icd10cm([9]).tasks[0].train[:40]}) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"chapters": [23]},
            "no chapter 23; give a number from 1 to 22, a range of codes such as I00-I99, or one of inf",
        ),
        ({"chapters": ["heart"]}, "no chapter 'heart'; give a number"),
        ({"chapters": [22]}, r"chapter 22 \(special purposes\) has fewer than two blocks to tell apart; leave it out"),
        ({"chapters": []}, r"must name at least one chapter, and none twice; got \[\]"),
        ({"chapters": [9, "circulatory"]}, r"none twice; got \[9, 'circulatory'\]"),
        ({"labels_per_task": 1}, "labels_per_task must be at least 2, not 1"),
        ({"max_rows_per_label": 0}, "max_rows_per_label must be at least 1, not 0"),
        ({"test_rows_per_label": 0}, "test_rows_per_label must be at least 1, not 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_stream("icd10cm", **options)
    assert "\n" not in str(caught.value)


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    from slao.streams.icd10cm import _read

    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    _read.cache_clear()
    with pytest.raises(ImportError, match=r'needs simple-icd-10-cm: pip install "slao_kernels\[icd\]"$'):
        icd10cm()
