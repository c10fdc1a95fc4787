"""A whole training step on a whole model: forward, backward, AdamW on the adapters; ours against PEFT.

"frozen" is the model without adapters or optimiser, forward and backward to the embedding output: what training
through it costs at least. All contestants have the same frozen weights in memory, and get the same embedding output,
which asks for a gradient, so that the rest of a step is the adapters' alone.
`ours share` = (ours - frozen) / (PEFT - frozen): what is left of PEFT's overhead.
"PEFT" and "ours" have fp32 adapters, as PEFT makes them; ", base dtype" marks autocast_adapter_dtype=False.
The Llama-3 geometries need a GPU. There a row also gives tokens/s, `overhead left` against PEFT in the same mode, and
the memory that a step takes at its peak beyond what lies there between steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import rivals
import torch
import transformers as hf
from contestants import adapted, fell_back, fused, lora_modules, twin
from models import CASES, Case, on_device
from race import Check, Medians, best, checker, first_line, interleave, record
from torch import Tensor, nn

from slao_kernels.testing import error_ratio

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Allowed RMS ratio to PEFT's run on fp32 adapters: of the loss, and of all adapters' gradients as one vector. On a CPU
# ours came to 9e-3 and 2.6e-2 in bf16 (PEFT's own other mode: 3e-3 and 3.1e-2), 4e-7 and 2e-6 in fp32.
AGREEMENT = {torch.bfloat16: (3e-2, 1e-1), torch.float32: (1e-5, 1e-4)}


class Training:
    """One contestant: its model, its optimiser if anything is trained, and the data that all of them share."""

    def __init__(self, model: nn.Module, embeddings: Tensor, labels: Tensor, compiled: bool = False) -> None:
        self.model, self.embeddings, self.labels = model.train(), embeddings, labels
        self.call = torch.compile(model) if compiled else model
        layers = lora_modules(model)
        self.trained = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
        # fused: what transformers' Trainer takes by default. The rate only keeps the weights near where they began.
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True) if layers else None

    def loss(self) -> Tensor:
        if isinstance(self.model, hf.LlamaForCausalLM):
            return self.call(inputs_embeds=self.embeddings, labels=self.labels).loss
        output = self.call(inputs_embeds=self.embeddings)
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


def agree(found: dict[str, Training], check: Check) -> dict[str, str]:
    """A fast wrong answer is no benchmark: loss and gradients against PEFT's, before anything is trained.

    Returns who cannot run, and why: of others (rivals.py), which are not this project's to repair, who is wrong too.
    """
    loss, grads = found["PEFT"].first_pass()
    bounds = list(AGREEMENT[found["PEFT"].embeddings.dtype])
    failed: dict[str, str] = {}

    def errors(name: str) -> list[float]:
        its_loss, its_grads = found[name].first_pass()
        return [error_ratio(its_loss, loss), error_ratio(its_grads, grads)]

    if "PEFT, base dtype" in found:
        # Rounding grows with depth: whoever rounds as PEFT's own other mode does may be as far off, either way.
        bounds = [max(bound, 2 * own) for bound, own in zip(bounds, errors("PEFT, base dtype"), strict=True)]
    for name, training in found.items():
        if name in ("PEFT", "PEFT, base dtype", "frozen"):
            continue
        foreign = name in rivals.NAMES.values()
        try:
            off = errors(name)
        except Exception as problem:
            if name == "ours" or isinstance(problem, torch.OutOfMemoryError):
                raise
            failed[name] = first_line(problem)
            check(name, foreign, failed[name])
            continue
        fine = all(error <= bound for error, bound in zip(off, bounds, strict=True))
        what = f"does not compute what PEFT does: loss and gradients differ by {off}"
        if foreign:
            failed |= {} if fine else {name: what}
            continue
        check(name, fine, what)
        if name.startswith("ours"):
            reasons = fell_back(training.model)
            check(name, not reasons, f"runs PEFT's own forward: {reasons}")
    return failed


def contestants(
    case: Case, dtype: torch.dtype, device: str, compiled: bool = False, others: dict[str, Any] | None = None
) -> dict[str, Training]:
    """All of them on one frozen base; others: name -> kernels of rivals.py."""
    base = on_device(case.build, dtype, device, case.for_a_gpu).requires_grad_(False)
    shape = case.batch, case.length
    labels = torch.randint(base.config.vocab_size, shape).to(device)
    embeddings = base.get_input_embeddings()(labels).detach().requires_grad_()

    def training(base_dtype: bool, prepare: Callable[[nn.Module], nn.Module], compiled: bool = False) -> Training:
        return Training(checkpointed(prepare(adapted(twin(base), "all-linear", base_dtype))), **data, compiled=compiled)

    def checkpointed(model: nn.Module) -> nn.Module:
        if case.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    data = {"embeddings": embeddings, "labels": labels}
    modes = {"": False} if dtype == torch.float32 else {"": False, ", base dtype": True}
    found = {"frozen": Training(checkpointed(twin(base)), **data)}
    found |= {f"PEFT{suffix}": training(mode, lambda model: model) for suffix, mode in modes.items()}
    if compiled and not case.checkpointing:
        torch.compiler.reset()
        found |= {
            f"PEFT{suffix}, compiled": training(mode, lambda model: model, True) for suffix, mode in modes.items()
        }
    backends = {"": "auto", ", triton": "triton"} if device == "cuda" else {"": "auto"}
    for name, backend in backends.items():
        prepare = partial(fused, backend=backend)
        found |= {f"ours{name}{suffix}": training(mode, prepare) for suffix, mode in modes.items()}
    if isinstance(base, hf.LlamaForCausalLM):
        for name, kernels in (others or {}).items():
            found[name] = training(dtype != torch.float32, partial(rivals.fuse, kernels=kernels))
    return found


def share(times: Medians, ours: str, peft: str) -> float:
    return (times[ours] - times["frozen"]) / (times[peft] - times["frozen"])


def step_memory(training: Training) -> int:
    """Bytes at a step's peak beyond those allocated before it: activations, gradients and temporaries."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training.step()
    return torch.cuda.max_memory_allocated() - before


