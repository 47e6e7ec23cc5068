"""Blocks whose weights diffusers' group offloading brings to the device together.

The first block of a group brings all of it and the last one takes it away. When either is skipped and another block of
the group runs, somebody has to do it for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class Offload:
    """Follows the groups of one transformer's blocks through a call.

    Args:
        blocks: all of them.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks, self._grouped = blocks, False
        self._skipped: set[nn.Module] = set()
        self._brought: list[Any] = []

    def begin_run(self) -> None:
        """A run starts: see whether the blocks are in groups, as they are then throughout."""
        self._grouped = any(group_of(block) is not None for block in self._blocks)

    def begin_call(self) -> None:
        """The transformer is about to be called."""
        self._skipped.clear()
        self._brought.clear()

    def skips(self, block: nn.Module) -> None:
        """A block is not run."""
        group = group_of(block) if self._grouped else None
        if group is None:
            return
        self._skipped.add(block)
        if group.offload_leader is block and group in self._brought:
            self._brought.remove(group)
            group.offload_()

    def runs(self, block: nn.Module) -> None:
        """A block is about to run."""
        group = group_of(block) if self._grouped else None
        if group is None or group in self._brought:
            return
        self._brought.append(group)
        if group.onload_leader in self._skipped:
            group.onload_()


def group_of(block: nn.Module) -> Any:
    """The group of a block under `enable_group_offload`; None without it."""
    registry = vars(block).get("_diffusers_hook")
    hook = registry.get_hook("group_offloading") if registry is not None else None
    return None if hook is None else hook.group
