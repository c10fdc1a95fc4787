"""A whole training step on a whole model: forward, backward, AdamW on the adapters; ours against PEFT.

"frozen" is the model without adapters or optimiser, forward and backward to the embedding output: what training
through it costs at least. All contestants get the same embedding output, which asks for a gradient, so that the rest
of a step is the adapters' alone. `ours share` = (ours - frozen) / (PEFT - frozen): what is left of PEFT's overhead.
"PEFT" and "ours" have fp32 adapters, as PEFT makes them; ", base dtype" marks autocast_adapter_dtype=False.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from contestants import adapted, assert_ran_fused, fused, lora_modules
from race import Medians, best, interleave, record
from torch import Tensor, nn

from slao_kernels.testing import error_ratio

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Allowed RMS ratio to PEFT's run on fp32 adapters: of the loss, and of all adapters' gradients as one vector. On a CPU
# ours came to 9e-3 and 2.6e-2 in bf16 (PEFT's own other mode: 3e-3 and 3.1e-2), 4e-7 and 2e-6 in fp32.
AGREEMENT = {torch.bfloat16: (3e-2, 1e-1), torch.float32: (1e-5, 1e-4)}


def minilm(dtype: torch.dtype) -> nn.Module:
    """The geometry of all-MiniLM-L6-v2, random weights."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    config = hf.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return hf.AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")


def llama(dtype: torch.dtype) -> nn.Module:
    """Four blocks in a Llama's proportions; a small vocabulary, so that the head does not hide them."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
    config = hf.LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=4096, use_cache=False)
    return hf.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


@dataclass(frozen=True)
class Case:
    build: Callable[[torch.dtype], nn.Module]
    batch: int
    length: int
    rounds: int
    iterations: int


CASES = {
    "minilm-16x64": Case(minilm, 16, 64, 11, 1),
    "minilm-2x16": Case(minilm, 2, 16, 31, 4),
    "llama-2x256": Case(llama, 2, 256, 7, 1),
}


class Training:
    """One contestant: its model, its optimiser if anything is trained, and the data that all of them share."""

    def __init__(self, model: nn.Module, embeddings: Tensor, labels: Tensor) -> None:
        self.model, self.embeddings, self.labels = model.train(), embeddings, labels
        layers = lora_modules(model)
        self.trained = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
        # fused: what transformers' Trainer takes by default. The rate only keeps the weights near where they began.
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True) if layers else None

    def loss(self) -> Tensor:
        if isinstance(self.model, hf.LlamaForCausalLM):
            return self.model(inputs_embeds=self.embeddings, labels=self.labels).loss
        output = self.model(inputs_embeds=self.embeddings)
        # Every sentence picks itself by its pooled output, whose layers all take part in the loss.
        logits = output.pooler_output.float() @ output.last_hidden_state.float().mean(1).t()
        return nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    def step(self) -> None:
        self.loss().backward()
        self.embeddings.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def first_pass(self) -> tuple[Tensor, Tensor]:
        """The loss and the gradients of all adapters in one vector; nothing is trained."""
        loss = self.loss()
        grads = torch.autograd.grad(loss, self.trained)
        return loss.detach(), torch.cat([grad.flatten().float() for grad in grads])


def agree(found: dict[str, Training]) -> None:
    """A fast wrong answer is no benchmark: loss and gradients against PEFT's, before anything is trained."""
    loss, grads = found["PEFT"].first_pass()
    for name, training in found.items():
        if name not in ("PEFT", "frozen"):
            its_loss, its_grads = training.first_pass()
            if name.startswith("ours"):
                assert_ran_fused(training.model)
            errors = error_ratio(its_loss, loss), error_ratio(its_grads, grads)
            bounds = AGREEMENT[training.embeddings.dtype]
            wrong = any(error > bound for error, bound in zip(errors, bounds, strict=True))
            assert not wrong, f"{name} does not compute what PEFT does: loss and gradients differ by {errors}"


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", list(CASES))
def test_step(case: str, dtype: str, benchmark: Any, device: str, request: pytest.FixtureRequest) -> None:
    chosen = CASES[case]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return chosen.build(DTYPES[dtype]).to(device)

    modes = {"": False} if dtype == "fp32" else {"": False, ", base dtype": True}
    models = {"frozen": model().requires_grad_(False)}
    models |= {f"PEFT{suffix}": adapted(model(), "all-linear", base) for suffix, base in modes.items()}
    models |= {f"ours{suffix}": fused(adapted(model(), "all-linear", base)) for suffix, base in modes.items()}
    shape = chosen.batch, chosen.length
    frozen = models["frozen"]
    labels = torch.randint(frozen.config.vocab_size, shape).to(device)
    embeddings = frozen.get_input_embeddings()(labels).detach().requires_grad_()
    found = {name: Training(model, embeddings, labels) for name, model in models.items()}
    agree(found)

    calls: dict[str, Callable[[], object]] = {name: training.step for name, training in found.items()}
    best_of = request.config.getoption("--best-of")
    races = interleave(benchmark, calls, device, chosen.rounds, chosen.iterations, best_of)
    record(benchmark, races, "frozen", device)
    for suffix in modes:
        ours, peft = f"ours{suffix}", f"PEFT{suffix}"

        def share(t: Medians, ours: str = ours, peft: str = peft) -> float:
            return (t[ours] - t["frozen"]) / (t[peft] - t["frozen"])

        def ratio(t: Medians, ours: str = ours, peft: str = peft) -> float:
            return t[ours] / t[peft]

        benchmark.extra_info[f"ours share{suffix}"] = best(races, share)
        benchmark.extra_info[f"ours / PEFT{suffix}"] = best(races, ratio)
    benchmark.extra_info["adapted layers"] = len(lora_modules(models["ours"]))
