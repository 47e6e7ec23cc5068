"""Token reduction at work on one transformer: what a policy is told, state by layer and branch, the account of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dita.kernels.account import Account
from dita.kernels.guards import steps_of
from dita.kernels.reduction.matching import Grid
from dita.kernels.reduction.shift import Watched
from dita.kernels.sparse.handler import bytes_of
from dita.seams import Call, Handler, Reducer, Site


@dataclass
class Tokens:
    """Image tokens that a layer is about to read.

    Attributes:
        x: [B, V, C].
        grid: frames, rows and columns of them.
        layer, layers: which of the model's layers this is.
        step, steps: solver steps since the run began, and of the run.
        state: what the policy keeps from step to step, of this layer, branch and stage alone.
        shared: the same, of this branch and stage, shared by all layers.
        shift: representation shift of the tokens, [B, V], when the MLP of this block, or of the nearest before it that
            has one, last ran; None if none was measured yet.
    """

    x: torch.Tensor
    grid: Grid
    layer: int
    layers: int
    step: int
    steps: int
    state: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)
    shift: torch.Tensor | None = None


class ReductionPolicy:
    """Says how the tokens of every layer are reduced; one object serves one transformer.

    Attributes:
        dense_steps: first part of the run, from 0 to 1, in which nothing is reduced.
    """

    dense_steps: float = 0.0

    def reducer(self, tokens: Tokens) -> Reducer | None:
        """The operators for these tokens; None to leave them."""
        raise NotImplementedError(f"{type(self).__name__} must define reducer()")


class ReductionHandler(Handler):
    """Lets a policy reduce the image tokens that attention reads.

    Args:
        policy: the method.
        sites: "input" sites of attention modules, in execution order.
        watched: "input" sites of MLPs whose representation shift is measured.
    """

    def __init__(self, policy: ReductionPolicy, sites: tuple[Site, ...], watched: tuple[Site, ...] = ()) -> None:
        self.policy, self.sites = policy, (*sites, *watched)
        self._layer = {site: number for number, site in enumerate(sites)}
        self._states: dict[Any, tuple[tuple[int, ...], dict[str, Any]]] = {}
        self._shifts: dict[Any, torch.Tensor] = {}
        self._account = Account()
        self._shares: list[float] = []

    def begin_run(self) -> None:
        """Forget everything: a run starts."""
        self._states.clear()
        self._shifts.clear()

    def begin_call(self, call: Call) -> None:
        """Start the account of one call of the transformer."""
        self._account.clear()
        self._shares.clear()

    def reducer(self, site: Site, occurrence: int, call: Call, tokens: torch.Tensor, text: int) -> Reducer | None:
        """Ask the policy."""
        stream = call.position.stream
        if site not in self._layer:

            def keep(shift: torch.Tensor) -> None:
                self._shifts[site.block, stream] = shift

            return Watched(tokens, keep)
        position, (frames, rows, columns) = call.position, call.grid
        if position.step < steps_of(self.policy.dense_steps, position.steps):
            return self._left("dense warm-up step")
        own, shared = self._state((site, occurrence, stream), tokens), self._state(stream, tokens)
        asked = Tokens(
            tokens, (frames, rows, columns), self._layer[site], len(self._layer), position.step, position.steps,
            own, shared, self._shift(site, call, tokens),
        )  # fmt: skip
        made = self.policy.reducer(asked)
        if made is None or made.positions is None:
            return self._left("nothing to reduce")
        count, kept = tokens.shape[1], made.positions.shape[1]
        self._account.count(((kept + text) / (count + text)) ** 2)
        self._shares.append(kept / count)
        return made

    def irreducible(self, site: Site, call: Call, why: str) -> None:
        """Count it as left alone."""
        if site in self._layer:
            self._left(why)

    def _left(self, why: str) -> None:
        self._account.count(1.0, why)
        self._shares.append(1.0)

    def _state(self, key: Any, tokens: torch.Tensor) -> dict[str, Any]:
        held = self._states.get(key)
        if held is None or held[0] != tokens.shape[:2]:
            self._states[key] = held = (tuple(tokens.shape[:2]), {})
        return held[1]

    def _shift(self, site: Site, call: Call, tokens: torch.Tensor) -> torch.Tensor | None:
        """Of the block's own MLP at the step before, else of the nearest before it, which has just run."""
        stream = call.position.stream
        blocks = [block for block, other in self._shifts if other == stream and block <= site.block]
        found = self._shifts[max(blocks), stream] if blocks else None
        return found if found is not None and found.shape == tokens.shape[:2] else None

    def end_call(self, call: Call) -> None:
        """Write the account into the call."""
        account = self._account
        if count := len(account.densities):
            share = sum(self._shares) / count
            account.write(call, f"{account.sparse} of {count} attentions on {share:.0%} of the image tokens")

    def bytes_held(self) -> int:
        """Bytes of whatever the policy keeps in its states, and of shifts."""
        return bytes_of([*(state for _, state in self._states.values()), *self._shifts.values()])
