"""LabelMatching and CausalLM against their formulas, written out by hand on single rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from slao.methods import SeqLoRA
from slao.objectives import OBJECTIVES, CausalLM, LabelMatching, check_objective
from slao.streams import Row, Stream, Task
from slao.train import TrainConfig, train

IGNORED = -100


# LabelMatching


def embed(model, tokenizer, text: str, max_length: int = 128) -> torch.Tensor:
    """Unit mean of one text's last hidden states: no batch, no padding, in fp64."""
    ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model(input_ids=ids).last_hidden_state[0].double()
    return F.normalize(hidden.mean(0), dim=0)


def logits_of(model, tokenizer, texts: list[str], table: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.stack([embed(model, tokenizer, text) for text in texts]) @ table.T / temperature


@pytest.fixture
def encoder(tiny):
    return tiny.bert().double()


def mixed(tiny):
    """Rows of several lengths, so that batches have padding."""
    return tiny.stream(train=9, test=9, extra=3)


@pytest.mark.parametrize("candidates", ["own", "all"])
def test_loss_is_the_written_formula(tiny, encoder, candidates):
    stream, tokenizer = mixed(tiny), tiny.tokenizer("bert")
    objective = LabelMatching(encoder, tokenizer, stream, train_candidates=candidates, temperature=0.1)
    table = torch.stack([embed(encoder, tokenizer, label) for label in stream.labels])
    for t, task in enumerate(stream.tasks):
        batch = objective.collate(objective.features(task, task.train))
        assert (batch["attention_mask"] == 0).any()
        logits = logits_of(encoder, tokenizer, [row.prompt for row in task.train], table, 0.1)
        own = slice(3 * t, 3 * t + 3) if candidates == "own" else slice(None)
        targets = torch.tensor([stream.labels[own].index(row.answer) for row in task.train])
        expected = F.cross_entropy(logits[:, own], targets).item()
        # The embeddings are rounded to fp32 (6e-8) before they are divided by the temperature.
        assert objective.loss(encoder, batch).item() == pytest.approx(expected, rel=1e-6)


def test_labels_of_a_stream_count_once_and_tasks_may_share_them(tiny, encoder):
    shared = [Task(name, tiny.rows(labels, 4), (), tiny.rows(labels, 4), labels) for name, labels in
              (("first", ("red", "cat")), ("second", ("cat", "dog")))]  # fmt: skip
    objective = LabelMatching(encoder, tiny.tokenizer("bert"), Stream("s", tuple(shared)))
    assert objective.labels == ("red", "cat", "dog")
    assert [row["labels"] for row in objective.features(shared[1], shared[1].train)] == [1, 2, 1, 2]


def test_label_embeddings_stay_when_the_model_changes(tiny, encoder):
    stream, tokenizer = mixed(tiny), tiny.tokenizer("bert")
    objective = LabelMatching(encoder, tokenizer, stream, train_candidates="all", temperature=0.1)
    table = torch.stack([embed(encoder, tokenizer, label) for label in stream.labels])
    task = stream.tasks[0]
    batch = objective.collate(objective.features(task, task.train))
    before = objective.loss(encoder, batch).item()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    targets = torch.tensor([stream.labels.index(row.answer) for row in task.train])
    logits = logits_of(encoder, tokenizer, [row.prompt for row in task.train], table, 0.1)
    after = objective.loss(encoder, batch).item()
    assert after == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    assert abs(after - before) > 1e-3
    assert not objective._table.requires_grad


@pytest.mark.parametrize("candidates", ["own", "all"])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_score_is_brute_force(tiny, encoder, candidates, batch_size):
    stream, tokenizer = mixed(tiny), tiny.tokenizer("bert")
    encoder.train()
    objective = LabelMatching(encoder, tokenizer, stream, eval_candidates=candidates)
    assert encoder.training
    table = torch.stack([embed(encoder.eval(), tokenizer, label) for label in stream.labels])
    encoder.train()
    for task in stream.tasks:
        allowed = task.labels if candidates == "own" else stream.labels
        columns = [stream.labels.index(label) for label in allowed]
        encoder.eval()
        logits = logits_of(encoder, tokenizer, [row.prompt for row in task.test], table, 0.05)[:, columns]
        encoder.train()
        hits = [allowed[g] == row.answer for g, row in zip(logits.argmax(1).tolist(), task.test, strict=True)]
        single = [objective.score(encoder, task, [row], batch_size) for row in task.test]
        assert single == [float(hit) for hit in hits]
        assert objective.score(encoder, task, task.test, batch_size) == pytest.approx(sum(hits) / len(hits))
    assert encoder.training


def test_a_long_text_is_cut(tiny, encoder):
    stream, tokenizer = mixed(tiny), tiny.tokenizer("bert")
    objective = LabelMatching(encoder, tokenizer, stream, max_length=5)
    task = stream.tasks[0]
    row = Row("red " * 40, "red")
    (features,) = objective.features(task, [row])
    words = tokenizer.convert_ids_to_tokens(features["input_ids"])
    assert words == ["[CLS]", "red", "red", "red", "[SEP]"]


def test_label_matching_refuses_what_it_cannot_do(tiny, encoder):
    stream, tokenizer = tiny.stream(), tiny.tokenizer("bert")
    free = replace(stream, tasks=(*stream.tasks, replace(stream.tasks[0], name="free", labels=())))
    with pytest.raises(ValueError, match="tasks without: free"):
        LabelMatching(encoder, tokenizer, free)
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        LabelMatching(encoder, tokenizer, stream, temperature=0)
    objective = LabelMatching(encoder, tiny.tokenizer("llama"), stream)  # adds no special tokens
    with pytest.raises(ValueError, match="makes no token of ' '; remove or correct that row"):
        objective.features(stream.tasks[0], [Row("a", "red"), Row(" ", "red")])
    for name in ("train_candidates", "eval_candidates"):
        with pytest.raises(ValueError, match=f"unknown {name} 'some'; choose one of own, all"):
            LabelMatching(encoder, tokenizer, stream, **{name: "some"})


def test_objectives_are_found_by_name():
    assert sorted(OBJECTIVES) == ["causal_lm", "image_matching", "label_matching"]
    with pytest.raises(
        ValueError, match="unknown objective 'mlm'; choose one of causal_lm, image_matching, label_matching"
    ):
        check_objective("mlm", {})
    with pytest.raises(ValueError, match="no option 'lenght'; its options are temperature, train_candidates"):
        check_objective("label_matching", {"lenght": 3})


def test_candidates_seen_so_far(tiny, encoder):
    """With two of three tasks seen, a row of the third can be one of theirs or of its own; before the first, any."""
    stream, tokenizer = mixed(tiny), tiny.tokenizer("bert")
    objective = LabelMatching(encoder, tokenizer, stream, eval_candidates="seen")
    whole = LabelMatching(encoder, tokenizer, stream, eval_candidates="all")
    assert objective._allowed("seen").all()
    objective.seen = ("first", "second")
    expected = torch.tensor([[True] * 6 + [False] * 3] * 2 + [[True] * 9])
    assert torch.equal(objective._allowed("seen"), expected)
    third = stream.tasks[2]
    assert objective.score(encoder, third, third.test, 4) == whole.score(encoder, third, third.test, 4)


# CausalLM


def words(tokenizer, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.fixture
def llama(tiny):
    return tiny.base("llama")


def test_only_answer_and_eos_are_supervised(tiny, llama):
    stream, tokenizer = tiny.stream(instruction="choose the word"), tiny.tokenizer()
    objective = CausalLM(llama, tokenizer, stream)
    task = stream.tasks[0]
    features = objective.features(task, [Row("a red b", "red"), Row("a", "green")])
    prompt = "choose the word Option : red , blue , green a red b Answer :"
    assert words(tokenizer, features[0]["input_ids"]) == f"{prompt} red [EOS]"
    assert features[0]["labels"] == [IGNORED] * len(prompt.split()) + tokenizer("red").input_ids + [2]
    batch = objective.collate(features)
    short = len(features[1]["input_ids"])
    assert batch["input_ids"][1, short:].tolist() == [tokenizer.pad_token_id] * 2
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in features]
    assert batch["labels"][1].tolist() == [IGNORED] * (short - 2) + tokenizer("green").input_ids + [2] + [IGNORED] * 2
    # The loss is the mean of -log p over exactly these four tokens.
    total = sum(-answer_likelihood(llama, row["input_ids"], 2) for row in features)
    assert objective.loss(llama, batch).item() == pytest.approx(total / 4, rel=1e-5)


def answer_likelihood(model, ids: list[int], count: int) -> float:
    """Σ log p of the last `count` tokens of one unpadded row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    steps = torch.log_softmax(logits[:-1], -1)[torch.arange(len(ids) - 1), ids[1:]]
    return steps[-count:].sum().item()


@pytest.mark.parametrize("candidates", ["own", "all"])
def test_option_line_lists_the_candidates_and_never_the_task(tiny, llama, candidates):
    stream, tokenizer = tiny.stream(tasks=2), tiny.tokenizer()
    objective = CausalLM(llama, tokenizer, stream, train_candidates=candidates)
    named = replace(stream.tasks[1], name="word sky")
    expected = "cat , dog , bird" if candidates == "own" else "red , blue , green , cat , dog , bird"
    text = words(tokenizer, objective.features(named, [Row("a", "dog")])[0]["input_ids"])
    assert text == f"Option : {expected} a Answer : dog [EOS]"


def test_a_free_form_task_has_no_option_line_beside_tasks_that_have(tiny, llama):
    stream, tokenizer = tiny.stream(tasks=2), tiny.tokenizer()
    free = replace(stream.tasks[0], name="free", labels=())
    objective = CausalLM(llama, tokenizer, replace(stream, tasks=(*stream.tasks, free)), train_candidates="all")
    assert words(tokenizer, objective.features(free, [Row("a b", "c d")])[0]["input_ids"]) == "a b Answer : c d [EOS]"


def test_a_long_text_is_cut_and_the_answer_kept(tiny, llama):
    stream, tokenizer = tiny.stream(tasks=1), tiny.tokenizer()
    objective = CausalLM(llama, tokenizer, stream, max_length=14)
    row = Row("a b c d e f g h " * 5, "blue")
    (features,) = objective.features(stream.tasks[0], [row])
    assert words(tokenizer, features["input_ids"]) == "Option : red , blue , green a b c Answer : blue [EOS]"
    assert features["labels"] == [IGNORED] * 12 + features["input_ids"][12:]


def test_what_does_not_fit_is_said_before_training(tiny, llama):
    stream, tokenizer = tiny.stream(tasks=2), tiny.tokenizer()
    message = "task 'first': instruction, options and answer alone take 12 tokens; max_length is 11: raise it"
    with pytest.raises(ValueError, match=message):
        CausalLM(llama, tokenizer, stream, max_length=11)
    CausalLM(llama, tokenizer, stream, max_length=12)
    with pytest.raises(ValueError, match="take 18 tokens; max_length is 12"):
        CausalLM(llama, tokenizer, stream, max_length=12, eval_candidates="all")
    free = Stream("s", (Task("free", (Row("a", "b"), Row("a", "a b c d e f")), (), (Row("a", "b"),)),))
    with pytest.raises(ValueError, match="task 'free': .* take 10 tokens; max_length is 9"):
        CausalLM(llama, tokenizer, free, max_length=9)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        CausalLM(llama, tokenizer, stream)


@pytest.mark.parametrize("candidates", ["own", "all"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_label_score_is_brute_force_without_padding(tiny, kind, candidates):
    """Candidates of one, two and three tokens; a batch holds several of them, padded."""
    model, tokenizer = tiny.base(kind, seed=1), tiny.tokenizer()
    labels = (("red", "blue sky", "green sea cat"), ("dog bird", "one"))
    tasks = [
        Task(name, tiny.rows(own, 9, 3), (), tiny.rows(own, 9, 3), own) for name, own in zip("xy", labels, strict=True)
    ]
    stream = Stream("s", tuple(tasks))
    objective = CausalLM(model, tokenizer, stream, eval_candidates=candidates)
    found = set()
    for task in tasks:
        allowed = task.labels if candidates == "own" else stream.labels
        hits = []
        for row in task.test:
            text = f"Option : {' , '.join(allowed)} {row.prompt} Answer :"
            scores = {
                label: answer_likelihood(model, tokenizer(f"{text} {label} [EOS]").input_ids, len(label.split()) + 1)
                for label in allowed
            }
            best = max(scores, key=scores.get)
            found.add(best)
            hits.append(best == row.answer)
        assert [objective.score(model, task, [row], 4) for row in task.test] == [float(hit) for hit in hits]
        for size in (4, 64):
            assert objective.score(model, task, task.test, size) == pytest.approx(sum(hits) / len(hits))
    assert len(found) > 1, "a model that always gives one answer tests nothing"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_score_of_a_model_that_knows_its_rows(tiny, kind):
    """Four free-form rows of different lengths, learned by heart: prompts are padded on the left when scored."""
    rows = (Row("red", "cat"), Row("blue sky", "dog bird"), Row("a b c green", "one two three"), Row("sea", "four"))
    task = Task("free", rows, (), rows)
    model, tokenizer = tiny.adapted(kind, r=8), tiny.tokenizer()
    objective = CausalLM(model, tokenizer, Stream("s", (task,)), max_new_tokens=6)
    config = TrainConfig(max_steps=100, batch_size=4, learning_rate=2e-2, lr_scheduler="constant")
    result = train(model, SeqLoRA(model), Stream("s", (task,)), objective, config)
    # The frozen head bounds how sure the model can be.
    assert objective.loss(model, objective.collate(objective.features(task, rows))).item() < 0.1
    assert result.zero_shot == [0.0]
    assert result.matrix == [[1.0]]
    # Case and white space do not count, words do.
    for answer, score in (("DOG  Bird ", 1.0), ("dog", 0.0), ("dog bird one", 0.0)):
        assert objective.score(model, task, [Row("blue sky", answer)], 1) == score
