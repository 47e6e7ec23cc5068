"""What is inside a block: attention and MLP modules, told by their names, and what joins them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from dita.errors import DitaError
from dita.models import FLEX_ATTENTION, OTHER_ATTENTION, PARALLEL_PARTS, PARALLEL_PROJECTION, TEMPORAL_PARTS
from dita.seams import Site

if TYPE_CHECKING:
    from dita.anatomy import Block

_DISPATCH = "diffusers.models.attention_dispatch"
_TEXT_NAME = re.compile(r"^(txt_.*|.*_context|ff_t|audio_(attn|ff|mlp|dec).*)$")
_ROW_WISE = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
_ATTENTION_NAME = re.compile(r"^((.*_)?(attn|attention)\d*|mhba)$")
_MLP_NAME = re.compile(r"^((.*_)?(ff|ffn|mlp)|feed_forward|ff_(context|i|t)|mlp_moe_gen|transition|DenseReluDense)$")
_CROSS_NAME = re.compile(r"^(.*_)?(cross_.*|.*_to_.*)$")
_SELF_NAME = re.compile(r"^(.*_)?self_")
_SECOND_NAME = re.compile(r"^(.*_)?attn2$")
_NO_PART_NAME = re.compile(r"^(adaln|proj_mlp|act_mlp)")


@dataclass(frozen=True)
class ModulePart:
    """A module inside a block, the modules that only feed it, and why it is no scaled dot-product attention."""

    site: Site
    module: nn.Module
    feeders: tuple[nn.Module, ...] = ()
    other: str = ""

    @property
    def backend(self) -> str:
        """The backend of diffusers that its processor calls now; "" if it calls attention some other way."""
        processor: Any = getattr(self.module, "processor", None)
        dispatch: Any = sys.modules.get(_DISPATCH)
        if dispatch is None or not hasattr(processor, "_attention_backend"):
            return ""
        chosen = processor._attention_backend or dispatch._AttentionBackendRegistry.get_active_backend()[0]
        return str(getattr(chosen, "value", chosen))

    @property
    def flex(self) -> bool:
        """It calls flex_attention."""
        known = type(getattr(self.module, "processor", None)).__name__ in FLEX_ATTENTION
        return known or self.backend == "flex"

    def check_backend(self) -> None:
        """Raise `DitaError` if its backend calls neither scaled dot-product attention nor flex_attention."""
        name = self.backend
        if name and name != "flex" and not name.startswith(("native", "_native")):
            raise DitaError(
                f"{self.site.name} attends by the backend {name!r}, whose kernel nobody can stand in for; choose "
                '"native" or "flex" (set_attention_backend) for methods on attention'
            )

    @property
    def row_wise(self) -> bool:
        """Each row of its output depends on the same row of its one input alone, as far as its structure tells.

        Example:
            >>> mlp, mixer = nn.Sequential(nn.Linear(2, 4), nn.GELU()), nn.Conv1d(2, 2, 3)
            >>> [ModulePart(Site("module", "m", role="mlp"), module).row_wise for module in (mlp, mixer)]
            [True, False]
        """
        if self.site.role not in ("mlp", "linear") or self.feeders:
            return False
        given = list(inspect.signature(type(self.module).forward).parameters.values())[1:]
        if sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in given) > 1:
            return False  # what else it needs may go by rows too
        holders = [m for m in self.module.modules() if next(m.parameters(recurse=False), None) is not None]
        return bool(holders) and all(isinstance(m, _ROW_WISE) or "Norm" in type(m).__name__ for m in holders)


def _parts_within(holder: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Attention, MLPs and joining projections in a block, also in what it only holds together.

    Yields:
        path within the block, the module, and the module that holds it.
    """
    children = dict(holder.named_children())
    parallel = _runs_side_by_side(children)
    for name, child in children.items():
        inner = f"{path}.{name}" if path else name
        if parallel and name in (*PARALLEL_PARTS, PARALLEL_PROJECTION):
            if name == PARALLEL_PROJECTION:
                yield inner, child, holder
        elif _is_part(name) and not isinstance(child, (nn.ModuleList, nn.Identity)):
            yield inner, child, holder
        elif any(_is_part(n.rpartition(".")[2]) for n, _ in child.named_modules()):
            yield from _parts_within(child, inner)


