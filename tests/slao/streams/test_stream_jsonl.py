"""Tasks from files: every accepted form, validation carved or given, and errors that name file and line."""

import json

import pytest

from slao.streams import Row, make_stream
from slao.streams.jsonl import jsonl


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def as_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def labelled(count, key="text"):
    return [{key: f"row {i}", "label": "ab"[i % 2]} for i in range(count)]


@pytest.fixture
def root(tmp_path):
    """Two tasks: "news" with labels, "sums" free-form."""
    lines(tmp_path / "news" / "train.jsonl", labelled(20))
    lines(tmp_path / "news" / "test.jsonl", [{"text": "t", "label": "b"}])
    lines(tmp_path / "sums" / "train.jsonl", [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(10)])
    lines(tmp_path / "sums" / "test.jsonl", [{"prompt": "9+9=", "answer": "18"}])
    return tmp_path


def test_tasks_sorted_labels_derived_validation_carved_from_train(root):
    stream = make_stream("jsonl", path=str(root))
    assert stream.name == root.name
    assert [task.name for task in stream.tasks] == ["news", "sums"]
    news, sums = stream.tasks
    assert (news.labels, sums.labels) == (("a", "b"), ())
    assert (len(news.train), len(news.validation), len(news.test)) == (18, 2, 1)
    assert (len(sums.train), len(sums.validation), len(sums.test)) == (9, 1, 1)
    assert {row.prompt for row in news.train + news.validation} == {f"row {i}" for i in range(20)}
    assert sums.test == (Row("9+9=", "18", verbatim=True),)
    assert sums.test[0].where == f"{root / 'sums' / 'test.jsonl'}, line 1"
    assert (sums.kind, news.kind) == ("prompt and answer", "text")


def test_the_seed_draws_the_validation(root):
    validation = [jsonl(root, seed=seed, validation_fraction=0.5).tasks[0].validation for seed in (0, 0, 1)]
    assert validation[0] == validation[1] != validation[2]
    assert jsonl(root, validation_fraction=0).tasks[0].validation == ()


@pytest.mark.parametrize("stem", ["validation", "dev", "val"])
def test_a_validation_file_is_used_as_it_is(root, stem):
    lines(root / "news" / f"{stem}.jsonl", labelled(3))
    news = jsonl(root).tasks[0]
    assert (len(news.train), len(news.validation)) == (20, 3)


def test_order_selects_and_arranges(root):
    assert [task.name for task in jsonl(root, order=["sums", "news"]).tasks] == ["sums", "news"]
    assert [task.name for task in jsonl(root, order=["sums"]).tasks] == ["sums"]
    with pytest.raises(ValueError, match=r"order names the task 'nope', but .* holds \['news', 'sums'\]"):
        jsonl(root, order=["nope"])


def test_labels_and_instruction_files(root):
    as_json(root / "news" / "labels.json", ["b", "a", "c"])
    (root / "news" / "instruction.txt").write_text("Which one is it?\n")
    news = jsonl(root).tasks[0]
    assert (news.labels, news.instruction) == (("b", "a", "c"), "Which one is it?")


def test_the_layout_of_the_published_15_task_suite(tmp_path):
    folder = tmp_path / "SC" / "amazon"
    for split, count in (("train", 8), ("dev", 4), ("test", 2)):
        as_json(folder / f"{split}.json", labelled(count, key="sentence"))
    as_json(folder / "labels.json", ["a", "b"])
    task = jsonl(tmp_path).tasks[0]
    assert (task.name, task.labels) == ("amazon", ("a", "b"))
    assert (len(task.train), len(task.validation), len(task.test)) == (8, 4, 2)
    assert task.train[1] == Row("row 1", "b")


def test_superni_files(tmp_path):
    content = {
        "Definition": ["Answer the question."],
        "Instances": [{"id": "1", "input": "why", "output": ["because", "so"]}, {"input": "who", "output": "me"}],
    }
    for split in ("train", "test"):
        as_json(tmp_path / "task002" / f"{split}.json", content)
    task = jsonl(tmp_path).tasks[0]
    assert (task.instruction, task.labels) == ("Answer the question.", ())
    assert task.test == (Row("why", "because", ("so",)), Row("who", "me"))
    assert task.metric == "accuracy"
    assert jsonl(tmp_path, metric="rouge_l").tasks[0].metric == "rouge_l"


