"""The world that the blocks of the documentation find: tiny models under the names of real ones, a few rows, no GPU."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # blocks, by name

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Name on a page -> kind of tiny model that stands for it.
CAUSAL = {
    "meta-llama/Llama-3.2-1B": "llama",
    "meta-llama/Llama-3.2-1B-Instruct": "llama",
    "Qwen/Qwen3-0.6B": "qwen3",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral",
}
TASKS = ("agnews", "yahoo", "dbpedia")


@pytest.fixture(scope="session")
def world(tiny, tmp_path_factory) -> Iterator[Path]:
    """The folder; every page gets one of its own with links to what is here."""
    import transformers as hf

    from slao_kernels.testing import tiny_model

    root = tmp_path_factory.mktemp("world")
    for name, kind in CAUSAL.items():
        tiny_model(kind, max_position_embeddings=1024).save_pretrained(root / name)
        tiny.characters(CHAT).save_pretrained(root / name)
    bert = tiny_model("bert").config
    hf.BertModel(bert).save_pretrained(root / "google-bert/bert-base-uncased")
    tiny.tokenizer("bert").save_pretrained(root / "google-bert/bert-base-uncased")
    tiny_model("vit").save_pretrained(root / "google/vit-base-patch16-224")
    hf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "google/vit-base-patch16-224")
    _rows(root / "data")
    (root / "gemma.jinja").write_text(CHAT)
    (root / "settings.yaml").write_text("stream: python_docs\n")
    gc.collect()
    gc.freeze()  # what the imports made is not looked at again by the collector, which a Trainer runs once a task
    yield root
    gc.unfreeze()


def _rows(folder: Path) -> None:
    """Eight rows a task to train and four to test: prompt and answer, a conversation, a text and its label, a picture
    and its class."""
    from PIL import Image

    for number, (task, pictured) in enumerate(zip(TASKS, ("birds", "cars", "trees"), strict=True)):
        for split, count in (("train", 8), ("test", 4)):
            labels = [f"{task}{row % 2}" for row in range(count)]
            kinds: dict[str, list[dict[str, Any]]] = {
                "data": [{"prompt": f"{row}+{number}=", "answer": str(row + number)} for row in range(count)],
                "chat": [
                    {"messages": [{"role": "user", "content": f"{row}?"}, {"role": "assistant", "content": label}]}
                    for row, label in enumerate(labels)
                ],
                "labelled": [{"text": f"sky {row} sea", "label": row % 2} for row in range(count)],
            }
            for kind, rows in kinds.items():
                path = folder.parent / kind / task
                path.mkdir(parents=True, exist_ok=True)
                (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for index in range(8):
            place = folder.parent / "images" / pictured / str(index % 2)
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (30 * index, 80 * number, 10)).save(place / f"{index}.png")


@pytest.fixture
def page_folder(world, tmp_path, monkeypatch) -> Path:
    """The working directory of a page: what is in `world`, by links, and a Trainer that knows it is on a CPU."""
    import datasets
    import transformers

    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    complete = transformers.TrainingArguments.__post_init__

    def on_cpu(arguments: Any) -> None:
        arguments.use_cpu, arguments.disable_tqdm = True, True  # bf16=True alone asks for a GPU
        complete(arguments)

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", on_cpu)
    return tmp_path
