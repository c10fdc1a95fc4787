"""Small made-up results, as `slao run` writes them, and what reads a page: for the tests of the report."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

from slao import metrics

SLAO = [[0.80, 0.30, 0.10], [0.60, 0.90, 0.20], [0.50, 0.70, 1.00]]
SEQ = [[0.80, 0.25, 0.10], [0.40, 0.90, 0.15], [0.20, 0.50, 1.00]]
ZERO_SHOT = [0.2, 0.1, 0.3]
TASKS = ["agnews", "yelp", "dbpedia"]


def entry(matrices: Any, lambdas: Any = None, tasks: Any = None) -> dict[str, Any]:
    """One method's part of results.json, with its metrics worked out from the matrices."""
    size = len(matrices[0])
    before = [ZERO_SHOT[k % 3] for k in range(size)]
    found = {
        "seeds": list(range(len(matrices))),
        "matrix": matrices,
        "AA": [metrics.average_accuracy(m) for m in matrices],
        "BWT": [metrics.backward_transfer(m) for m in matrices],
        "forgetting": [metrics.forgetting(m) for m in matrices],
        "FWT": [metrics.forward_transfer(m, before) for m in matrices],
        "zero_shot": [before for _ in matrices],
        "tasks": tasks or [TASKS[:size] for _ in matrices],
        "tokens_per_second": [1200.0 + 100 * s for s in range(len(matrices))],
        "train_seconds": [3.25 for _ in matrices],
        "peak_memory_mb": [640.0 + s for s in range(len(matrices))],
    }
    if lambdas:
        found["lambdas"] = [lambdas for _ in matrices]
    return found


def two_methods() -> dict[str, Any]:
    """Results of SLAO and SeqLoRA on three tasks, two seeds each."""
    better = [[min(1.0, v + 0.02) for v in row] for row in SLAO]
    return {
        "stream": "python_docs",
        "model": "MiniLM",
        "methods": {
            "slao": entry([SLAO, better], [1 / math.sqrt(i) for i in (1, 2, 3)]),
            "seqlora": entry([SEQ, SEQ]),
        },
        "throughput": {"slao": {"tokens_per_second": 1250.0, "seconds_per_task": 1.1, "peak_memory_mb": 641.0}},
        "versions": {"slao_kernels": "0.1.0", "torch": "2.11.0"},
        "settings": {"lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]}},
        "metric": "accuracy",
    }


class Page(HTMLParser):
    """The tags, addresses, alternative texts and text of a page; tags have to be closed in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.words = " ".join(filter(None, self.text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())

    @property
    def alts(self) -> list[str]:
        return [attrs.get("alt") or "" for tag, attrs in self.attributes if tag == "img"]
