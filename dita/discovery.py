"""Reading block lists and block signatures off the source of a model class that the table does not list."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import lru_cache
from typing import Any

from torch import nn

from dita.models import BLOCKS, MODELS, BlockEntry, ModelEntry

_BEFORE_TRUNK = re.compile(r"(^|[._])(refiner|text|txt|context|cond|control|vace|adapter)")


def _lookup(cls: type, table: dict[str, Any]) -> Any:
    names = [name for base in cls.__mro__ for name in (f"{base.__module__}.{base.__qualname__}", base.__name__)]
    return next((table[name] for name in names if name in table), None)


@lru_cache(maxsize=256)
def _forward_tree(cls: type, name: str = "forward") -> ast.FunctionDef | None:
    forward = cls.__dict__.get(name) or getattr(cls, name, None)
    if forward is None:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return None
    node = tree.body[0]
    return node if isinstance(node, ast.FunctionDef) else None


def model_entry(model: nn.Module) -> tuple[ModelEntry | None, str]:
    """Find the block lists of a model: declared ones, else the module lists that its `forward` loops over.

    Loops in methods of the model that its `forward` calls count too, and lists inside of dictionaries of lists. Lists
    that work on the conditions, before the trunk, are told by their names and left out, if there are others.

    Returns:
        the entry and "", or None and the reason.
    """
    declared = _lookup(type(model), MODELS)
    if declared is not None:
        return (declared, "") if not declared.refused else (None, declared.refused)
    loops = _loops(type(model))
    if loops is None:
        return None, "the source of its forward cannot be read"
    found: list[tuple[int, int, tuple[str, ...]]] = []
    for number, (line, iterated) in enumerate(loops):
        names = [path for node in ast.walk(iterated) if (path := _path_of_list(node, model))]
        if names:
            found.append((line, number, tuple(dict.fromkeys(names))))
    together = [names for _, _, names in sorted(found)]
    lists = tuple(dict.fromkeys(name for names in together for name in names))
    trunk = tuple(name for name in lists if not _BEFORE_TRUNK.search(name)) or lists
    if not trunk:
        held = [name for name, child in model.named_children() if isinstance(child, nn.ModuleList)]
        return None, f"its forward loops over no list of blocks (module lists it holds: {', '.join(held) or 'none'})"
    in_turn = len(trunk) > 1 and any(set(trunk) <= set(names) for names in together)
    return ModelEntry(family="", block_lists=trunk, text_used_after=True, in_turn=in_turn), ""


def is_refused(cls: type) -> bool:
    """The table says that models of this class cannot be accelerated.

    Example:
        >>> is_refused(nn.Linear)
        False
    """
    declared = _lookup(cls, MODELS)
    return declared is not None and bool(declared.refused)


@lru_cache(maxsize=256)
def _loops(cls: type) -> list[tuple[int, ast.expr]] | None:
    """What `forward`, and methods it calls, loop over: line of the call or loop in `forward`, and the expression."""
    tree = _forward_tree(cls)
    if tree is None:
        return None
    loops = []
    for node in ast.walk(tree):
        if isinstance(node, ast.For):
            loops.append((node.lineno, node.iter))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_self(node.func.value):
            helper = _forward_tree(cls, node.func.attr) if node.func.attr in cls.__dict__ else None
            if helper is not None:
                inner = sorted((n.lineno, n.iter) for n in ast.walk(helper) if isinstance(n, ast.For))
                loops += [(node.lineno, iterated) for _, iterated in inner]
    return loops


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _path_of_list(node: ast.AST, model: nn.Module) -> str:
    """The path of the module list that `self.name` or `self.name["key"]` stands for; "" for anything else."""
    key = ""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        node, key = node.value, "." + node.slice.value
    if not isinstance(node, ast.Attribute) or not _is_self(node.value):
        return ""
    held = getattr(model, node.attr, None)
    if key:
        held = held[key[1:]] if isinstance(held, nn.ModuleDict) and key[1:] in held else None
    return node.attr + key if isinstance(held, nn.ModuleList) and len(held) > 0 else ""


@lru_cache(maxsize=256)
def _returned(cls: type) -> list[tuple[tuple[str, ...], ast.expr]]:
    """What the different return statements of `forward` return: the texts of its items, and the whole."""
    shapes: dict[tuple[str, ...], ast.expr] = {}
    for node in ast.walk(_forward_tree(cls) or ast.Module([], [])):
        if isinstance(node, ast.Return) and node.value is not None:
            items = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            shapes[tuple(ast.unparse(item) for item in items)] = node.value
    return list(shapes.items())


def block_entry(module: nn.Module) -> tuple[BlockEntry | None, str]:
    """Find what a block takes and returns: declared, else from the names in its return statement.

    A block that hands everything to a module inside it is read as that one, with its own argument names.

    Returns:
        the entry and "", or None and the reason.
    """
    cls = type(module)
    declared = _lookup(cls, BLOCKS)
    if declared is not None:
        return declared, ""
    if _forward_tree(cls) is None:
        return None, f"the source of {cls.__name__}.forward cannot be read"
    parameters = list(inspect.signature(cls.forward).parameters)[1:]
    if not parameters:
        return None, f"{cls.__name__}.forward takes no tensor"
    hidden = "hidden_states" if "hidden_states" in parameters else parameters[0]
    shapes = _returned(cls)
    if len(shapes) != 1:
        return None, f"{cls.__name__}.forward has {len(shapes)} different return statements"
    returned, value = shapes[0]
    inner = value.func.attr if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) else ""
    if inner and _is_self(value.func.value):  # pyright: ignore[reportAttributeAccessIssue]
        entry, _ = block_entry(getattr(module, inner))
        if entry is not None and {entry.hidden, entry.encoder} <= set(parameters):
            return entry, ""
    wrapped = isinstance(value, ast.Tuple) and len(returned) == 1
    others = [name for name in returned if name != hidden]
    if len(returned) == 2 and len(others) == 1 and others[0] in parameters:
        order = tuple("hidden" if name == hidden else "encoder" for name in returned)
        return BlockEntry(order, hidden=hidden, encoder=others[0]), ""
    if len(returned) == 1:
        # A single tensor under another name than the input's is the new hidden state.
        return BlockEntry(("hidden",), hidden=hidden, wrapped=wrapped), ""
    return None, f"{cls.__name__}.forward returns {returned}, which does not match its parameters {tuple(parameters)}"
