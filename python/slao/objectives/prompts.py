"""From a row to the token ids that a causal language model reads, and which of them it learns: the one place for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from ..reading import read_text
from ..streams import Row, Stream, Task
from .chat import IGNORED, Chat, Encoded, following, plain, row_name, without_oldest

_FIELDS = ("text", "options", "instruction")
_SPLITS = ("train", "validation", "test")


class Prompts:
    """Builds the ids of every kind of row, at most `max_length` of them.

    A text goes into `template`. Without one it is the papers': "instruction / Option: a, b, c / text / Answer:", lines
    that a task does not have left out, and a space before the answer. One of the user's has {text}, once, and perhaps
    {options} and {instruction}; white space at its end goes to the answer. The text's end is cut, never the answer.
    prompt and answer are taken as they are, each tokenised by itself; the prompt's beginning is cut.
    messages: see `Chat`. The oldest questions with their answers are left out, after a system message; ValueError
    where the last one alone is too long.
    """

    def __init__(
        self,
        tokenizer: Any,
        stream: Stream,
        max_length: int,
        template: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        kinds = {task.kind for task in stream.tasks}
        _check_use(kinds, template=template, chat_template=chat_template)
        self.tokenizer, self.max_length, self.or_shorten = tokenizer, max_length, ""
        self._eos = tokenizer.eos_token_id
        text = template_text("template", template)
        self._template = None if text is None else Template.parse(text, stream)
        self._chat = Chat(tokenizer, template_text("chat_template", chat_template)) if "messages" in kinds else None

    def supervised(self, task: Task, row: Row, labels: tuple[str, ...]) -> dict[str, Any]:
        """A row of training: input_ids, and labels that are IGNORED but where it learns. labels: what can be chosen."""
        if row.messages:
            found, _ = self._conversation(task, row, 0)
            return {"input_ids": found.input_ids, "labels": found.labels}
        answer = self.answer(row.answer, row.verbatim)
        return supervised(self.prompt(task, row, len(answer), labels), answer)

    def prompt(self, task: Task, row: Row, reserved: int, labels: tuple[str, ...]) -> list[int]:
        """What comes before the answer, at most max_length - reserved ids."""
        if row.messages:
            found, _ = self._conversation(task, row, reserved, only_prompt=True)
            return found.input_ids[: found.start]
        if row.verbatim:
            head, text, tail = self._special(), self._opened(row.prompt), []
            text = text[len(head) :] if text[: len(head)] == head else text
            what = "the answer"
        else:
            before, after = self._around(task, labels)
            head, text, tail = self._opened(before), plain(self.tokenizer, row.prompt), plain(self.tokenizer, after)
            what = "instruction, options and answer"
        left = self.max_length - reserved - len(head) - len(tail)
        if left < 1:
            raise ValueError(
                f"task {task.name!r}: {what} alone take {self.max_length - left + 1} tokens; "
                f"max_length is {self.max_length}: raise it{self.or_shorten}"
            )
        return head + (text[-left:] if row.verbatim else text[:left]) + tail

    def answer(self, text: str, verbatim: bool = False) -> list[int]:
        """Ids of an answer, with <eos>: of a verbatim row as it stands, else as the template has it."""
        if verbatim:
            return [*following(self.tokenizer, text), self._eos]
        between = " " if self._template is None else self._template.between
        ids = plain if between else following
        return [*ids(self.tokenizer, between + text), self._eos]

    def check_rows(self, stream: Stream) -> Iterator[tuple[int | None, bool]]:
        """(the special token that ends a conversation, whether it is cut) of each row of messages; ValueError for one
        that the template does not take, or that is too long, and for a prompt that says nothing."""
        for task in stream.tasks:
            for row in (row for split in _SPLITS for row in getattr(task, split)):
                if row.messages:
                    found, cut = self._conversation(task, row, 0)
                    yield found.end, cut
                elif row.verbatim and not row.prompt.strip() and not self._opened(row.prompt):
                    raise ValueError(f"{row_name(row, task.name)}: the prompt makes no token; give it a text")

    def _conversation(self, task: Task, row: Row, reserved: int, only_prompt: bool = False) -> tuple[Encoded, bool]:
        """What fits of it, and whether that is not all."""
        assert self._chat is not None
        messages, where = row.messages, row_name(row, task.name)
        while True:
            found = self._chat.encode(messages, where)
            length = found.start if only_prompt else len(found.input_ids)
            if length <= self.max_length - reserved:
                return found, messages != row.messages
            shorter = without_oldest(messages)
            if shorter is None:
                raise ValueError(
                    f"{where}: its last question and answer alone take {length + reserved} tokens; max_length is "
                    f"{self.max_length}: raise it{self.or_shorten}, or shorten the row"
                )
            messages = shorter

    def _around(self, task: Task, labels: tuple[str, ...]) -> tuple[str, str]:
        if self._template is not None:
            return self._template.around(task.instruction, ", ".join(labels))
        lines = [task.instruction] if task.instruction else []
        lines += [f"Option: {', '.join(labels)}"] if labels else []
        return "".join(line + "\n" for line in lines), "\nAnswer:"

    def _opened(self, text: str) -> list[int]:
        """Ids of a text that begins a row."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids[:-1] if self._eos is not None and ids[-1:] == [self._eos] else ids  # some end every text

    def _special(self) -> list[int]:
        """What the tokenizer puts before every text."""
        return self._opened("")


