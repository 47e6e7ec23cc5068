"""The parts of one transformer: blocks in execution order, spans, and the modules inside blocks."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dita.discovery import block_entry, model_entry
from dita.errors import DitaError
from dita.models import PARALLEL_PARTS, PARALLEL_PROJECTION, BlockEntry
from dita.seams import Features, Site

_TEXT_NAME = re.compile(r"^(txt_.*|.*_context)$")
_ROW_WISE = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
_MODULE_NAME = re.compile(r"^(attn\d*|attention|self_attn|cross_attn|ff|ffn|mlp|ff_context|.*_attn|.*_mlp)$")


@dataclass(frozen=True)
class Block:
    """One transformer block: where it is, and how to read its inputs and outputs."""

    number: int
    path: str
    module: nn.Module
    entry: BlockEntry
    parameters: tuple[str, ...]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Features:
        """The streams among a call's arguments: (hidden, encoder or None)."""
        hidden = self._argument(self.entry.hidden, args, kwargs)
        encoder = self._argument(self.entry.encoder, args, kwargs) if "encoder" in self.entry.returns else None
        return (hidden, encoder)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        if name in kwargs:
            return kwargs[name]
        place = self.parameters.index(name)
        return args[place] if place < len(args) else None

    def unpack(self, output: Any) -> Features:
        """The streams of the block's return value."""
        if len(self.entry.returns) == 1:
            return (output[0] if isinstance(output, tuple) else output, None)
        streams = dict(zip(self.entry.returns, output, strict=True))
        return (streams["hidden"], streams["encoder"])

    def pack(self, streams: Features) -> Any:
        """A return value made of streams."""
        hidden, encoder = streams
        if len(self.entry.returns) == 1:
            return hidden
        return tuple(hidden if name == "hidden" else encoder for name in self.entry.returns)


@dataclass(frozen=True)
class ModulePart:
    """A module inside a block, and the modules that only feed it."""

    site: Site
    module: nn.Module
    feeders: tuple[nn.Module, ...] = ()

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
        holders = [m for m in self.module.modules() if next(m.parameters(recurse=False), None) is not None]
        return bool(holders) and all(isinstance(m, _ROW_WISE) or "Norm" in type(m).__name__ for m in holders)


