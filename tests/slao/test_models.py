"""Model folders that are cut, mismatched, of another kind or malicious: one line; and models whose positions end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig

import slao_kernels
from slao import models
from slao.cli import main
from slao.models import check_tokens, load_model, load_tokenizer
from slao.objectives import CausalLM, LabelMatching
from slao.objectives.base import positions
from slao.streams import Row, Stream, Task

TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def refused(saved_llama, stream_folder, tmp_path, capsys):
    """The line that `slao run` says of a changed copy of a model folder; nothing is written."""

    def run(change: Any) -> tuple[Path, str]:
        model = shutil.copytree(saved_llama, tmp_path / "model")
        change(model)
        capsys.readouterr()
        flags = ["--stream", "jsonl", "--stream-path", str(stream_folder), "--runs", str(tmp_path / "runs")]
        assert main(["run", "--model", str(model), *flags]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("slao: ")
        assert err.count("\n") == 1, err
        assert not (tmp_path / "runs").exists()
        return model, err

    return run


def settings_of(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def pickled(folder: Path) -> None:
    weights(folder).unlink()
    torch.save({"x": Trap(folder / "trap")}, folder / "pytorch_model.bin")


def sharded(part: str) -> Any:
    def change(folder: Path) -> None:
        weights(folder).rename(folder.parent / "elsewhere.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": part}}))

    return change


def linked(folder: Path) -> None:
    weights(folder).rename(folder.parent / "elsewhere.safetensors")
    weights(folder).symlink_to(folder.parent / "elsewhere.safetensors")


def with_code(folder: Path) -> None:
    settings_of(
        folder, "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.M"}
    )
    (folder / "mine.py").write_text(f"open({str(folder / 'trap')!r}, 'w')")


class Trap:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


BAD: dict[str, tuple[Any, str]] = {
    "cut": (lambda f: weights(f).write_bytes(weights(f).read_bytes()[:1000]), "could not be loaded as a model folder"),
    "empty": (lambda f: weights(f).write_bytes(b""), "could not be loaded as a model folder"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "could not be loaded as a model folder"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "could not be loaded as a model folder"),
    "a folder": (lambda f: (weights(f).unlink(), weights(f).mkdir()), "could not be loaded as a model folder"),
    "sizes": (lambda f: settings_of(f, "config.json", hidden_size="wide"), "could not be loaded as a model folder"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("[]"), "could not be loaded as a model folder"),
    "another kind": (lambda f: settings_of(f, "config.json", is_encoder_decoder=True), "a sequence-to-sequence model"),
    "pickle": (pickled, "has its weights in a pickle (pytorch_model.bin), which may run any code"),
    "up": (sharded("../elsewhere.safetensors"), "names '../elsewhere.safetensors', no file of its own folder"),
    "absolute": (sharded("/etc/passwd"), "names '/etc/passwd', no file of its own folder"),
    "no index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "has no weight_map"),
    "link": (linked, "leads out of its folder"),
    "code": (with_code, "contains custom code"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_line(case, refused):
    change, message = BAD[case]
    model, line = refused(change)
    assert message in line
    assert str(model) in line
    assert not (model / "trap").exists()


def test_tokens_beyond_the_vocabulary(refused):
    def change(folder: Path) -> None:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"<{i}>" for i in range(200)])
        tokenizer.save_pretrained(folder)

    _, line = refused(change)
    assert "the model has no row for" in line
    assert "resize_token_embeddings" in line


def test_a_vocabulary_that_fits(saved_llama):
    check_tokens(load_model(str(saved_llama), "causal_lm", "float32", "cpu"), load_tokenizer(str(saved_llama)), "x")


BERT = {**TINY, "max_position_embeddings": 40}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
DISTIL = {"vocab_size": 64, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 40}
OPT = {
    **{key: value for key, value in BERT.items() if key != "intermediate_size"},
    "ffn_dim": 16,
    "word_embed_proj_dim": 16,
}
LEARNED: dict[str, tuple[Any, int | None]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**BERT)), 40),
    "roberta": (lambda: hf.RobertaModel(hf.RobertaConfig(**BERT)), 38),
    "distilbert": (lambda: hf.DistilBertModel(hf.DistilBertConfig(**DISTIL)), 40),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), 40),
    "opt": (lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)), 40),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**BERT)), None),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_positions_are_all_that_the_model_takes(kind):
    make, expected = LEARNED[kind]
    model = make().eval()
    assert positions(model) == expected
    length = expected or 60
    ids = torch.randint(5, 60, (1, length))
    with torch.no_grad():
        model(input_ids=ids)
        if expected is not None:
            with pytest.raises((IndexError, RuntimeError, ValueError)):
                model(input_ids=torch.cat([ids, ids[:, :1]], 1))


def long_stream(metric: str = "accuracy", labels: tuple[str, ...] = ("cat", "dog")) -> Stream:
    rows = tuple(Row("sky sea " * 60, word) for word in ("cat", "dog"))
    return Stream("long", (Task("t", rows, (), rows, labels, metric=metric),))


def gpt2() -> Any:
    return LEARNED["gpt2"][0]()


@pytest.mark.parametrize(("metric", "labels"), [("accuracy", ("cat", "dog")), ("accuracy", ()), ("exact_match", ())])
def test_long_rows_are_cut_and_that_is_said(metric, labels, tiny):
    model, stream = gpt2(), long_stream(metric, labels)
    generated = {} if labels else {"max_new_tokens": 8}
    objective = CausalLM(model, tiny.tokenizer(), stream, **generated)
    assert objective.notes == ("longer rows are cut at 40 tokens: the model has no more positions",)
    task = stream.tasks[0]
    assert max(len(row["input_ids"]) for row in objective.features(task, task.train)) == 40
    batch = objective.collate(objective.features(task, task.train))
    assert torch.isfinite(objective.loss(model, batch))
    assert 0 <= objective.score(model, task, task.test, 4) <= 1  # generates past the 40th position without room


def test_no_room_for_what_is_generated(tiny):
    with pytest.raises(ValueError, match="raise it, or lower max_new_tokens, for which the model's positions"):
        CausalLM(gpt2(), tiny.tokenizer(), long_stream("exact_match", ()), max_new_tokens=40)
    CausalLM(gpt2(), tiny.tokenizer(), long_stream())  # where nothing is generated
    with pytest.raises(ValueError, match="max_new_tokens would do nothing"):
        CausalLM(gpt2(), tiny.tokenizer(), long_stream(), max_new_tokens=40)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, not 0"):
        CausalLM(gpt2(), tiny.tokenizer(), long_stream(), max_new_tokens=0)


def test_max_length_of_label_matching(tiny):
    model, tokenizer, stream = tiny.bert(), tiny.tokenizer("bert"), tiny.stream()
    for length in (-1, 0, 1, 2):
        with pytest.raises(
            ValueError, match=rf"max_length must be at least 3 \(marks, and a token of text\), not {length}"
        ):
            LabelMatching(model, tokenizer, stream, max_length=length)
    objective = LabelMatching(model, tokenizer, stream, max_length=3)
    rows = objective.features(stream.tasks[0], stream.tasks[0].train)
    assert {len(row["input_ids"]) for row in rows} == {3}
    most = positions(model)
    assert LabelMatching(model, tokenizer, stream, max_length=9999).max_length == most


def test_labels_that_are_the_same_to_the_model(tiny):
    rows = (Row("a", "red cat"), Row("b", "red dog"))
    stream = Stream("s", (Task("t", rows, (), rows, ("red cat", "red dog")),))
    with pytest.raises(ValueError, match="the labels 'red cat' and 'red dog' are the same tokens: raise max_length"):
        LabelMatching(tiny.bert(), tiny.tokenizer("bert"), stream, max_length=3)
    LabelMatching(tiny.bert(), tiny.tokenizer("bert"), stream, max_length=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_auto_is_the_checkpoints_own_dtype(tiny, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(models, "cpu_computes", lambda dtype: True)
    tiny.base("llama").to(dtype).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "causal_lm", "auto", "cpu")
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert load_model(str(tmp_path), "causal_lm", "float32", "cpu").dtype == torch.float32
    report = slao_kernels.patch(model, LoraConfig(r=4, target_modules="all-linear"))
    assert len(report.patched) == 14
    adapter = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    assert len(adapter) == 28
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_auto_is_float32_where_the_cpu_has_no_such_instructions(tiny, tmp_path, monkeypatch, caplog, dtype):
    monkeypatch.setattr(models, "cpu_computes", lambda dtype: False)
    tiny.base("llama").to(dtype).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "causal_lm", "auto", "cpu").dtype == torch.float32
    assert f"is {dtype}, for which this CPU has no instructions: computing in float32" in caplog.text
    assert load_model(str(tmp_path), "causal_lm", str(dtype).partition(".")[2], "cpu").dtype == dtype


def test_auto_is_float32_for_an_encoder(tiny, tmp_path):
    tiny.base("bert").bfloat16().save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "label_matching", "auto", "cpu").dtype == torch.float32
    assert load_model(str(tmp_path), "label_matching", "bfloat16", "cpu").dtype == torch.bfloat16
