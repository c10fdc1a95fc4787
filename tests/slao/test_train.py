"""slao.train: what is trained, what is scored, and that accumulation and checkpointing change neither."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from slao.methods import SLAO, Joint, SeqLoRA
from slao.train import TrainConfig, seed_everything
from slao.trainer import make_trainer, training_arguments

KINDS = ["bert", "llama"]  # LabelMatching, CausalLM


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_and_zero_shot(tiny, kind):
    job = tiny.Job(kind)
    result = job.train()
    assert result.finished
    assert result.tasks == ["first", "second", "third"]
    assert [len(row) for row in result.matrix] == [3, 3, 3]
    scores = [score for row in result.matrix for score in row]
    assert all(0 <= score <= 1 for score in scores)
    assert len(set(scores)) > 1, "training changed no score: this run tests nothing"
    base = tiny.base(kind)
    untouched = tiny.OBJECTIVE[kind](base, tiny.tokenizer(kind), job.stream)
    assert result.zero_shot == [untouched.score(base, task, task.test, 64) for task in job.stream.tasks]
    assert result.lambdas == [1.0, pytest.approx(2**-0.5), pytest.approx(3**-0.5)]
    summary, last = result.summary(), result.matrix[-1]
    assert summary["AA"] == pytest.approx(sum(last) / 3)
    so_far = [sum(row[: t + 1]) / (t + 1) for t, row in enumerate(result.matrix)]
    assert summary["Inc-Acc"] == pytest.approx(sum(so_far) / 3)
    assert summary["BWT"] == pytest.approx(sum(last[i] - result.matrix[i][i] for i in range(2)) / 2)
    assert summary["FWT"] == pytest.approx(sum(result.matrix[i - 1][i] - result.zero_shot[i] for i in range(1, 3)) / 2)
    assert result.train_seconds > 0
    assert result.tokens_per_second == pytest.approx(result.tokens / result.train_seconds)
    assert result.peak_memory_mb > 1


def test_seen_leaves_out_the_tasks_to_come(tiny):
    """What is scored does not change what is trained: the other entries are those of evaluate="all"."""
    everything, seen = tiny.Job(), tiny.Job()
    everything.train()
    result = seen.train(TrainConfig(batch_size=4, learning_rate=1e-2, evaluate="seen"))
    for t, row in enumerate(result.matrix):
        assert row[t + 1 :] == [None] * (2 - t)
        assert row[: t + 1] == everything.result.matrix[t][: t + 1]
    assert result.zero_shot == everything.result.zero_shot
    assert result.summary()["FWT"] is None
    assert tiny.differing(seen.weights(), everything.weights()) == []


def test_the_merged_weights_are_scored(tiny):
    """λ = 0 never lets a later task in: every row is the first one, whatever the trained weights have become."""
    job = tiny.Job(schedule=0.0, merge="AB")
    result = job.train()
    assert result.matrix[1] == result.matrix[2] == result.matrix[0]
    trained = [job.objective.score(job.model, task, task.test, 64) for task in job.stream.tasks]
    assert trained != result.matrix[0]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_exported_adapters(tiny, kind, tmp_path):
    """By hand: each task's adapter folder, loaded by plain PEFT onto a fresh base, gives the row of the matrix."""
    job = tiny.Job(kind)
    job.train(on_task=lambda index, result: job.method.save_pretrained(tmp_path / str(index)))
    for index, row in enumerate(job.result.matrix):
        plain = PeftModel.from_pretrained(tiny.base(kind), tmp_path / str(index))
        objective = tiny.OBJECTIVE[kind](tiny.base(kind), tiny.tokenizer(kind), job.stream)
        assert [objective.score(plain, task, task.test, 64) for task in job.stream.tasks] == row


