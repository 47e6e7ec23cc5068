"""Replacing one method of one object, and putting it back key for key."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

_SLOT = "_compiled_call_impl"

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

    @property
    def held(self) -> Any:
        """What the object's own dictionary held under the name; None for nothing."""
        return self._previous

    def original(self, target: Any) -> Callable[..., Any]:
        """The method that was there before, bound to `target`."""
        if self._had:
            return self._previous  # pyright: ignore[reportReturnType]
        return getattr(type(target), self.name).__get__(target)

    def apply(self) -> None:
        """Put the wrapper in place."""
        owner = weakref.ref(self.target)
        before = self.original(self.target)

        def wrapper(target: Any, *args: Any, **kwargs: Any) -> Any:
            if self.active and owner() is target:
                return self.around(before, args, kwargs)
            return self.original(target)(*args, **kwargs)

        said: Any = wrapper
        if self.name != _SLOT:  # what was compiled carries marks for the compiler, which are its own
            functools.update_wrapper(wrapper, before)
            signature = inspect.signature(before)
            own = inspect.Parameter("target", inspect.Parameter.POSITIONAL_ONLY)
            # Pipelines ask for the signature; binding drops the first parameter, so there must be one more.
            said.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
        said.patch = self
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
        # The hooks of accelerate and of diffusers, added since then, keep the forward that they found here.
        elif attributes.get("_old_forward") is self._bound:
            attributes["_old_forward"] = self.original(self.target)
        else:
            for hook in getattr(attributes.get("_diffusers_hook"), "_fn_refs", ()):
                for name in ("forward", "original_forward"):
                    if getattr(hook, name, None) is self._bound:
                        setattr(hook, name, self.original(self.target))


class CallPatch(Patch):
    """Wrap the calls of one module, on the instance only and outside of whatever else is hung on it.

    A call of a module goes to `_compiled_call_impl`, where `Module.compile` leaves its work, before it comes to forward
    hooks and to `forward`, which the hooks of accelerate and diffusers replace. Whoever stands there is the outermost,
    no matter who came first: a module that is skipped loads no weights, and its compiled graph is of itself alone.

    PyTorch takes no notice of that place while it compiles something that holds the module. There `forward` is
    replaced, and the graph is cut at it.

    Args:
        target: the module.
        around: as in `Patch`.
        inlined: the module is called from within something compiled.

    Example:
        >>> layer = nn.Identity()
        >>> patch = CallPatch(layer, lambda original, args, kwargs: original(*args, **kwargs) + 1)
        >>> patch.apply()
        >>> layer(1), layer.forward(1), patch.remove(), layer(1)
        (2, 1, None, 1)
    """

    def __init__(self, target: nn.Module, around: Around, inlined: bool = False) -> None:
        super().__init__(target, "forward" if inlined else _SLOT, around)

    def original(self, target: Any) -> Callable[..., Any]:
        """See `Patch`; where nothing was compiled, the slot held None and the call went on to `_call_impl`."""
        held = self._previous if self._had else None
        return target._call_impl if self.name == _SLOT and held is None else super().original(target)


def compiled_call(module: nn.Module) -> Any:
    """What `Module.compile` left on a module, accelerated or not; None for nothing.

    Example:
        >>> layer = nn.Identity()
        >>> layer.compile(backend="eager")
        >>> compiled_call(layer) is None, compiled_call(nn.Identity()) is None
        (False, True)
    """
    held = vars(module).get(_SLOT)
    while isinstance(held, types.MethodType) and hasattr(held.__func__, "patch"):
        held = vars(held.__func__)["patch"].held
    return held


def unwrapped(module: nn.Module) -> nn.Module:
    """What `torch.compile` wrapped; any other module is returned as it is.

    Example:
        >>> import torch
        >>> layer = nn.Identity()
        >>> unwrapped(torch.compile(layer)) is unwrapped(layer) is layer
        True
    """
    return getattr(module, "_orig_mod", module)
