"""Replacing one method of one object, and putting it back key for key."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Patch:
    """Wrap `target.name`, on the instance only, so that a call becomes `around(original, args, kwargs)`.

    The wrapper knows the object it was made for. A copy of the object (diffusers' LTX2 deep-copies its scheduler, users
    deep-copy pipelines) carries the attribute along, bound to the copy, where it calls the copy's own method and
    nothing else.
    """

    def __init__(self, target: Any, name: str, around: Around) -> None:
        self.target, self.name, self.around = target, name, around
        self.active = False
        self._had = name in vars(target)
        self._previous = vars(target).get(name)
        self._bound: types.MethodType | None = None

    def original(self, target: Any) -> Callable[..., Any]:
        """The method that was there before, bound to `target`."""
        if self._had:
            return self._previous  # pyright: ignore[reportReturnType]
        return getattr(type(target), self.name).__get__(target)

    def apply(self) -> None:
        """Put the wrapper in place."""
        owner = weakref.ref(self.target)
        before = self.original(self.target)

        @functools.wraps(before)
        def wrapper(target: Any, *args: Any, **kwargs: Any) -> Any:
            original = self.original(target)
            if not self.active or owner() is not target:
                return original(*args, **kwargs)
            return self.around(original, args, kwargs)

        signature = inspect.signature(before)
        own = inspect.Parameter("target", inspect.Parameter.POSITIONAL_ONLY)
        # Pipelines ask for the signature; binding drops the first parameter, so there must be one more.
        parameters = [own, *signature.parameters.values()]
        wrapper.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        self._bound = types.MethodType(wrapper, self.target)
        vars(self.target)[self.name] = self._bound
        self.active = True

    def remove(self) -> None:
        """Put back what was there. A wrapper that someone else wrapped since then is taken out of his chain."""
        self.active = False
        attributes = vars(self.target)
        if attributes.get(self.name) is self._bound:
            if self._had:
                attributes[self.name] = self._previous
            else:
                del attributes[self.name]
        elif attributes.get("_old_forward") is self._bound:
            # accelerate's offload hooks, added after the pipeline was accelerated, keep the forward they found here.
            attributes["_old_forward"] = self.original(self.target)