@dataclass(frozen=True)
class Template:
    """head + text + tail, then the answer with `between` before it; head and tail may have other fields."""

    head: str
    tail: str
    between: str

    @staticmethod
    def parse(text: str, stream: Stream) -> Template:
        """ValueError for a field that there is not, no {text} or two, or {options} where a task has none."""
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"objective.template: {error}; write a brace that is one as {{{{ or }}}}") from None
        names = [name for _, name, _, _ in parts if name is not None]
        if other := [name for _, name, spec, how in parts if name is not None and (name not in _FIELDS or spec or how)]:
            raise ValueError(
                f"objective.template: unknown field or format in {{{other[0]}}}; it can have {{text}}, {{options}} and "
                "{instruction}, and a brace that is one is written {{ or }}"
            )
        if names.count("text") != 1:
            raise ValueError(f"objective.template must have {{text}} once, not {names.count('text')} times")
        bare = [task.name for task in stream.tasks if task.kind == "text" and not task.labels]
        if "options" in names and bare:
            raise ValueError(f"objective.template has {{options}}, and task {bare[0]!r} has no labels; leave it out")
        unsaid = [task.name for task in stream.tasks if task.kind == "text" and task.instruction]
        if "instruction" not in names and unsaid:
            raise ValueError(f"objective.template has no {{instruction}}, which task {unsaid[0]!r} has; add it")
        at = next(i for i, (_, name, _, _) in enumerate(parts) if name == "text")
        head = "".join(_written(*part[:2]) for part in parts[:at]) + _written(parts[at][0], None)
        rest = "".join(_written(*part[:2]) for part in parts[at + 1 :])
        tail = rest.rstrip(" ")
        return Template(head, tail, rest[len(tail) :])

    def around(self, instruction: str, options: str) -> tuple[str, str]:
        """What stands before the text, and after it."""
        given = {"instruction": instruction, "options": options}
        return self.head.format(**given), self.tail.format(**given)


def _written(literal: str, name: str | None) -> str:
    """A part of a format string, as `Formatter.parse` gives it, as it was written."""
    return literal.replace("{", "{{").replace("}", "}}") + ("" if name is None else f"{{{name}}}")


def supervised(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    """A row whose loss is on the answer only."""
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def told_apart(tokenizer: Any, ids: list[int], labels: list[int]) -> list[tuple[str, str]]:
    """("reads" or "LEARNS", the text of these tokens) of each stretch of a row, in order."""
    cuts = [i for i in range(1, len(ids)) if (labels[i] == IGNORED) != (labels[i - 1] == IGNORED)]
    told, before = [], ""
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        # Of the whole beginning: some tokenizers leave out the space of a text's first token.
        whole = tokenizer.decode(ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[start:end])
        told.append(("reads" if labels[start] == IGNORED else "LEARNS", f"{end - start} tokens {text!r}"))
        before = whole
    return told


def template_text(name: str, given: str | None) -> str | None:
    """The template that a setting says: itself, or what stands in the file of that name, which has no brace."""
    if given is None or "{" in given:
        return given
    text = read_text(Path(given).expanduser())
    if "{" not in text:
        raise ValueError(f"objective.{name}: {given} is no template: it has no field in braces")
    return text.removesuffix("\n")


def _check_use(kinds: set[str], **given: str | None) -> None:
    for name, kind in (("template", "text"), ("chat_template", "messages")):
        if given[name] is not None and kind not in kinds:
            raise ValueError(f"objective.{name} would do nothing: no row is one of {kind}; leave it out")
