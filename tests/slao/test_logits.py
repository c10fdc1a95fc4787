"""Logits at labelled positions alone: loss and every gradient are transformers' own, in every place that trains."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as hf
from causal_models import CONFIGS, SIZES, WORDS, causal
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from slao import SLAO, SlaoCallback, logits
from slao.logits import IGNORED, labelled_only, log_probabilities, why_whole
from slao_kernels.testing import error_ratio

# Both add the same products in fp32, in another order.
CLOSE = 2e-6


def batch(layout: str) -> dict[str, Tensor]:
    """Three rows of 12 tokens: answers at the end, padded left or right, packed, or several answers a row."""
    ids = torch.randint(5, WORDS, (3, 12), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :8] = IGNORED
    if layout in ("left", "right"):
        gone = (0, slice(0, 3)) if layout == "left" else (0, slice(9, 12))
        mask[gone], labels[gone] = 0, IGNORED
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if layout == "packed":
        labels[:, 3:5] = ids[:, 3:5]
        del given["attention_mask"]
        given["position_ids"] = torch.tensor([[*range(5), *range(7)]]).repeat(3, 1)
    if layout == "several answers":
        labels[0, 2:4], labels[1, 6], labels[2] = ids[0, 2:4], ids[1, 6], ids[2]
    return given


def results(model: Any, given: dict[str, Any], narrow: bool) -> tuple[float, Tensor]:
    """The loss, and all gradients as one vector."""
    model.zero_grad(set_to_none=True)
    with labelled_only(model) if narrow else nullcontext() as reason:
        assert reason is None
        output = model(**given)
        assert (output.logits is None) is narrow
        output.loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return output.loss.item(), torch.cat([grad.flatten() for grad in grads])


def check(model: Any, given: dict[str, Any]) -> None:
    (loss, grads), (found, narrow) = results(model, given, False), results(model, given, True)
    assert abs(found - loss) <= CLOSE * abs(loss)
    assert error_ratio(narrow, grads) <= CLOSE


@pytest.fixture(params=["in one", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All positions in one pass through the head, or three at a time."""
    if request.param == "in parts":
        monkeypatch.setattr(logits, "_CHUNK", 3 * WORDS)
    return request.param


