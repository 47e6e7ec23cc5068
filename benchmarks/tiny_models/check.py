"""Which seams a transformer class offers, and whether that is so: methods attached, calls counted, taken off again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import dita
from dita.anatomy import Anatomy, describe
from dita.attention_view import Attended
from dita.caching import ABCache, DeltaDiT, FirstBlockCache, TaylorSeer
from dita.config import Method
from dita.flex import uncompiled
from dita.kernels.sparse import Sage
from dita.reporting import RunReport
from dita.seams import Call, Handler, Site
from tiny_models.base import TinyModel
from tiny_models.sampling import Counted, Sampler, counting

SEAMS = ("model", "trunk", "block", "module", "attention")
"""The trunk is the block seam at its largest: all blocks at once."""
STEPS = 3
REPEATED = ("trunk", "module")
"""Seams with state of its own that a second run could meet."""
_COUNT = ("", "how many")
MASKED = "masks differ from query to query: the methods there are leave it whole"


@dataclass(frozen=True)
class AttentionReuse(Method):
    """Answers attention on every other step by what it was a step before, whatever its mask: tries the seam alone.

    Attributes:
        every: steps from one that is computed to the next; 1 computes all.
    """

    every: int = 2

    name: ClassVar[str] = "attention-reuse"

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        anatomy.require("attention", self.name)
        return _Reusing(anatomy.attention_sites, self.every)

    @classmethod
    def disabled(cls) -> AttentionReuse:
        """Every step computed."""
        return cls(every=1)


class _Reusing(Handler):
    def __init__(self, sites: tuple[Site, ...], every: int) -> None:
        self.sites, self.every = sites, every
        self._kept: dict[Any, torch.Tensor] = {}

    def begin_run(self) -> None:
        self._kept.clear()

    def attend(
        self, site: Site, occurrence: int, call: Call, seen: Attended, plain: Callable[[Attended], torch.Tensor]
    ) -> torch.Tensor:
        key = (site, occurrence)
        if call.position.step % self.every and key in self._kept:
            call.action = "partial"
            return self._kept[key]
        self._kept[key] = plain(seen)
        return self._kept[key]


METHODS: dict[str, Method] = {
    "model": ABCache(interval=2, points=1, warmup=1),
    "trunk": TaylorSeer(interval=2, warmup=1, granularity="last-block"),
    "block": DeltaDiT.forced(),
    "module": TaylorSeer.forced(),
    "attention": Sage.forced(),
}
"""One method for each seam."""
DISABLED: tuple[dict[str, Method], ...] = (
    {"block": FirstBlockCache.disabled(), "attention": AttentionReuse.disabled()},
    {"module": TaylorSeer.disabled()},
)
"""What is attached together to change nothing."""


@dataclass(frozen=True)
class Coverage:
    """What one class offers.

    Attributes:
        name, kind: the class, and what it makes.
        reasons: seam -> why it is missing; "" where it is there.
        spans: pieces that all blocks fall into, each with one kind of input and output.
        note: what besides is to be said of its attention.
    """

    name: str
    kind: str
    reasons: dict[str, str]
    spans: int
    note: str = ""

    @property
    def offered(self) -> tuple[str, ...]:
        """The seams that are there."""
        return tuple(seam for seam, why in self.reasons.items() if not why)


def check(tiny: TinyModel) -> Coverage:
    """Try every seam that dita says is there on a tiny instance, and that the others are refused.

    Raises:
        AssertionError: something was not skipped, not finite, not the same twice, or not restored.
    """
    with warnings.catch_warnings(), uncompiled():
        warnings.simplefilter("ignore")  # what the models warn of is not at stake, and the reports are read
        sampler, note = Sampler(tiny), ""
        anatomy = describe(sampler.transformer)
        reasons = {seam: anatomy.why_not("block" if seam == "trunk" else seam) or "" for seam in SEAMS}
        with counting(sampler.transformer) as whole:
            plain = sampler(STEPS)
        assert plain.isfinite().all() and plain.std() > 0, tiny.name
        settled, short = _attributes(sampler), sampler(2)
        before = _attributes(sampler)
        # What a model replaces by itself in every run tells nothing.
        before = {place: value for place, value in before.items() if settled[place] == value}
        for seam, method in METHODS.items():
            if reasons[seam]:
                _check_refusal(sampler, method, reasons[seam])
                continue
            run = _check_seam(sampler, seam, method, plain, whole)
            if run.reused == 0 and seam == "attention":
                note = MASKED
                run = _check_seam(sampler, seam, AttentionReuse(), plain, whole)
            assert 0 < run.reused < len(run.records) == STEPS, (tiny.name, seam, run)
            _check_restored(sampler, before)
        for together in DISABLED:
            methods = [method for seam, method in together.items() if not reasons[seam]]
            if methods:
                with dita.accelerated(sampler, *methods):
                    assert torch.equal(sampler(2), short), (tiny.name, methods)
        _check_restored(sampler, before)
        assert torch.equal(sampler(2), short), tiny.name
    return Coverage(tiny.name, tiny.kind, reasons, len(anatomy.segments), note)


def _check_seam(sampler: Sampler, seam: str, method: Method, plain: torch.Tensor, whole: Counted) -> RunReport:
    where = (sampler.tiny.name, seam)
    with dita.accelerated(sampler, method):
        with counting(sampler.transformer, seam == "attention") as count:
            output = sampler(STEPS)
        if seam in REPEATED:
            assert torch.equal(sampler(STEPS), output), where
        run = dita.report(sampler).last
    assert run.finished and output.isfinite().all(), where
    if run.reused:
        assert not torch.equal(output, plain), where
        fewer = count.attentions < whole.attentions if seam == "attention" else count.modules < whole.modules
        assert fewer, (where, count, whole)
    return run


def _check_refusal(sampler: Sampler, method: Method, reason: str) -> None:
    try:
        dita.accelerate_pipeline(sampler, method)
    except dita.DitaError as error:
        assert reason in str(error)
    else:
        raise AssertionError(f"{sampler.tiny.name} was to refuse {method.name}: {reason}")


def _check_restored(sampler: Sampler, before: dict[tuple[str, str], int]) -> None:
    after = _attributes(sampler)
    changed = [place for place, value in before.items() if after.get(place) != value]
    assert not changed and after[_COUNT] == before[_COUNT], (sampler.tiny.name, changed, set(after) - set(before))


def _attributes(sampler: Sampler) -> dict[tuple[str, str], int]:
    """Every attribute that acceleration could touch: of a module with its value's identity, of others by name."""
    found = {(path, k): id(v) for path, m in sampler.transformer.named_modules() for k, v in vars(m).items()}
    for name, holder in (("pipe", sampler), ("scheduler", sampler.scheduler)):
        found |= {(name, key): 0 for key in vars(holder)}
    return {**found, _COUNT: len(found)}
