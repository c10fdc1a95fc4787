"""Tiny streams, tokenizers and models for the tests of `slao`; conftest.py hands this module out as a fixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

import slao_kernels
from slao.methods import SLAO, Method
from slao.objectives import CausalLM, LabelMatching
from slao.objectives.prompts import Prompts
from slao.streams import Row, Stream, Task
from slao.train import Result, TrainConfig, train
from slao_kernels.testing import error_ratio, tiny_model

SPECIAL = ["[PAD]", "[UNK]", "[EOS]", "[CLS]", "[SEP]"]
WORDS = "Option Answer : , . choose the word red blue green cat dog bird one two three four sky sea a b c d e f g h"
COLOURS, ANIMALS = ("red", "blue", "green"), ("cat", "dog", "bird")
# The objective that goes with a model of that kind.
OBJECTIVE: dict[str, Any] = {"bert": LabelMatching, "llama": CausalLM}
FILLERS = ["a", "b", "c", "d", "e", "f", "g", "h", "sky", "sea"]


def tokenizer(kind: str = "llama") -> hf.PreTrainedTokenizerFast:
    """One token a word or punctuation mark, within tiny_model's vocabulary; "bert" adds [CLS] ... [SEP]."""
    words = SPECIAL + WORDS.split()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if kind == "bert":
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
        )
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        special["eos_token"] = "[EOS]"
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **special)


def characters(chat_template: str | None = None, dummy_prefix: bool = False) -> hf.PreTrainedTokenizerFast:
    """A token a character, and four special ones; <bos> before a text. dummy_prefix: with a space before each text, as
    SentencePiece models have it."""
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<|start|>", "<|end|>", *map(chr, range(32, 127)), "\n", "▁"]
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    split = pre_tokenizers.Split("", "isolated")
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([metaspace, split]) if dummy_prefix else split
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        extra_special_tokens=["<|start|>", "<|end|>"],
    )  # fmt: skip
    made.chat_template = chat_template
    return made


def of_rows(*rows: Row, **options: Any) -> Stream:
    return Stream("s", (Task("one", rows, (), rows, **options),))


def told(features: dict[str, Any], tokenizer: Any) -> str:
    """The row's text, with what is learned in double brackets."""
    text, learns = "", False
    for number, label in zip(features["input_ids"], features["labels"], strict=True):
        assert label in (-100, number)
        if (label != -100) != learns:
            learns = not learns
            text += "[[" if learns else "]]"
        text += tokenizer.convert_ids_to_tokens(number)
    return text + ("]]" if learns else "")


def first(stream: Stream, tokenizer: Any, max_length: int = 200, **options: Any) -> str:
    task = stream.tasks[0]
    prompts = Prompts(tokenizer, stream, max_length, **options)
    return told(prompts.supervised(task, task.train[0], task.labels), tokenizer)


def rows(labels: tuple[str, ...], count: int, extra: int = 0) -> tuple[Row, ...]:
    """`count` rows whose text holds the label; all of one length unless `extra` fillers are added in turn."""
    made = []
    for i in range(count):
        label = labels[i % len(labels)]
        fillers = [FILLERS[(3 * i + k) % len(FILLERS)] for k in range(3 + (i % (extra + 1)))]
        made.append(Row(" ".join([fillers[0], label, *fillers[1:]]), label))
    return tuple(made)


def stream(train: int = 8, test: int = 6, extra: int = 0, tasks: int = 3, instruction: str = "") -> Stream:
    """Up to three tasks of three labels each, none of which names its task."""
    sets = {"first": COLOURS, "second": ANIMALS, "third": ("one", "two", "three")}
    made = [
        Task(name, rows(labels, train, extra), (), rows(labels, test, extra), labels, instruction)
        for name, labels in list(sets.items())[:tasks]
    ]
    return Stream("tiny", tuple(made))


def bert(seed: int = 0) -> nn.Module:
    """The bare encoder, whose last_hidden_state LabelMatching reads."""
    config = tiny_model("bert").config
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        return hf.BertModel(config).eval()
    finally:
        torch.random.set_rng_state(state)


