"""Checks that the list ops share. All problems are collected, then raised as one ValueError: nothing is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Naming every offender helps; naming 224 of them does not.
_SHOWN = 8
_OWN_MEMORY = (Tensor, nn.Parameter)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Problems:
    """Collects what is wrong with the arguments of one op."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}")

    def raise_if_any(self) -> None:
        if self.found:
            more = len(self.found) - _SHOWN
            tail = f"; and {more} more" if more > 0 else ""
            raise ValueError(f"{self.op}: " + "; ".join(self.found[:_SHOWN]) + tail + ". Nothing was written.")


def lengths(problems: Problems, **lists: Sequence[object]) -> bool:
    """Whether all lists are equally long and the first is not empty; else the problem is added."""
    sizes = {name: len(items) for name, items in lists.items()}
    if len(set(sizes.values())) > 1:
        problems.add("lists", "lengths differ: " + ", ".join(f"{name} {size}" for name, size in sizes.items()))
        return False
    return True


def description(tensors: Sequence[Tensor]) -> tuple[list[object], ...] | None:
    """All that checks and pointer tables depend on, in a fraction of their time; None for what has no such things.

    Two equal descriptions of one call's lists mean equal verdicts and equal tables, whatever happened in between.
    """
    try:
        if any(map(Tensor.is_neg, tensors)):
            return None
        return (
            list(map(Tensor.data_ptr, tensors)),
            [item.shape for item in tensors],
            list(map(Tensor.stride, tensors)),
            [item.dtype for item in tensors],
            [item.device for item in tensors],
        )
    except (TypeError, AttributeError, RuntimeError):  # no tensor, or one without strides or storage
        return None


def tensor(problems: Problems, where: str, item: object, device: torch.device | None) -> bool:
    """Whether `item` is a dense floating tensor with storage, on `device` if one is given."""
    if not isinstance(item, Tensor):
        problems.add(where, f"is a {type(item).__name__}, expected a tensor")
        return False
    plain = type(item) in _OWN_MEMORY and item.dtype in FLOATING and item.layout is torch.strided
    if plain and item.device == device and item.device.type != "meta" and not item.is_neg():
        return True  # a model's call has hundreds of these
    before, found = len(problems.found), elsewhere(item)
    if found is not None:
        problems.add(where, found)
        return False
    if item.dtype not in FLOATING:
        problems.add(where, f"is {item.dtype}, expected fp64, fp32, bf16 or fp16")
    if item.device.type == "meta":
        problems.add(where, "is on the meta device; load the weights first")
    elif item.layout is not torch.strided:
        problems.add(where, f"has layout {item.layout}, expected a dense tensor")
    elif device is not None and item.device != device:
        problems.add(where, f"is on {item.device}, the first tensor is on {device}")
    elif item.is_neg():
        problems.add(where, "is a view that holds the negative of its memory; pass resolve_neg() of it")
    return len(problems.found) == before


def destination(problems: Problems, where: str, item: Tensor) -> None:
    """That torch lets `item` be written here."""
    if item.is_inference() and not torch.is_inference_mode_enabled():
        problems.add(where, "was made in inference mode, and may be written only there; pass a clone")


def numbers(op: str, name: str, values: float | Sequence[float], count: int) -> list[float]:
    """One number for all `count`, or as many as there are, as floats; else ValueError."""
    try:
        one = isinstance(values, int | float)
        return [float(values)] * count if one else [float(value) for value in values]  # type: ignore
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        raise ValueError(f"{op}: {name} is neither a number nor a list of numbers. Nothing was written.") from None


def not_finite(tensors: Sequence[Tensor]) -> list[int]:
    """Indices of the tensors that hold a NaN or an infinity. One pass over the data, one wait for the device."""
    if not tensors:
        return []
    # A sum is finite only if every term is, and takes no temporary; the few that overflow are looked at again.
    totals = [item.detach().sum(dtype=torch.promote_types(item.dtype, torch.float32)) for item in tensors]
    finite = torch.stack([total.to(totals[0].device) for total in totals]).isfinite()
    if bool(finite.all()):
        return []
    return [i for i, fine in enumerate(finite.tolist()) if not fine and not bool(tensors[i].isfinite().all())]


def elsewhere(item: Tensor) -> str | None:
    """What is wrong with a tensor that only wraps others (DTensor, torchao's): its own address is none."""
    if type(item) in _OWN_MEMORY or not is_traceable_wrapper_subclass(item):
        return None
    what = "gather it first (slao_kernels.sharding.whole)" if hasattr(item, "full_tensor") else "unwrap it first"
    return f"is a {type(item).__name__}, whose memory is elsewhere; {what}"


def distinct_memory(problems: Problems, name: str, items: Sequence[Tensor], **reads: Sequence[Tensor]) -> None:
    """That the destinations `items` are distinct memory and no list in `reads` looks into another one's.

    A source may be its own destination (same index, same view): that is a no-op, not a mistake.
    """
    spans: list[tuple[int, int, bool, str, int, Tensor]] = []
    for owner, tensors in {name: items, **reads}.items():
        for index, item in enumerate(tensors):
            if owner == name and _self_overlaps(item):
                problems.add(f"{name}[{index}]", "is an expanded view: several of its elements share memory")
            elif item.numel():
                spans.append((*_span(item), owner == name, owner, index, item))
    spans.sort(key=lambda span: span[0])
    open_spans: list[tuple[int, int, bool, str, int, Tensor]] = []
    for span in spans:
        start, _, writes, owner, index, item = span
        open_spans = [other for other in open_spans if other[1] > start]
        for _, _, other_writes, other_owner, other_index, other in open_spans:
            if not (writes or other_writes) or _share_no_byte(item, other):
                continue
            if owner != other_owner and index == other_index and _same_view(item, other):
                continue
            problems.add(f"{owner}[{index}]", f"overlaps the memory of {other_owner}[{other_index}]")
        open_spans.append(span)


def _span(item: Tensor) -> tuple[int, int]:
    """First byte, and one past the last byte, that `item` can touch."""
    if item.is_contiguous():
        return item.data_ptr(), item.data_ptr() + item.nbytes
    reach = sum((size - 1) * stride for size, stride in zip(item.shape, item.stride(), strict=True))
    start = item.data_ptr()
    return start, start + (reach + 1) * item.element_size()


def _same_view(left: Tensor, right: Tensor) -> bool:
    return (
        left.data_ptr() == right.data_ptr()
        and left.dtype == right.dtype
        and left.shape == right.shape
        and left.stride() == right.stride()
    )


def _self_overlaps(item: Tensor) -> bool:
    """Whether two elements of `item` may share memory, as in `expand` or overlapping `as_strided` windows."""
    if item.is_contiguous():
        return False
    needed = 1
    for stride, size in sorted((s, n) for n, s in zip(item.shape, item.stride(), strict=True) if n > 1):
        if stride < needed:
            return True
        needed += stride * (size - 1)
    return False


def _share_no_byte(left: Tensor, right: Tensor) -> bool:
    """Whether two matrices whose byte ranges meet are side by side in the rows of one larger matrix."""
    if left.dim() != 2 or right.dim() != 2 or left.stride() != right.stride():
        return False
    if left.element_size() != right.element_size() or min(left.stride()) != 1:
        return False
    pitch, inner = max(left.stride()), left.stride().index(1)
    low, high = sorted((left, right), key=Tensor.data_ptr)
    offset = (high.data_ptr() - low.data_ptr()) // low.element_size() % pitch
    return low.shape[inner] <= offset and offset + high.shape[inner] <= pitch
