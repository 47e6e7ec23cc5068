"""Floating-point operations that really ran, counted at the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count


def _cpu_attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
}


class _Counter(TorchDispatchMode):
    """Adds up torch's own formulas; `FlopCounterMode` also names the module of each operation, at 5 times the cost."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.kinds: dict[Any, str] = {}

    def _kind(self, func: Any) -> str:
        if func._overloadpacket in _FORMULAS:
            return "counted"
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        return "composite" if composite else "free"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        kind = self.kinds.get(func)
        if kind is None:
            kind = self.kinds[func] = self._kind(func)
        if kind == "composite":  # in inference mode linear and matmul arrive whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if kind == "counted":
            self.total += int(_FORMULAS[func._overloadpacket](*args, **kwargs, out_val=result))
        return result


def count_flops(call: Callable[[], Any]) -> tuple[int, Any]:
    """Run `call` once and count the floating-point operations of its matrix products, convolutions and attention.

    The formulas are those of `torch.utils.flop_counter`; a multiplication with its addition counts as two. Elementwise
    work (norms, activations, the weighted sums of a forecast) is not counted, neither for the plain nor for an
    accelerated run, and a Triton kernel launched outside the dispatcher is not seen; wall-clock time has both.

    Args:
        call: function without arguments; whatever it skips is not counted.

    Returns:
        The count, and what `call` returned.

    Example:
        >>> a, b = torch.ones(2, 3), torch.ones(3, 5)
        >>> count_flops(lambda: a @ b)[0]
        60
    """
    with _Counter() as counter:
        result = call()
    return counter.total, result
