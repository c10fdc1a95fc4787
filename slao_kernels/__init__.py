"""slao_kernels: continual LoRA fine-tuning with one adapter, fast. See README.md for a tour."""

from .dispatch import use_backend
from .ops.exact_fold import Kept, unfold_
from .ops.fold import fold_
from .ops.interference import Interference, interference
from .ops.lora_linear import lora_linear
from .ops.orthogonal_init import OrthogonalInitReport, orthogonal_init_
from .ops.scaled_merge import scaled_merge_
from .ops.weighted_merge import WeightedMerge, weighted_merge
from .patching import PatchReport, patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "Interference",
    "Kept",
    "OrthogonalInitReport",
    "PatchReport",
    "WeightedMerge",
    "fold_",
    "interference",
    "lora_linear",
    "orthogonal_init_",
    "patch",
    "scaled_merge_",
    "unfold_",
    "unpatch",
    "use_backend",
    "weighted_merge",
]
