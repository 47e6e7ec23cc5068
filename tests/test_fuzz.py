"""Any recipe in any order of events: hypothesis draws both, on pipelines of three blocks.

`make nightly` draws 5,000 sequences, new ones every time; here it is 200 and always the same.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import pytest
import torch
from helpers import CACHING, INSIDE, METHODS, SAMPLING, assert_same_snapshot, snapshot
from hypothesis import currently_in_test_context, event, given, seed, settings
from hypothesis import strategies as st
from small import (
    BLOCKS,
    KEEPS,
    SCHEDULERS,
    Asked,
    Setting,
    assert_consistent,
    assert_same_classes,
    build,
    call,
    classes_of,
    plain,
    quietly,
)

import dita
from dita.config import Method
from dita.errors import DitaError

PARTS = tuple(SCHEDULERS)
SEQUENCES = 200 if settings.get_current_profile_name() == "dita" else settings.default.max_examples  # pyright: ignore


class Lamp(RuntimeError):
    """Went out in the middle of a run."""


@dataclass(frozen=True)
class Attach:
    """Another recipe, in place of the one before; it may be refused."""

    recipe: tuple[Setting, ...]


@dataclass(frozen=True)
class Detach:
    """Take all off."""


@dataclass(frozen=True)
class Run:
    """One call of the pipeline."""

    asked: Asked


@dataclass(frozen=True)
class Break:
    """A run that raises, in the n-th call of a block or of the transformer; it may be over before."""

    asked: Asked
    block: int | None
    after: int


@dataclass(frozen=True)
class Interrupt:
    """A run that a callback stops at its end of a step, where the pipeline has callbacks."""

    asked: Asked
    after: int


@dataclass(frozen=True)
class Other:
    """A second pipeline of the same transformer runs plainly, and may not be accelerated as well."""

    asked: Asked


@dataclass(frozen=True)
class Copy:
    """A deep copy runs plainly."""

    asked: Asked


@dataclass(frozen=True)
class Replace:
    """Another scheduler, in the middle of it all."""

    scheduler: int


Event = Attach | Detach | Run | Break | Interrupt | Other | Copy | Replace


class Story:
    """A pipeline, what is attached to it, and what its runs gave so far."""

    def __init__(self, tiny: str) -> None:
        self.tiny, self.scheduler = tiny, 0
        self.pipe = build(tiny)
        self.before, self.classes = snapshot(self.pipe), classes_of(self.pipe)
        self.recipe: tuple[Method, ...] = ()
        self.given: dict[tuple[Any, ...], torch.Tensor | str] = {}

    @property
    def disabled(self) -> bool:
        return all(method == type(method).disabled() for method in self.recipe)

    def attach(self, recipe: tuple[Setting, ...]) -> None:
        try:
            methods = tuple(setting.config(self.tiny) for setting in recipe)
        except DitaError:
            return count("not calibrated")
        before = snapshot(self.pipe)
        try:
            dita.accelerate_pipeline(self.pipe, *methods)
            self.recipe = methods
        except DitaError:
            count("refused")
            assert_same_snapshot(before, snapshot(self.pipe))

    def run(self, asked: Asked) -> None:
        if not self.recipe:
            assert torch.equal(call(self.tiny, self.pipe, asked), plain(self.tiny, self.scheduler, asked)[0])
            return
        across = any(method.across_runs for method in self.recipe)
        key = (self.recipe, self.scheduler, asked)
        for _ in range(1 if key in self.given or across else 2):
            try:
                got: torch.Tensor | str = call(self.tiny, self.pipe, asked)
            except DitaError as error:
                got = str(error)
                count(f"refused to run: {got[:40]}")
            if isinstance(got, torch.Tensor):
                assert got.isfinite().all()
                assert_consistent(dita.report(self.pipe).last)
                if self.disabled:
                    assert torch.equal(got, plain(self.tiny, self.scheduler, asked)[0])
            if not across:
                assert_equal(got, self.given.setdefault(key, got))

    def broken(self, what: Break) -> None:
        ticks = 0

        def tick(*_: Any) -> None:
            nonlocal ticks
            ticks += 1
            if ticks == what.after:
                raise Lamp

        model = self.pipe.transformer
        blocks = [module for name in BLOCKS for module in getattr(model, name, ())]
        where = model if what.block is None else blocks[what.block % len(blocks)]
        handle = where.register_forward_pre_hook(tick)
        try:
            call(self.tiny, self.pipe, what.asked)
        except Lamp:
            count("broken")
        except DitaError:
            pass
        finally:
            handle.remove()

    def interrupted(self, what: Interrupt) -> None:
        if self.tiny == "dit":
            return

        def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step + 1 >= what.after
            return tensors

        with contextlib.suppress(DitaError):
            call(self.tiny, self.pipe, what.asked, callback_on_step_end=stop)

    def other(self, asked: Asked) -> None:
        parts = {**self.pipe.components, "scheduler": SCHEDULERS[self.tiny][self.scheduler]()}
        twin: Any = type(self.pipe)(**parts)
        twin.set_progress_bar_config(disable=True)
        if self.recipe:
            with pytest.raises(DitaError, match="is shared"):
                dita.accelerate_pipeline(twin, "taylorseer")
        assert torch.equal(call(self.tiny, twin, asked), plain(self.tiny, self.scheduler, asked)[0])

    def copied(self, asked: Asked) -> None:
        twin = copy.deepcopy(self.pipe)
        assert torch.equal(call(self.tiny, twin, asked), plain(self.tiny, self.scheduler, asked)[0])

    def tell(self, what: Event) -> None:
        if isinstance(what, Attach):
            self.attach(what.recipe)
        elif isinstance(what, Detach):
            dita.restore_pipeline(self.pipe)
            self.recipe = ()
        elif isinstance(what, Run):
            self.run(what.asked)
        elif isinstance(what, Break):
            self.broken(what)
        elif isinstance(what, Interrupt):
            self.interrupted(what)
        elif isinstance(what, Other):
            self.other(what.asked)
        elif isinstance(what, Copy):
            self.copied(what.asked)
        else:
            self.scheduler = what.scheduler % len(SCHEDULERS[self.tiny])
            self.pipe.scheduler = SCHEDULERS[self.tiny][self.scheduler]()
            self.before["scheduler"] = dict.fromkeys(vars(self.pipe.scheduler))

    def end(self) -> None:
        """What was given before is given still; and without the methods all is as it was."""
        known = [key for key in self.given if key[:2] == (self.recipe, self.scheduler)]
        if known and self.recipe:
            self.run(known[0][2])
        dita.restore_pipeline(self.pipe)
        expected, names = plain(self.tiny, self.scheduler, Asked())
        assert torch.equal(call(self.tiny, self.pipe, Asked()), expected)
        assert_same_snapshot(self.before, snapshot(self.pipe), names)
        assert_same_classes(self.classes)


def count(what: str) -> None:
    """For `--hypothesis-show-statistics`."""
    if currently_in_test_context():
        event(what)


def assert_equal(one: torch.Tensor | str, two: torch.Tensor | str) -> None:
    """The same output, or the same refusal."""
    if isinstance(one, str) or isinstance(two, str):
        assert one == two
    else:
        assert torch.equal(one, two)


strengths = st.sampled_from(("forced", "forced", "default", "disabled", *(f"ladder {n}" for n in range(4))))


def one_of(names: tuple[str, ...]) -> st.SearchStrategy[Setting]:
    return st.builds(Setting, st.sampled_from(names), strengths, st.sampled_from(tuple(KEEPS)))


recipes = st.one_of(
    st.tuples(one_of(CACHING)),
    st.tuples(one_of(METHODS)),
    st.tuples(one_of(CACHING), one_of(INSIDE)),
    st.tuples(one_of(SAMPLING), one_of(CACHING)),
    st.tuples(one_of(METHODS), one_of(METHODS)),
    st.tuples(one_of(CACHING), one_of(INSIDE), one_of(SAMPLING)),
)
calls = st.builds(
    Asked,
    st.sampled_from((3, 4, 2, 1)),
    st.integers(0, 1),
    st.sampled_from((1, 1, 2)),
    st.sampled_from(("small", "large")),
)
after = st.integers(1, 4)
happens = st.one_of(
    st.builds(Run, calls),
    st.builds(Run, calls),
    st.builds(Break, calls, st.none() | st.integers(0, 2), after),
    st.builds(Interrupt, calls, after),
    st.builds(Other, calls),
    st.builds(Copy, calls),
    st.builds(Replace, st.integers(0, 1)),
    st.builds(Detach),
    st.builds(Attach, recipes),
)
stories = st.builds(
    lambda recipe, asked, rest: (Attach(recipe), Run(asked), *rest), recipes, calls, st.lists(happens, max_size=2)
)


def go_through(tiny: str, events: tuple[Event, ...]) -> None:
    story = Story(tiny)
    with quietly():
        for what in events:
            story.tell(what)
        story.end()


FOUND: dict[str, tuple[str, tuple[Event, ...]]] = {
    "a stage of one step begins with noise of another size": (
        "wan",
        (Attach((Setting("progressive-resolution", "ladder 3"),)), Run(Asked())),
    ),
    "a call of another pipeline after a run that was left in the middle": (
        "wan",
        (Attach((Setting("freqca"),)), Interrupt(Asked(4), 1), Other(Asked())),
    ),
}
"""What went wrong once."""


@pytest.mark.parametrize("found", FOUND)
def test_what_was_found_stays_mended(found: str) -> None:
    go_through(*FOUND[found])


@pytest.mark.parametrize("tiny", PARTS)
def test_whatever_happens(tiny: str) -> None:
    @settings(max_examples=SEQUENCES // len(PARTS))
    @given(stories)
    def drawn(events: tuple[Event, ...]) -> None:
        go_through(tiny, events)

    (seed(crc32(tiny.encode()))(drawn) if SEQUENCES == 200 else drawn)()