@pytest.mark.parametrize("layout", ["left", "right", "packed", "several answers"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_loss_and_gradients(kind, layout, parts):
    """Also with the count of a whole accumulated batch, by which transformers divides."""
    if kind.startswith("opt") and layout == "packed":
        pytest.skip("OPT counts positions by the attention mask")
    model, given = causal(kind), batch(layout)
    for count in (None, torch.tensor(29)):
        check(model, given if count is None else {**given, "num_items_in_batch": count})


def test_only_labelled_rows_reach_the_head(parts):
    model, given, seen = causal("llama"), batch("several answers"), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    _, grads = results(model, given, True)
    labelled = int((given["labels"][:, 1:] != IGNORED).sum())
    assert grads.any()
    if parts == "in one":
        assert seen == [labelled]
    else:  # but for the first part all are computed again in the backward pass
        assert max(seen) == 3
        assert sum(seen) == 2 * labelled - 3


def test_a_batch_without_answers_is_the_models_own():
    model, given = causal("llama"), batch("left")
    given["labels"][:] = IGNORED
    with labelled_only(model):
        output = model(**given, num_items_in_batch=torch.tensor(5))
    assert output.loss.item() == 0.0
    assert output.logits.shape == (3, 12, WORDS)


@pytest.mark.parametrize(
    "how", ["eval mode", "no labels", "shifted already", "logits_to_keep", "tuples", "after the block"]
)
def test_elsewhere_nothing_changes(how):
    model, given = causal("llama"), batch("left")
    block, kind = labelled_only(model), type(model)
    with block:
        assert type(model).__name__ == kind.__name__
        copy = deepcopy(model)
        if how == "eval mode":
            model.eval()
        if how == "no labels":
            del given["labels"]
        if how == "shifted already":
            given["shift_labels"] = nn.functional.pad(given["labels"][:, 1:], (0, 1), value=IGNORED)
        if how == "logits_to_keep":
            given["logits_to_keep"] = 12
        if how == "tuples":
            assert model(**given, return_dict=False)[1].shape == (3, 12, WORDS)
            return
        if how != "after the block":
            assert model(**given).logits.shape == (3, 12, WORDS)
    assert type(model) is kind
    assert model(**given).logits.shape == (3, 12, WORDS)
    if "labels" in given and how != "shifted already":
        copy.lm_head.weight.data.zero_()  # a copy made within the block runs on parts of its own
        assert copy(**batch("left")).loss.item() == pytest.approx(torch.tensor(float(WORDS)).log().item())


def test_blocks_within_blocks():
    model = causal("llama")
    with labelled_only(model):
        narrowed = type(model)
        with labelled_only(model) as reason:
            assert reason is None
            assert type(model) is narrowed
        assert type(model) is narrowed


@pytest.mark.parametrize("kind", ["BartForCausalLM", "T5ForConditionalGeneration", "RobertaForCausalLM"])
def test_a_model_that_reads_labels_in_another_way_is_left_alone(kind):
    """A decoder's that are shifted already, an encoder-decoder's; RoBERTa's are the usual ones."""
    sizes = {"d_model": 16, "decoder_layers": 1, "encoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": WORDS}
    configs = {
        "B": lambda: hf.BartConfig(**sizes, encoder_attention_heads=2, is_decoder=True, is_encoder_decoder=False),
        "T": lambda: hf.T5Config(vocab_size=WORDS, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16,
                                 decoder_start_token_id=0),
        "R": lambda: hf.RobertaConfig(**SIZES, intermediate_size=16, is_decoder=True, hidden_dropout_prob=0.0,
                                      attention_probs_dropout_prob=0.0),
    }  # fmt: skip
    torch.manual_seed(0)
    model = getattr(hf, kind)(configs[kind[0]]()).train()
    given = {key: value[:1] for key, value in batch("several answers").items()}
    if kind[0] == "T":
        model.config.dropout_rate = 0.0
    if kind[0] == "R":
        check(model, given)
        return
    assert why_whole(model) is not None
    state = torch.get_rng_state()
    losses = []
    for block in (nullcontext(), labelled_only(model)):
        torch.set_rng_state(state)
        with block:
            losses.append(model(**given).loss.item())
    assert losses[0] == losses[1]


def test_copies_and_pickles_are_of_the_models_own_class(tmp_path):
    model = causal("llama")
    with labelled_only(model):
        torch.save(model, tmp_path / "model.pt")
        copied = deepcopy(model)
        model.save_pretrained(tmp_path / "saved")
    for other in (copied, torch.load(tmp_path / "model.pt", weights_only=False)):
        assert type(other) is hf.LlamaForCausalLM
        assert other(**batch("left")).logits is not None
    assert hf.LlamaConfig.from_pretrained(tmp_path / "saved").architectures == ["LlamaForCausalLM"]


def test_a_class_that_somebody_swaps_within_the_block_stays():
    """As FSDP2 does with a bare model."""
    model = causal("llama")
    with labelled_only(model):
        swapped = type("Sharded", (type(model),), {})
        model.__class__ = swapped
        assert model(**batch("left")).logits is None
    assert type(model) is swapped
    assert model(**batch("left")).logits is not None
    with labelled_only(model):
        assert model(**batch("left")).logits is None


def test_the_class_is_back_after_an_exception(tmp_path):
    """A training that breaks off, and one that another Trainer's stands in the way of."""

    class Broken(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = get_peft_model(causal("llama"), LoraConfig(r=4, target_modules="all-linear"))
    method, kind = SLAO(model), type(model.base_model.model)
    rows = [{key: value[i] for key, value in batch("left").items()} for i in range(3)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", max_steps=2)
    for callbacks in ([Broken()], []):
        first, second = (Trainer(model, arguments, train_dataset=rows, callbacks=callbacks) for _ in range(2))
        SlaoCallback(method).attach(first)
        SlaoCallback(SLAO(model)).attach(second)  # never trained
        with pytest.raises(KeyboardInterrupt) if callbacks else nullcontext():
            first.train()
        assert type(model.base_model.model) is kind
        if callbacks:
            method.end_task()


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_who_is_left_alone_says_why():
    assert why_whole(Around(causal("llama"))) == "Around is around LlamaForCausalLM, and may read its logits"
    model = causal("llama")
    model.register_forward_hook(lambda *args: None)
    assert why_whole(model) == "a forward hook of LlamaForCausalLM may read its logits"
    encoder = hf.BertModel(hf.BertConfig(**SIZES, intermediate_size=48))
    assert why_whole(encoder) == "BertModel has no decoder with a language-model head over it"
    model = causal("llama")
    model.loss_function = lambda *args, **kwargs: None
    assert why_whole(model) == "LlamaForCausalLM has a loss of its own"
    model = causal("llama")
    model.forward = model.forward
    assert why_whole(model) == "the forward pass of this LlamaForCausalLM was replaced"

    class Own(hf.LlamaForCausalLM):
        def forward(self, **kwargs: Any) -> Any:
            return super().forward(**kwargs)

    assert str(why_whole(Own(CONFIGS["llama"]()))).startswith("Own has a forward pass from ")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_of_anyone(checkpointing, tmp_path, caplog, parts):
    """Two tasks through SlaoCallback(...).attach, batches of unlike counts of answers accumulated: the same weights."""

    def trained(attach: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(causal("llama"), LoraConfig(r=4, target_modules="all-linear"))
        method = SLAO(model)
        for task in range(2):
            rows = [{k: v[i] for k, v in batch("several answers").items()} for i in (0, 1, 2, 1, 0)]
            arguments = TrainingArguments(
                str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, num_train_epochs=2,
                report_to="none", use_cpu=True, save_strategy="no", gradient_checkpointing=checkpointing, seed=task,
                disable_tqdm=True, learning_rate=1e-2, optim="sgd",
            )  # fmt: skip
            callback = SlaoCallback(method)
            trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
            kind = type(model.base_model.model)
            if attach:
                callback.attach(callback.attach(trainer))
            trainer.train()
            assert type(model.base_model.model) is kind
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    plain, narrow = trained(False), trained(True)
    assert max(error_ratio(narrow[name], value) for name, value in plain.items() if value.any()) <= 50 * CLOSE


@pytest.mark.parametrize("loss", ["smoothed", "function", "own", "step"])
def test_a_trainer_with_another_loss_is_left_alone(loss, tmp_path, caplog):
    class Mine(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            return model(**inputs).logits.mean()

    model = get_peft_model(causal("llama"), LoraConfig(r=4, target_modules="all-linear"))
    smoothing = 0.1 if loss == "smoothed" else 0.0
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=smoothing)
    function = (lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()) if loss == "function" else None
    trainer = (Mine if loss == "own" else Trainer)(model, arguments, compute_loss_func=function)
    if loss == "step":
        trainer.training_step = trainer.training_step
    with caplog.at_level(logging.INFO, "slao"):
        SlaoCallback(SLAO(model)).attach(trainer)
        with pytest.raises(ValueError, match="train_dataset"):  # it has none
            trainer.train()
    why = {"own": "Mine has a compute_loss of its own", "step": "Trainer has a training_step of its own"}
    line = why.get(loss, "the Trainer computes the loss from them")
    assert f"logits are computed at every position: {line}" in caplog.messages


@pytest.mark.parametrize("kind", CONFIGS)
def test_log_probabilities(kind, parts):
    model, given = causal(kind).eval(), batch("left")
    del given["labels"]
    found = torch.tensor([0, 0, 2, 1, 2]), torch.tensor([5, 7, 11, 3, 4])
    places, tokens = torch.tensor([4, 0, 1, 1, 3, 2, 0]), torch.tensor([9, 8, 7, 6, 5, 4, 3])
    with torch.no_grad():
        logp = model(**given).logits.log_softmax(-1)
        got, _ = log_probabilities(model, found, places, tokens, **given)
    expected = logp[found[0][places], found[1][places], tokens]
    assert error_ratio(got, expected) <= CLOSE
