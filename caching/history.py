"""The ring of past features that all methods forecast from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from dita.kernels.weighted_sum import weighted_sum
from dita.seams import Features


class History:
    """The newest features of one site, each with the step it was computed at.

    What is kept is a copy: a model may write into its tensors later. The oldest entry's memory is used again.

    Args:
        length: entries kept.
    """

    def __init__(self, length: int) -> None:
        self._entries: deque[tuple[int, Features]] = deque(maxlen=length)

    def push(self, step: int, features: Features) -> None:
        """Keep a copy of `features`, computed at `step`, dropping the oldest entry if the ring is full."""
        spare: Features = ()
        if len(self._entries) == self._entries.maxlen:
            spare = self._entries.pop()[1]
        if len(spare) != len(features):
            spare = (None,) * len(features)
        kept = tuple(_copy(new, old) for new, old in zip(features, spare, strict=True))
        self._entries.appendleft((step, kept))

    @property
    def steps(self) -> list[int]:
        """Steps of the entries, newest first."""
        return [step for step, _ in self._entries]

    @property
    def newest(self) -> Features:
        """The newest features."""
        return self._entries[0][1]

    def combine(self, weights: Sequence[float] | torch.Tensor, base: Features = ()) -> Features:
        """The weighted sum of the newest entries, on top of `base` where given.

        Args:
            weights: one number per entry, newest first, or a tensor [entries, C] of weights per channel.
            base: tensors to add to, one per feature (a skipped span's inputs, when residuals are kept).

        Returns:
            new tensors, summed in float32, in the features' dtype; None where the features are None.
        """
        count = len(weights)
        columns = zip(*(features for _, features in list(self._entries)[:count]), strict=True)
        bases = base or (None,) * len(self.newest)
        results: list[torch.Tensor | None] = []
        for column, start in zip(columns, bases, strict=True):
            tensors = [t for t in column if t is not None]
            results.append(weighted_sum(tensors, weights, start) if tensors else start)
        return tuple(results)

    def bytes_held(self) -> int:
        """Bytes of the tensors kept."""
        return sum(t.numel() * t.element_size() for _, features in self._entries for t in features if t is not None)


def _copy(new: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor | None:
    if new is None:
        return None
    if old is not None and old.shape == new.shape and old.dtype == new.dtype and old.device == new.device:
        return old.copy_(new)
    return new.detach().clone(memory_format=torch.contiguous_format)
