"""The cross-entropy of a text that no task is about: of which tokens, and when."""

from __future__ import annotations

import pytest
import torch

from slao import report
from slao.retention import LENGTH, TOKENS, content, cross_entropy, windows
from slao.train import TrainConfig


def test_windows_of_what_every_python_carries(tiny):
    tokenizer = tiny.tokenizer()
    found = windows("python", tokenizer)
    assert [len(line) for line in found] == [LENGTH] * (TOKENS // LENGTH)
    assert found == windows("python", tokenizer)
    assert [len(line) for line in windows("python", tokenizer, 50)] == [50] * (TOKENS // 50)


def test_a_text_that_is_too_short_is_refused(tiny, tmp_path):
    (tmp_path / "short.txt").write_text("red blue " * 20)
    with pytest.raises(ValueError, match=r"short\.txt has 40 tokens, and 256 are needed; give a longer text"):
        windows(str(tmp_path / "short.txt"), tiny.tokenizer())
    assert len(windows(str(tmp_path / "short.txt"), tiny.tokenizer(), 40)) == 1


def test_cross_entropy_by_hand(tiny):
    model = tiny.base("llama").train()
    lines = [[7, 8, 9, 10, 11, 12], [3, 4, 5, 6, 7, 8]]
    expected = []
    with torch.no_grad():
        for line in lines:
            logp = model.eval()(torch.tensor([line])).logits[0].double().log_softmax(-1)
            expected += [-float(logp[place, token]) for place, token in enumerate(line[1:])]
    model.train()
    assert cross_entropy(model, lines) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert model.training


def test_it_is_measured_before_training_and_after_each_task_with_the_merged_weights(tiny, tmp_path):
    """λ = 0 never lets a later task in: what is measured after each is the first one's."""
    (tmp_path / "text.txt").write_text(" ".join(tiny.FILLERS) * 40)
    config = TrainConfig(batch_size=4, learning_rate=1e-2, retention=str(tmp_path / "text.txt"))
    job = tiny.Job("llama", schedule=0.0, merge="AB")
    result = job.train(config)
    lines = windows(config.retention, tiny.tokenizer(), 256)
    assert len(result.cross_entropy) == 4
    assert result.cross_entropy[0] == pytest.approx(cross_entropy(tiny.base("llama"), lines), rel=1e-5)
    assert result.cross_entropy[1] == result.cross_entropy[2] == result.cross_entropy[3]
    assert result.summary()["CE_rise"] == result.cross_entropy[3] - result.cross_entropy[0] != 0
    plain = tiny.Job("llama", schedule=0.0, merge="AB").train(TrainConfig(batch_size=4, learning_rate=1e-2))
    assert plain.summary()["CE_rise"] is None
    assert plain.matrix == result.matrix


def test_a_window_begins_as_a_text_does(tiny):
    marks = tiny.characters()  # <bos> before a text
    first, second, *_ = windows("python", marks)
    plain = marks(content("python")[:1000], add_special_tokens=False)["input_ids"]
    assert first == [marks.bos_token_id, *plain[: LENGTH - 1]]
    assert second == [marks.bos_token_id, *plain[LENGTH - 1 : 2 * (LENGTH - 1)]]


def test_a_state_without_it_is_not_gone_on_from(tiny, tmp_path):
    """Its first value would be missing, and the rise a wrong one."""
    first = TrainConfig(batch_size=4, max_steps=1)
    tiny.Job("llama").train(first, state_dir=tmp_path)
    with pytest.raises(ValueError, match=r"is of other settings or rows \(retention\); choose another folder"):
        tiny.Job("llama").train(TrainConfig(batch_size=4, max_steps=1, retention="python"), state_dir=tmp_path)


def test_a_model_that_diverged_is_said(tiny):
    model = tiny.base("llama")
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="cross-entropy of the retention text is nan: the model has diverged"):
        cross_entropy(model, [[1, 2, 3]])


def test_an_encoder_has_none(tiny):
    with pytest.raises(ValueError, match=r"train\.retention would do nothing: label_matching scores"):
        tiny.Job("bert").train(TrainConfig(retention="python"))


def test_it_is_a_column_of_the_report_where_it_was_measured():
    entry = {"seeds": [0], "tasks": [["a"]], "matrix": [[[0.5]]], "zero_shot": [[0.1]], "AA": [0.5], "BWT": [None],
             "forgetting": [None], "FWT": [None], "tokens_per_second": [1.0], "train_seconds": [1.0],
             "peak_memory_mb": [1.0]}  # fmt: skip
    about = {"stream": "s", "model": "m", "metric": "accuracy"}
    assert "CE rise" not in report.table({**about, "methods": {"slao": entry}})
    assert "CE rise" in report.table({**about, "methods": {"slao": {**entry, "CE_rise": [0.125]}}})
    assert "0.125" in report.table({**about, "methods": {"slao": {**entry, "CE_rise": [0.125]}}})