def base(kind: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """The encoder "bert", or a causal LM whose random logits are of the size of a trained one's (transformers draws
    weights of 0.02: too small for a LoRA below the frozen head to fit anything)."""
    return bert(seed) if kind == "bert" else tiny_model(kind, seed, **{"initializer_range": 0.3, **overrides})


def adapted(
    kind: str, seed: int = 0, fused: bool = True, dtype: torch.dtype | None = None, **options: Any
) -> nn.Module:
    """`base` with a LoRA on every linear layer; the same `seed`, the same weights. dtype: of the base; the adapter is
    then as PEFT makes it (fp32)."""
    model = base(kind, seed).to(dtype)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    slao_kernels.patch(model, LoraConfig(**settings))
    if not fused:
        slao_kernels.unpatch(model)
    return model


def save(kind: str, folder: Path) -> Path:
    """A folder that from_pretrained takes: model and tokenizer."""
    base(kind).save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


def write_stream(content: Stream, folder: Path) -> Path:
    """`content` as the folders that the stream "jsonl" reads."""
    for task in content.tasks:
        path = folder / task.name
        path.mkdir(parents=True)
        for split in ("train", "test"):
            lines = [json.dumps({"text": row.prompt, "label": row.answer}) for row in getattr(task, split)]
            (path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        (path / "labels.json").write_text(json.dumps(list(task.labels)))
    return folder


class Job:
    """One model with its method, objective and stream; `Job(...).train()` is a run."""

    def __init__(
        self,
        kind: str = "bert",
        method: type[Method] = SLAO,
        tasks: Stream | None = None,
        seed: int = 0,
        lora: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.model = adapted(kind, 0, **(lora or {}))
        self.stream = tasks or stream()
        self.method: Method = method(self.model, **options)
        self.objective = OBJECTIVE[kind](self.model, tokenizer(kind), self.stream)
        self.seed = seed

    def train(self, config: TrainConfig | None = None, **options: Any) -> Result:
        config = config or TrainConfig(batch_size=4, learning_rate=1e-2)
        self.result = train(self.model, self.method, self.stream, self.objective, config, seed=self.seed, **options)
        return self.result

    def weights(self) -> dict[str, torch.Tensor]:
        """Every A and B as trained, and as merged."""
        found = {f"{p.name}.{f}": getattr(p, f).detach().clone() for p in self.method.pairs for f in "AB"}
        with self.method.merged():
            found |= {f"{p.name}.{f}.merged": getattr(p, f).detach().clone() for p in self.method.pairs for f in "AB"}
        return found


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not bitwise equal, or stand on one side only."""
    both = found.keys() & expected.keys()
    return sorted((found.keys() ^ expected.keys()) | {n for n in both if not torch.equal(found[n], expected[n])})


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """RMS error over RMS, of the tensor where that is largest."""
    return max(error_ratio(found[name], expected[name]) for name in expected)


def sgd(**options: Any) -> TrainConfig:
    """Plain gradient descent: what differs in the gradient differs as much in the weights."""
    arguments = {"optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1, **options.pop("arguments", {})}
    settings = {"batch_size": 4, "learning_rate": 0.1, "lr_scheduler": "constant", "group_by_length": False}
    return TrainConfig(**{**settings, **options}, arguments=arguments)


def inputs(kind: str, seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    """`count` rows that transformers' default collator takes: a map-style data set for a Trainer. The rows of a
    seed (a task) follow one rule."""
    g = torch.Generator().manual_seed(seed)
    rows: list[dict[str, torch.Tensor]] = []
    for _ in range(count):
        ids = (torch.randint(3, 128, (), generator=g) + (3 + seed) * torch.arange(10)) % 120 + 4
        mask = torch.ones_like(ids)
        if kind == "vit":
            label = torch.randint(4, (), generator=g)
            pixels = torch.randn(3, 16, 16, generator=g)
            pixels[:, label * 4 : label * 4 + 4] += 1 + seed % 2
            rows.append({"pixel_values": pixels, "labels": label})
            continue
        labels = ids.clone()
        if kind == "bert":
            hidden = torch.rand(10, generator=g) < 0.3
            hidden[1] = True
            labels, ids = ids.masked_fill(~hidden, -100), ids.masked_fill(hidden, 2)
        elif kind == "t5":
            labels = ids[:6].flip(0)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows
