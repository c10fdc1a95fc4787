"""How the task vectors of saved adapters lie to each other: what `slao interference` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .folders import Source, aligned, triples


@dataclass(frozen=True)
class Compared:
    """T saved adapters. names: of their folders. cosines: (T, T), of their task vectors over all layers together.
    norms: (T,). beside: for each the fields of what trains beside A and B, which is no part of a task vector."""

    names: list[str]
    cosines: list[list[float]]
    norms: list[float]
    beside: list[list[str]]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table."""
        numbers = [str(index + 1) for index in range(len(self.names))]
        rows = [
            [f"{index + 1:>3} {name}", *map(_cosine, self.cosines[index]), f"{self.norms[index]:#.4g}"]
            for index, name in enumerate(self.names)
        ]
        return ["cosines", *numbers, "norm"], rows

    def notes(self) -> list[str]:
        """A line that names what was not looked at, where there is such."""
        said = [f"{', '.join(own)} of {name}" for name, own in zip(self.names, self.beside, strict=True) if own]
        return [f"not looked at, since it has no B A: {'; '.join(said)}"] if said else []

    def __str__(self) -> str:
        header, rows = self.cells()
        width = max(len(row[0]) for row in rows)
        lines = [
            " ".join([f"{first:<{width}}", *(f"{cell:>6}" for cell in cells), f"{norm:>7}"])
            for first, *cells, norm in [header, *rows]
        ]
        return "\n".join([*lines, *self.notes()])


def _cosine(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def compare(folders: Sequence[str | Path]) -> Compared:
    """The task vectors of the adapters in `folders`; a layer that one of them lacks counts as zero. ValueError for
    fewer than two, and for what is no plain LoRA (`slao.folders.Source`)."""
    from slao_kernels import interference

    if len(folders) < 2:
        raise ValueError(f"cosines are between two adapters or more; got {len(folders)}")
    sources = [Source(folder, beside=True) for folder in folders]
    _, adapters = aligned([triples(source) for source in sources])
    whole = interference(adapters).whole()
    return Compared(
        [Path(folder).resolve().name for folder in folders],
        whole.cosines[0].tolist(),
        whole.norms[0].tolist(),
        [list(source.beside) for source in sources],
    )
