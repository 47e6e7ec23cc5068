"""The processes of one sweep, one or many; launched with `accelerate launch`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from dita.errors import DitaError


@dataclass(frozen=True)
class Group:
    """Number of processes and which one this is.

    Example:
        >>> Group().gather("mine")
        ['mine']
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, items: list[Any]) -> list[Any]:
        """Every `size`-th item, from this process's own rank on."""
        return items[self.rank :: self.size]

    def gather(self, value: Any) -> list[Any]:
        """Collect a picklable value of every process, by rank, on all of them."""
        if self.size == 1:
            return [value]
        import torch.distributed as distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def from_lead(self, value: Any) -> Any:
        """The value that the first process holds, on all of them."""
        return self.gather(value)[0]


def join_group(device: str = "cpu") -> tuple[Group, str]:
    """Join the processes that `accelerate launch` or `torchrun` started; a group of one otherwise.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The group, and the device of this process ("cuda" becomes "cuda:1" for the second process of a machine).

    Raises:
        DitaError: the processes cannot find each other.

    Example:
        >>> join_group()[0].size
        1
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Group(), device
    from accelerate import PartialState

    try:
        state = PartialState(cpu=device == "cpu")
    except Exception as error:
        raise DitaError(f"the {os.environ['WORLD_SIZE']} processes cannot talk to each other: {error}") from error
    return Group(state.process_index, state.num_processes), str(state.device) if device == "cuda" else device
