"""Stream "digits": scikit-learn's handwritten digits, 8×8 grey images, two classes a session.

1,797 images of 43 writers (Alpaydin & Kaynak 1998, UCI "Optical recognition of handwritten digits", its test part;
CC BY 4.0), carried by scikit-learn itself. Split here: the data set has no split of its own there.
"""

from __future__ import annotations

import random

from slao.streams.base import ImageRow, Splits, Stream


def digits(
    classes_per_task: int = 2, validation_fraction: float = 0.15, test_fraction: float = 0.25, seed: int = 0
) -> Stream:
    """Sessions of `classes_per_task` digits each, in the order 0 to 9; every image is in one split of one session.

    The fractions are of each class's images, drawn from `seed`. Labels are "0" to "9"; rows are `ImageRow`s.
    ValueError: classes_per_task does not divide 10, or the fractions leave nothing to train or test on.
    ImportError: no scikit-learn.
    """
    if classes_per_task < 1 or 10 % classes_per_task:
        raise ValueError(f"classes_per_task must divide the 10 digits, got {classes_per_task}")
    if not (validation_fraction >= 0 and test_fraction > 0 and validation_fraction + test_fraction < 1):
        raise ValueError(
            "test_fraction must be positive, validation_fraction not negative, and together they must be below 1; "
            f"got {test_fraction} and {validation_fraction}"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the stream "digits" needs scikit-learn: pip install "slao_kernels[demo]"') from error
    images, targets = load_digits(return_X_y=True)
    grey = (images * (255 / 16)).round().astype("uint8")  # from 17 levels, all of them apart
    by_class: list[list[ImageRow]] = [[] for _ in range(10)]
    for pixels, target in zip(grey, targets, strict=True):
        by_class[target].append(ImageRow("", str(target), pixels=pixels.tobytes(), shape=(1, 8, 8)))
    tasks = []
    for first in range(0, 10, classes_per_task):
        session, labels = Splits(), range(first, first + classes_per_task)
        for label in labels:
            rows = by_class[label]
            random.Random(f"{seed}/{label}").shuffle(rows)
            test = max(1, round(test_fraction * len(rows)))
            held = test + round(validation_fraction * len(rows))
            session.test += rows[:test]
            session.validation += rows[test:held]
            session.train += rows[held:]
        tasks.append(session.task(f"digits {', '.join(map(str, labels))}", map(str, labels)))
    return Stream("digits", tuple(tasks))
