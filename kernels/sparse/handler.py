"""Sparse attention at work on one transformer: guards, state by layer and branch, and the account of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from dita.attention_view import Attended
from dita.kernels.account import Account
from dita.kernels.sparse.layout import Layout
from dita.kernels.sparse.policy import Asked, Policy
from dita.seams import Call, Handler, Site


class SparseHandler(Handler):
    """Lets a policy answer the attention of some sites.

    Attention that no policy can answer stays as it is, and the report says why: masks that differ from query to query,
    keys of other tokens than the queries, or tokens of which it is not known where they lie.

    Args:
        policy: the method.
        sites: "attention" sites, in execution order.
        text_at: where text tokens stand in joint attention, "first" or "last", "" for nowhere or unknown.
    """

    def __init__(self, policy: Policy, sites: tuple[Site, ...], text_at: str) -> None:
        self.policy, self.sites, self.text_at = policy, sites, text_at
        self._layer = {site: number for number, site in enumerate(sites)}
        self._states: dict[Any, tuple[Layout, dict[str, Any]]] = {}
        self._account = Account()

    def begin_run(self) -> None:
        """Forget everything: a run starts."""
        self._states.clear()
        self.policy.begin_run()

    def begin_call(self, call: Call) -> None:
        """Start the account of one call of the transformer."""
        self._account.clear()

    def attend(
        self, site: Site, occurrence: int, call: Call, seen: Attended, plain: Callable[[Attended], torch.Tensor]
    ) -> torch.Tensor:
        """Let the policy answer, or the model itself where it cannot."""
        layout = self._layout(call, seen)
        if isinstance(layout, str):
            self._account.count(1.0, layout)
            return plain(seen)
        key = (site, occurrence, call.position.stream)
        held = self._states.get(key)
        if held is None or held[0] != layout:
            self._states[key] = held = (layout, {})
        scale = 1 / math.sqrt(seen.q.shape[-1]) if seen.scale is None else seen.scale
        position = call.position
        asked = Asked(
            seen.q, seen.k, seen.v, scale, seen.key_mask, layout, self._layer[site], len(self.sites),
            position.step, position.steps, held[1], lambda: plain(seen), position.timestep,
        )  # fmt: skip
        out = self.policy.attend(asked)
        self._account.count(asked.density, asked.reason)
        return out

    def _layout(self, call: Call, seen: Attended) -> Layout | str:
        """How the tokens lie, or why that is not known."""
        queries, keys = seen.q.shape[2], seen.k.shape[2]
        if queries != keys:
            return f"{queries} queries look at {keys} keys of other tokens"
        if seen.causal or (seen.mask is not None and seen.key_mask is None):
            return "the model's attention mask differs from query to query"
        if len(call.grid) != 3:
            return "the model does not tell how its image tokens lie in frames, rows and columns"
        frames, rows, columns = call.grid
        text = queries - frames * rows * columns
        if text < 0 or (text and not self.text_at):
            return f"{queries} tokens are not the {frames} x {rows} x {columns} of the image, with or without text"
        return Layout((frames, rows, columns), text, self.text_at == "first")

    def end_call(self, call: Call) -> None:
        """Write the account into the call."""
        account = self._account
        if count := len(account.densities):
            account.write(call, f"density {account.mean:.2f}, {account.sparse} of {count} attentions sparse")

    def bytes_held(self) -> int:
        """Bytes of plans and of whatever else the policy keeps in its states."""
        return bytes_of([state for _, state in self._states.values()])


def bytes_of(value: Any) -> int:
    """Bytes of the tensors in a value: tensors, dataclasses, dictionaries and sequences of such.

    Example:
        >>> bytes_of({"a": [torch.zeros(2), None], "b": "text"})
        8
    """
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if is_dataclass(value):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, dict):
        value = value.values()
    return sum(map(bytes_of, value)) if isinstance(value, Iterable) and not isinstance(value, str) else 0