@dataclass(frozen=True)
class Anatomy:
    """What dita found in one transformer.

    Attributes:
        model: the transformer.
        family: short name of the declared family, "" for a discovered model.
        blocks: all blocks in execution order; empty if none were found.
        segments: maximal spans over which the streams stay the same (one for most models).
        modules: attention and MLP modules inside the blocks; where both run side by side, the projection joining them.
        inner: the attention modules that feed such projections.
        linears: the linear layers inside attention and MLP modules, and such projections; not those of modulations.
        reasons: seam -> why it is missing.
        text_used_after: the text stream leaving the last block matters.
    """

    model: nn.Module
    family: str
    blocks: tuple[Block, ...] = ()
    segments: tuple[Site, ...] = ()
    modules: tuple[ModulePart, ...] = ()
    inner: tuple[ModulePart, ...] = ()
    linears: tuple[ModulePart, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)
    text_used_after: bool = True

    @property
    def name(self) -> str:
        """Class name of the transformer."""
        return type(self.model).__name__

    @property
    def text_at(self) -> str:
        """Where text tokens stand in joint attention: "first", "last", or "" for nowhere or unknown."""
        return next((block.entry.text for block in self.blocks if "encoder" in block.entry.returns), "")

    def span(self, first: int, last: int) -> Site:
        """The site of blocks first..last, both included."""
        if not 0 <= first <= last < len(self.blocks):
            raise DitaError(f"{self.name} has blocks 0..{len(self.blocks) - 1}; a span {first}..{last} does not fit")
        return Site("span", f"blocks[{first}:{last + 1}]", first, last, ends=last == len(self.blocks) - 1)

    def entry(self, number: int) -> Site:
        """The site just before the attention of a block.

        Raises:
            DitaError: the block has no attention by that name.
        """
        block = self.blocks[number]
        if not any("attn" in name or "attention" in name for name, _ in block.module.named_children()):
            raise DitaError(f"{block.path} of {self.name} holds no attention module: there is no modulated input")
        return Site("entry", f"entry of {block.path}", number, number)

    def spans(self, first: int, last: int) -> tuple[Site, ...]:
        """Blocks first..last cut where the streams change, so that each piece has one kind of input and output."""
        pieces = [(max(first, s.first), min(last, s.last)) for s in self.segments]
        return tuple(self.span(start, end) for start, end in pieces if start <= end)

    def attentions(self, cross: bool = True) -> tuple[ModulePart, ...]:
        """All attention modules in execution order; without `cross` only self-attention and joint attention."""
        roles = ("attention", "cross-attention") if cross else ("attention",)
        parts = [part for part in (*self.modules, *self.inner) if part.site.role in roles]
        return tuple(sorted(parts, key=lambda part: part.site.block))

    @property
    def apart(self) -> tuple[ModulePart, ...]:
        """`modules`, with each projection joining attention and MLP taken apart.

        Its place is taken by the attention that feeds it, by the layers beside that, and by the projection itself as a
        row-wise layer.
        """
        joining = {part.site.block: part for part in self.modules if part.site.role == "parallel"}
        parts = [part for part in self.modules if part.site.role != "parallel"] + list(self.inner)
        for part in self.linears:
            joined = joining.get(part.site.block)
            if joined is not None and (part.module is joined.module or part.module in joined.feeders):
                parts.append(part)
        return tuple(sorted(parts, key=lambda part: part.site.block))

    @property
    def attention_sites(self) -> tuple[Site, ...]:
        """Self- and joint attention inside the blocks, in execution order: where tokens of the image see each other."""
        parts = [p for p in (*self.modules, *self.inner) if p.site.role == "attention" and not p.site.text]
        return tuple(attention_site(part.site) for part in sorted(parts, key=lambda part: part.site.block))

    @property
    def input_sites(self) -> tuple[Site, ...]:
        """What self- and joint attention inside the blocks reads, in execution order."""
        parts = [p for p in (*self.modules, *self.inner) if p.site.role == "attention" and not p.site.text]
        return tuple(input_site(part.site) for part in sorted(parts, key=lambda part: part.site.block))

    @property
    def block_inputs(self) -> tuple[Site, ...]:
        """What each block reads."""
        return tuple(
            Site("input", f"input of {b.path}", b.number, b.number, block=b.number, role="block") for b in self.blocks
        )

    def require(self, seam: str, method: str) -> None:
        """Raise `DitaError` with the reason if the seam is missing."""
        why = self.reasons.get(seam)
        if seam == "attention" and not self.attention_sites:
            why = self.reasons.get("module", "no self- or joint attention was recognised inside its blocks")
        if why is not None:
            raise DitaError(
                f"{method} needs the {seam} seam, which {self.name} does not offer: {why}; "
                "dita.supports(pipe) lists what it does offer"
            )


def attention_site(site: Site) -> Site:
    """The scaled dot-product attention inside an attention module.

    Example:
        >>> attention_site(Site("module", "blocks.0.attn1", block=0, role="attention")).name
        'attention of blocks.0.attn1'
    """
    return Site("attention", f"attention of {site.name}", block=site.block, role=site.role)


def input_site(site: Site) -> Site:
    """The image tokens that a module reads.

    Example:
        >>> input_site(Site("module", "blocks.0.attn1", block=0, role="attention")).name
        'input of blocks.0.attn1'
    """
    return Site("input", f"input of {site.name}", block=site.block, role=site.role)