def test_blank_lines_a_byte_order_mark_and_odd_line_ends_inside_strings(root):
    text = '\ufeff{"text": "one\u2028two", "label": "a"}\r\n\n{"text": "x", "label": "b"}'
    (root / "news" / "train.jsonl").write_bytes(text.encode())
    assert jsonl(root, validation_fraction=0).tasks[0].train == (Row("one\u2028two", "a"), Row("x", "b"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x", "label"', "line 2: not JSON"),
        ("[1, 2]", r"line 2: a row must be an object, not \[1, 2\]"),
        ('{"text": "x", "answer": "a"}', r"line 2: a row needs .* this one has \['answer', 'text'\]"),
        ('{"text": "x", "label": 1}', "line 2: 'label' must be a text, not 1"),
        ('{"text": NaN, "label": "a"}', "line 2: 'text' must be a text, not NaN"),
        ('{"text": "x", "label": " "}', "line 2: the label is empty"),
        ('{"text": "x", "text": "y", "label": "a"}', "line 2: the key 'text' stands twice in one object"),
        ('{"text": "funny \\ud83d", "label": "a"}', r"line 2: its text has half of a character \(\\ud83d, place 6\)"),
        ('{"text": "x", "label": "\\ude00"}', r"line 2: the label has half of a character \(\\ude00"),
        ('{"prompt": "x", "answer": "\\ude00"}', "line 2: its answer has half of a character"),
        ('{"prompt": "x", "answer": " "}', "line 2: the answer is empty, so there is nothing to learn"),
        ('{"messages": []}', r'line 2: "messages" must be a list of {"role", "content"}, not \[\]'),
        ('{"messages": "hi"}', r'line 2: "messages" must be a list of {"role", "content"}, not "hi"'),
        ('{"messages": [3]}', "line 2, message 1: 'role' must be a text; the message is 3"),
        ('{"messages": [{"role": "user"}]}', "line 2, message 1: 'content' must be a text"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}',
            "line 2, message 2: the assistant says nothing",
        ),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: the last message is the user's, so it has no"),
        ('{"messages": [{"role": "assistant", "content": "\\ud83d"}]}', "line 2: its answer has half of a character"),
        ("[" * 100_000, "line 2: nested too deeply"),
        ('{"n": ' + "1" * 5000 + "}", "line 2: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named(root, line, message):
    (root / "news" / "test.jsonl").write_text('{"text": "x", "label": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"test.jsonl, {message}"):
        jsonl(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "x",\n "label": }]', "line 2: not JSON"),
        ('[{"text": "x", "label": "a"}, 3]', "row 2: a row must be an object, not 3"),
    ],
)
def test_a_bad_place_of_a_json_list_is_named(root, content, message):
    (root / "news" / "test.jsonl").unlink()
    (root / "news" / "test.json").write_text(content)
    with pytest.raises(ValueError, match=rf"test.json, {message}"):
        jsonl(root)


def test_a_json_object_without_rows(root):
    (root / "news" / "test.jsonl").unlink()
    (root / "news" / "test.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"test.json: must be a JSON list of rows"):
        jsonl(root)


@pytest.mark.parametrize("stem", ["train", "test", "dev"])
def test_an_empty_file_is_named(root, stem):
    (root / "news" / f"{stem}.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=rf"{stem}.jsonl holds no rows"):
        jsonl(root)


def test_a_test_file_is_required(root):
    (root / "sums" / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"sums has no test.jsonl or test.json"):
        jsonl(root)


def test_a_test_label_that_train_does_not_have(root):
    lines(root / "news" / "test.jsonl", [{"text": "t", "label": "z"}])
    with pytest.raises(ValueError, match=r"task 'news', test: label 'z' is not among its labels \['a', 'b'\]"):
        jsonl(root)


def test_files_that_are_none(root):
    """A folder in the place of a file, in each place where one is read."""
    for name in ("train.jsonl", "test.jsonl", "dev.jsonl", "labels.json", "instruction.txt"):
        file = root / "news" / name
        kept = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        file.mkdir()
        with pytest.raises(ValueError, match=rf"{name} is a folder where a file is expected"):
            jsonl(root)
        file.rmdir()
        if kept is not None:
            file.write_bytes(kept)
    jsonl(root)


def test_other_encodings_name_the_line(root):
    text = '{"text": "x", "label": "a"}\n{"text": "caf\u00e9", "label": "a"}\n'
    for encoding, line in (("latin-1", 2), ("utf-16", 1)):
        (root / "news" / "test.jsonl").write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=rf"test.jsonl, line {line}: not UTF-8 \(byte \d+\); save it as UTF-8"):
            jsonl(root)


def test_half_of_a_character_elsewhere(root):
    (root / "news" / "labels.json").write_text('["a", "b", "\\ud83d"]')
    with pytest.raises(ValueError, match=r"labels.json: the label has half of a character"):
        jsonl(root)


@pytest.mark.parametrize("labels", [{"a": 1}, [], [1]])
def test_labels_must_be_a_list_of_texts(root, labels):
    as_json(root / "news" / "labels.json", labels)
    with pytest.raises(ValueError, match=r"labels.json: must be a JSON list of label texts"):
        jsonl(root)


def test_a_file_that_is_not_utf_8(root):
    (root / "news" / "test.jsonl").write_bytes(b'{"text": "\xff", "label": "a"}')
    with pytest.raises(ValueError, match=r"test.jsonl, line 1: not UTF-8 \(byte 10\)"):
        jsonl(root)


def test_folders_without_tasks_and_two_of_one_name(root, tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*absent"):
        jsonl(root / "absent")
    with pytest.raises(ValueError, match=r"no task in .*news"):
        jsonl(root / "news")
    lines(root / "group" / "news" / "train.jsonl", labelled(2))
    with pytest.raises(ValueError, match="two tasks of one name"):
        jsonl(root)


def talk(*contents, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return {"messages": turns + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def test_conversations(root):
    lines(root / "chat" / "train.jsonl", [talk("hi", "hello", "who?", "me", system="be kind"), talk("a", "b")])
    lines(root / "chat" / "test.jsonl", [talk("x", "y")])
    task = jsonl(root, order=["chat"], validation_fraction=0).tasks[0]
    turns = (("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "who?"), ("assistant", "me"))
    assert task.train[0] == Row("", "me", messages=turns)
    assert task.train[1].where.endswith("train.jsonl, line 2")
    assert (task.labels, task.kind) == ((), "messages")


def test_a_task_is_of_one_kind_of_rows(root):
    lines(root / "news" / "test.jsonl", [{"prompt": "t", "answer": "b"}])
    message = r"'news' mixes rows of text \(.*train.jsonl, line \d+\) and of prompt and answer \(.*test.jsonl, line 1\)"
    with pytest.raises(ValueError, match=message):
        jsonl(root)


def test_an_instruction_beside_rows_that_are_whole(root):
    (root / "sums" / "instruction.txt").write_text("Add.")
    with pytest.raises(
        ValueError, match="'sums' has an instruction, which rows of prompt and answer have no place for"
    ):
        jsonl(root)
