"""Scores of generated texts: the numbers by hand, and a model that is scored by the metric its task names."""

from __future__ import annotations

import json
import sys
from random import Random

import pytest

from slao.cli import main
from slao.methods import SeqLoRA
from slao.objectives import CausalLM, LabelMatching, text_scores
from slao.objectives.text_scores import text_score
from slao.streams import Row, Stream, Task
from slao.train import TrainConfig, train

needs_rouge = pytest.fixture(lambda: pytest.importorskip("rouge_score", reason="the package rouge-score is missing"))


@pytest.mark.parametrize(
    ("text", "reference", "same", "exact"),
    [
        ("POS", "pos", 1, 1),
        ("  very\n negative ", "very negative", 1, 1),
        ("Positive.", "positive", 0, 1),
        ("'joy'!", "joy", 0, 1),
        ("positive one", "positive", 0, 0),
        ("", "joy", 0, 0),
        ("", "", 1, 1),
    ],
)
def test_matches(text, reference, same, exact):
    assert [text_score(metric)(text, reference, "") for metric in ("accuracy", "exact_match")] == [same, exact]


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [
        ("the cat", "the cat", 1),
        ("Hello, World!", "hello world", 1),  # case and punctuation aside
        ("a b c d", "a c d e f", 2 / 3),  # common: a c d; 3 of 4 and 3 of 5
        ("one two three", "three two one", 1 / 3),  # the order counts
        ("dog", "dog bird", 2 / 3),  # 1 of 1 and 1 of 2
        ("cats running", "cats runs", 1),  # words of more than three letters are stemmed
        ("ones", "one", 1),
        ("", "a b", 0),
        ("a b", "", 0),
        ("x y", "a b", 0),
    ],
)
def test_rouge_l(needs_rouge, text, reference, f1):
    assert text_score("rouge_l")(text, reference, "") == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("B", "B", 1),
        (" B\nBecause", "B because", 1),
        ("A", "B", 0),
        ("b", "B", 0),
        ("", "B", 0),
        ("x", "", 0),
        ("", "", 0),
    ],
)
def test_first_letter(text, reference, score):
    assert text_score("first_letter")(text, reference, "") == score


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("abc", "abc", 1),
        ("abcd", "abxd", 6 / 8),  # a b d
        ("abc", "cab", 4 / 6),  # a b
        ("aab", "ab", 4 / 5),
        ("x", "y", 0),
        ("", "y", 0),
        ("f(<NUM_LIT:17>, <STR_LIT>)", "f(17, )", 1),
        ("<NUM_LIT>", "0", 1),
        ("<CHAR_LIT:é>", "é", 1),
    ],
)
def test_code_similarity(text, reference, score):
    assert text_score("code_similarity")(text, reference, "") == pytest.approx(score, abs=1e-15)


def test_code_similarity_is_that_of_the_plain_table():
    random = Random(0)
    for _ in range(200):
        first, second = ("".join(random.choices("ab(c", k=random.randint(1, 90))) for _ in range(2))
        row = [0] * (len(second) + 1)
        for a in first:
            before = row
            row = [0]
            for i, b in enumerate(second):
                row.append(before[i] + 1 if a == b else max(row[i], before[i + 1]))
        assert text_score("code_similarity")(first, second, "") == 2 * row[-1] / (len(first) + len(second))


@pytest.mark.parametrize(
    ("prompt", "text", "reference", "score"),
    [
        # Of 1 to 4 words kept 2/3, 0, 1, 1; added 1, 0, 0, 1; left out 1, 1, 1, 1.
        ("a b c", "a b d", "a d", (8 / 3 + 2 + 4) / 12),
        ("a b c", "A d!", "a d!", 1),
        # Nothing is left out, and all of it should be: kept 0, 0, 0, 1; added 0, 1, 1, 1; left out nothing.
        ("a b c", "a b c", "x", (1 + 3 + 4) / 12),
        # Kept 2/3 (one of the two that are needed), 0, 1, 1; added nothing; left out 0 (one too many), 1/2, 1, 1.
        ("a a a", "a", "a a", (8 / 3 + 4 + 5 / 2) / 12),
    ],
)
def test_sari(prompt, text, reference, score):
    assert text_score("sari")(text, reference, prompt) == pytest.approx(score, abs=1e-12)


def test_sari_takes_no_conversations():
    rows = (Row("", "b", messages=(("user", "a"), ("assistant", "b"))),)
    with pytest.raises(ValueError, match="task 'x' has messages, and sari compares with a prompt"):
        Task("x", rows, (), rows, metric="sari")


def test_without_rouge_score_the_error_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    text_scores._rouge_l.cache_clear()
    row = (Row("a", "b"),)
    with pytest.raises(ImportError, match=r'rouge-score.*pip install "slao_kernels\[rouge\]"'):
        CausalLM(tiny.base("llama"), tiny.tokenizer(), Stream("s", (Task("t", row, (), row, metric="rouge_l"),)))


