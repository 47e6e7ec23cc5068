"""Parts of the runtime that know no run: the clock of a call, a hooked site, what modules take and return."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dita.anatomy import Anatomy, Block, ModulePart, input_site
from dita.errors import DitaError
from dita.kernels.tokens import gather_tokens
from dita.parts import first_attention
from dita.reporting import StepRecord
from dita.seams import Call, Features, Handler, Position, Site

Original = Callable[..., Any]


class _Reached(Exception):
    """A block got as far as its attention."""


class Timer:
    """Seconds of one call: host clock on the CPU, events on a CUDA device, read when the report is."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        if self._cuda:
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._events[0].record()
        else:
            self._start, self._end = time.perf_counter(), 0.0

    def stop(self) -> None:
        """Mark the end of the call."""
        if self._cuda:
            self._events[1].record()
        else:
            self._end = time.perf_counter()

    def seconds(self) -> float:
        """The time between construction and `stop`."""
        if self._cuda:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1000
        return self._end - self._start


class Hooked:
    """A module or model site: whose it is, and what its handler says of it once and for all."""

    def __init__(self, site: Site, handler: Handler, part: ModulePart | None = None) -> None:
        self.site, self.handler, self.part = site, handler, part
        self.driven = handler.drives(site)
        self.wants_inputs = site.kind == "module" and handler.wants_inputs(site)
        self.by_tokens = part is not None and site.role in ("mlp", "linear")
        self.rebuild: dict[int, Callable[[Features], Any]] = {}  # what its outputs were wrapped in, by occurrence


def check_inputs(anatomy: Anatomy, handlers: Sequence[Handler]) -> None:
    """Refuse to reuse or rank what attention modules do whose tokens are reduced: each time by other tokens."""
    reusing = {site: h.owner for h in handlers for site in h.sites if site.role == "linear"}
    ranking = {site.name: h.owner for h in handlers for site in h.ranks}
    reducing = {site: h.owner for h in handlers for site in h.sites if site.kind == "input"}
    for part in (*anatomy.modules, *anatomy.inner):
        name, reducer = part.site.name, reducing.get(input_site(part.site))
        if reducer is None:
            continue
        inside = next((site for site in reusing if site.name.startswith(f"{name}.")), None)
        if part.site.role == "attention" and inside is not None:
            raise DitaError(
                f"{reusing[inside]} reuses {inside.name}, {reducer} changes from step to step which tokens {name} "
                "reads: they exclude each other; choose one"
            )
        if name in ranking:
            raise DitaError(
                f"{ranking[name]} ranks the tokens of {name} by its attention, of which {reducer} reduces the tokens: "
                "they exclude each other; choose one (asymrnr goes with both)"
            )


def attention_of(block: Block) -> torch.nn.Module:
    """The first attention module of a block.

    Raises:
        DitaError: it has none.
    """
    attention = first_attention(block.module)
    if attention is None:
        raise DitaError(f"{block.path} holds no attention module: there is nothing to watch")
    return attention


