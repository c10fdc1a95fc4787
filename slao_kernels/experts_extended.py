"""PEFT's wrapper of experts, one of whose adapters has cores or frozen pairs (extension.py), each expert its own."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import layer as lora
from torch import Tensor

from .adapters import stack, through
from .experts import FusedExperts, wrappers
from .extended import Extended


class ExtendedExperts(Extended, FusedExperts):
    """As `FusedExperts`; the branch is that of an ordinary pair of A and B of more rank. Made by `extension.extend`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, by its own forward where the model is not patched."""
        for one in wrappers(self):
            active = [name for name in one.active_adapters if name in one.lora_A]
            if not (one.disable_adapters or one.merged_adapters) and getattr(one, "slao_adapter", None) in active:
                one.refuse_beside(active)
        runs = super().forward if hasattr(self.slao_before, "peft_class") else lora.ParamWrapper.forward.__get__(self)
        y: Tensor = runs(x, *args, **kwargs)
        return y

    def slao_factors(self) -> tuple[Tensor, Tensor]:
        """A and B as PEFT lays them out, of the whole branch, with the gradients that extension.py tells of."""
        A, B = self.slao_stack()
        core, delta = self.slao_core, self.slao_core_delta
        if delta is None:
            return A, B if core is None else through(B.detach(), core)
        if core is None:
            return A, through(B, delta)
        # What the core leads through trains nothing but what comes before the layer.
        rest, count = (A.detach(), through(B.detach(), core)), self.num_experts
        return stack(count, "A", A, rest[0]), stack(count, "B", through(B, delta), rest[1])

    def get_delta_factors(self, adapter: str) -> tuple[Tensor, Tensor, Any]:
        """As PEFT's, for its own forward: what it multiplies, in the order in which it stores its experts."""
        if adapter != self.slao_adapter:
            return super().get_delta_factors(adapter)
        A, B = self.slao_factors()
        As, Bs = A.view(self.num_experts, -1, A.shape[1]), B.view(len(B), -1, self.num_experts).permute(2, 0, 1)
        both = (Bs, As) if self._did_swap_in_out_features else (As.mT, Bs.mT)
        dtype = self.get_param().dtype
        return both[0].to(dtype), both[1].to(dtype), self.scaling[adapter]

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's, for its own merges and forward."""
        if adapter != self.slao_adapter:
            return super().get_delta_weight(adapter, *args, **kwargs)
        left, right, scaling = self.get_delta_factors(adapter)
        return left @ right * scaling


ExtendedExperts.__name__ = lora.ParamWrapper.__name__
