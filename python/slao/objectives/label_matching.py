"""Text classification by an encoder against frozen label texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..streams import Row, Stream, Task
from .base import Features, evaluating, in_batches, room
from .matching import Matching


class LabelMatching(Matching):
    """Logits are cosine(text, label text) / temperature over the candidate labels; the loss is cross-entropy.

    Text and label are the encoder's mean-pooled, normalised last hidden states. The label side is computed once, here,
    by the model as it is (so build the objective before training), and stays frozen. See `Matching` for the candidates.
    Raises ValueError for a stream of images or without labels or scored otherwise than by accuracy, or an unknown
    choice.
    """

    name = "label_matching"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        stream: Stream,
        *,
        temperature: float = 0.05,
        train_candidates: str = "own",
        eval_candidates: str = "all",
        max_length: int = 128,
    ) -> None:
        super().__init__(stream, temperature, train_candidates, eval_candidates)
        self.tokenizer = tokenizer
        self.max_length = room(self, model, max_length, tokenizer.num_special_tokens_to_add() + 1)
        blank = {row.prompt for task in stream.tasks for row in (*task.train, *task.test) if not row.prompt.strip()}
        self._tokenize(sorted(blank))  # raises where that makes no token at all
        with evaluating(model) as device:
            encoded = self._tokenize(self.labels)
            _check_distinct(self.labels, encoded)
            table = [torch.empty(0)] * len(self.labels)
            for indices, batch in in_batches(encoded, 64, self.collate, device):
                for i, row in zip(indices, self._embed(model, batch), strict=True):
                    table[i] = row
            self._table = torch.stack(table).float()  # (labels, width)

    def features(self, task: Task, rows: Sequence[Row]) -> Features:
        encoded = self._tokenize([row.prompt for row in rows])
        for features, row in zip(encoded, rows, strict=True):
            features |= {"labels": self._index[row.answer], "task": self._task_index[task.name]}
        return encoded

    def collate(self, features: Features) -> dict[str, Tensor]:
        tokens = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in features]
        batch = dict(self.tokenizer.pad(tokens, return_tensors="pt"))
        extra = [key for key in ("labels", "task") if key in features[0]]
        return batch | {key: torch.tensor([row[key] for row in features]) for key in extra}

    def _tokenize(self, texts: Sequence[str]) -> Features:
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        for text, ids in zip(texts, encoded["input_ids"], strict=True):
            if not ids:  # a mean over no token is NaN
                raise ValueError(f"the tokenizer makes no token of {text!r}; remove or correct that row")
        pairs = zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs]

    def _embed(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(rows, width), unit length: the mean of the last hidden states over the real tokens, in fp32."""
        mask = batch["attention_mask"]
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def _check_distinct(labels: Sequence[str], encoded: Features) -> None:
    """ValueError for two labels that are the same tokens: no model tells them apart."""
    first: dict[tuple[int, ...], str] = {}
    for label, row in zip(labels, encoded, strict=True):
        other = first.setdefault(tuple(row["input_ids"]), label)
        if other != label:
            raise ValueError(
                f"the labels {other!r} and {label!r} are the same tokens: raise max_length, or rename one of them"
            )