def run_to_attention(
    block: Block, attention: torch.nn.Module, forward: Original, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Run a block up to its first attention and return what that is about to read.

    Raises:
        DitaError: it ran to its end without calling that module.
    """
    seen: list[torch.Tensor] = []

    def stop(module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        value = named.get("hidden_states", positional[0] if positional else None)
        if isinstance(value, torch.Tensor):
            seen.append(value)
        raise _Reached

    handle = attention.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        forward(*args, **kwargs)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not seen:
        raise DitaError(f"{block.path} ran without calling its attention: there is nothing to watch")
    return seen[0]


def on_some_tokens(
    hooked: Hooked,
    call: Call,
    occurrence: int,
    inputs: Features,
    original: Original,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Features | None:
    """Run a row-wise module on the tokens that the handler wants fresh; None if it wants none.

    Raises:
        DitaError: the module is not known to be row-wise.
    """
    tokens, site, handler = first_tensor(args, kwargs), hooked.site, hooked.handler
    fresh = None if tokens is None else handler.fresh(site, occurrence, call, tokens.shape)
    if tokens is None or fresh is None:
        return None
    if hooked.part is None or not hooked.part.row_wise:
        raise DitaError(
            f"{site.name} is not known to treat every token by itself, so that it cannot run on some of them; reuse "
            "its output instead"
        )
    some = gather_tokens(tokens, fresh.index)
    if args and args[0] is tokens:
        args = (some, *args[1:])
    else:
        kwargs = {name: some if value is tokens else value for name, value in kwargs.items()}
    outputs, _ = flatten(original(*args, **kwargs))
    return handler.refreshed(site, occurrence, call, inputs, fresh, outputs)


def record_of(position: Position, call: Call, model: str) -> StepRecord:
    """What the report keeps of a call: sparse or low-bit if in full but for its attention, partial on fewer tokens."""
    action, reason = call.action, call.reason
    if action == "computed" and (call.density < 1 or call.fewer_bits):
        action = "sparse" if call.density < 1 else "low-bit"
    if call.sparsely:
        reason = f"{reason}; {call.sparsely}" if reason else call.sparsely
    value = call.density if action == "sparse" and call.value is None else call.value
    tokens = 1.0
    if call.tokens is not None and call.tokens[0] < call.tokens[1]:
        tokens = call.tokens[0] / call.tokens[1]
        action = "partial" if action in ("computed", "sparse", "low-bit") else action
        reason = f"{call.tokens[0]} of {call.tokens[1]} tokens; {reason}"
    return StepRecord(
        position.step, position.stage, position.name, action, value, reason, model,
        density=call.density, tokens=tokens,
    )  # fmt: skip


def left_out(position: Position, role: str, reason: str, model: str) -> tuple[StepRecord, Timer]:
    """What the report keeps of a branch that was not computed.

    Example:
        >>> left_out(Position(0, 1, 0, "all", 0, 1, 0), "uncond", "outside", "transformer")[0].action
        'skipped'
    """
    timer = Timer(cuda=False)
    timer.stop()
    branch = position.branch if role == "all" else role
    return StepRecord(position.step, position.stage, branch, "skipped", None, reason, model), timer


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What a module is about to read, by name or as its first argument; None if that is no tensor.

    Example:
        >>> first_tensor((), {"hidden_states": torch.ones(1)})
        tensor([1.])
    """
    value = kwargs.get("hidden_states", kwargs.get("input", args[0] if args else None))
    if value is None and not args:
        value = next((v for v in kwargs.values() if isinstance(v, torch.Tensor)), None)
    return value if isinstance(value, torch.Tensor) else None


def latents_of(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """What a transformer is called to denoise: its `hidden_states`, else the first numbers with channels.

    Args:
        arguments: of the call, by name, in the order of the parameters. Z-Image and others take a list with one tensor
            per sample: equal ones are stacked, of others the first stands for all.

    Example:
        >>> latents_of({"t": torch.ones(2), "x": [torch.zeros(3, 4), torch.zeros(3, 4)]}).shape
        torch.Size([2, 3, 4])
    """
    known = arguments.get("hidden_states")
    if isinstance(known, torch.Tensor) and known.is_floating_point() and known.ndim >= 2:
        return known
    for value in (known, *arguments.values()):
        held = list(value) if isinstance(value, (list, tuple)) else [value]
        fit = [t for t in held if isinstance(t, torch.Tensor) and t.is_floating_point() and t.ndim >= 2]
        if not fit or len(fit) != len(held):
            continue
        if not isinstance(value, (list, tuple)):
            return fit[0]
        return torch.stack(fit) if _are_alike(fit) else fit[0]
    return None


def flatten(result: Any) -> tuple[Features, Callable[[Features], Any]]:
    """The tensors of an output, and the function that makes such an output of tensors.

    A list of equal tensors, one per sample, is one tensor. What is none, such as a model's cache of keys, stays as it
    was in this output. The function holds none of the tensors.

    Raises:
        DitaError: an output that is neither a tensor, nor a tuple, list or diffusers output with some, nor has
            `.sample`.

    Example:
        >>> features, rebuild = flatten((torch.ones(1), None))
        >>> rebuild(features)
        (tensor([1.]), None)
        >>> [tuple(t.shape) for t in flatten(([torch.ones(3), torch.ones(3)], torch.ones(2)))[0]]
        [(2, 3), (2,)]
    """
    leaves: list[torch.Tensor | None] = []
    rebuild = _taken_apart(result, leaves)
    if rebuild is None or not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        kind = type(result).__name__
        raise DitaError(f"a hooked module returned {kind}; expected a tensor, a tuple of them, or .sample")
    return tuple(leaves), lambda features: rebuild(iter(features))


def _taken_apart(value: Any, leaves: list[torch.Tensor | None]) -> Callable[[Iterator[Any]], Any] | None:
    """Collect the tensors of a value in `leaves`; return what builds such a value of them, None for no tensors."""
    if value is None or isinstance(value, torch.Tensor):
        leaves.append(value)
        return next
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)} if _is_output(value) else {}
    if not fields and hasattr(value, "sample") and not isinstance(value, tuple):
        fields = {"sample": value.sample}
    held = list(fields.values()) if fields else value
    if not isinstance(held, (list, tuple)):
        return None
    if held is value and isinstance(value, list) and _are_alike(value):
        leaves.append(torch.stack(value))
        return lambda features: list(next(features))
    builders = [None if fields and item is None else _taken_apart(item, leaves) for item in held]
    kind: Any = type(value)
    names, rest = tuple(fields), [item if make is None else None for item, make in zip(held, builders, strict=True)]

    def build(features: Iterator[Any]) -> Any:
        items = [item if make is None else make(features) for item, make in zip(rest, builders, strict=True)]
        return kind(**dict(zip(names, items, strict=True))) if names else kind(items)

    return build


def _are_alike(items: Sequence[Any]) -> bool:
    return bool(items) and all(isinstance(t, torch.Tensor) and t.shape == items[0].shape for t in items)


def _is_output(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
