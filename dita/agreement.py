"""Ranks that work on one sample together: what one of them wants computed, all compute.

A decision by the data of one rank alone would let it skip what the others wait for. diffusers' context and tensor
parallelism are found by themselves; ranks that share work some other way, such as one guidance branch each, are named
by `dita.share_decisions`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dita.errors import DitaError


class Agreement:
    """The ranks of one process group.

    Args:
        group: of torch.distributed; None for one process, which agrees with itself.

    Example:
        >>> Agreement(None)(True, False)
        (True, False)
    """

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, *wanted: bool) -> tuple[bool, ...]:
        """What any rank wants; every rank has to ask, in the same order."""
        if self.group is None:
            return wanted
        import torch.distributed as dist

        device = "cuda" if "nccl" in dist.get_backend(self.group) else "cpu"
        flags = torch.tensor(wanted, dtype=torch.int32, device=device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.group)
        return tuple(bool(flag) for flag in flags.tolist())


def group_of(model: nn.Module) -> Any:
    """The process group over which diffusers spread a model (`enable_parallelism`); None if it did not.

    Example:
        >>> group_of(nn.Identity()) is None
        True
    """
    config = getattr(model, "_parallel_config", None)
    for name in ("context_parallel_config", "tensor_parallel_config"):
        part = getattr(config, name, None)
        mesh = getattr(part, "_flattened_mesh", None) or getattr(part, "_mesh", None)
        if mesh is not None:
            return mesh.get_group()
    return None


def check_group(group: Any) -> None:
    """Raise `DitaError` unless it is a process group that this process belongs to."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise DitaError("ranks can share decisions after torch.distributed.init_process_group; it was not called")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise DitaError(f"expected a process group of torch.distributed, got {type(group).__name__}")
