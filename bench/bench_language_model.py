"""A small language model with a large vocabulary as users train and score it: logits where they are read, against all.

The geometry is Gemma 3 270M's (18 layers, 640 wide, 262,144 words, tied embeddings) with random weights, or the model
itself with --model gemma-3-270m. `step`: forward, backward, AdamW on 8 rows of 48 prompt and 4 answer tokens, r = 8;
"PEFT" is a model as PEFT makes it under transformers' own loss, "PEFT, labelled" the same within
`slao.logits.labelled_only`, "ours" is patched too. Peaks are of a step, above what lies in memory before it. `score`:
four prompts with 15 candidates of four tokens each; "all logits" runs every prompt with every candidate and has the
logits of all positions; "best" finds the most likely candidate alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from contestants import adapted, fused, lora_modules, twin
from models import gemma_3_270m
from race import best, interleave, record
from torch import Tensor, nn

from slao.logits import labelled_only
from slao.objectives.likelihood import log_likelihoods, most_likely
from slao.train import peak_memory_mb, reset_peak_memory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TARGETS: dict[str, Any] = {"qv": ["q_proj", "v_proj"], "all-linear": "all-linear"}
RANK = 8
ROWS, PROMPT, ANSWER = 8, 48, 4
CANDIDATES = 15


def base(dtype: torch.dtype, options: pytest.Config) -> nn.Module:
    if options.getoption("--model") != "gemma-3-270m":
        return gemma_3_270m(dtype).requires_grad_(False)
    from slao.models import load_model, model_path

    return load_model(model_path("gemma-3-270m"), "causal_lm", str(dtype)[6:], "cpu").requires_grad_(False)


def skip_on_a_cpu(device: str, options: pytest.Config) -> None:
    if device == "cpu" and options.getoption("--model") != "gemma-3-270m":
        pytest.skip("minutes on a CPU: ask for it by --model gemma-3-270m")


def batch(words: int, device: str) -> dict[str, Tensor]:
    ids = torch.randint(5, words, (ROWS, PROMPT + ANSWER), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Step:
    """A training step of one contestant."""

    def __init__(self, model: nn.Module, given: dict[str, Tensor]) -> None:
        self.model, self.given = model.train(), given
        layers = lora_modules(model)
        self.trained = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True) if layers else None

    def __call__(self) -> Tensor:
        loss: Tensor = self.model(**self.given, use_cache=False).loss
        if self.optimizer is not None:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def first(self) -> tuple[Tensor, Tensor]:
        loss = self.model(**self.given, use_cache=False).loss
        grads = torch.autograd.grad(loss, self.trained)
        return loss.detach(), torch.cat([grad.flatten().float() for grad in grads])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("targets", list(TARGETS))
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_step(dtype: str, targets: str, benchmark: Any, device: str, request: pytest.FixtureRequest) -> None:
    if (dtype, targets) != ("fp32", "qv"):
        skip_on_a_cpu(device, request.config)
    model = base(DTYPES[dtype], request.config).to(device)
    given = batch(model.config.vocab_size, device)
    made = {name: adapted(twin(model), TARGETS[targets], r=RANK) for name in ("PEFT", "PEFT, labelled", "ours")}
    fused(made["ours"])
    steps = {name: Step(contestant, given) for name, contestant in made.items()}
    with ExitStack() as blocks:
        for name in ("PEFT, labelled", "ours"):
            assert blocks.enter_context(labelled_only(made[name])) is None
        loss, grads = steps["PEFT"].first()
        narrow, narrow_grads = steps["PEFT, labelled"].first()
        off = {"loss": relative(narrow, loss), "gradients": relative(narrow_grads, grads)}
        assert off["loss"] <= 1e-6, off
        assert off["gradients"] <= (1e-6 if dtype == "fp32" else 3e-2), off
        peaks = {name: peak(step) for name, step in steps.items()}
        races = interleave(benchmark, steps, device, 5, 1, request.config.getoption("--best-of"))
    record(benchmark, races, "PEFT", device)
    benchmark.extra_info["PEFT / ours"] = best(races, lambda race: race["PEFT"] / race["ours"])
    benchmark.extra_info |= {f"{name} peak MB": found for name, found in peaks.items()} | off


def peak(step: Callable[[], object]) -> float:
    step()
    reset_peak_memory()
    before = peak_memory_mb()
    step()
    return peak_memory_mb() - before


@pytest.mark.parametrize("length", [48, 200])
def test_score(length: int, benchmark: Any, device: str, request: pytest.FixtureRequest) -> None:
    skip_on_a_cpu(device, request.config)
    model = base(torch.float32, request.config).to(device).eval()
    draw, words = random.Random(0), model.config.vocab_size
    prompts = [[draw.randrange(5, words) for _ in range(length)] for _ in range(4)]
    answers = [[draw.randrange(5, words) for _ in range(4)] for _ in range(CANDIDATES)]

    def whole() -> Tensor:
        found = []
        for prompt in prompts:  # 15 rows at a time: with 60 the logits of 204 tokens would be 13 GB
            ids = torch.tensor([prompt + answer for answer in answers], device=device)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[:, length - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(2, ids[:, length:, None]).sum((1, 2)).cpu())
        return torch.stack(found)

    def ours() -> Tensor:
        return log_likelihoods(model, prompts, answers, 64, 0)

    expected, found = whole(), ours()
    assert relative(found, expected) <= 1e-4
    assert torch.equal(found.argsort(1), expected.argsort(1))

    def best_one() -> list[int]:
        return most_likely(model, prompts, answers, 64, 0)

    assert best_one() == expected.argmax(1).tolist()
    races = interleave(benchmark, {"all logits": whole, "ours": ours, "best": best_one}, device, 3)
    record(benchmark, races, "all logits", device)
    benchmark.extra_info["all logits / ours"] = best(races, lambda race: race["all logits"] / race["ours"])
    benchmark.extra_info["largest relative difference"] = float(((found - expected) / expected).abs().max())
    benchmark.extra_info["all logits / best"] = best(races, lambda race: race["all logits"] / race["best"])
