"""What of a transformer is under torch.compile, and how hooks live with it.

A module that is compiled by itself (`compile_repeated_blocks`) is hooked from outside, and its graph stays whole.
Inside of something compiled, hooks cut the graph: PyTorch then compiles what lies between them, piece by piece, and
runs dita's own code as it stands.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dita.errors import DitaError
from dita.patch import compiled_call

_SPARED: set[str] = set()


class Compilation:
    """A transformer's modules and what of them is compiled, as it was when it was last looked at.

    Args:
        outer: what the pipeline calls: the model, or what `torch.compile` made of it.
        model: the transformer.
    """

    def __init__(self, outer: nn.Module, model: nn.Module) -> None:
        self.outer, self.model = outer, model
        self._modules, self._calls = list(model.modules()), list[Any]()
        self._holders: dict[nn.Module, Any] = {}

    def look(self) -> None:
        """See what is compiled."""
        self._calls = [compiled_call(module) for module in self._modules]
        holders = {m: call for m, call in zip(self._modules, self._calls, strict=True) if call is not None}
        if self.outer is not self.model:
            holders[self.outer] = self.outer.forward
        self._holders = {}
        for holder, call in holders.items():
            self._holders |= {inside: call for inside in holder.modules() if inside is not holder}
        if holders:
            _spare_dita()

    def changed(self) -> bool:
        """Something was compiled, put in or taken out since then: a LoRA puts modules in the place of others."""
        modules = list(self.model.modules())
        return len(modules) != len(self._modules) or any(
            module is not old or compiled_call(module) is not call
            for module, old, call in zip(modules, self._modules, self._calls, strict=True)
        )

    def inlines(self, module: nn.Module) -> bool:
        """Whether a module is called from within something compiled, where it can be hooked.

        Raises:
            DitaError: it was compiled with fullgraph=True, which forbids that.
        """
        if module not in self._holders:
            return False
        if _is_whole(self._holders[module]):
            name = next(path for path, found in self.model.named_modules() if found is module)
            raise DitaError(
                f"{name or 'the transformer'} is inside of what was compiled with fullgraph=True, so that nothing can "
                "be skipped there: compile the blocks (compile_repeated_blocks) for a method on blocks, or do without "
                "fullgraph"
            )
        return True

    def uncompiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call with nothing of it compiled: a compiled graph lets nobody take part in what it calls."""
        return torch.compiler.disable(call) if self._holders else call


def _is_whole(call: Any) -> bool:
    """The compiled function must be one graph."""
    cells = (cell.cell_contents for cell in getattr(call, "__closure__", None) or ())
    return any(getattr(held, "fullgraph", False) is True for held in cells)


def _spare_dita() -> None:
    """Have PyTorch compile none of dita's own code (kernels see to themselves), wherever it comes upon it."""
    from torch._dynamo import trace_rules

    for name in [name for name in sys.modules if name.startswith("dita.")]:
        part = name.split(".")[1]
        if part not in ("kernels", "eval", *_SPARED):
            _SPARED.add(part)
            trace_rules.add(f"dita.{part}")
