"""One transformer under acceleration: its hooks, and the passage of each call through the handlers' sites."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from dita.agreement import Agreement, group_of
from dita.anatomy import Anatomy, Block, ModulePart, attention_site, input_site
from dita.attention_view import Attended, AttentionTaken, AttentionView
from dita.clock import RunClock
from dita.compilation import Compilation
from dita.errors import DitaError
from dita.grid import Grid, token_grid
from dita.loop import Loop, LoopVariables, Request, one_by_one, roles_of
from dita.offload import Offload
from dita.passage import (
    Hooked,
    Original,
    Timer,
    attention_of,
    check_inputs,
    first_tensor,
    flatten,
    latents_of,
    left_out,
    on_some_tokens,
    record_of,
    run_to_attention,
)
from dita.patch import CallPatch, Patch, compiled_call
from dita.reporting import RunReport
from dita.seams import Call, Features, Handler, Position, Site
from dita.token_input import TokenInput


class ModelRuntime:
    """Hooks one transformer and drives the handlers.

    Args:
        number: which transformer of the pipeline this is; Wan2.2 has two.
        name: the pipeline's attribute, such as "transformer_2".
        anatomy: what was found in it.
        handlers: the methods at work, in the user's order.
        clock: the pipeline's run clock.
        current_report: returns the report of the run under way.
        loops: methods at work on the sampling loop, the first one outermost.
        pipe: the pipeline.
        outer: what the pipeline calls: the transformer, or what `torch.compile` made of it.
        per_sample: run the samples of a batch one by one, each on decisions of its own.
    """

    def __init__(
        self,
        number: int,
        name: str,
        anatomy: Anatomy,
        handlers: Sequence[Handler],
        clock: RunClock,
        current_report: Callable[[], RunReport],
        loops: Sequence[Loop] = (),
        pipe: Any = None,
        outer: torch.nn.Module | None = None,
        per_sample: bool = False,
    ) -> None:
        self.outer = anatomy.model if outer is None else outer
        self.compilation = Compilation(self.outer, anatomy.model)
        self._offload = Offload([block.module for block in anatomy.blocks])
        self.number, self.name, self.anatomy = number, name, anatomy
        self.handlers, self.clock, self._current_report = tuple(handlers), clock, current_report
        self.loops, self._variables, self._per_sample = tuple(loops), LoopVariables(pipe), per_sample
        self.group, self._agree = None, Agreement(None)
        self._keeps = any(handler.sites for handler in self.handlers)
        self._roles: tuple[tuple[int, int], list[tuple[str, ...]]] = ((-1, -1), [])
        self._ran: tuple[int, int] = (-1, -1)
        self._patches: list[Patch] = []
        self._branch: str | None = None
        self._run = -1
        self._call: Call | None = None
        self._occurrences: dict[Site, int] = {}
        self._open: dict[Site, Features] = {}
        self._skipping: tuple[Site, Handler, Features] | None = None
        self._grids: dict[Any, Grid] = {}
        self._parameters = tuple(inspect.signature(type(anatomy.model).forward).parameters)[1:]
        self._entries = [(site, h) for h in self.handlers for site in h.sites if site.kind == "entry"]
        whole = [Hooked(site, h) for h in self.handlers for site in h.sites if site.kind == "model"]
        self._outermost = whole[0] if whole else None
        spans = [(site, handler) for handler in self.handlers for site in handler.sites if site.kind == "span"]
        self._starts = {n: [p for p in spans if p[0].first == n] for n in range(len(anatomy.blocks))}
        self._ends = {n: [p for p in spans if p[0].last == n] for n in range(len(anatomy.blocks))}
        for pairs in self._starts.values():
            pairs.sort(key=lambda pair: -pair[0].last)
        for pairs in self._ends.values():
            pairs.sort(key=lambda pair: -pair[0].first)

    def attach(self) -> None:
        """Hook the transformer, the blocks under some span, and the module sites."""
        model = self.anatomy.model
        self.compilation.look()
        self._patch(self.outer, self._model)
        if hasattr(model, "cache_context"):
            self._apply(Patch(model, "cache_context", self._cache_context))
        sites = {site for handler in self.handlers for site in handler.sites}
        check_inputs(self.anatomy, self.handlers)
        # The innermost hooks come first: a module that is skipped, or whose block is, reads nothing.
        for block, site in zip(self.anatomy.blocks, self.anatomy.block_inputs, strict=True):
            if site in sites:
                place = block.entry.returns.index("hidden")
                self._patch(block.module, self._around_input(site, block.module, block, place))
        for part in (*self.anatomy.modules, *self.anatomy.inner):
            if input_site(part.site) in sites:
                block = self.anatomy.blocks[part.site.block]
                self._patch(part.module, self._around_input(input_site(part.site), part.module, block))
        covered = {n for site in sites if site.kind in ("span", "entry") for n in range(site.first, site.last + 1)}
        for block in self.anatomy.blocks:
            if block.number in covered:
                self._patch(block.module, self._around_block(block))
        for part in (*self.anatomy.modules, *self.anatomy.inner, *self.anatomy.linears):
            if part.site in sites:
                self._patch(part.module, self._around_module(part))
                for feeder in part.feeders:
                    self._patch(feeder, self._around_feeder(part, feeder))
        for part in (*self.anatomy.modules, *self.anatomy.inner):
            if attention_site(part.site) in sites:
                self._patch(part.module, self._around_attention(attention_site(part.site), part))

    def detach(self) -> None:
        """Put every hooked method back, last first."""
        while self._patches:
            self._patches.pop().remove()
        for handler in self.handlers:
            handler.begin_run()

    def stepped(self, position: Position, latents: torch.Tensor) -> torch.Tensor:
        """The solver finished a step for which this model was called; each handler may correct the latents."""
        if self._ran != (self.clock.run, position.step):
            return latents  # some method left out every call of this step
        for handler in self.handlers:
            latents = handler.stepped(position, latents)
        return latents

    def bytes_held(self) -> int:
        """Bytes of tensors that the handlers keep now, and with the first transformer those of the loop's methods."""
        loops = sum(loop.bytes_held() for loop in self.loops) if self.number == 0 else 0
        return loops + sum(handler.bytes_held() for handler in self.handlers)

    def _patch(self, target: torch.nn.Module, around: Any) -> None:
        self._apply(CallPatch(target, around, self.compilation.inlines(target)))

    def _apply(self, patch: Patch) -> None:
        patch.apply()
        self._patches.append(patch)

    def _cache_context(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = kwargs.get("name", args[0] if args else None)

        @contextlib.contextmanager
        def scope() -> Iterator[None]:
            before, self._branch = self._branch, name
            try:
                with original(*args, **kwargs):
                    yield
            finally:
                self._branch = before

        return scope()

    def _model(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = None if self._call is not None else self.clock.position(self.number, self._branch)
        if position is not None and torch.is_grad_enabled():
            self._current_report().note = "gradients are enabled: run the loop under torch.no_grad()"
            position = None
        if position is None:
            return self._plain(original, args, kwargs)
        if self._run != self.clock.run:
            self._run = self.clock.run
            self._grids.clear()
            self._offload.begin_run()
            self._agree = Agreement(self.group or group_of(self.anatomy.model))
            for handler in self.handlers:
                handler.begin_run()
        if not (self.loops or self._per_sample):
            return self._one(position, ("all",), "", original, args, kwargs)

        def together(request: Request) -> Any:
            position, roles, reason = request.position, request.roles, request.reason
            said = {"scale": request.scale, "tokens": request.tokens, "grid": request.grid, "fresh": request.fresh}
            said["due"] = request.due(position.sample)
            return self._one(position, roles, reason, original, request.args, request.kwargs, **said)

        def carried_out(request: Request) -> Any:
            if self._per_sample and not request.each and request.batch > 1:
                request = replace(request, each=({},) * request.batch)
            return one_by_one(request, together) if request.each else together(request)

        run: Any = carried_out
        for loop in reversed(self.loops):
            run = functools.partial(loop.model, run=run)
        return run(self._request(position, args, kwargs))

    def _request(self, position: Position, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request:
        """The call as methods on the sampling loop see it."""
        variables, pipe = self._variables.read(), self._variables.pipe
        if self._roles[0] != self.clock.entry:
            self._roles = (self.clock.entry, [])
        scale = LoopVariables.scale(variables, pipe)
        perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
        request = Request(
            position, ("all",), self._parameters, args, kwargs, self.anatomy, scale, self._left_out, not perturbed,
            self._keeps, remark=self._remark,
        )  # fmt: skip
        latents = request.get("hidden_states")
        roles = roles_of(variables, pipe, position.branch, self._roles[1], latents)
        self._roles[1].append(roles)
        named = replace(position, branch=roles[0]) if len(roles) == 1 and roles != ("all",) else position
        return replace(request, roles=roles, position=named)

    def _remark(self, text: str) -> None:
        self._current_report().note = text

    def _left_out(self, position: Position, role: str, reason: str) -> None:
        self._current_report().add(*left_out(position, role, reason, self.name), self.bytes_held())

    def _one(
        self,
        position: Position,
        roles: tuple[str, ...],
        reason: str,
        original: Original,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        scale: float | None = None,
        tokens: tuple[int, int] | None = None,
        grid: Grid | None = None,
        fresh: bool = False,
        due: bool | None = None,
    ) -> Any:
        """Run one call, of one branch or all of them batched, through the handlers' sites."""
        self._ran = (self.clock.run, position.step)
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        call = self._describe(position, args, kwargs, tensors)
        call.reason, call.scale, call.tokens, call.fresh, call.due = reason, scale, tokens, fresh, due
        call.grid = call.grid if grid is None else grid
        timer = Timer(cuda=bool(tensors) and tensors[0].is_cuda)
        self._call = call
        self._occurrences.clear()
        self._offload.begin_call()
        try:
            for handler in self.handlers:
                handler.begin_call(call)
            result = self._model_site(call, original, args, kwargs)
            self._check_closed()
            for handler in self.handlers:
                handler.end_call(call)
        finally:
            self._call, self._skipping = None, None
            self._open.clear()
        timer.stop()
        for role in roles:
            placed = position if len(roles) == 1 else replace(position, branch=role)
            record, held = record_of(placed, call, self.name), self.bytes_held()
            self._current_report().add(record, timer, held, call.note, 1 / len(roles))
        return result

    def _describe(
        self, position: Position, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]
    ) -> Call:
        """Gather what a handler may know of a call."""
        arguments = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        latents = latents_of(arguments)
        shapes = tuple(t.shape for t in tensors)
        if shapes not in self._grids:
            self._grids[shapes] = token_grid(self.anatomy.model, arguments, latents)
        said = (self.clock.scheduler_fingerprint, self._grids[shapes], latents, arguments)
        return Call(position, shapes, *said, schedule=self.clock.schedule, agree=self._agree)

    def _plain(self, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what belongs to no step of this pipeline, or is run besides: untouched, and remembered nowhere."""
        call, self._call = self._call, None
        try:
            return original(*args, **kwargs)
        finally:
            self._call = call

    def _model_site(self, call: Call, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._outermost is None:
            return original(*args, **kwargs)
        return self._around_site(self._outermost, call, original, args, kwargs)

    def _check_closed(self) -> None:
        if self._skipping is not None:
            name = self._skipping[0].name
            raise DitaError(
                f"{self.anatomy.name} never reached the end of {name}, which was to be skipped: the pipeline leaves "
                "out blocks of its own (skip-layer guidance, for one). Switch that off or restore the pipeline."
            )

    def _around_block(self, block: Block) -> Any:
        starts, ends = self._starts[block.number], self._ends[block.number]
        entries = [(*pair, attention_of(block)) for pair in self._entries if pair[0].first == block.number]

        def around(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None:
                return original(*args, **kwargs)
            if self._skipping is not None and not ends:
                self._offload.skips(block.module)
                return block.pack(block.read(args, kwargs))
            if self._skipping is None:
                for site, handler, attention in entries:
                    self._offload.runs(block.module)
                    entry = self._entry(block, attention, original, args, kwargs)
                    handler.computed(site, 0, call, (), (entry,))
                for site, handler in starts:
                    inputs = block.read(args, kwargs)
                    if not handler.compute(site, call, inputs):
                        self._skipping = (site, handler, inputs)
                        break
                    # A block may write into its input; what is kept of it is a copy.
                    wanted = handler.wants_inputs(site)
                    self._open[site] = tuple(None if t is None else t.clone() for t in inputs) if wanted else ()
            if self._skipping is None:
                self._offload.runs(block.module)
                for site, handler in starts:
                    if handler.rehearses(site, call):
                        handler.rehearsed(site, call, self._rehearse(handler, block, original, args, kwargs))
                result = original(*args, **kwargs)
                streams = block.unpack(result) if ends else ()
            else:
                self._offload.skips(block.module)
                site, handler, inputs = self._skipping
                streams = block.read(args, kwargs)
                if site.last == block.number:
                    streams = handler.skipped(site, 0, call, inputs)
                    self._skipping = None
                result = block.pack(streams)
            for site, handler in ends:
                if self._skipping is not None:
                    # What overlaps a skipped span and ends within it has no output this time.
                    self._open.pop(site, None)
                elif site in self._open:
                    handler.computed(site, 0, call, self._open.pop(site), streams)
            return result

        return around

    def _rehearse(
        self, handler: Handler, block: Block, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Features:
        """Run a block with nothing inside it skipped or remembered, on copies of what it reads."""
        copied = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
        named = {name: a.clone() if isinstance(a, torch.Tensor) else a for name, a in kwargs.items()}
        return block.unpack(self._plain(original, copied, named))

    def _entry(
        self,
        block: Block,
        attention: torch.nn.Module,
        original: Original,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        run = original if compiled_call(block.module) is None else block.module._call_impl
        return self._plain(run_to_attention, (block, attention, self.compilation.uncompiled(run), args, kwargs), {})

    def _around_module(self, part: ModulePart) -> Any:
        handler, *others = (h for h in self.handlers if part.site in h.sites)
        if others:
            raise DitaError(
                f"two methods act on the output of {part.site.name} of {self.anatomy.name}, {handler.owner} and "
                f"{others[0].owner}, of which only one would be heard: they exclude each other; choose one"
            )
        hooked = Hooked(part.site, handler, part)

        def around(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None:
                return original(*args, **kwargs)
            return self._around_site(hooked, call, original, args, kwargs)

        return around

    def _around_attention(self, site: Site, part: ModulePart) -> Any:
        part.check_backend()
        handlers = [h for h in self.handlers if site in h.sites]

        def around(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None:
                return original(*args, **kwargs)

            def take(seen: Attended, plain: Callable[[Attended], torch.Tensor]) -> torch.Tensor:
                occurrence = self._occurrences.get(site, 0)
                self._occurrences[site] = occurrence + 1
                for handler in handlers:
                    plain = functools.partial(handler.attend, site, occurrence, call, plain=plain)
                return plain(seen)

            before = self._occurrences.get(site, 0)
            with AttentionTaken(take, part.flex):
                result = self.compilation.uncompiled(original)(*args, **kwargs)
            if self._occurrences.get(site, 0) == before:
                self._remark(f"{part.site.name} called no attention that a method could take part in")
            return result

        return around

    def _around_input(self, site: Site, module: torch.nn.Module, block: Block, place: int = 0) -> Any:
        """Let the handler reduce the image tokens that a module or block reads."""
        handler = next(h for h in self.handlers if site in h.sites)
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        text_at = block.entry.text

        def around(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None:
                return original(*args, **kwargs)
            occurrence = self._occurrences.get(site, 0)
            self._occurrences[site] = occurrence + 1
            where = site.name.removeprefix("input of ")
            found = TokenInput.read(where, names, args, kwargs, call.grid, text_at, place)
            if isinstance(found, str):
                handler.irreducible(site, call, found)
                return original(*args, **kwargs)
            reducer = handler.reducer(site, occurrence, call, found.tokens, found.text)
            return original(*args, **kwargs) if reducer is None else found.run(original, reducer)

        return around

    def _around_site(
        self, hooked: Hooked, call: Call, original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run or skip a module or the model, whose output is a tensor, a tuple with Nones, or has `.sample`."""
        site, handler = hooked.site, hooked.handler
        occurrence = self._occurrences.get(site, 0)
        self._occurrences[site] = occurrence + 1
        if hooked.driven:
            return self._driven(hooked, occurrence, call, lambda: original(*args, **kwargs))
        inputs: Features = (call.latents,) if site.kind == "model" else ()
        if hooked.wants_inputs:
            inputs = (first_tensor(args, kwargs),)
        if handler.compute(site, call, inputs):
            if hooked.part is not None and handler.wants_attention(site, call):
                with AttentionView(lambda seen: handler.attended(site, call, seen)):
                    result = self.compilation.uncompiled(original)(*args, **kwargs)
            else:
                result = original(*args, **kwargs)
            features, hooked.rebuild[occurrence] = flatten(result)
            handler.computed(site, occurrence, call, inputs, features)
            return result
        if hooked.by_tokens:
            stood_in = on_some_tokens(hooked, call, occurrence, inputs, original, args, kwargs)
            if stood_in is not None:
                return hooked.rebuild[occurrence](stood_in)
        return hooked.rebuild[occurrence](handler.skipped(site, occurrence, call, inputs))

    def _driven(self, hooked: Hooked, occurrence: int, call: Call, original: Callable[[], Any]) -> Any:
        """Leave it to the handler how often a module or the model runs."""
        site = hooked.site

        def run() -> Features:
            if site.kind == "model":
                self._occurrences.clear()
            features, hooked.rebuild[occurrence] = flatten(original())
            return features

        features = hooked.handler.drive(site, occurrence, call, run)
        return hooked.rebuild[occurrence](features)

    def _around_feeder(self, part: ModulePart, feeder: torch.nn.Module) -> Any:
        """A module whose output only feeds a skipped one: stand in for it with zeros that take no memory."""
        handler = next(h for h in self.handlers if part.site in h.sites)
        stand_ins: dict[tuple[str, int], tuple[Callable[[Features], Any], Features]] = {}

        def around(original: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None:
                return original(*args, **kwargs)
            stream = call.position.stream
            if handler.compute(part.site, call, ()):
                result = original(*args, **kwargs)
                features, rebuild = flatten(result)
                zeros = tuple(None if t is None else t.new_zeros(()).expand(t.shape) for t in features)
                stand_ins[stream] = (rebuild, zeros)
                return result
            rebuild, zeros = stand_ins[stream]
            return rebuild(zeros)

        return around
