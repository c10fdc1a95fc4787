"""Text classification by an encoder against frozen label texts: nothing is trained but the LoRA, so only it forgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..streams import Row, Stream, Task
from .base import Features, Objective, check_candidates, evaluating, in_batches


class LabelMatching(Objective):
    """Logits are cosine(text, label text) / temperature over the candidate labels; the loss is cross-entropy.

    Text and label are the encoder's mean-pooled, normalised last hidden states. The label side is computed once, here,
    by the model as it is (so build the objective before training), and stays frozen.
    train_candidates, eval_candidates: "own" (the task's labels) or "all" (the stream's: class-incremental).
    Raises ValueError for a stream without labels or scored otherwise than by accuracy, and for an unknown choice.
    """

    name = "label_matching"
    metrics = ("accuracy",)
    own_loss = True

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
        check_candidates(train_candidates=train_candidates, eval_candidates=eval_candidates)
        unlabelled = [task.name for task in stream.tasks if not task.labels]
        if unlabelled:
            raise ValueError(f"label_matching needs labels; tasks without: {', '.join(unlabelled)} (use causal_lm)")
        self.check_metrics(stream)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.tokenizer, self.max_length, self.temperature = tokenizer, max_length, temperature
        self.train_candidates, self.eval_candidates = train_candidates, eval_candidates
        self.labels = stream.labels
        self._index = {label: i for i, label in enumerate(self.labels)}
        self._task_index = {task.name: t for t, task in enumerate(stream.tasks)}
        own = torch.zeros(len(stream.tasks), len(self.labels), dtype=torch.bool)
        for t, task in enumerate(stream.tasks):
            own[t, [self._index[label] for label in task.labels]] = True
        everything = torch.ones_like(own)
        # (tasks, labels): which labels a row of that task may be given.
        self._train_allowed = own if train_candidates == "own" else everything
        self._eval_allowed = own if eval_candidates == "own" else everything
        with evaluating(model) as device:
            encoded = self._tokenize(self.labels)
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

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self._logits(model, batch, self._train_allowed), batch["labels"])

    def score(self, model: nn.Module, task: Task, rows: Sequence[Row], batch_size: int) -> float:
        features = self.features(task, rows)
        correct = 0
        with evaluating(model) as device:
            for _, batch in in_batches(features, batch_size, self.collate, device):
                guesses = self._logits(model, batch, self._eval_allowed).argmax(1)
                correct += int((guesses == batch["labels"]).sum())
        return correct / len(rows)

    def _tokenize(self, texts: Sequence[str]) -> Features:
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

    def _logits(self, model: nn.Module, batch: dict[str, Tensor], allowed: Tensor) -> Tensor:
        """(rows, labels of the stream), -inf where a label is no candidate."""
        embedded = self._embed(model, batch)
        logits = embedded @ self._table.to(embedded.device).T / self.temperature
        return logits.masked_fill(~allowed.to(logits.device)[batch["task"]], float("-inf"))
