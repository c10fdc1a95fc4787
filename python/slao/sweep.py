"""What one `slao run` trains: every variant of the settings × every method × every seed × every order."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .settings import assign, complete

# Sections and settings that a sweep may vary. Methods vary by having several labels under `methods`.
SWEPT = (
    "train", "lora", "stream", "objective", "model", "dtype", "precision", "backend", "patch", "train_rows",
    "train_fraction", "test_rows",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One choice of all swept values. name: what tells it from the others, empty without a sweep."""

    name: str
    settings: dict[str, Any]

    def label(self, method: str) -> str:
        """What the method's results are called."""
        return f"{method} ({self.name})" if self.name else method


@dataclass(frozen=True)
class Job:
    """One training of the whole stream. order: number of the task order, None where the seed chooses it."""

    variant: int
    method: str
    label: str
    seed: int
    order: int | None

    @property
    def title(self) -> str:
        return f"{self.label} seed {self.seed}" + ("" if self.order is None else f" order {self.order}")

    @property
    def folder(self) -> str:
        """A file name of its own."""
        name = re.sub(r"[^\w.=+,-]+", "_", self.label).strip("_")
        return f"{name}-{self.seed}" + ("" if self.order is None else f"-order{self.order}")


def variants(settings: dict[str, Any]) -> list[Variant]:
    """Every combination of the values under `sweep`, each checked and without a sweep of its own.

    sweep: a mapping of a setting, such as train.learning_rate, to the list of its values, or to a mapping of names
    to values. A mapping for a whole section, such as stream, changes what it names and leaves the rest, unless it has
    a name of its own. ValueError for anything else.
    """
    sweep = settings["sweep"]
    choices = [[(key, name, value) for name, value in _named(key, values)] for key, values in sweep.items()]
    found = []
    for key in sweep:
        section, _, name = key.partition(".")
        own = [label for label, given in settings["methods"].items() if name in given]
        if section == "train" and own:
            raise ValueError(f"sweep: {key} would change nothing of {own[0]}, which has a {name} of its own; drop one")
    for combination in itertools.product(*choices):
        changed = {**copy.deepcopy(settings), "sweep": {}}
        for key, _, value in combination:
            section = changed.get(key)
            if isinstance(section, dict) and isinstance(value, dict) and "name" not in value:
                section.update(copy.deepcopy(value))
            else:
                assign(changed, key, copy.deepcopy(value))
        found.append(Variant(", ".join(name for _, name, _ in combination), complete(changed)))
    return found


def _named(key: str, values: Any) -> list[tuple[str, Any]]:
    if key.partition(".")[0] not in SWEPT:
        raise ValueError(f"sweep: {key!r} cannot be swept; what can be begins with one of {', '.join(SWEPT)}")
    if isinstance(values, dict) and values:
        return [(str(name), value) for name, value in values.items()]
    if isinstance(values, list) and values:
        names = [f"{key.rpartition('.')[2]}={value}" for value in values]
        if len(set(names)) == len(names):
            return list(zip(names, values, strict=True))
    raise ValueError(f"sweep.{key} must be a list of different values, or a mapping of names to values; got {values!r}")


def jobs(settings: dict[str, Any]) -> Iterator[Job]:
    """All of them, in the order in which they run: what is compared with each other runs side by side."""
    orders = settings["orders"] or [None]
    for seed, order in itertools.product(settings["seeds"], orders):
        for index, variant in enumerate(variants(settings)):
            for method in settings["methods"]:
                yield Job(index, method, variant.label(method), seed, order)