@pytest.fixture(scope="module")
def learned(tiny):
    """A model that has learned four free-form rows by heart, and the test of it."""
    pytest.importorskip("rouge_score", reason="the package rouge-score is missing")
    rows = (Row("red", "cat"), Row("blue sky", "dog bird"), Row("a b c green", "one two three"), Row("sea", "four"))
    stream = Stream("s", (Task("free", rows, (), rows, metric="rouge_l"),))
    model = tiny.adapted("llama", r=8)
    objective = CausalLM(model, tiny.tokenizer(), stream, max_new_tokens=6)
    config = TrainConfig(max_steps=100, batch_size=4, learning_rate=2e-2, lr_scheduler="constant")
    result = train(model, SeqLoRA(model), stream, objective, config)
    assert result.matrix == [[1.0]]
    assert result.zero_shot[0] < 0.5
    return model, objective


def scored(learned, metric: str, *rows: Row, labels: tuple[str, ...] = ()) -> float:
    model, objective = learned
    return objective.score(model, Task("free", rows, (), rows, labels, metric=metric), rows, 2)


def test_the_metric_of_the_task_scores_its_continuation(learned):
    part, all_, wrong = Row("blue sky", "dog"), Row("a b c green", "one two three"), Row("sea", "cat")
    assert scored(learned, "rouge_l", part) == pytest.approx(2 / 3)  # "dog bird": 1 of 2 and 1 of 1
    assert scored(learned, "rouge_l", part, all_, wrong) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scored(learned, "exact_match", part, all_, wrong) == pytest.approx(1 / 3)
    assert scored(learned, "exact_match", Row("blue sky", "Dog, bird!")) == 1
    assert scored(learned, "accuracy", Row("blue sky", "Dog, bird!")) == 0


def test_the_best_reference_counts(learned):
    row = Row("blue sky", "cat", ("dog sea sky", "dog bird one"))
    assert scored(learned, "rouge_l", row) == pytest.approx(0.8)  # of "dog bird one": 2 of 2 and 2 of 3
    assert scored(learned, "exact_match", row) == 0
    assert scored(learned, "exact_match", Row("blue sky", "cat", ("dog bird",))) == 1


def test_exact_match_generates_even_where_there_are_labels(learned):
    """Without the learned answer among the labels the likelihoods must choose one of them, a text need not."""
    row = Row("sea", "red")
    assert scored(learned, "accuracy", row, labels=("red",)) == 1
    assert scored(learned, "exact_match", row, labels=("red",)) == 0


def test_references_are_not_trained_on(tiny):
    one, more = Row("red", "cat"), Row("red", "cat", ("dog", "bird"))
    task = Task("t", (one,), (), (one,))
    objective = CausalLM(tiny.base("llama"), tiny.tokenizer(), Stream("s", (task,)))
    assert objective.features(task, [one]) == objective.features(task, [more])


def test_label_matching_refuses_what_it_does_not_score(tiny):
    rows = (Row("a", "red"),)
    tasks = (Task("x", rows, (), rows, ("red",)), Task("y", rows, (), rows, ("red",), metric="exact_match"))
    message = r"label_matching scores accuracy only; tasks that want another: y \(exact_match\)"
    with pytest.raises(ValueError, match=message):
        LabelMatching(tiny.bert(), tiny.tokenizer("bert"), Stream("s", tasks))


def test_a_stream_says_its_metric():
    rows = (Row("a", "b"),)
    tasks = [
        Task(name, rows, (), rows, metric=metric)
        for name, metric in zip("xyz", ["rouge_l", "rouge_l", "exact_match"], strict=True)
    ]
    assert Stream("s", tuple(tasks[:2])).metric == "rouge_l"
    assert Stream("s", tuple(tasks)).metric == "rouge_l, exact_match"
    with pytest.raises(
        ValueError, match="task 'x': unknown metric 'bleu'; choose one of accuracy, exact_match, rouge_l, "
    ):
        Task("x", rows, (), rows, metric="bleu")


def test_a_run_from_the_command_line_says_its_metric(saved_llama, stream_folder, tmp_path):
    """Two labelled tasks, scored by what the model writes."""
    arguments = ["run", "--model", str(saved_llama), "--stream", "jsonl", "--stream-path", str(stream_folder)]
    training = [
        "--methods",
        "seqlora",
        "--seeds",
        "0",
        "--epochs",
        "20",
        "--batch-size",
        "8",
        "--learning-rate",
        "2e-2",
    ]
    settings = ["--no-shuffle", "--set", "stream.metric=exact_match", "--set", "objective.max_new_tokens=4"]
    assert main([*arguments, *training, *settings, "--name", "tiny", "--runs", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert results["metric"] == "exact_match"
    assert results["methods"]["seqlora"]["zero_shot"] == [[0.0, 0.0]]  # the likelihoods of labels would give a third
    ((first, _), _) = results["methods"]["seqlora"]["matrix"][0]
    assert first == 1.0
    assert "Score: exact_match." in (tmp_path / "tiny" / "report.html").read_text()
