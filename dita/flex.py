"""flex_attention in the terms of scaled dot-product attention.

A model that calls it uncompiled has PyTorch compile it by a backend that only records it, where a torch function mode
cannot answer; with compilation off for the moment the mode sees the call itself, with the same output bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

try:
    import torch.nn.attention.flex_attention as flex
except ImportError:  # a build without it: then no model calls it
    flex = None
_COMPILED = "_torchdynamo_orig_callable"


@contextmanager
def uncompiled() -> Iterator[None]:
    """Have flex_attention run without compilation, unless someone compiled it, or the code around is being compiled.

    Example:
        >>> with uncompiled():
        ...     pass
    """
    if flex is None or torch.compiler.is_compiling() or hasattr(flex.flex_attention, _COMPILED):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def is_flex(func: Any, args: tuple[Any, ...]) -> bool:
    """Say whether a call seen by a torch function mode is flex_attention that changes no score and gives no statistics.

    Example:
        >>> is_flex(torch.nn.functional.softmax, ())
        False
    """
    if flex is None or func is not torch.ops.higher_order.flex_attention or len(args) < 7:
        return False
    options = args[6]
    return args[3] is flex._identity and not any(options.get(name) for name in ("OUTPUT_LOGSUMEXP", "OUTPUT_MAX"))


def of_flex(args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float]:
    """Queries, keys, values, mask and scale of such a call.

    The mask is bool [B, H, N, M]: no larger than the scores that uncompiled flex_attention makes.
    """
    query, key, value, _, block_mask, scale = args[:6]
    lengths = block_mask[:2]
    mask = None
    if lengths != (1, 1):  # which stands for no mask
        assert flex is not None
        shape = (len(query), query.shape[1], query.shape[2], key.shape[2])
        mask = flex.create_mask(block_mask[-1], *shape, device=query.device)
    return query, key, value, mask, scale
