"""Stream "digits": every image of scikit-learn's once, in one split of the session of its class."""

from collections import Counter

import pytest
from sklearn.datasets import load_digits

from slao.streams import ImageRow, make_stream

SPLITS = ("train", "validation", "test")


def test_every_image_is_used_once():
    images, targets = load_digits(return_X_y=True)
    expected = Counter((str(t), tuple(round(v) for v in x)) for x, t in zip(images, targets, strict=True))
    stream = make_stream("digits")
    rows = [row for task in stream.tasks for split in SPLITS for row in getattr(task, split)]
    assert all(isinstance(row, ImageRow) and row.shape == (1, 8, 8) for row in rows)
    assert Counter((row.answer, tuple(round(p * 16 / 255) for p in row.pixels)) for row in rows) == expected
    assert len(rows) == 1797


def test_sessions_are_disjoint_and_stratified():
    stream = make_stream("digits")
    assert [task.labels for task in stream.tasks] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"), ("8", "9")]
    assert len(stream.labels) == 10
    for task in stream.tasks:
        for label in task.labels:
            train, validation, test = (sum(row.answer == label for row in getattr(task, split)) for split in SPLITS)
            whole = train + validation + test
            assert 174 <= whole <= 183
            assert abs(test - whole / 4) <= 0.5
            assert abs(validation - 0.15 * whole) <= 0.5


def test_the_seed_draws_the_split_and_nothing_else():
    first, again, other = make_stream("digits", seed=3), make_stream("digits", seed=3), make_stream("digits", seed=4)
    assert first == again
    for one, two in zip(first.tasks, other.tasks, strict=True):
        assert set(one.test) != set(two.test)
        assert Counter(one.train + one.validation + one.test) == Counter(two.train + two.validation + two.test)


def test_five_classes_a_session_and_no_validation():
    stream = make_stream("digits", classes_per_task=5, validation_fraction=0)
    assert [task.labels for task in stream.tasks] == [tuple("01234"), tuple("56789")]
    assert [len(task.validation) for task in stream.tasks] == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes_per_task": 3}, "classes_per_task must divide the 10 digits, got 3"),
        ({"classes_per_task": 0}, "classes_per_task must divide the 10 digits, got 0"),
        ({"test_fraction": 0}, "test_fraction must be positive.*got 0 and 0.15"),
        ({"test_fraction": 0.6, "validation_fraction": 0.4}, "must be below 1; got 0.6 and 0.4"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_stream("digits", **options)


def test_an_image_has_its_pixels():
    with pytest.raises(ValueError, match=r"an image of shape \(1, 2, 2\) cannot have 3 pixels"):
        ImageRow("", "a", pixels=b"abc", shape=(1, 2, 2))
