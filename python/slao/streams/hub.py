"""Data sets of the Hugging Face hub, through `datasets`: their label column is read, and of the texts only the rows
that are drawn (Yahoo has 1.4 M and Amazon 3 M training rows)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from slao.streams.base import Row
from slao.streams.sources import Source, fields


def loader(load: Callable[..., Any] | None, otherwise: str = "") -> Callable[..., Any]:
    """`load`, or `datasets.load_dataset` where it is None; ImportError says what to install, or `otherwise`."""
    if load is not None:
        return load
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f'data sets from the hub need `datasets`: pip install "slao_kernels[hub]"{otherwise}'
        ) from error
    return load_dataset


class HubPart:
    """One split of a source: the label text of every row, and the rows at given places.

    ValueError: a column is missing, or a label value is outside the published ones.
    """

    def __init__(self, source: Source, split: str, load: Callable[..., Any]) -> None:
        config = () if source.config is None else (source.config,)
        self._dataset, self._source = load(source.hub_id, *config, split=split), source
        missing = {*source.columns, source.label} - set(self._dataset.column_names)
        if missing:
            raise ValueError(
                f"{source.hub_id} has no column {sorted(missing)[0]!r}, only {self._dataset.column_names}; "
                "its layout has changed: give load a function that returns the published columns"
            )
        first, last = source.first_label, source.first_label + len(source.labels) - 1
        self.labels: list[str] = []
        for place, value in enumerate(self._dataset[source.label][:]):
            if not first <= value <= last:
                raise ValueError(f"{source.hub_id}, row {place}: label {value!r} is not in {first}..{last}")
            self.labels.append(source.labels[value - first])

    def rows(self, places: Sequence[int]) -> Iterable[Row]:
        for place, example in zip(places, self._dataset.select(places), strict=True):
            yield Row("\n".join(_lines(self._source.text, example)), self.labels[place])


def _lines(templates: Sequence[str], example: dict[str, Any]) -> Iterable[str]:
    """The filled lines; one whose columns are all empty is left out."""
    for line in templates:
        values = {name: str(example[name] or "").strip() for name in fields(line)}
        if any(values.values()):
            yield line.format(**values)