def describe(model: nn.Module) -> Anatomy:
    """Look at a transformer and say what can be hooked.

    Never raises for an unknown model: what is missing stands in `reasons`.

    Example:
        >>> from torch import nn
        >>> describe(nn.Linear(2, 2)).reasons["block"]
        'its forward loops over no list of blocks (module lists it holds: none)'
    """
    entry, why = model_entry(model)
    if entry is None:
        return Anatomy(model, "", reasons={"block": why, "module": why})
    blocks: list[Block] = []
    for list_name in entry.block_lists:
        for number, module in enumerate(getattr(model, list_name)):
            shape, why = block_entry(type(module))
            if shape is None:
                return Anatomy(model, entry.family, reasons={"block": why, "module": why})
            parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]
            blocks.append(Block(len(blocks), f"{list_name}.{number}", module, shape, parameters))
    modules = tuple(part for block in blocks for part in _modules_of(block))
    reasons = {} if modules else {"module": "no attention or MLP module was recognised inside its blocks"}
    inner = tuple(part for block in blocks for part in _inner_of(block))
    linears = tuple(part for block in blocks for part in _linears_of(block))
    bare = Anatomy(model, entry.family, tuple(blocks))
    segments = tuple(bare.span(first, last) for first, last in _segments(blocks))
    return Anatomy(
        model, entry.family, tuple(blocks), segments, modules, inner, linears, reasons, entry.text_used_after
    )


def _segments(blocks: list[Block]) -> list[tuple[int, int]]:
    cuts = [0]
    for before, after in zip(blocks, blocks[1:], strict=False):
        if set(before.entry.returns) != set(after.entry.returns):
            cuts.append(after.number)
    return [(start, end - 1) for start, end in zip(cuts, [*cuts[1:], len(blocks)], strict=True)]


def _linears_of(block: Block) -> list[ModulePart]:
    children = dict(block.module.named_children())
    parallel = PARALLEL_PROJECTION in children and all(name in children for name in PARALLEL_PARTS)
    parts = []
    for name, child in children.items():
        if not _MODULE_NAME.match(name) and not (parallel and name in (*PARALLEL_PARTS, PARALLEL_PROJECTION)):
            continue
        for inner, module in child.named_modules():
            if isinstance(module, nn.Linear):
                path = ".".join(filter(None, (block.path, name, inner)))
                parts.append(ModulePart(Site("module", path, block=block.number, role="linear"), module))
    return parts


def _inner_of(block: Block) -> list[ModulePart]:
    children = dict(block.module.named_children())
    if PARALLEL_PROJECTION not in children or not all(name in children for name in PARALLEL_PARTS):
        return []
    name = PARALLEL_PARTS[0]
    return [ModulePart(Site("module", f"{block.path}.{name}", block=block.number, role="attention"), children[name])]


def _modules_of(block: Block) -> list[ModulePart]:
    children = dict(block.module.named_children())
    if PARALLEL_PROJECTION in children and all(name in children for name in PARALLEL_PARTS):
        site = Site("module", f"{block.path}.{PARALLEL_PROJECTION}", block=block.number, role="parallel")
        return [ModulePart(site, children[PARALLEL_PROJECTION], tuple(children[name] for name in PARALLEL_PARTS))]
    parts = []
    for name, child in children.items():
        if _MODULE_NAME.match(name) and not isinstance(child, (nn.ModuleList, nn.Identity)):
            role = "attention" if "attn" in name or name == "attention" else "mlp"
            # A block that reads the text but does not pass it on has it read by its second attention.
            reads_text = "encoder" not in block.entry.returns and block.entry.encoder in block.parameters
            crossing = name == "cross_attn" or (name == "attn2" and reads_text)
            if role == "attention" and (crossing or getattr(child, "is_cross_attention", False)):
                role = "cross-attention"
            text = _TEXT_NAME.match(name) is not None
            site = Site("module", f"{block.path}.{name}", block=block.number, role=role, text=text)
            parts.append(ModulePart(site, child))
    return parts
