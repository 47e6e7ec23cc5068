"""Reading block lists and block signatures off the source of a model class that the table does not list."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any

from torch import nn

from dita.models import BLOCKS, MODELS, BlockEntry, ModelEntry


def _lookup(cls: type, table: dict[str, Any]) -> Any:
    return next((table[base.__name__] for base in cls.__mro__ if base.__name__ in table), None)


@lru_cache(maxsize=256)
def _forward_tree(cls: type) -> ast.FunctionDef | None:
    forward = cls.__dict__.get("forward") or getattr(cls, "forward", None)
    if forward is None:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return None
    node = tree.body[0]
    return node if isinstance(node, ast.FunctionDef) else None


def model_entry(model: nn.Module) -> tuple[ModelEntry | None, str]:
    """Find the block lists of a model: declared ones, else the module lists its `forward` loops over.

    Returns:
        the entry and "", or None and the reason.
    """
    declared = _lookup(type(model), MODELS)
    if declared is not None:
        return declared, ""
    tree = _forward_tree(type(model))
    if tree is None:
        return None, "the source of its forward cannot be read"
    found: list[tuple[int, str]] = []
    for loop in ast.walk(tree):
        if not isinstance(loop, ast.For):
            continue
        for node in ast.walk(loop.iter):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                value = getattr(model, node.attr, None)
                if isinstance(value, nn.ModuleList) and len(value) > 0:
                    found.append((loop.lineno, node.attr))
    lists = tuple(dict.fromkeys(name for _, name in sorted(found)))
    if not lists:
        held = [name for name, child in model.named_children() if isinstance(child, nn.ModuleList)]
        return None, f"its forward loops over no list of blocks (module lists it holds: {', '.join(held) or 'none'})"
    return ModelEntry(family="", block_lists=lists, text_used_after=True), ""


def block_entry(cls: type) -> tuple[BlockEntry | None, str]:
    """Find what a block class takes and returns: declared, else from the names in its return statement.

    Returns:
        the entry and "", or None and the reason.
    """
    declared = _lookup(cls, BLOCKS)
    if declared is not None:
        return declared, ""
    tree = _forward_tree(cls)
    if tree is None:
        return None, f"the source of {cls.__name__}.forward cannot be read"
    parameters = list(inspect.signature(cls.forward).parameters)[1:]  # pyright: ignore[reportAttributeAccessIssue]
    if not parameters:
        return None, f"{cls.__name__}.forward takes no tensor"
    hidden = "hidden_states" if "hidden_states" in parameters else parameters[0]
    shapes = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None:
            items = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            shapes.add(tuple(ast.unparse(item) for item in items))
    if len(shapes) != 1:
        return None, f"{cls.__name__}.forward has {len(shapes)} different return statements"
    returned = shapes.pop()
    if returned == (hidden,):
        return BlockEntry(("hidden",), hidden=hidden), ""
    others = [name for name in returned if name != hidden]
    if len(returned) == 2 and len(others) == 1 and others[0] in parameters:
        order = tuple("hidden" if name == hidden else "encoder" for name in returned)
        return BlockEntry(order, hidden=hidden, encoder=others[0]), ""
    if len(returned) == 1:
        # A single tensor under another name than the input's is the new hidden state.
        return BlockEntry(("hidden",), hidden=hidden), ""
    return None, f"{cls.__name__}.forward returns {returned}, which does not match its parameters {tuple(parameters)}"
