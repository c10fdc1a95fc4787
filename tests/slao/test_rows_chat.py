"""Conversations: which tokens the assistant's turns are, by every sort of chat template, learned and asked for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from slao.cli import main
from slao.methods import SeqLoRA
from slao.objectives import CausalLM, LabelMatching
from slao.objectives.prompts import Prompts
from slao.streams import Row
from slao.train import TrainConfig, train

# ChatML, with and without marks around what the assistant says.
PLAIN = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# No mark where a turn ends; each answer begins where its question's line ends.
BARE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
# Earlier answers are left out, as templates of models that think do with their thoughts.
FORGETFUL = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TALK = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Why?"), ("assistant", "So."))


def chat(messages: tuple[tuple[str, str], ...] = TALK, where: str = "chat/train.jsonl, line 3") -> Row:
    return Row("", messages[-1][1], messages=messages, where=where)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tiny, template):
    found = tiny.first(tiny.of_rows(chat()), tiny.characters(template))
    assert found == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n[[Hello!<|end|>]]\n"
        "<|start|>user\nWhy?<|end|>\n<|start|>assistant\n[[So.<|end|>]]\n"
    )


def test_a_template_without_marks_of_an_end_gets_eos(tiny):
    found = tiny.first(tiny.of_rows(chat(TALK[1:])), tiny.characters(BARE))
    assert found == "Hi\n[[Hello!\n]]Why?\n[[So.\n<eos>]]"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_tokens_are_those_of_the_template(tiny, template):
    tokenizer = tiny.characters(template)
    turns = [{"role": role, "content": content} for role, content in TALK]
    whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    stream = tiny.of_rows(chat())
    prompts = Prompts(tokenizer, stream, 200)
    assert prompts.supervised(stream.tasks[0], chat(), ())["input_ids"] == whole
    assert prompts.prompt(stream.tasks[0], chat(), 0, ()) == asked


def test_a_template_that_changes_its_mind_is_refused_by_name(tiny):
    stream = tiny.of_rows(chat())
    with pytest.raises(
        ValueError, match=r"chat/train.jsonl, line 3: the chat template writes the turns up to message 3"
    ):
        tiny.first(stream, tiny.characters(FORGETFUL))
    # One answer alone has nothing after it that could change it.
    short = tiny.of_rows(chat(TALK[:3]))
    assert tiny.first(short, tiny.characters(FORGETFUL)).endswith("<|start|>assistant\n[[Hello!<|end|>]]\n")


def test_a_template_that_refuses_the_messages_is_quoted(tiny):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn, please') }}{% endif %}" + PLAIN
    with pytest.raises(ValueError, match=r"line 3: the chat template does not take these messages: No system turn"):
        tiny.first(tiny.of_rows(chat()), tiny.characters(strict))
    with pytest.raises(ValueError, match=r"line 3: the chat template does not take these messages: "):
        tiny.first(tiny.of_rows(chat()), tiny.characters("{% for m in %}"))


def test_marks_around_all_turns_at_once_are_refused(tiny):
    wrong = "{% generation %}" + PLAIN + "{% endgeneration %}"
    with pytest.raises(ValueError, match=r"line 3: .* blocks mark 1 stretches of tokens for 2 turns of the assistant"):
        tiny.first(tiny.of_rows(chat()), tiny.characters(wrong))


def test_no_chat_template_says_how_to_give_one(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"no chat template, which rows of messages need; give one by --set objective.chat_temp"
    ):
        tiny.first(tiny.of_rows(chat()), tiny.characters())
    file = tmp_path / "chatml.jinja"
    file.write_text(PLAIN)
    given = [tiny.first(tiny.of_rows(chat()), tiny.characters(), chat_template=each) for each in (PLAIN, str(file))]
    assert given == [tiny.first(tiny.of_rows(chat()), tiny.characters(PLAIN))] * 2


def test_the_oldest_turns_go_first_and_the_system_message_stays(tiny):
    tokenizer, stream = tiny.characters(PLAIN), tiny.of_rows(chat())
    whole = len(Prompts(tokenizer, stream, 200).supervised(stream.tasks[0], chat(), ())["input_ids"])
    found = tiny.first(stream, tokenizer, max_length=whole - 1)
    assert found == (
        "<|start|>system\nBe brief.<|end|>\n<|start|>user\nWhy?<|end|>\n<|start|>assistant\n[[So.<|end|>]]\n"
    )
    with pytest.raises(
        ValueError, match=r"line 3: its last question and answer alone take 47 tokens; max_length is 40"
    ):
        tiny.first(stream, tokenizer, max_length=40)
    objective = CausalLM(tiny.base("llama"), tokenizer, stream, max_length=whole - 1)
    assert objective.notes == (f"2 of 2 conversations lose their oldest turns: max_length is {whole - 1}",)
    with pytest.raises(ValueError, match="max_length is 40"):  # found before anything is trained
        CausalLM(tiny.base("llama"), tokenizer, stream, max_length=40)


def test_conversations_are_learned_and_generation_ends_with_the_turn(tiny):
    """By heart; scored by what is generated after the last question, up to the template's own end of a turn."""
    rows = tuple(
        chat((("user", "Hi"), ("assistant", "Yo"), ("user", question), ("assistant", answer)))
        for question, answer in (("a?", "No"), ("bb?", "Yes"), ("c c?", "Maybe"))
    )
    stream, tokenizer = tiny.of_rows(*rows), tiny.characters(PLAIN)
    model = tiny.adapted("llama", r=8)
    objective = CausalLM(model, tokenizer, stream, max_new_tokens=40)
    assert objective._stops == [1, 5]
    config = TrainConfig(max_steps=100, batch_size=3, learning_rate=2e-2, lr_scheduler="constant")
    result = train(model, SeqLoRA(model), stream, objective, config)
    assert (result.zero_shot, result.matrix) == ([0.0], [[1.0]])
    assert objective.answer(model, stream.tasks[0], "Hi") == "Yo"  # the first turn of a conversation
    # With labels too it is what is said that counts, not a likelihood.
    labelled = replace(stream.tasks[0], labels=("No", "Yes", "Maybe"))
    assert objective.score(model, labelled, rows, 2) == 1.0


