"""The ring of past features that all methods forecast from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dita.caching.storage import Storage, bytes_of
from dita.kernels.tokens import put_tokens, spread_to_clusters
from dita.kernels.weighted_sum import weighted_sum
from dita.seams import Features, Fresh


@dataclass
class Entry:
    """Features of one site at one step.

    Attributes:
        step: which.
        features: kept of it.
        real: computed, not forecast.
        made: of a forecast, the weight of each computed step in it, through all forecasts in between.
    """

    step: int
    features: Features
    real: bool = True
    made: Mapping[int, float] = field(default_factory=dict)


def makes(entries: Sequence[Entry], weights: Sequence[float]) -> dict[int, float]:
    """The weight of each computed step in a weighted sum of entries.

    Example:
        >>> makes([Entry(3, (), False, {2: 2.0, 1: -1.0}), Entry(2, ())], [2.0, -1.0])
        {2: 3.0, 1: -2.0}
    """
    total: dict[int, float] = {}
    for entry, weight in zip(entries, weights, strict=False):
        for step, share in entry.made.items() if not entry.real else ((entry.step, 1.0),):
            total[step] = total.get(step, 0.0) + weight * share
    return total


class History:
    """The newest features of one site, each with the step it was computed at.

    What is kept is a copy: a model may write into its tensors later. The memory of what is dropped is used again.

    Args:
        length: entries kept.
        retain: chooses among all entries, newest first, which are kept; if None the newest.
        storage: where and how precisely they are kept.
    """

    def __init__(
        self,
        length: int,
        retain: Callable[[list[Entry]], list[Entry]] | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.length = length
        self._retain = retain or (lambda entries: entries[:length])
        self._storage = storage or Storage()
        self._entries: list[Entry] = []
        self._bytes: int | None = 0
        self._like: tuple[torch.dtype, torch.device] | None = None

    def push(self, step: int, features: Features, made: Mapping[int, float] | None = None) -> None:
        """Keep a copy of `features`, computed at `step` or else forecast, and drop what is no longer wanted.

        Args:
            step: which.
            features: to keep.
            made: of a forecast, the weight of each computed step in it.
        """
        self._keep(self._retain([Entry(step, features, made is None, made or {}), *self._entries]))

    def _keep(self, wanted: list[Entry]) -> None:
        """Let the entries be `wanted`, of which new ones are copied to where features are kept."""
        new = [entry for entry in wanted if not any(entry is old for old in self._entries)]
        spare = [old.features for old in self._entries if not any(old is entry for entry in wanted)]
        self._entries, self._bytes = wanted, None
        for entry in new:
            first = next((tensor for tensor in entry.features if tensor is not None), None)
            self._like = None if first is None else (first.dtype, first.device)
            entry.features = self._storage.put(entry.features, spare.pop(0) if spare else ())

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Entries, newest first."""
        return tuple(self._entries)

    @property
    def steps(self) -> list[int]:
        """Steps of the entries, newest first."""
        return [entry.step for entry in self._entries]

    @property
    def newest(self) -> Features:
        """The newest features, as they were computed (but for what a lower precision cost)."""
        return self._storage.get(self._entries[0].features, self._like)

    def refresh(self, fresh: Fresh, rows: Features) -> None:
        """Take fresh rows of tokens [B, K, C] up into the newest features [B, N, C], in place."""
        entry = self._entries[0]
        updated: list[torch.Tensor | None] = []
        for kept, new in zip(self.newest, rows, strict=True):
            if kept is not None and new is not None:
                kept = put_tokens(kept, fresh.index, new)
                if fresh.labels is not None and fresh.share:
                    kept = spread_to_clusters(kept, fresh.index, fresh.labels, fresh.share)
            updated.append(kept)
        if any(new is not old for new, old in zip(updated, entry.features, strict=True)):
            entry.features, self._bytes = self._storage.put(tuple(updated), entry.features), None

    def combine(
        self, weights: Sequence[float] | torch.Tensor, base: Features = (), only: int | None = None
    ) -> Features:
        """The weighted sum of the newest entries, on top of `base` where given.

        Args:
            weights: one number per entry, newest first, or a tensor [entries, C] of weights per channel.
            base: tensors to add to, one per feature (a skipped span's inputs, when residuals are kept).
            only: number of the one feature wanted; None for all.

        Returns:
            new tensors, summed in float32, in the features' dtype; None where the features are None.
        """
        used = [self._storage.get(entry.features, self._like) for entry in self._entries[: len(weights)]]
        if len(used[0]) == 1 and used[0][0] is not None:  # most modules, many times a step
            return (weighted_sum([kept[0] for kept in used], weights, base[0] if base else None),)  # pyright: ignore
        columns = list(zip(*used, strict=True))
        bases = list(base or (None,) * len(columns))
        if only is not None:
            columns, bases = columns[only : only + 1], bases[only : only + 1]
        results: list[torch.Tensor | None] = []
        for column, start in zip(columns, bases, strict=True):
            tensors = [t for t in column if t is not None]
            results.append(weighted_sum(tensors, weights, start) if tensors else start)
        return tuple(results)

    def move(self, storage: Storage) -> None:
        """Keep the entries, and later ones, in another way."""
        for entry in self._entries:
            entry.features = storage.put(self._storage.get(entry.features, None), ())
        self._storage, self._bytes = storage, None

    def bytes_held(self) -> int:
        """Bytes of the tensors kept."""
        if self._bytes is None:
            self._bytes = bytes_of(t for entry in self._entries for t in entry.features)
        return self._bytes
