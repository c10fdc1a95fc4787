"""Image classification by an encoder against directions that are fixed before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..streams import ImageRow, Row, Stream, Task
from .base import Features, evaluating, in_batches
from .matching import Matching
from .simplex import simplex_directions

DIRECTIONS = ("means", "simplex")


class ImageMatching(Matching):
    """Logits are cosine(image, direction of the label) / temperature over the candidate labels.

    An image is the encoder's mean-pooled, normalised last hidden states; it is brought to the model's size and number
    of channels first, and to [-1, 1] (transformers' ViT processors do the same).
    directions: "means": of the label's training images as the model embeds them now, so build the objective before
    training; the zero-shot row is then that of the nearest class mean (SimpleCIL, arXiv 2303.07338). "simplex": those
    of `simplex_directions` for the sorted labels, drawn from `seed`, whatever the order of the tasks; they have nothing
    to do with what the model knows, so the zero-shot row is chance.
    model: takes `pixel_values` and has `config.image_size`. tokenizer: not used. See `Matching` for the candidates.
    Raises ValueError for a stream of texts or without labels, a label without training images ("means"), another
    model, or more labels than the model is wide ("simplex").
    """

    name = "image_matching"
    images = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        stream: Stream,
        *,
        temperature: float = 0.1,
        train_candidates: str = "running",
        eval_candidates: str = "seen",
        directions: str = "means",
        seed: int = 0,
    ) -> None:
        super().__init__(stream, temperature, train_candidates, eval_candidates)
        self.check(stream, directions=directions)
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "image_size"):
            raise ValueError(f"{self.name} needs a model of images, with config.image_size; got {type(model).__name__}")
        self._size = _two(config.image_size)
        self._channels = int(getattr(config, "num_channels", 3))
        patch = _two(getattr(config, "patch_size", 1))
        self._patches = (self._size[0] // patch[0]) * (self._size[1] // patch[1])
        if directions == "means":
            self._table = self._means(model, stream)
        else:
            drawn = simplex_directions(len(self.labels), int(config.hidden_size), seed)
            place = {label: i for i, label in enumerate(sorted(self.labels))}
            self._table = drawn[[place[label] for label in self.labels]]

    @classmethod
    def check(cls, stream: Stream, **options: Any) -> None:
        super().check(stream, **options)
        if (directions := options.get("directions", DIRECTIONS[0])) not in DIRECTIONS:
            raise ValueError(f"unknown directions {directions!r}; choose one of {', '.join(DIRECTIONS)}")

    def features(self, task: Task, rows: Sequence[Row]) -> Features:
        made: Features = []
        for row in rows:
            assert isinstance(row, ImageRow)
            pixels = normalised(self._fitted(row))
            made.append(
                {"pixel_values": pixels, "labels": self._index[row.answer], "task": self._task_index[task.name]}
            )
        return made

    def collate(self, features: Features) -> dict[str, Tensor]:
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in features])}
        return batch | {key: torch.tensor([row[key] for row in features]) for key in ("labels", "task")}

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """The images' patches."""
        return torch.tensor(len(batch["pixel_values"]) * self._patches)

    def _embed(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return embed(model, batch["pixel_values"])

    def _means(self, model: nn.Module, stream: Stream) -> Tensor:
        """(labels, width), unit length."""
        features = [row for task in stream.tasks for row in self.features(task, task.train)]
        sums: Tensor | None = None
        with evaluating(model) as device:
            for _, batch in in_batches(features, 64, self.collate, device):
                embedded = self._embed(model, batch)
                sums = embedded.new_zeros(len(self.labels), embedded.shape[1]) if sums is None else sums
                sums.index_add_(0, batch["labels"], embedded)
        absent = set(self.labels) - {row.answer for task in stream.tasks for row in task.train}
        if absent or sums is None:
            raise ValueError(f"no training image has the label {min(absent)!r}: its direction would be their mean")
        return F.normalize(sums, dim=-1)

    def _fitted(self, row: ImageRow) -> Tensor:
        """(channels, height, width) of the model, in [0, 1]."""
        pixels = torch.frombuffer(bytearray(row.pixels), dtype=torch.uint8).view(row.shape).float() / 255
        if len(pixels) != self._channels:
            if len(pixels) != 1:
                raise ValueError(f"the model takes {self._channels} channels, an image has {len(pixels)}")
            pixels = pixels.expand(self._channels, -1, -1)
        if tuple(pixels.shape[1:]) != self._size:
            pixels = F.interpolate(pixels[None], self._size, mode="bilinear", antialias=True)[0]
        return pixels.contiguous()


def normalised(pixels: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]."""
    return pixels * 2 - 1


def embed(model: nn.Module, pixels: Tensor) -> Tensor:
    """(rows, width), unit length, fp32: the mean of the last hidden states of (rows, channels, height, width)."""
    hidden = model(pixel_values=pixels).last_hidden_state.float()
    return F.normalize(hidden.mean(1), dim=-1)


def _two(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
