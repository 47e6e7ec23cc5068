"""A limit on the memory that a method holds: the bytes it will hold are foretold, and it gives way until they fit.

A run's first step shows the shapes of the features. From them and the recipe follows what will be held once all
anchors are there, over all guidance branches (`expected_bytes`). Where that is more than the budget, the method goes
down a ladder: its setting, and then each coarser one that it offers (`CachingMethod.coarser`), as it is, in half
precision, and with its anchors on the host besides. The host is a gain only where the model is on a GPU, whose memory
alone is counted there. Nothing is decided by what is free at the time or by what ran before, so that the same call
gives the same output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dita.attention_view import Attended
from dita.caching.engine import CacheHandler
from dita.caching.storage import Storage, bytes_of
from dita.errors import DitaError
from dita.reporting import in_bytes
from dita.seams import Call, Features, Fresh, Handler, Position, Site


class Seen(NamedTuple):
    """What passed through a site in one call of one branch, as tensors on the meta device: sizes without memory."""

    site: Site
    inputs: Features
    outputs: Features


@dataclass(frozen=True)
class Expected:
    """Bytes that a method will hold.

    Attributes:
        anchors: of past features.
        indicators: of what decisions are made by, always kept where and as it was computed.
    """

    anchors: int = 0
    indicators: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.anchors + self.indicators

    def counted(self, storage: Storage, on_gpu: bool) -> int:
        """What counts against a budget: on a GPU, what is kept on the host does not.

        Example:
            >>> Expected(8, 2).counted(Storage("host"), on_gpu=True), Expected(8, 2).counted(Storage("host"), False)
            (2, 10)
        """
        return self.indicators if on_gpu and storage.place == "host" else self.total


def expected_bytes(handler: CacheHandler, seen: Iterable[Seen], storage: Storage | None = None) -> Expected:
    """Bytes that a method holds once all its anchors are there: the most that a run comes to.

    A run of fewer computed steps than anchors holds less.

    Args:
        handler: of the method on one model.
        seen: one entry per site (and call of it) and branch; sites that the method does not use cost nothing.
        storage: how features are kept; None for as the handler does.

    Example:
        Two anchors of each of two branches, 2 x 4 x 8 numbers of 4 bytes:

        >>> from torch import nn
        >>> from dita.anatomy import describe
        >>> from dita.caching import ABCache
        >>> handler = ABCache(points=2).handler(describe(nn.Linear(2, 2)))
        >>> output = torch.empty(2, 4, 8, device="meta")
        >>> expected_bytes(handler, 2 * [Seen(Site("model", "model"), (), (output,))])
        Expected(anchors=1024, indicators=0)
    """
    storage = storage or handler.storage
    anchors = indicators = 0
    for site, inputs, outputs in seen:
        kept, watched = handler.expects(site, inputs, outputs)
        anchors += sum(t.numel() * storage.dtype_of(t).itemsize for t in kept if t is not None)
        indicators += bytes_of(watched)
    return Expected(anchors, indicators)


@dataclass(frozen=True)
class Form:
    """One way to carry out a method.

    Attributes:
        label: the settings that differ from the user's, in words.
        handler: of the settings; forms that only keep features otherwise share it.
        storage: how features are kept.
    """

    label: str
    handler: CacheHandler
    storage: Storage


class BudgetHandler(Handler):
    """Carries out the first form of a method that fits. See `dita.seams.Handler` for when each method is called.

    All forms' sites are hooked; those that the present form does not use run as they are. A form that only keeps its
    features otherwise takes over what is kept. A coarser one begins at the step after, which is then its first.

    Args:
        forms: of the method on one model, from the user's down.
        method: its name.
        limit: bytes.
    """

    def __init__(self, forms: Sequence[Form], method: str, limit: int) -> None:
        self.forms, self.method, self.limit = tuple(forms), method, limit
        self.sites: tuple[Site, ...] = tuple(dict.fromkeys(s for form in self.forms for s in form.handler.sites))
        self.ranks = frozenset[Site]().union(*(form.handler.ranks for form in self.forms))
        self._wanting = frozenset(s for form in self.forms for s in self.sites if form.handler.wants_inputs(s))
        self.begin_run()

    def begin_run(self) -> None:
        """Forget everything."""
        for form in self.forms:
            form.handler.begin_run()
        self._shapes: dict[tuple[str, int], tuple[tuple[int, ...], ...]] = {}
        self._seen: dict[tuple[tuple[str, int], Site, int], Seen] = {}
        self._level, self._lost, self._failed, self._on_gpu = 0, -1, False, False
        self._needed, self._news = 0, False
        self.forms[0].handler.move(self.forms[0].storage)

    @property
    def _now(self) -> CacheHandler:
        return self.forms[self._level].handler

    def begin_call(self, call: Call) -> None:
        """Clear what belonged to the last call.

        Raises:
            DitaError: what a step showed does not fit in any form.
        """
        if self._failed and call.position.step > self._lost:
            raise DitaError(
                f"{self.method} may hold {in_bytes(self.limit)} (max_cache_bytes), and no form of it fits over "
                f"{self._branches()}: {self._ladder()}. Allow more, or take a method that keeps less (easycache and "
                "ab-cache keep outputs of the model)"
            )
        stream = call.position.stream
        if self._shapes.get(stream) != call.shapes:
            self._shapes[stream] = call.shapes
            self._seen = {key: seen for key, seen in self._seen.items() if key[0] != stream}
            self._needed = self._counted(self._level)
        self._now.begin_call(call)
        if self._waits(call):
            call.reason = "a coarser form begins at the next step"

    def _waits(self, call: Call) -> bool:
        return call.position.step == self._lost

    def _uses(self, site: Site, call: Call) -> bool:
        return not self._waits(call) and site in self._now.sites

    def compute(self, site: Site, call: Call, inputs: Features) -> bool:
        """What the present form does not use runs."""
        return not self._uses(site, call) or self._now.compute(site, call, inputs)

    def wants_inputs(self, site: Site) -> bool:
        """The inputs that any form needs."""
        return site in self._wanting

    def computed(self, site: Site, occurrence: int, call: Call, inputs: Features, outputs: Features) -> None:
        """Look at the sizes before anything is kept."""
        key = (call.position.stream, site, occurrence)
        if key not in self._seen:
            self._on_gpu = self._on_gpu or _on_gpu(outputs)
            self._seen[key] = Seen(site, _sizes(inputs), _sizes(outputs))
            self._needed += self._counted(self._level, [self._seen[key]])
            self._news = True
            while self._needed > self.limit and not self._failed:
                self._give_way(call)
        if self._uses(site, call):
            self._now.computed(site, occurrence, call, inputs if self._now.wants_inputs(site) else (), outputs)

    def _counted(self, level: int, seen: Iterable[Seen] | None = None) -> int:
        form = self.forms[level]
        expected = expected_bytes(form.handler, self._seen.values() if seen is None else seen, form.storage)
        return expected.counted(form.storage, self._on_gpu)

    def _give_way(self, call: Call) -> None:
        old = self._now
        self._failed = self._level + 1 == len(self.forms)
        self._level += not self._failed
        form = self.forms[self._level]
        if self._failed or form.handler is not old:
            old.begin_run()
            self._lost = call.position.step
        form.handler.move(form.storage)
        self._needed = self._counted(self._level)

    def skipped(self, site: Site, occurrence: int, call: Call, inputs: Features) -> Features:
        """See `CacheHandler.skipped`."""
        return self._now.skipped(site, occurrence, call, inputs)

    def fresh(self, site: Site, occurrence: int, call: Call, shape: tuple[int, ...]) -> Fresh | None:
        """See `CacheHandler.fresh`."""
        return self._now.fresh(site, occurrence, call, shape)

    def refreshed(
        self, site: Site, occurrence: int, call: Call, inputs: Features, fresh: Fresh, outputs: Features
    ) -> Features:
        """See `CacheHandler.refreshed`."""
        return self._now.refreshed(site, occurrence, call, inputs, fresh, outputs)

    def wants_attention(self, site: Site, call: Call) -> bool:
        """See `CacheHandler.wants_attention`."""
        return self._uses(site, call) and self._now.wants_attention(site, call)

    def attended(self, site: Site, call: Call, seen: Attended) -> None:
        """See `CacheHandler.attended`."""
        self._now.attended(site, call, seen)

    def rehearses(self, site: Site, call: Call) -> bool:
        """See `CacheHandler.rehearses`."""
        return self._uses(site, call) and self._now.rehearses(site, call)

    def rehearsed(self, site: Site, call: Call, outputs: Features) -> None:
        """See `CacheHandler.rehearsed`."""
        self._now.rehearsed(site, call, outputs)

    def stepped(self, position: Position, latents: torch.Tensor) -> torch.Tensor:
        """See `CacheHandler.stepped`."""
        return self._now.stepped(position, latents)

    def end_call(self, call: Call) -> None:
        """Say what was chosen, whenever more has been seen."""
        self._now.end_call(call)
        if self._news:
            self._news = False
            form = self.forms[self._level]
            what = f"memory budget {in_bytes(self.limit)}, over {self._branches()}: {self._ladder()}"
            call.note = what if self._failed else f"{what} and was taken"
            if self._on_gpu and form.storage.place == "host":
                held = expected_bytes(form.handler, self._seen.values(), form.storage)
                call.note += f" ({in_bytes(held.anchors)} wait in host memory)"

    def _branches(self) -> str:
        count = len({key[0] for key in self._seen})
        return f"{count} branch{'es' if count > 1 else ''}"

    def _ladder(self) -> str:
        """What each form down to the present one holds, without those that gain nothing over the one before."""
        parts: list[str] = []
        least: int | None = None
        for level, form in enumerate(self.forms[: self._level + 1]):
            needed = self._counted(level)
            if least is None or needed < least or (level == self._level and not self._failed):
                parts.append(f"{form.label} needs {in_bytes(needed)}")
                least = needed
        return ", ".join(parts)

    def bytes_held(self) -> int:
        """Bytes kept over all streams."""
        return self._now.bytes_held()


def _on_gpu(features: Features) -> bool:
    return any(t is not None and t.is_cuda for t in features)


def _sizes(features: Features) -> Features:
    return tuple(None if t is None else torch.empty(t.shape, dtype=t.dtype, device="meta") for t in features)
