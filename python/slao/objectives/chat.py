"""Conversations as token ids, by the tokenizer's chat template, and which of them the assistant says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..logits import IGNORED
from ..streams import Row

Messages = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Encoded:
    """input_ids, and labels that are IGNORED outside the assistant's turns. start: of the last turn's first token.
    end: the special token that ends it, None where the template has none."""

    input_ids: list[int]
    labels: list[int]
    start: int
    end: int | None


class Chat:
    """A chat template. Where it marks what the assistant says with {% generation %} ... {% endgeneration %}, that is
    learned. Elsewhere a turn is what comes after everything before it and the generation prompt, up to the end of the
    turn's own marker; the row is rendered up to each turn for that, and the template refused where what it says of the
    beginning of a conversation is no beginning of what it says of the whole.

    Every piece is tokenised by itself, as the prompt of an answer is when the model is asked. A row that ends with no
    special token gets <eos>, which is learned.

    template: Jinja; None for the tokenizer's own. ValueError where there is none.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template, which rows of messages need; give one by "
                "--set objective.chat_template=FILE (Jinja: the chat_template.jinja of the model's instruct version, "
                "or the one in docs/rows.md)"
            )
        self._tokenizer = tokenizer
        self._template: str = tokenizer.get_chat_template() if template is None else template
        self._marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}

    def encode(self, messages: Messages, where: str) -> Encoded:
        """The whole conversation. where: the row, for messages."""
        pieces = self._marked(messages, where) if self._marks_answers else self._compared(messages, where)
        ids = [number for piece, _ in pieces for number in piece]
        labels = [number if learned else IGNORED for piece, learned in pieces for number in piece]
        last = max(i for i, label in enumerate(labels) if label != IGNORED)
        start = next((i + 1 for i in range(last, -1, -1) if labels[i] == IGNORED), 0)
        end = next((number for number in ids[last:] if number in self._special), None)
        if end is None:
            eos = self._tokenizer.eos_token_id
            ids, labels = [*ids[: last + 1], eos], [*labels[: last + 1], eos]
        return Encoded(ids, labels, start, end)

    def _marked(self, messages: Messages, where: str) -> list[tuple[list[int], bool]]:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = self._apply(messages, where, **options)
        pieces: list[tuple[list[int], bool]] = []
        for number, mark in zip(found["input_ids"], found["assistant_masks"], strict=True):
            if not pieces or pieces[-1][1] != bool(mark):
                pieces.append(([], bool(mark)))
            pieces[-1][0].append(number)
        marked, turns = sum(learned for _, learned in pieces), sum(role == "assistant" for role, _ in messages)
        if marked != turns:
            raise ValueError(
                f"{where}: the chat template's {{% generation %}} blocks mark {marked} stretches of tokens for {turns} "
                "turns of the assistant; give one by objective.chat_template that has a block around each turn"
            )
        return pieces

    def _compared(self, messages: Messages, where: str) -> list[tuple[list[int], bool]]:
        whole, at = self._render(messages, where), 0
        pieces: list[tuple[list[int], bool]] = []
        for i, (role, content) in enumerate(messages):
            if role != "assistant":
                continue
            before = self._render(messages[:i], where, add_generation_prompt=True) if i else ""
            after = self._render(messages[: i + 1], where)
            if not (whole.startswith(after) and after.startswith(before) and at <= len(before) < len(after)):
                raise ValueError(
                    f"{where}: the chat template writes the turns up to message {i + 1} otherwise when more follow, or "
                    "its answer otherwise than its generation prompt begins it, so that what is learned would not be "
                    "what is asked for; give one by objective.chat_template, with {% generation %} around the "
                    "assistant's turns"
                )
            turn = after[len(before) :].rstrip()
            if turn.endswith(content.rstrip()):
                turn = after[len(before) :]  # no mark of its end but white space
            pieces += [(self._following(whole[at : len(before)], at), False), (self._following(turn), True)]
            at = len(before) + len(turn)
        return [*pieces, (self._following(whole[at:]), False)]

    def _following(self, text: str, at: int = 1) -> list[int]:
        return following(self._tokenizer, text) if at else plain(self._tokenizer, text)

    def _render(self, messages: Messages, where: str, **options: Any) -> str:
        return str(self._apply(messages, where, tokenize=False, **options))

    def _apply(self, messages: Messages, where: str, **options: Any) -> Any:
        from jinja2.exceptions import TemplateError

        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._tokenizer.apply_chat_template(turns, chat_template=self._template, **options)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{where}: the chat template does not take these messages: {error}") from error


def without_oldest(messages: Messages) -> Messages | None:
    """Without the first question and its answers, a system message in front kept; None where one question is left."""
    kept = 1 if messages[0][0] == "system" else 0
    later = (i for i in range(kept + 1, len(messages)) if messages[i][0] == "user")
    cut = next(later, None)
    return None if cut is None else (*messages[:kept], *messages[cut:])


def plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def following(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that follows another one: without the space that some tokenizers put before the first word."""
    anchor, ids = plain(tokenizer, "\n"), plain(tokenizer, "\n" + text)
    return ids[len(anchor) :] if anchor and ids[: len(anchor)] == anchor else plain(tokenizer, text)


def row_name(row: Row, task: str) -> str:
    """Where a row stands, for messages."""
    return row.where or f"task {task!r}, the row with the answer {row.answer!r:.60}"
