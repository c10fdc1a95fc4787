"""Prompt and answer rows for a causal language model; the loss is on the answer only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..logits import IGNORED, most_logits
from ..streams import Row, Stream, Task
from ..streams.base import METRICS
from .base import Features, Objective, check_candidates, evaluating, in_batches, positions, room
from .likelihood import most_likely
from .prompts import Prompts, told_apart
from .text_scores import text_score


class CausalLM(Objective):
    """Reads a row's prompt and is trained to continue with the answer and <eos>; of a conversation, with each of the
    assistant's turns. How a row becomes tokens, and what is cut of a long one, is said in `Prompts`; the task's name
    never appears.
    score: by the task's metric. "accuracy" is for a task with labels how often the right label has the highest
    log-likelihood among the candidates, and for a free-form task how often the greedy continuation equals the answer
    (white space and case aside). Every other metric compares the greedy continuation, whether there are labels or
    not, and of a conversation the last turn. Of a row with several references the best one counts.
    train_candidates, eval_candidates: whose labels the Option line (and the scoring) lists: "own" or "all".
    max_new_tokens: of a greedy continuation; None for as many as the longest right answer of its task takes. ValueError
    where no task needs one.
    template: goes around the text of {"text", "label"} rows instead of the papers' own; chat_template: around messages,
    instead of the tokenizer's. Each is a template, or the name of a file that holds one.
    """

    name = "causal_lm"
    metrics = METRICS
    own_loss = False
    answers = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        stream: Stream,
        *,
        train_candidates: str = "own",
        eval_candidates: str = "own",
        max_length: int = 512,
        max_new_tokens: int | None = None,
        template: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        chosen = {"train_candidates": train_candidates, "eval_candidates": eval_candidates}
        self.check(stream, **chosen, max_new_tokens=max_new_tokens)
        self.tokenizer, self.max_length = tokenizer, room(self, model, max_length, 1)
        self.train_candidates, self.eval_candidates = train_candidates, eval_candidates
        self.labels = stream.labels
        self._eos = tokenizer.eos_token_id
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._eos
        if self._eos is None:
            raise ValueError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
        self.prompts = Prompts(tokenizer, stream, self.max_length, template, chat_template)
        self._new_tokens = {
            task.name: self._longest_answer(task) if max_new_tokens is None else max_new_tokens
            for task in stream.tasks
            if _generates(task)
        }
        # What a prompt leaves free where text is generated: only learned positions end.
        most = positions(model)
        longest = max(self._new_tokens.values(), default=0)
        self._reserved = 0 if most is None else max(0, self.max_length + longest - most)
        if most:
            self.prompts.or_shorten = ", or lower max_new_tokens, for which the model's positions must suffice"
        for task in stream.tasks:  # what cannot fit is found here, before anything is trained
            self._check_room(task, train_candidates)
            self._check_room(task, eval_candidates)
            if _generates(task) and task.kind != "messages":
                self._prompt(task, replace(task.train[0], prompt=""), self._reserved, eval_candidates)
        ends = list(self.prompts.check_rows(stream))
        self._stops = sorted({self._eos, *(end for end, _ in ends if end is not None)})
        if count := sum(cut for _, cut in ends):
            note = f"{count} of {len(ends)} conversations lose their oldest turns: max_length is {self.max_length}"
            self.notes = (*self.notes, note)

    @classmethod
    def check(cls, stream: Stream, **options: Any) -> None:
        check_candidates(**{name: value for name, value in options.items() if name.endswith("_candidates")})
        super().check(stream)
        for task in stream.tasks:
            text_score(task.metric)  # raises here where its package is missing
        most = options.get("max_new_tokens")
        if most is not None and most < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {most}")
        if most is not None and not any(map(_generates, stream.tasks)):
            raise ValueError(
                "max_new_tokens would do nothing: every task is scored by its labels' likelihood (metric accuracy), so "
                "nothing is generated; leave it out"
            )

    def features(self, task: Task, rows: Sequence[Row]) -> Features:
        labels = self._candidates(task, self.train_candidates)
        return [self.prompts.supervised(task, row, labels) for row in rows]

    def collate(self, features: Features) -> dict[str, Tensor]:
        return self._pad_batch(features, left=False)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def shown(self, task: Task, features: dict[str, Any]) -> list[tuple[str, str]]:
        return told_apart(self.tokenizer, features["input_ids"], features["labels"])

    def outputs(self, model: nn.Module, rows: int, longest: int) -> int:
        return most_logits(model, rows * longest)

    def score(self, model: nn.Module, task: Task, rows: Sequence[Row], batch_size: int) -> float:
        score = self._score_generated if _generates(task) else self._score_labels
        return score(model, task, rows, batch_size)

    def _score_labels(self, model: nn.Module, task: Task, rows: Sequence[Row], batch_size: int) -> float:
        candidates = self._candidates(task, self.eval_candidates)
        answers = [self._answer(label, task) for label in candidates]
        longest = max(map(len, answers))  # so that all candidates of a row follow the very same prompt
        prompts = [self._prompt(task, row, longest, self.eval_candidates) for row in rows]
        best = most_likely(model, prompts, answers, batch_size, self._pad)
        return sum(candidates[guess] == row.answer for guess, row in zip(best, rows, strict=True)) / len(rows)

    def _score_generated(self, model: nn.Module, task: Task, rows: Sequence[Row], batch_size: int) -> float:
        score, total = text_score(task.metric), 0.0
        for i, text in self._continued(model, task, rows, self._new_tokens[task.name], batch_size):
            total += max(score(text, right, rows[i].prompt) for right in (rows[i].answer, *rows[i].references))
        return total / len(rows)

    def answer(self, model: nn.Module, task: Task, text: str) -> str:
        row = task.train[0]
        if row.messages:  # the system's message, if there is one, and the text as the user's
            system = row.messages[: int(row.messages[0][0] == "system")]
            row = replace(row, messages=(*system, ("user", text), row.messages[-1]))
        else:
            row = replace(row, prompt=text)
        ((_, found),) = self._continued(model, task, [row], self._longest_answer(task), 1)
        return found.strip()

    def _continued(
        self, model: nn.Module, task: Task, rows: Sequence[Row], most: int, batch_size: int
    ) -> Iterator[tuple[int, str]]:
        """The number of each row and its greedy continuation, up to its end token and of at most `most` tokens."""
        features = [{"input_ids": self._prompt(task, row, self._reserved, self.eval_candidates)} for row in rows]
        with evaluating(model) as device:
            for indices, batch in in_batches(features, batch_size, lambda f: self._pad_batch(f, left=True), device):
                ends: dict[str, Any] = {"pad_token_id": self._pad, "eos_token_id": self._stops}
                found = model.generate(**batch, max_new_tokens=most, do_sample=False, **ends)
                new = found[:, batch["input_ids"].shape[1] :]
                yield from zip(indices, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)

    def _answer(self, text: str, task: Task) -> list[int]:
        return self.prompts.answer(text, task.train[0].verbatim)

    def _longest_answer(self, task: Task) -> int:
        """In tokens, with the end's, of those that count as right."""
        texts = {text for row in (*task.validation, *task.test) for text in (row.answer, *row.references)}
        return max(len(self._answer(text, task)) for text in texts)

    def _candidates(self, task: Task, whose: str) -> tuple[str, ...]:
        """A free-form task has none, whatever the others have."""
        return task.labels if whose == "own" or not task.labels else self.labels

    def _check_room(self, task: Task, candidates: str) -> None:
        if task.kind == "messages":
            return
        answers = self._candidates(task, candidates) or tuple({row.answer for row in task.train})
        longest = max(len(self._answer(answer, task)) for answer in answers)
        self._prompt(task, replace(task.train[0], prompt=""), longest, candidates)

    def _prompt(self, task: Task, row: Row, reserved: int, candidates: str) -> list[int]:
        """Token ids up to the answer, at most max_length - reserved."""
        return self.prompts.prompt(task, row, reserved, self._candidates(task, candidates))

    def _pad_batch(self, features: Features, left: bool) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in features)

        def stack(key: str, filler: int) -> Tensor:
            rows = []
            for row in features:
                padding = [filler] * (longest - len(row[key]))
                rows.append(padding + row[key] if left else row[key] + padding)
            return torch.tensor(rows)

        batch = {"input_ids": stack("input_ids", self._pad)}
        for row in features:
            row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        batch["attention_mask"] = stack("attention_mask", 0)
        if "labels" in features[0]:
            batch["labels"] = stack("labels", IGNORED)
        return batch


def _generates(task: Task) -> bool:
    """Whether scoring it takes a continuation, not the likelihood of its labels."""
    return not task.labels or task.metric != "accuracy" or task.kind == "messages"
