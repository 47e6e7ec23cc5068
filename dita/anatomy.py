"""The parts of one transformer: blocks in execution order, spans, and what is inside blocks."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dita.discovery import block_entry, is_refused, model_entry
from dita.errors import DitaError
from dita.models import BlockEntry, ModelEntry
from dita.parts import ModulePart, first_attention, inner_of, linears_of, modules_of
from dita.patch import unwrapped
from dita.seams import Features, Site


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
            return (hidden,) if self.entry.wrapped else hidden
        return (hidden, encoder) if self.entry.returns[0] == "hidden" else (encoder, hidden)


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
        return next((block.entry.text for block in self.blocks if block.entry.text), "")

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
        if first_attention(block.module) is None:
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
        parts = [
            p for p in (*self.modules, *self.inner) if p.site.role == "attention" and not p.site.text and not p.other
        ]
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

    def why_not(self, seam: str) -> str | None:
        """Why a seam is missing; None if it is there.

        Example:
            >>> describe(nn.Linear(2, 2)).why_not("model") is None
            True
        """
        if seam != "attention" or seam in self.reasons or self.attention_sites:
            return self.reasons.get(seam)
        others = [p.other for p in (*self.modules, *self.inner) if p.site.role == "attention" and p.other]
        return (*others, self.reasons.get("module", "no self- or joint attention was recognised inside its blocks"))[0]

    def require(self, seam: str, method: str) -> None:
        """Raise `DitaError` with the reason if the seam is missing."""
        why = self.why_not(seam)
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

    What `torch.compile` wrapped is looked into. Never raises for an unknown model: what is missing stands in `reasons`.

    Example:
        >>> from torch import nn
        >>> describe(nn.Linear(2, 2)).reasons["block"]
        'its forward loops over no list of blocks (module lists it holds: none)'
    """
    model = unwrapped(model)
    entry, why = model_entry(model)
    if entry is None:
        refused = {"model": why, "attention": why} if is_refused(type(model)) else {}
        return Anatomy(model, "", reasons={"block": why, "module": why, **refused})
    blocks: list[Block] = []
    for path, module in _in_order(model, entry):
        shape, why = block_entry(module)
        if shape is None:
            return Anatomy(model, entry.family, reasons={"block": why, "module": why})
        parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]
        blocks.append(Block(len(blocks), path, module, shape, parameters))
    modules = tuple(part for block in blocks for part in modules_of(block))
    reasons = {} if modules else {"module": "no attention or MLP module was recognised inside its blocks"}
    inner = tuple(part for block in blocks for part in inner_of(block))
    linears = tuple(part for block in blocks for part in linears_of(block))
    bare = Anatomy(model, entry.family, tuple(blocks))
    tail = int(getattr(model, entry.tail, 0)) if entry.tail else 0
    segments = tuple(bare.span(first, last) for first, last in _segments(blocks, entry.alone, tail))
    return Anatomy(
        model, entry.family, tuple(blocks), segments, modules, inner, linears, reasons, entry.text_used_after
    )


def _in_order(model: nn.Module, entry: ModelEntry) -> list[tuple[str, nn.Module]]:
    """Blocks as they are run, with their paths."""
    lists = [
        [(f"{path}.{number}", module) for number, module in enumerate(model.get_submodule(path).children())]
        for path in entry.block_lists
    ]
    if entry.in_turn:
        return [block for turn in zip(*lists, strict=False) for block in turn]
    return [block for blocks in lists for block in blocks]


def _segments(blocks: list[Block], alone: bool, tail: int) -> list[tuple[int, int]]:
    """Cut where the streams change, and where another list may read another single stream."""
    cuts = [0]
    for before, after in zip(blocks, blocks[1:], strict=False):
        lists = [block.path.rpartition(".")[0] for block in (before, after)]
        other_list = lists[0] != lists[1] and "encoder" not in after.entry.returns
        differ = set(before.entry.returns) != set(after.entry.returns)
        if differ or other_list or alone or after.number == len(blocks) - tail:
            cuts.append(after.number)
    return [(start, end - 1) for start, end in zip(cuts, [*cuts[1:], len(blocks)], strict=True)]
