"""From rows to tokens: what is read and what is learned, of each kind of row, to the last id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slao.objectives import CausalLM
from slao.objectives.prompts import Prompts
from slao.streams import Row, Task
from slao.streams.sources import SOURCES
from slao.streams.standard_cl import ORDERS

IGNORED = -100


# The papers' layout


def written_before(tokenizer: Any, task: Task, row: Row, labels: tuple[str, ...], max_length: int) -> dict[str, Any]:
    """The rows of the papers' streams as they were built before there were other kinds, by one function."""
    answer = [*tokenizer(" " + row.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    lines = [task.instruction] if task.instruction else []
    lines += [f"Option: {', '.join(labels)}"] if labels else []
    head = tokenizer("".join(line + "\n" for line in lines))["input_ids"]
    tail = tokenizer("\nAnswer:", add_special_tokens=False)["input_ids"]
    text = tokenizer(row.prompt, add_special_tokens=False)["input_ids"]
    prompt = head + text[: max_length - len(answer) - len(head) - len(tail)] + tail
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


@pytest.mark.parametrize("max_length", [400, 4000])
@pytest.mark.parametrize("name", ORDERS["O4"])
def test_the_papers_rows_are_what_they_were(tiny, name, max_length):
    source, tokenizer = SOURCES[name], tiny.characters()
    rows = tuple(Row(f"{label} or not? " * 30, label) for label in source.labels)
    stream = tiny.of_rows(*rows, labels=source.labels, instruction=source.instruction)
    prompts = Prompts(tokenizer, stream, max(max_length, 2 * len(source.instruction) + 400))
    for row in rows:
        expected = written_before(tokenizer, stream.tasks[0], row, source.labels, prompts.max_length)
        assert prompts.supervised(stream.tasks[0], row, source.labels) == expected


def test_the_papers_row_byte_for_byte(tiny):
    stream = tiny.of_rows(Row("It rains.\nStill.", "bad"), labels=("good", "bad"), instruction="How is it?")
    assert (
        tiny.first(stream, tiny.characters())
        == "<bos>How is it?\nOption: good, bad\nIt rains.\nStill.\nAnswer:[[ bad<eos>]]"
    )
    assert tiny.first(tiny.of_rows(Row("1+1", "2")), tiny.characters()) == "<bos>1+1\nAnswer:[[ 2<eos>]]"


# Prompt and answer


@pytest.mark.parametrize("dummy_prefix", [False, True])
@pytest.mark.parametrize(("prompt", "answer"), [("Q: why\nA:", " so"), ("2+2=", "4"), ("say ", "hi"), ("x\n", "\ny")])
def test_prompt_and_answer_are_verbatim(tiny, prompt, answer, dummy_prefix):
    tokenizer = tiny.characters(dummy_prefix=dummy_prefix)
    found = tiny.first(tiny.of_rows(Row(prompt, answer, verbatim=True)), tokenizer)
    start = "<bos>▁" if dummy_prefix else "<bos>"
    expected = f"{start}{prompt}[[{answer}<eos>]]"
    assert found.replace("▁", " ") == expected.replace("▁", " ")


def test_a_long_prompt_loses_its_beginning_and_never_the_answer(tiny):
    stream = tiny.of_rows(Row("abcdefghij=", "xyz", verbatim=True))
    assert tiny.first(stream, tiny.characters(), max_length=10) == "<bos>ghij=[[xyz<eos>]]"
    assert tiny.first(stream, tiny.characters(), max_length=6) == "<bos>=[[xyz<eos>]]"
    with pytest.raises(ValueError, match="task 'one': the answer alone take 6 tokens; max_length is 5: raise it"):
        tiny.first(stream, tiny.characters(), max_length=5)


def test_labels_of_verbatim_rows_are_scored_as_they_stand(tiny):
    """No Option line, no space: the candidates follow the prompt as the answer does in training."""
    model, tokenizer = tiny.base("llama", seed=1), tiny.characters()
    rows = tuple(Row(f"{i} is", label, verbatim=True) for i, label in enumerate([" odd", " even", "n't"] * 3))
    stream = tiny.of_rows(*rows, labels=(" odd", " even", "n't"))
    objective = CausalLM(model, tokenizer, stream)
    hits = 0
    for row in rows:
        scores = {}
        for label in stream.labels:
            ids = tokenizer(f"{row.prompt}{label}<eos>")["input_ids"]
            with torch.no_grad():
                steps = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double()[:-1], -1)
            chosen = steps[torch.arange(len(ids) - 1), ids[1:]]
            scores[label] = chosen[-len(label) - 1 :].sum().item()
        hits += max(scores, key=scores.__getitem__) == row.answer
    assert objective.score(model, stream.tasks[0], rows, 4) == hits / len(rows)
    assert 0 < hits < len(rows)


def test_a_prompt_without_a_token_is_named(tiny):
    row = Row(" ", "red", verbatim=True, where="data/t/train.jsonl, line 7")
    with pytest.raises(ValueError, match=r"data/t/train.jsonl, line 7: the prompt makes no token; give it a text"):
        CausalLM(tiny.base("llama"), tiny.tokenizer(), tiny.of_rows(row))


# A template of the user's


def test_a_template_of_ones_own(tiny):
    stream = tiny.of_rows(Row("It rains.", "bad"), labels=("good", "bad"), instruction="How?")
    template = "{instruction} {{{options}}}\n<{text}>\nMood: "
    found = tiny.first(stream, tiny.characters(), template=template)
    assert found == "<bos>How? {good, bad}\n<It rains.>\nMood:[[ bad<eos>]]"
    assert tiny.first(stream, tiny.characters(), template="{instruction}:{text}=") == "<bos>How?:It rains.=[[bad<eos>]]"
    cut = tiny.first(stream, tiny.characters(), max_length=22, template="{instruction}:{text}\nMood: ")
    assert cut == "<bos>How?:It ra\nMood:[[ bad<eos>]]"


def test_the_papers_layout_can_be_written_as_a_template(tiny):
    stream = tiny.of_rows(Row("It rains.", "bad"), labels=("good", "bad"), instruction="How?")
    template = "{instruction}\nOption: {options}\n{text}\nAnswer: "
    assert tiny.first(stream, tiny.characters(), template=template) == tiny.first(stream, tiny.characters())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{txt}: ", r"unknown field or format in \{txt\}; it can have \{text\}, \{options\} and \{instruction\}"),
        ("{text!r}: ", r"unknown field or format in \{text\}"),
        ("{options}: ", r"must have \{text\} once, not 0 times"),
        ("{text}{text}", r"must have \{text\} once, not 2 times"),
        ("{text", "objective.template: .*write a brace that is one as"),
        ("{text} {options}", r"has \{options\}, and task 'one' has no labels; leave it out"),
        ("/no/such/file", "there is no file /no/such/file"),
    ],
)
def test_a_template_that_cannot_be_filled(tiny, template, message):
    with pytest.raises(ValueError, match=message):
        tiny.first(tiny.of_rows(Row("a", "b")), tiny.characters(), template=template)