def test_an_encoder_takes_no_conversations(tiny):
    stream = tiny.of_rows(chat(), labels=("So.",))
    with pytest.raises(
        ValueError, match=r"label_matching reads single texts; task 'one' has messages \(use causal_lm\)"
    ):
        LabelMatching(tiny.bert(), tiny.tokenizer("bert"), stream)


def test_slao_run_on_messages(tiny, saved_llama, tmp_path, capsys):
    """Without a chat template one line and no folder; with one a run."""
    data = tmp_path / "data" / "one"
    data.mkdir(parents=True)
    turns = [{"role": role, "content": content} for role, content in TALK[1:3]]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    command = ["run", "--model", str(saved_llama), "--stream", "jsonl", "--stream-path", str(data.parent)]
    command += ["--runs", str(tmp_path / "runs"), "--name", "x", "--methods", "slao", "--seeds", "0", "--rank", "2"]
    command += ["--set", "train.max_steps=1", "--set", "objective.max_new_tokens=2"]
    capsys.readouterr()
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert (
        "the tokenizer has no chat template, which rows of messages need; give one by --set objective.chat_template="
        in err
    )
    assert not (tmp_path / "runs").exists()
    file = tmp_path / "chatml.jinja"
    file.write_text(PLAIN)
    assert main([*command, "--set", f"objective.chat_template={file}"]) == 0
    results = json.loads((tmp_path / "runs" / "x" / "results.json").read_text())
    assert results["settings"]["objective"]["chat_template"] == PLAIN
    assert results["methods"]["slao"]["matrix"] == [[[0.0]]]