def rows(races: list[Medians], tokens: int, memory: dict[str, int]) -> list[dict[str, Any]]:
    """A line for each contestant. `overhead left` is against PEFT with adapters of the same dtype."""
    found: list[dict[str, Any]] = []
    for name in races[0]:
        # Other projects' kernels run on adapters of the base's dtype, where there are such.
        narrow = ", base dtype" in name or name in rivals.NAMES.values()
        peft = "PEFT, base dtype" if narrow and "PEFT, base dtype" in races[0] else "PEFT"
        seconds = best(races, lambda race, name=name: race[name])
        over = None if name in ("frozen", peft) else best(races, partial(share, ours=name, peft=peft))
        line = {"contestant": name, "ms": seconds * 1e3}
        line["x frozen"] = best(races, lambda race, name=name: race[name] / race["frozen"])
        line |= {"tokens/s": round(tokens / seconds), "overhead left": over}
        line["step GB"] = memory[name] / 1e9 if name in memory else None
        found.append(line)
    return found


@pytest.fixture(autouse=True)
def _memory_back(device: str) -> Iterator[None]:
    yield
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("case", list(CASES))
def test_step(case: str, dtype: str, benchmark: Any, device: str, request: pytest.FixtureRequest) -> None:
    chosen, options = CASES[case], request.config
    if chosen.for_a_gpu and device == "cpu":
        pytest.skip("a GPU's model: minutes a step on a CPU")
    if chosen.for_a_gpu and dtype != "bf16":
        pytest.skip("nobody trains it in fp32, and contestants would not fit")
    others, left_out = rivals.load(options.getoption("--rivals")) if device == "cuda" else ({}, {})
    try:
        found = contestants(chosen, DTYPES[dtype], device, options.getoption("--compile"), others)
        failed = agree(found, checker(benchmark, device))
        found = {name: training for name, training in found.items() if name not in failed}
        calls: dict[str, Callable[[], object]] = {name: training.step for name, training in found.items()}
        best_of = options.getoption("--best-of")
        races = interleave(benchmark, calls, device, chosen.rounds, chosen.iterations, best_of)
        memory = {name: step_memory(training) for name, training in found.items() if device == "cuda"}
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {str(error).splitlines()[0]}")
    info = benchmark.extra_info
    record(benchmark, races, "frozen", device)
    for suffix in [""] if dtype == "fp32" else ["", ", base dtype"]:
        ours, peft = f"ours{suffix}", f"PEFT{suffix}"
        info[f"ours share{suffix}"] = best(races, partial(share, ours=ours, peft=peft))
        info[f"ours / PEFT{suffix}"] = best(races, lambda race, ours=ours, peft=peft: race[ours] / race[peft])
    info["adapted layers"] = len(lora_modules(found["ours"].model))
    if device == "cuda":
        info |= {"left out": left_out | failed, "rows": rows(races, chosen.batch * chosen.length, memory)}
