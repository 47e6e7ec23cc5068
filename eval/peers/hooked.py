"""What diffusers' hooks need around them: a context, a clean start, a state for each branch, the timestep."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from dita.errors import DitaError
from dita.eval.peers.harness import Attachment, Forward
from dita.seams import Position

_CACHES = ("_cache", "_broadcast")  # ends of the names of diffusers' modules that define caching hooks


class Hooked(Attachment):
    """diffusers' caching hooks on one transformer.

    Args:
        model: the transformer, after `apply_*`.
        steps: the number of steps that the hooks were made for; None if any will do.
        per_branch: give each guidance branch its own state, for hooks that know no context.
        around: leads a call through the hooks, if more than that is to be done.
        may_idle: a run that skips nothing is no surprise.

    Attributes:
        at_finish: called when the last step of a run returned.

    Raises:
        DitaError: there is no hook.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int | None = None,
        per_branch: bool = False,
        around: Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any] | None = None,
        may_idle: bool = False,
    ) -> None:
        from diffusers.hooks import HookRegistry

        # Contexts and resets go through the registry of the model itself, which apply_* leaves to the caller.
        HookRegistry.check_if_exists_or_initialize(model)
        self.model, self.steps, self.may_idle = model, steps, may_idle
        self.registries = [vars(m)["_diffusers_hook"] for m in model.modules() if "_diffusers_hook" in vars(m)]
        for registry in self.registries:
            # A list of registries that was made before these hooks came would miss them.
            vars(registry).pop("_child_registries_cache", None)
        found = [hook for registry in self.registries for hook in registry.hooks.values()]
        hooks = [hook for hook in found if type(hook).__module__.endswith(_CACHES)]
        if not hooks:
            raise DitaError(f"no module of {type(model).__name__} was hooked, so that nothing would ever be skipped")
        self.managers = [vars(hook)["state_manager"] for hook in hooks if "state_manager" in vars(hook)]
        self.at_finish: Callable[[], None] = lambda: None
        self.summary = f"{len(hooks)} hooks on {type(model).__name__}"
        self._owners = [hook for hook in hooks if "state" in vars(hook)] if per_branch else []
        self._states: dict[tuple[str, int], Any] = {}
        self._around = around

    def start(self) -> None:
        """Forget the run before, which may have ended in an error."""
        self._states.clear()
        for registry in self.registries:
            registry.reset_stateful_hooks(recurse=False)

    def call(self, position: Position, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Set branch and context, and run the hooked transformer."""
        from diffusers.models.cache_utils import CacheMixin

        if self.steps is not None and position.steps != self.steps:
            raise DitaError(
                f"this run has {position.steps} steps, but the hooks were made for {self.steps}: calibrate with the "
                "number of steps that is to be run"
            )
        for number, hook in enumerate(self._owners):
            hook.state = self._states.setdefault((position.branch, number), type(hook.state)())
        bare: Any = self.model
        missing = bool(self.managers) and self.managers[0]._context is None
        with CacheMixin.cache_context(bare, position.branch) if missing else nullcontext():
            return forward(*args, **kwargs) if self._around is None else self._around(forward, args, kwargs)

    def finish(self) -> None:
        """See `Attachment.finish`."""
        self.at_finish()


class Timestep:
    """The timestep under way, from 1000 down to 0, for hooks that ask: the pipeline's, else the transformer's argument.

    Args:
        pipe: the pipeline.

    Example:
        >>> now = Timestep(object())
        >>> now.read({"timestep": torch.tensor([981, 981])})
        >>> now()
        981.0
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._present = float("nan")

    def read(self, kwargs: dict[str, Any]) -> None:
        """Look at the timestep once for a call of the transformer, of which these are the arguments.

        Raises:
            DitaError: neither tells it.
        """
        present = getattr(self.pipe, "current_timestep", None)
        present = kwargs.get("timestep") if present is None else present
        if present is None:
            raise DitaError(f"{type(self.pipe).__name__} has no current_timestep and gives its transformer no timestep")
        self._present = float(torch.as_tensor(present).flatten()[0])

    def __call__(self) -> float:
        return self._present
