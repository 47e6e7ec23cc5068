"""Parts of the runtime that know no run: the clock of a call, a hooked site, what modules take and return."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from dita.anatomy import Block, ModulePart
from dita.errors import DitaError
from dita.reporting import StepRecord
from dita.seams import Call, Features, Handler, Position, Site

Original = Callable[..., Any]


class _Reached(Exception):
    """A block got as far as its attention."""


class Timer:
    """Seconds of one call: host clock on the CPU, events on a CUDA device, read when the report is."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
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


def run_to_attention(block: Block, forward: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Run a block up to its first attention and return what that is about to read.

    Raises:
        DitaError: it ran to its end without calling an attention module.
    """
    attention = next(c for n, c in block.module.named_children() if "attn" in n or "attention" in n)
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


def record_of(position: Position, call: Call, model: str) -> StepRecord:
    """What the report keeps of a call: sparse if in full but for its attention, partial on fewer tokens."""
    action, reason = call.action, call.reason
    if action == "computed" and call.density < 1:
        action = "sparse"
    if call.sparsely:
        reason = f"{reason}; {call.sparsely}" if reason else call.sparsely
    value = call.density if action == "sparse" and call.value is None else call.value
    tokens = 1.0
    if call.tokens is not None and call.tokens[0] < call.tokens[1]:
        tokens = call.tokens[0] / call.tokens[1]
        action = "partial" if action in ("computed", "sparse", "low-bit") else action
        reason = f"{call.tokens[0]} of {call.tokens[1]} tokens; {reason}"
    return StepRecord(
        position.step, position.stage, position.branch, action, value, reason, model,
        density=call.density, tokens=tokens,
    )  # fmt: skip


def left_out(position: Position, role: str, reason: str, model: str) -> tuple[StepRecord, Timer]:
    """What the report keeps of a branch that was not computed.

    Example:
        >>> left_out(Position(0, 1, 0, "all", 0, 1, 0), "uncond", "outside", "transformer")[0].action
        'skipped'
    """
    timer = Timer(torch.device("cpu"))
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
    return value if isinstance(value, torch.Tensor) else None


def flatten(result: Any) -> tuple[Features, Callable[[Features], Any]]:
    """The tensors of an output, and the function that makes such an output of tensors.

    Raises:
        DitaError: an output that is neither a tensor, nor a tuple of them, nor has `.sample`.

    Example:
        >>> features, rebuild = flatten((torch.ones(1), None))
        >>> rebuild(features)
        (tensor([1.]), None)
    """
    if isinstance(result, torch.Tensor):
        return (result,), lambda features: features[0]
    if isinstance(result, tuple) and all(t is None or isinstance(t, torch.Tensor) for t in result):
        return result, tuple
    if hasattr(result, "sample") and not isinstance(result, tuple):
        kind: Any = type(result)
        return (result.sample,), lambda features: kind(sample=features[0])
    raise DitaError(f"a hooked module returned {type(result).__name__}; expected a tensor, a tuple of them, or .sample")
