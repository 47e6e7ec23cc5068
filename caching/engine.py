"""The engine that runs every caching method: a recipe of what, when and how, carried out at the sites of one model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from dita.anatomy import Anatomy
from dita.attention_view import Attended
from dita.caching.finite import Finite
from dita.caching.forecast import Forecast
from dita.caching.history import History
from dita.caching.policy import Guards, Policy, Verdict, View, relative_l1
from dita.caching.storage import Storage, bytes_of
from dita.errors import DitaError, DitaWarning
from dita.seams import Call, Features, Fresh, Handler, Position, Site


@dataclass(frozen=True)
class Recipe:
    """A caching method on the engine's axes.

    Attributes:
        what: "module" (outputs of attention and MLP before the gate), "trunk" (all blocks), "span" (blocks
            `first`..`last`) or "model" (the transformer's output).
        when: makes the policy of one stream.
        how: the forecast.
        keep: "residual" (output minus input; spans and the model), "output", or "pair" (output and input; modules).
        guards: limits on the policy.
        first, last: the span; a negative last counts from the end, -1 being the last block.
        text: forecast the text stream too; without it a skipped span hands the text on as it came in.
        oldest_anchor: steps before this one are computed but not forecast from.
        follow_first: the step's first branch decides for all; otherwise each branch for itself.
        from_probe: the residual is that of the trunk, from the input of the probe blocks on, not from their output.
        sites: spans or modules to reuse, in place of those that `what` stands for.
        watch: sites that the policy sees besides.
        attend: attention modules whose queries, keys and values the policy sees at computed steps.
        verify: the span of one block that is run for real too, on steps that the policy wants verified.
        correct: given the position of a finished solver step and its latents, returns those to go on from.
    """

    what: str
    when: Callable[[], Policy]
    how: Forecast = field(default_factory=Forecast)
    keep: str = "residual"
    guards: Guards = field(default_factory=Guards)
    first: int = 0
    last: int = -1
    text: bool = True
    oldest_anchor: int = 0
    follow_first: bool = False
    from_probe: bool = False
    sites: tuple[Site, ...] = ()
    watch: tuple[Site, ...] = ()
    attend: tuple[Site, ...] = ()
    verify: Site | None = None
    correct: Callable[[Position, torch.Tensor], torch.Tensor] | None = None


@dataclass
class Stream:
    """State of one guidance branch and solver stage within a run."""

    policy: Policy
    how: Forecast
    storage: Storage
    shapes: tuple[tuple[int, ...], ...]
    histories: dict[tuple[Site, int], History] = field(default_factory=dict)
    watched: dict[Site, torch.Tensor] = field(default_factory=dict)
    finite: Finite = field(default_factory=Finite)
    newest: int | None = None
    skipped_in_row: int = 0
    skipped_total: int = 0

    def history(self, site: Site, occurrence: int) -> History:
        """The ring of a site, made on first use."""
        history = self.histories.get((site, occurrence))
        if history is None:
            history = self.histories[site, occurrence] = self.how.make_history(self.storage)
        return history

    def newest_of(self, site: Site) -> Features:
        """The newest features kept of a site, () if there are none."""
        history = self.histories.get((site, 0))
        return history.newest if history is not None else ()

    def bytes_held(self) -> int:
        """Bytes of all tensors kept."""
        rings = sum(history.bytes_held() for history in self.histories.values())
        return rings + bytes_of(self.watched.values()) + self.policy.bytes_held()


def plan_sites(recipe: Recipe, anatomy: Anatomy, method: str) -> tuple[tuple[Site, ...], tuple[Site, ...], Site | None]:
    """Find a recipe's sites in a model.

    Returns:
        the reused sites, the watched blocks, and the probe span or None.

    Raises:
        DitaError: the model lacks the seam, or has too few blocks.
    """
    policy = recipe.when()
    if recipe.what == "model":
        return (Site("model", "model"),), recipe.watch, None
    anatomy.require("block", method)
    count = len(anatomy.blocks)
    probe = policy.probe_blocks
    watched = tuple(anatomy.span(n, n) for n in range(count)) if policy.watch_blocks else ()
    watched += recipe.watch
    if recipe.sites:
        return recipe.sites, watched, anatomy.span(0, probe - 1) if probe else None
    if recipe.what == "module":
        anatomy.require("module", method)
        return tuple(part.site for part in anatomy.modules), watched, None
    first, last = (0, count - 1) if recipe.what == "trunk" else (recipe.first, recipe.last % count)
    first = max(first, probe)
    if recipe.what == "span" and recipe.last < -count or first > last:
        raise DitaError(
            f"{method} keeps {probe} blocks at the front and {-1 - recipe.last} at the end running, but {anatomy.name} "
            f"has {count}: nothing is left to reuse; ask for fewer"
        )
    return anatomy.spans(first, last), watched, anatomy.span(0, probe - 1) if probe else None


class CacheHandler(Handler):
    """Carries out one recipe on one model. See `dita.seams.Handler` for when each method is called."""

    def __init__(self, recipe: Recipe, anatomy: Anatomy, method: str, storage: Storage | None = None) -> None:
        self.recipe, self.anatomy, self.storage = recipe, anatomy, storage or Storage()
        self.method, self._told = method, False
        self.reused, self.watched, self.probe = plan_sites(recipe, anatomy, method)
        probe = () if self.probe is None else (self.probe,)
        verified = () if recipe.verify is None else (recipe.verify,)
        kinds = (*probe, *self.reused, *self.watched, *verified, *recipe.attend)
        self.sites: tuple[Site, ...] = tuple(dict.fromkeys(kinds))
        self._reused, self._watched = frozenset(self.reused), frozenset(self.watched)
        self.ranks = frozenset(recipe.attend)
        self._residual = recipe.keep == "residual" and recipe.what in ("trunk", "span", "model")
        self.indicator = recipe.when()
        self._measures_residual = self.indicator.wants_residual and recipe.what in ("trunk", "span")
        self._units = {site: _units(site) for site in self.reused}
        self._whole = set[int | Site]().union(*self._units.values())
        self._streams: dict[tuple[str, int], Stream] = {}
        self._leader: tuple[tuple[int, int, int | None], Verdict] | None = None
        self.begin_run()

    def begin_run(self) -> None:
        """Forget everything."""
        self._streams.clear()
        self._leader, self._told = None, False
        self._begin_call()

    def _begin_call(self) -> None:
        self._current: Stream | None = None
        self._verdict: Verdict | None = None
        self._view: View | None = None
        self._changes: list[torch.Tensor] = []
        self._stood_in: set[int | Site] = set()
        self._origin: Features = ()
        self._exact: Features = ()

    def begin_call(self, call: Call) -> None:
        """Clear what belonged to the last call."""
        self._begin_call()

    def _stream(self, call: Call) -> Stream:
        if self._current is None:
            key = call.position.stream
            stream = self._streams.get(key)
            if stream is None or stream.shapes != call.shapes:
                # Features of another shape are of no use: what a change of resolution leaves behind is a first step.
                stream = self._anew(call)
            self._current = stream
        return self._current

    def _anew(self, call: Call) -> Stream:
        stream = Stream(self.recipe.when(), self.recipe.how, self.storage, call.shapes)
        self._streams[call.position.stream] = self._current = stream
        return stream

    def compute(self, site: Site, call: Call, inputs: Features) -> bool:
        """Probe and watched sites always run; all reused sites of a call share one verdict."""
        if site not in self._reused:
            return True
        verdict = self._verdict
        if verdict is None:
            verdict = self._verdict = self._decide(call)
            call.value, call.reason = verdict.value, verdict.reason
            self._make_view(call).computing = verdict.compute
        if verdict.compute or (verdict.computes is not None and call.agree(verdict.computes(site))[0]):
            return True
        # A site without a past cannot be skipped, whatever the policy says.
        return (site, 0) not in self._stream(call).histories

    def _make_view(self, call: Call) -> View:
        if self._view is None:
            stream = self._stream(call)
            gap = 0 if stream.newest is None else call.position.step - stream.newest
            self._view = View(
                call.position, call.shapes, call.scheduler, call.grid, call.latents, stream.newest_of, gap,
                stream.skipped_in_row, schedule=call.schedule, due=call.due,
            )  # fmt: skip
        return self._view

    def _decide(self, call: Call) -> Verdict:
        stream, view, position = self._stream(call), self._make_view(call), call.position
        moment = (position.step, position.stage, position.sample)
        if stream.newest is None:
            stream.policy.begin(view)
            verdict = Verdict(True, "first step")
        elif call.fresh:
            verdict = Verdict(True, call.reason or "guidance compares the branches")
        elif self.recipe.follow_first and self._leader is not None and self._leader[0] == moment:
            leader = self._leader[1]
            return self._sound(replace(leader, reason=f"as the first branch: {leader.reason}"), call)
        else:
            verdict = self.recipe.guards.verdict(view, stream.skipped_total) or stream.policy.decide(view)
            verdict = self._agreed(self._sound(verdict, call), call)
        if self._leader is None or self._leader[0] != moment:
            self._leader = (moment, verdict)
        return verdict

    def _sound(self, verdict: Verdict, call: Call) -> Verdict:
        """Compute where the policy's number or what was kept is not finite; the stream then begins anew."""
        stream, value = self._stream(call), verdict.value
        odd = "its indicator" if value is not None and not math.isfinite(value) else ""
        if verdict.compute:
            if value is None or not math.isnan(value):  # infinite is what a change from nothing is
                return verdict
        elif not odd and stream.finite.holds:
            return verdict
        else:
            self._anew(call).skipped_total = stream.skipped_total
        reason = f"{odd or 'what was kept'} is not finite"
        if not self._told:
            self._told = True
            text = f"{self.method}: {reason} at step {call.position.step}, which is computed; so are others like it"
            warnings.warn(text, DitaWarning, stacklevel=2)
        return Verdict(True, reason, value)

    def _agreed(self, verdict: Verdict, call: Call) -> Verdict:
        """Compute what another rank that works on the same sample computes."""
        compute, verify = call.agree(verdict.compute, verdict.verify)
        if compute and not verdict.compute:
            return Verdict(True, "another rank computes", verdict.value)
        return verdict if verify == verdict.verify else replace(verdict, verify=verify)

    def wants_inputs(self, site: Site) -> bool:
        """Residuals need the inputs of their span, and so do policies that watch one."""
        if site == self.probe or (site in self.recipe.watch and site.kind == "span"):
            return True
        if self.recipe.keep == "pair" and site.kind == "module":
            return True
        return site in self._reused and (self._residual or self._measures_residual)

    def computed(self, site: Site, occurrence: int, call: Call, inputs: Features, outputs: Features) -> None:
        """Keep what the recipe keeps."""
        stream, view = self._stream(call), self._make_view(call)
        if site == self.probe:
            view.probe = _difference(outputs[0], inputs[0])
            self._origin = inputs
        if site in self._watched and stream.policy.watch_blocks:
            self._watch(stream, site, outputs[0])
        if site == self.recipe.verify and self._exact:
            stream.policy.verified(outputs, self._exact, view)
        if site == self.probe or site in self._watched or site in self._reused:
            stream.policy.saw(site, inputs, outputs, view)
        if site not in self._reused:
            return
        if site.kind == "model" and self._residual:
            outputs = (outputs[0] - matching(inputs[0], outputs[0]), *outputs[1:])  # pyright: ignore
            inputs = ()
        inputs = self._start(site, inputs)
        if self._keeps_ends(site):
            outputs = (outputs[0], None)
        if self.recipe.keep == "pair":
            outputs = (*outputs, *inputs)
        if inputs and (self._residual or self._measures_residual):
            residual = tuple(_difference(o, i) for o, i in zip(outputs, inputs, strict=True))
            view.residual = residual[0] if self._measures_residual else None
            outputs = residual if self._residual else outputs
        if call.position.local_step >= self.recipe.oldest_anchor:
            stream.finite.saw(outputs, self.storage)
            stream.history(site, occurrence).push(call.position.step, outputs)

    def _start(self, site: Site, inputs: Features) -> Features:
        """Where a span's residual is measured from."""
        probed = self.recipe.from_probe and self.probe is not None and site.first == self.probe.last + 1
        return self._origin if probed and self._origin else inputs

    def _keeps_ends(self, site: Site) -> bool:
        """The text stream is left out: by the recipe, or because it ends with the blocks and nothing reads it."""
        unused = site.ends and not self.anatomy.text_used_after
        return site.kind == "span" and (unused or not self.recipe.text)

    def expects(self, site: Site, inputs: Features, outputs: Features) -> tuple[Features, Features]:
        """What comes to be kept because of a site, were all anchors there: tensors of the sizes given, repeated.

        Args:
            site: a site that the method reuses, watches or probes; of another nothing is kept.
            inputs, outputs: that passed through it in one call; tensors on the meta device will do.

        Returns:
            features in the anchors, as they were computed, and tensors kept for indicators.
        """
        if site not in self.sites:
            return (), ()
        anchors: Features = ()
        if site in self._reused:
            features = (outputs[0], None) if self._keeps_ends(site) else outputs
            anchors = (*features, *inputs) if self.recipe.keep == "pair" else features
        watched = site in self._watched and self.indicator.watch_blocks
        asked = site == self.probe or site in self._watched or site in self._reused
        kept = self.indicator.keeps(site, inputs, outputs) if asked else ()
        return anchors * self.recipe.how.anchors, (*kept, *outputs[:1] * watched)

    def move(self, storage: Storage) -> None:
        """Keep what is kept, and what comes, in another way."""
        self.storage = storage
        for stream in self._streams.values():
            stream.storage = storage
            for history in stream.histories.values():
                history.move(storage)

    def _watch(self, stream: Stream, site: Site, output: torch.Tensor | None) -> None:
        if output is None:
            return
        old = stream.watched.get(site)
        if old is not None and old.shape == output.shape:
            self._changes.append(relative_l1(output, old))
            old.copy_(output)
        else:
            stream.watched[site] = output.detach().clone()

    def skipped(self, site: Site, occurrence: int, call: Call, inputs: Features) -> Features:
        """Forecast the site's outputs from its anchors."""
        self._stood_in |= self._units[site]
        stream, how = self._stream(call), self.recipe.how
        history = stream.history(site, occurrence)
        base: Features = ()
        inputs = self._start(site, inputs)
        if self.recipe.keep == "pair":
            base = inputs
        if self._residual:
            base = inputs
            if site.kind == "model":  # of what it puts out besides, such as sound, the output itself is kept
                base = (matching(inputs[0], history.newest[0]), *(None for _ in history.newest[1:]))
        weights = None if self._verdict is None else self._verdict.weights
        plain = (len(history.steps) if weights is None else len(weights)) == 1 or (how.order == 0 and weights is None)
        forecast = how.forecast(history, base, site, call) if weights is None else history.combine(weights, base)
        call.action = "reused" if plain else "forecast"
        if self._keeps_ends(site):
            return (forecast[0], inputs[1])
        return forecast

    def fresh(self, site: Site, occurrence: int, call: Call, shape: tuple[int, ...]) -> Fresh | None:
        """Ask the verdict."""
        if self._verdict is None or self._verdict.fresh is None:
            return None
        if occurrence or (site, 1) in self._stream(call).histories:
            raise DitaError(
                f"{site.name} of {self.anatomy.name} runs on its tokens in several chunks; choosing among all of them "
                "needs them at once: switch chunking off (set_chunk_feed_forward(None) on its blocks)"
            )
        return self._verdict.fresh(site, shape)

    def refreshed(
        self, site: Site, occurrence: int, call: Call, inputs: Features, fresh: Fresh, outputs: Features
    ) -> Features:
        """Take the rows up into what is kept, and forecast from that."""
        history = self._stream(call).history(site, occurrence)
        self._stream(call).finite.saw(outputs, self.storage)
        history.refresh(fresh, outputs)
        if call.action == "computed":
            call.action = "partial"
        return self.recipe.how.forecast(history, inputs if self.recipe.keep == "pair" else (), site, call)

    def wants_attention(self, site: Site, call: Call) -> bool:
        """The recipe names the modules, the policy the steps."""
        if site not in self.ranks or (self._verdict is not None and not self._verdict.compute):
            return False
        return self._stream(call).policy.wants_attention(site, self._make_view(call))

    def attended(self, site: Site, call: Call, seen: Attended) -> None:
        """Hand on what an attention module reads."""
        self._stream(call).policy.attended(site, seen, self._make_view(call))

    def _stands_in(self, unit: int | Site) -> bool:
        """A unit was skipped, by itself or with the block around it."""
        return unit in self._stood_in or (isinstance(unit, Site) and unit.block in self._stood_in)

    def rehearses(self, site: Site, call: Call) -> bool:
        """Blocks are run for real on the steps that the policy wants verified."""
        return site == self.recipe.verify and self._verdict is not None and self._verdict.verify

    def rehearsed(self, site: Site, call: Call, outputs: Features) -> None:
        """Keep what the block really puts out until its draft is there."""
        self._exact = outputs

    def stepped(self, position: Position, latents: torch.Tensor) -> torch.Tensor:
        """Correct the latents, if the recipe does."""
        return latents if self.recipe.correct is None else self.recipe.correct(position, latents)

    def end_call(self, call: Call) -> None:
        """Tell the policy how the call went."""
        if self._verdict is None:
            return
        stream, view = self._stream(call), self._make_view(call)
        stream.finite.end_call()
        if call.action != "computed" and not (self._whole <= self._stood_in or all(map(self._stands_in, self._whole))):
            call.action = "partial"
        if self._changes:
            view.block_change = torch.stack(self._changes).mean(0)
        if self._verdict.compute or call.action == "computed":  # no site may have had a past to be skipped with
            stream.policy.computed(view)
            stream.newest, stream.skipped_in_row = call.position.step, 0
        else:
            stream.policy.skipped(view)
            stream.skipped_in_row += 1
            stream.skipped_total += 1
        self._begin_call()  # what the call left here would live on after the run

    def bytes_held(self) -> int:
        """Bytes kept over all streams."""
        return sum(stream.bytes_held() for stream in self._streams.values())


def _units(site: Site) -> set[int | Site]:
    """What a site stands for, for telling whether all of a model was reused: the blocks of a span, else itself."""
    return set(range(site.first, site.last + 1)) if site.kind == "span" else {site}


def matching(latents: torch.Tensor | None, output: torch.Tensor | None) -> torch.Tensor:
    """The latents laid out as a model's output: zeros for channels that only the output has, none of the others.

    Models that also predict a variance return more channels than they take; those that read a mask or an image besides
    the latents return fewer.

    Raises:
        DitaError: more than the channels differ.
    """
    if latents is None or output is None:
        raise DitaError("the transformer was called without a tensor to denoise: there is no latent to compare with")
    if latents.shape == output.shape:
        return latents
    differ = [n for n, sizes in enumerate(zip(latents.shape, output.shape, strict=False)) if sizes[0] != sizes[1]]
    # Packed tokens and Kandinsky have channels last, CogVideoX after the frames, others after the batch.
    places = {latents.ndim - 1} if latents.ndim == 3 else {1, 2, latents.ndim - 1}
    if latents.ndim != output.ndim or len(differ) != 1 or differ[0] not in places:
        raise DitaError(
            f"the transformer maps {tuple(latents.shape)} to {tuple(output.shape)}; only the channels may differ for "
            "the change of its latents to be reused"
        )
    axis = differ[0]
    shared = min(latents.shape[axis], output.shape[axis])
    result = torch.zeros_like(output)
    result.narrow(axis, 0, shared).copy_(latents.narrow(axis, 0, shared))
    return result


def _difference(new: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor | None:
    return None if new is None or old is None else new - old
