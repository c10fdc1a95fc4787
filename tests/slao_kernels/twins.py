"""Tiny LoRA models that can be built twice alike, one training step of them, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slao_kernels
from slao_kernels.testing import error_ratio, tiny_model

Pair = tuple[nn.Module, nn.Module, slao_kernels.PatchReport]
FP32_RATIO = 1e-5  # of an output or gradient against the unpatched fp32 model


class CountOps(TorchDispatchMode):
    """How often each slao_kernels operator ran within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "slao_kernels":
            name = func.overloadpacket._qualified_op_name.split("::")[1]
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def forward(self) -> int:
        """Layers computed."""
        return sum(self.counts.get(name, 0) for name in ("lora_linear", "lora_add", "expert_linear"))


def config(**options) -> peft.LoraConfig:
    """r and alpha whose ratio is no power of two: a misplaced rounding or factor shows."""
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options})


# Whole transformers models


def base_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model whose biases are not zero (transformers starts them at zero)."""
    torch.manual_seed(0)
    model = tiny_model(kind).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def train_a_little(model: nn.Module, seed: int = 7) -> nn.Module:
    """B as training leaves it: a delta of about a tenth of the base output."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def peft_model(kind: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    return train_a_little(peft.get_peft_model(base_model(kind, dtype), config(**options)))


def model_pair(kind: str = "llama", *args, **options) -> Pair:
    """(patched, unpatched, report)"""
    model, twin = (peft_model(kind, *args, **options) for _ in range(2))
    return model, twin, slao_kernels.patch(model)


def token_ids(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def step(model: nn.Module) -> dict[str, Tensor]:
    """Logits and every gradient of one step; the loss is the model's own."""
    ids = token_ids()
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def train(model: nn.Module, optimizer: type[torch.optim.Optimizer], steps: int, lr: float) -> list[float]:
    """The losses of that many steps."""
    made, losses = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr), []
    for _ in range(steps):
        made.zero_grad()
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        made.step()
        losses.append(loss.item())
    return losses


# One adapted layer


class Net(nn.Module):
    """One adapted layer, `proj`, and one that is not."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj, self.head = proj, nn.Linear(4, 4)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.proj(x, *args, **kwargs)


def net(base: Callable[[], nn.Module] = lambda: nn.Linear(24, 20), **options) -> Net:
    """The same model at every call, with an adapter that is not zero, in training mode."""
    torch.manual_seed(0)
    options = {"target_modules": ["proj"], "init_lora_weights": False, **options}
    return peft.inject_adapter_in_model(config(**options), Net(base())).train()


def net_input(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 5, 24), generator=torch.Generator().manual_seed(1)).to(dtype)


def input_of(model: nn.Module) -> Tensor:
    """What an adapted layer of a net reads."""
    base = model.proj.base_layer
    return net_input(2, 5, getattr(base, "in_features", getattr(base, "nx", 24)))  # Conv1D's is called nx


def net_step(model: nn.Module, x: Tensor, *args, **kwargs) -> dict[str, Tensor]:
    """The output and every gradient, x's included, under one seed."""
    torch.manual_seed(2)
    model.zero_grad()
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
    y = model(x, *args, **kwargs)
    found = {"y": y.detach().clone()}
    if y.requires_grad:
        y.square().sum().backward()
        found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found |= {} if x.grad is None else {"x": x.grad}
    return found


def net_pair(make: Callable[..., nn.Module] = net, *args, **options) -> Pair:
    """(patched, unpatched, report)"""
    model, twin = make(*args, **options), make(*args, **options)
    report = slao_kernels.patch(model, strict=True)
    assert report.patched == ["proj"]
    return model, twin, report


def attempt(run: Callable[..., dict[str, Any]], *args, **kwargs) -> dict[str, Any]:
    """What a step finds, or its error."""
    try:
        return run(*args, **kwargs)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


# Comparison


def snapshot(model: nn.Module) -> dict[str, tuple[type, dict]]:
    """Every module's class and instance dictionary (its containers by content, tensors by identity)."""
    found = {}
    for name, module in model.named_modules():
        state = {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()}
        found[name] = (type(module), state)
    return found


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def check_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float = FP32_RATIO) -> None:
    """Same names and dtypes, error ratios within `tolerance`; what is no tensor is the same."""
    assert found.keys() == expected.keys()
    # A gradient that is zero but for rounding (softmax does not see a key's bias) must stay that small.
    zero = 1e-6 * max((rms(value) for value in expected.values() if isinstance(value, Tensor)), default=0.0)
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            assert found[name] == value
            continue
        assert found[name].dtype == value.dtype, name
        if rms(value) < zero:
            assert rms(found[name]) < 2 * zero, name
            continue
        ratio = error_ratio(found[name], value)
        assert ratio <= tolerance, f"{name}: {ratio:.2e}"


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Same names, types and dtypes, and bitwise the same values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is type(value), name
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


def check_same(
    model: nn.Module, twin: nn.Module, *args, ops: int | dict[str, int] | None = None, tolerance=FP32_RATIO, **kwargs
) -> dict[str, Tensor]:
    """One step of each, a net's or a transformers model's: the same numbers, which are returned.

    ops: how often which of our operators ran, or in how many forwards of layers.
    """
    run = net_step if hasattr(model, "proj") else step
    if run is net_step and not args:
        args = (input_of(model),)
    with CountOps() as ran:
        found = run(model, *args, **kwargs)
    assert ops is None or ops == (ran.forward if isinstance(ops, int) else ran.counts)
    check_close(found, run(twin, *args, **kwargs), tolerance)
    return found


def check_same_error(model: nn.Module, twin: nn.Module, *args, **kwargs) -> None:
    """PEFT's own exception, not one of ours."""
    found, expected = (attempt(net_step, net, *(args or (input_of(net),)), **kwargs) for net in (model, twin))
    assert list(expected) == ["error"]
    assert found == expected


def check_peft_runs(model, twin, reasons: dict[str, str], reason: str, told, *args, **kwargs) -> None:
    """Twice the very numbers (or the error) of the unpatched twin, without our operators; `reason` logged once."""
    args = args or (input_of(model),)
    with CountOps() as ops:
        for _ in range(2):
            found, expected = (attempt(net_step, net, *args, **kwargs) for net in (model, twin))
            check_equal(found, expected)
    assert ops.counts == {}
    assert reason in reasons["proj"]
    assert told() == [f"proj runs PEFT's own forward: {reasons['proj']}"]


def check_fused(model: nn.Module, *args) -> None:
    """One call runs our operator."""
    with CountOps() as ops:
        model(*(args or (input_of(model),)))
    assert ops.forward == 1