def test_a_template_must_have_a_use_and_the_instruction(tiny):
    with pytest.raises(ValueError, match=r"objective.template would do nothing: no row is one of text; leave it out"):
        tiny.first(tiny.of_rows(Row("a", "b", verbatim=True)), tiny.characters(), template="{text}")
    with pytest.raises(ValueError, match=r"objective.chat_template would do nothing: no row is one of messages"):
        tiny.first(tiny.of_rows(Row("a", "b")), tiny.characters(), chat_template="{{ messages }}")
    with pytest.raises(ValueError, match=r"no \{instruction\}, which task 'one' has; add it"):
        tiny.first(tiny.of_rows(Row("a", "b"), instruction="Do."), tiny.characters(), template="{text}: ")


def test_a_template_in_a_file(tiny, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("{text} -> \n")
    assert tiny.first(tiny.of_rows(Row("a", "b")), tiny.characters(), template=str(file)) == "<bos>a ->[[ b<eos>]]"
    file.write_text("no field")
    with pytest.raises(ValueError, match=r"mine.txt is no template: it has no field in braces"):
        tiny.first(tiny.of_rows(Row("a", "b")), tiny.characters(), template=str(file))


def test_a_file_is_read_when_the_settings_are(tmp_path):
    from slao import settings

    file: Path = tmp_path / "t.txt"
    file.write_text("{text} = ")
    given = {"objective": {"name": "causal_lm", "template": str(file)}}
    assert settings.complete(given)["objective"]["template"] == "{text} = "
