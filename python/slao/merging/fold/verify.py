"""Whether a folded model answers as its base with the adapters does: logits of a prompt, against rounding's effect."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...reading import read_json
from .base import Base
from .plan import Plan

# The largest of a vocabulary's errors differs between two drawings of the same rounding, by 1.4 at most in twenty
# drawings on each tiny model of the tests, and an fp32 GEMM adds up to 2^-19 of the largest logit in another order.
_DRAWN, _SUMMED = 4.0, 2.0**-19


@dataclass(frozen=True)
class Verified:
    """difference: the largest of the logits, relative to the largest logit. allowed: what rounding the weights once
    explains. choice: of the next token, by the base with the adapters and by the folded model; None for a model that
    tells no tokens apart."""

    difference: float
    allowed: float
    choice: tuple[str, str] | None

    @property
    def passed(self) -> bool:
        return self.difference <= self.allowed

    def __str__(self) -> str:
        same = "explains" if self.passed else "DOES NOT explain"
        text = f"verified: logits differ by {self.difference:.1e} at most, which rounding {same} ({self.allowed:.1e})"
        if self.choice is None:
            return text
        both = repr(self.choice[0]) if self.choice[0] == self.choice[1] else " and ".join(map(repr, self.choice))
        return f"{text}; next token {both}"


def tokens_of(base: Base, prompt: str) -> tuple[Any, Tensor]:
    """The tokenizer of the base, and the prompt's tokens (1, n). ValueError where there is none."""
    import transformers as hf

    try:
        tokenizer: Any = hf.AutoTokenizer.from_pretrained(base.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"--verify needs a tokenizer, and none loads from {base.folder}: put its files there, or leave --verify out"
        ) from error
    tokens: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not tokens.numel():
        raise ValueError(f"--verify needs a prompt of at least one token, not {prompt!r}")
    return tokenizer, tokens


@torch.no_grad()
def verified(
    made: Plan, adapters: Sequence[Path], weights: Sequence[float], folded: Path, tokenizer: Any, tokens: Tensor
) -> Verified:
    """Compare on the CPU, both in fp32 with the weights as they are stored; one model in memory at a time. (In other
    dtypes more than the weights differs: Gemma rounds a factor of its embedding to the dtype that it is loaded in.)

    What rounding explains is measured: every weight that the fold has rounded is moved by up to half a unit in its last
    place, at random, as rounding moved the exact one, and the logits may differ four times as much as that changes
    them.
    """
    expected = _logits(_adapted(made, adapters, weights), tokens)
    model = _model(folded)
    found = _logits(model, tokens)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name in made.rounded:
            _, exponent = torch.frexp(parameter)
            part = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter += torch.ldexp(part * torch.finfo(made.rounded[name]).eps, exponent - 1)
    moved = _logits(model, tokens)
    size = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    allowed = _DRAWN * float((moved - found).abs().max()) / size + _SUMMED
    choice = None
    if expected.dim() == 3 and expected.shape[-1] >= len(tokenizer):
        first, second = (tokenizer.decode(logits[0, -1].argmax()) for logits in (expected, found))
        choice = first, second
    return Verified(float((found - expected).abs().max()) / size, allowed, choice)


def _model(folder: Path) -> Any:
    import transformers as hf

    names = read_json(folder / "config.json").get("architectures") or []
    kind: Any = getattr(hf, str(names[0])) if names else hf.AutoModel
    return kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def _adapted(made: Plan, adapters: Sequence[Path], weights: Sequence[float]) -> Any:
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = _model(made.base.folder)
        if made.rows is not None:
            base.resize_token_embeddings(made.rows, mean_resizing=False)
        model: Any = PeftModel.from_pretrained(base, str(adapters[0]), adapter_name="0")
        for index, folder in enumerate(adapters[1:], 1):
            model.load_adapter(str(folder), adapter_name=str(index))
        if len(adapters) > 1:
            model.base_model.set_adapter([str(index) for index in range(len(adapters))])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for index, weight in enumerate(weights):
                if str(index) in module.scaling:
                    module.scaling[str(index)] *= weight
    return model


def _logits(model: Any, tokens: Tensor) -> Tensor:
    more = {"decoder_input_ids": tokens[:, :1]} if getattr(model.config, "is_encoder_decoder", False) else {}
    answer = model.eval()(input_ids=tokens, **more)
    return (answer["logits"] if "logits" in answer else answer[0]).float()