# 8 rows are two full steps of 2 x 2, 6 leave half a step.
@pytest.mark.parametrize("count", [8, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_equals_a_larger_batch(tiny, kind, count):
    stream = tiny.stream(train=count, tasks=2)
    whole, parts = tiny.Job(kind, tasks=stream), tiny.Job(kind, tasks=stream)
    whole.train(tiny.sgd(batch_size=4))
    parts.train(tiny.sgd(batch_size=2, gradient_accumulation=2))
    assert [len(losses) for losses in parts.result.losses] == [2, 2]
    start = tiny.Job(kind, tasks=stream).weights()
    assert tiny.largest_error(whole.weights(), start) > 1e-3
    # Other GEMM shapes, other sums: fp32 rounding, four steps of it.
    assert tiny.largest_error(parts.weights(), whole.weights()) <= 1e-5
    torch.testing.assert_close(parts.result.losses, whole.result.losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(tiny, kind):
    """Twice the forward passes (six steps and as many repeats), with the same dropout masks."""
    jobs, calls = [tiny.Job(kind, lora={"lora_dropout": 0.1}) for _ in range(2)], [[], []]
    for job, seen in zip(jobs, calls, strict=True):
        layer = job.method.pairs[0].layer
        layer.register_forward_hook(lambda module, x, y, seen=seen: seen.append(1) if module.training else None)
    plain, saving = jobs
    plain.train(tiny.sgd())
    saving.train(tiny.sgd(gradient_checkpointing=True))
    assert (len(calls[0]), len(calls[1])) == (6, 12)
    torch.testing.assert_close(saving.result.losses, plain.result.losses, rtol=1e-6, atol=0)
    assert tiny.largest_error(saving.weights(), plain.weights()) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_trains_in_bf16_and_scores_in_the_models_own_precision(tiny, kind):
    plain, half = tiny.Job(kind), tiny.Job(kind)
    plain.train(tiny.sgd())
    half.train(tiny.sgd(bf16=True))
    losses = torch.tensor(half.result.losses)
    assert not torch.equal(losses, torch.tensor(plain.result.losses))
    # bf16 keeps 8 bits: 0.4 % an operation, and errors of a loss average out over tokens.
    torch.testing.assert_close(losses, torch.tensor(plain.result.losses), rtol=0.03, atol=0)
    assert "forward" not in vars(half.model), "accelerate's autocast is still around the model"
    assert half.result.zero_shot == plain.result.zero_shot
    with half.method.merged():
        again = [half.objective.score(half.model, task, task.test, 64) for task in half.stream.tasks]
    assert again == half.result.matrix[-1]
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_joint_training_is_one_task_of_all_rows(tiny, kind, tmp_path):
    """The same as SeqLoRA on a stream whose one task has all rows (and all labels as candidates of a row, if asked)."""
    parts, config = tiny.stream(train=6), tiny.sgd(batch_size=3)
    job = tiny.Job(kind, Joint, parts)
    result = job.train(config, state_dir=tmp_path)
    assert result.finished
    assert result.matrix[:2] == [[None] * 3] * 2
    assert all(score is not None for score in result.matrix[2])
    assert [len(losses) for losses in result.losses] == [6]
    assert (result.lambdas, job.method.names) == ([1.0], ["joint"])
    summary = result.summary()
    assert summary["AA"] == pytest.approx(sum(result.matrix[2]) / 3)
    assert (summary["BWT"], summary["forgetting"], summary["FWT"]) == (None, None, None)
    again = tiny.Job(kind, Joint, parts)
    assert again.train(config, state_dir=tmp_path) == result  # finished: nothing is trained
    assert tiny.differing(again.weights(), job.weights()) == []
    by_hand = tiny.Job(kind, SeqLoRA, parts)
    features = [row for task in parts.tasks for row in by_hand.objective.features(task, task.train)]
    seed_everything(0)
    by_hand.method.begin_task("all")
    make_trainer(by_hand.model, by_hand.method, by_hand.objective, config, features, 0, ()).train()
    by_hand.method.end_task()
    assert tiny.differing(by_hand.weights(), job.weights()) == []
    steps = tiny.Job(kind, Joint, parts).train(tiny.sgd(batch_size=3, max_steps=1)).losses
    assert len(steps[0]) == 3  # one a task


class Pull(SeqLoRA):
    """A penalty of known gradient: 0.5 in every entry of every B."""

    name = "pull"

    def penalty(self) -> torch.Tensor:
        return 0.5 * torch.stack([pair.parameters[1].sum() for pair in self.pairs]).sum()


@pytest.mark.parametrize(("rows", "accumulation", "steps"), [(8, 1, 4), (8, 2, 2), (6, 2, 2), (6, 4, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_counts_once_an_optimiser_step(tiny, kind, rows, accumulation, steps):
    """With A = 0 the loss has no gradient in B, so B moves by -rate * 0.5 a step and nothing else."""
    job = tiny.Job(kind, Pull, tiny.stream(train=rows, tasks=1))
    for pair in job.method.pairs:
        pair.parameters[0].requires_grad_(False).zero_()
    job.train(tiny.sgd(batch_size=2, gradient_accumulation=accumulation))
    for pair in job.method.pairs:
        assert not pair.A.any()
        torch.testing.assert_close(pair.B.detach(), torch.full_like(pair.B, -0.1 * 0.5 * steps), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_counted_without_padding(tiny, kind):
    stream = tiny.stream(train=7, extra=4)
    job = tiny.Job(kind, tasks=stream)
    job.train(TrainConfig(batch_size=3, epochs=2))
    tokenizer = tiny.tokenizer(kind)
    expected = 0
    for task in stream.tasks:
        for row in task.train:
            options = f"Option : {' , '.join(task.labels)} {row.prompt} Answer : {row.answer} [EOS]"
            expected += 2 * len(tokenizer(row.prompt if kind == "bert" else options)["input_ids"])
    assert job.result.tokens == expected


BAD = {
    "evaluate": ({"evaluate": "some"}, "unknown evaluate 'some'; choose all or seen"),
    "batch_size": ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    "accumulation": ({"gradient_accumulation": 0}, "gradient_accumulation must be at least 1"),
    "epochs": ({"epochs": 0}, "epochs must be positive, not 0"),
    "clash": ({"arguments": {"seed": 1, "learning_rate": 1}}, "set learning_rate, seed through TrainConfig's own"),
    "argument": ({"arguments": {"no_such": 1}}, "train: .*unexpected keyword argument 'no_such'"),
    "schedule": ({"lr_scheduler": "zigzag"}, "train: zigzag is not a valid SchedulerType"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_named(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        training_arguments(TrainConfig(**settings))


def test_the_settings_reach_the_trainer():
    config = TrainConfig(
        epochs=3, batch_size=5, learning_rate=0.5, lr_scheduler="cosine", weight_decay=0.1, gradient_accumulation=7
    )
    found = training_arguments(config, seed=11)
    assert (found.num_train_epochs, found.per_device_train_batch_size, found.learning_rate) == (3, 5, 0.5)
    assert (found.lr_scheduler_type, found.weight_decay, found.gradient_accumulation_steps) == ("cosine", 0.1, 7)
    assert (found.seed, found.data_seed, found.use_cpu, found.report_to) == (11, 11, True, [])


@pytest.mark.parametrize("method", [SLAO, Joint])
def test_what_the_model_is_asked_it_answers_before_and_after_every_task(tiny, method):
    """As a row of the first task, by the merged weights: with λ = 0 they are those of the first task throughout."""
    options = {"schedule": 0.0, "merge": "AB"} if method is SLAO else {}
    job = tiny.Job("llama", method, **options)
    task, said = job.stream.tasks[0], []
    config = TrainConfig(batch_size=4, learning_rate=3e-2, epochs=20, ask=task.test[0].prompt)
    result = job.train(config, on_task=lambda index, result: said.append(result.answers[-1]))
    before, *after = result.answers
    assert after == said == after[:1] * (3 if method is SLAO else 1)
    assert before != after[0]
    ids = job.objective.features(task, task.test[:1])[0]
    ids = [number for number, label in zip(ids["input_ids"], ids["labels"], strict=True) if label == -100]
    new: list[int] = []
    with job.method.merged(), torch.no_grad():
        while len(new) < 2 and job.objective.tokenizer.eos_token_id not in new:  # the longest answer: a word, the end
            new.append(int(job.model.eval()(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    assert job.objective.tokenizer.decode(new, skip_special_tokens=True).strip() == after[-1]


def test_a_model_that_says_nothing_is_not_asked(tiny):
    with pytest.raises(ValueError, match=r"^train\.ask would do nothing: label_matching scores, and generates no text"):
        tiny.Job().train(TrainConfig(ask="anything"))