def _is_part(name: str) -> bool:
    known = _ATTENTION_NAME.match(name) or _MLP_NAME.match(name)
    return known is not None and not _NO_PART_NAME.match(name)


def _runs_side_by_side(children: dict[str, nn.Module]) -> bool:
    return PARALLEL_PROJECTION in children and all(name in children for name in PARALLEL_PARTS)


def first_attention(block: nn.Module) -> nn.Module | None:
    """The first attention module inside a block, as they are listed; None if there is none.

    Example:
        >>> first_attention(nn.ModuleDict({"attn_norm": nn.Identity(), "attn": nn.Linear(2, 2)}))
        Linear(in_features=2, out_features=2, bias=True)
    """
    for path, module, holder in _parts_within(block):
        name = path.rpartition(".")[2]
        if name == PARALLEL_PROJECTION:
            return dict(holder.named_children())[PARALLEL_PARTS[0]]
        if _ATTENTION_NAME.match(name):
            return module
    return None


def linears_of(block: Block) -> list[ModulePart]:
    """The linear layers inside a block's attention and MLPs, and those beside and behind where both run at once."""
    parts = []
    for path, found, holder in _parts_within(block.module):
        start, _, name = path.rpartition(".")
        joined = name == PARALLEL_PROJECTION
        beside = dict(holder.named_children())
        inside = {n: m for n, m in beside.items() if n in (*PARALLEL_PARTS, name)} if joined else {name: found}
        for child, whole in inside.items():
            for inner, module in whole.named_modules():
                if isinstance(module, nn.Linear):
                    full = ".".join(filter(None, (block.path, start, child, inner)))
                    parts.append(ModulePart(Site("module", full, block=block.number, role="linear"), module))
    return parts


def inner_of(block: Block) -> list[ModulePart]:
    """The attention modules of a block that feed a projection joining attention and MLP."""
    parts = []
    for path, _, holder in _parts_within(block.module):
        start, _, name = path.rpartition(".")
        if name == PARALLEL_PROJECTION:
            module = dict(holder.named_children())[PARALLEL_PARTS[0]]
            full = ".".join(filter(None, (block.path, start, PARALLEL_PARTS[0])))
            site = Site("module", full, block=block.number, role="attention")
            parts.append(ModulePart(site, module, other=_other_attention(module)))
    return parts


def modules_of(block: Block) -> list[ModulePart]:
    """Attention and MLP modules of a block with their roles; where both run at once, the projection joining them."""
    parts = []
    # A block that reads the text but does not pass it on has it read by its second attention.
    passed = block.entry.encoder if "encoder" in block.entry.returns else ""
    reads_text = any(n in block.parameters and n != passed for n in (block.entry.encoder, "encoder_hidden_states"))
    for path, child, holder in _parts_within(block.module):
        name, other = path.rpartition(".")[2], ""
        text = any(_TEXT_NAME.match(step) for step in path.split("."))
        feeders: tuple[nn.Module, ...] = ()
        if name == PARALLEL_PROJECTION:
            role = "parallel"
            feeders = tuple(dict(holder.named_children())[n] for n in PARALLEL_PARTS)
        elif not _ATTENTION_NAME.match(name):
            role = "mlp"
        else:
            crossing = _CROSS_NAME.match(name) or (_SECOND_NAME.match(name) and reads_text)
            crossing = crossing or "Cross" in type(holder).__name__ or getattr(child, "is_cross_attention", False)
            role = "cross-attention" if crossing and not _SELF_NAME.match(name) else "attention"
            other = _other_attention(child)
        full = f"{block.path}.{path}"
        temporal = role == "attention" and not TEMPORAL_PARTS.isdisjoint(full.split("."))
        site = Site("module", full, block=block.number, role=role, text=text, temporal=temporal)
        parts.append(ModulePart(site, child, feeders, other))
    return parts


def _other_attention(module: nn.Module) -> str:
    """Why an attention module never calls scaled dot-product attention; "" if it does, or nothing is known."""
    kinds = [type(getattr(module, "processor", None)), *(type(m) for m in module.modules())]
    return next((OTHER_ATTENTION[kind.__name__] for kind in kinds if kind.__name__ in OTHER_ATTENTION), "")
