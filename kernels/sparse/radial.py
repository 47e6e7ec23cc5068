"""Radial Attention: a fixed pattern in which frames see each other the less, the farther apart they are.

Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation", NeurIPS 2025,
arXiv 2506.19852.

Selection: with S tokens in a frame, frames delta apart and bits(x) the binary digits of x, let
l = 2^(bits(S) - bits(delta)). Token a of one frame sees token b of the other if |a - b| <= max(l * decay, block), and
if l >= block or delta is a multiple of floor(block / l). The same and the next frame are seen whole. Where the text is
not among the tokens (Wan), all see the first frame. A block is computed if more than 60 % of its columns that hold any
kept pair have more than a third of theirs kept. When: the pattern is the same for all layers, heads and steps; the
first steps and layers are dense.

Differs from the paper: the authors round to blocks frame pair by frame pair and join the results, here a block is
looked at as a whole, which also works for frames smaller than a block. In their code for Wan neighbouring frames see
each other within half a frame: `adjacent=0.5`; and the second condition also drops neighbours, if a frame has fewer
tokens than a block. Blocks on the diagonal are always kept. A block holds at most an eighth of a frame, but 16 tokens:
it is also the narrowest window, and one as wide as a small frame would keep everything; frames of 1,024 tokens and more
get the published 128. In an image rows take the place of frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut, Layout
from dita.kernels.sparse.policy import Asked, Policy
from dita.kernels.sparse.tiles import framed, sees_first_frame
from dita.registry import register


def window_width(distance: int, tokens: int, decay: float, block: int, adjacent: float = 1.0) -> int:
    """How far apart two tokens of frames may lie that see each other; -1 if these frames do not.

    Args:
        distance: of the frames.
        tokens: of a frame.
        decay, block, adjacent: as of the method.

    Example:
        >>> [window_width(distance, 3600, 0.2, 128) for distance in (0, 1, 2, 4, 8, 32, 33)]
        [3600, 3600, 204, 128, 128, 128, -1]
    """
    if distance < 2:
        return tokens if distance == 0 else int(tokens * adjacent)
    length = 2.0 ** (tokens.bit_length() - distance.bit_length())
    if length < block and distance % int(block / length):
        return -1
    return int(max(length * decay, block))


def radial_blocks(
    grid: tuple[int, int, int],
    block: int,
    decay: float,
    sink: bool,
    adjacent: float = 1.0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Which blocks the pattern keeps: bool [T, T].

    Args:
        grid: frames, rows and columns.
        sink: all see the first frame.
        block, decay, adjacent: as of the method.
        device: where it is computed.

    Example:
        >>> radial_blocks((4, 1, 4), 4, 0.2, sink=False).int()
        tensor([[1, 1, 1, 0],
                [1, 1, 1, 1],
                [1, 1, 1, 1],
                [0, 1, 1, 1]], dtype=torch.int32)
    """
    frames, size = grid[0], grid[1] * grid[2]
    tokens = frames * size
    widths = [window_width(distance, size, decay, block, adjacent) for distance in range(frames)]
    reach = torch.tensor(widths, device=device)
    token = torch.arange(tokens, device=device)
    frame, place = token // size, token % size
    rows = []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        kept = torch.zeros_like(token)
        for number in range(start // size, (stop - 1) // size + 1):
            first, last = max(start - number * size, 0), min(stop - number * size, size)
            width = reach[(frame - number).abs()]
            seen = (place + width + 1).clamp_max(last) - (place - width).clamp_min(first)
            seen = seen.masked_fill(width < 0, 0).clamp_min(0)
            kept += torch.where(frame == 0, last - first, seen) if sink else seen
        dense = torch.stack([kept > 0, 3 * kept > stop - start])
        held, full = torch.nn.functional.pad(dense, (0, -tokens % block)).unflatten(-1, (-1, block)).sum(-1)
        rows.append(full > 0.6 * held)
    return torch.stack(rows)


def block_for(tokens: int, block: int) -> int:
    """The block for frames of that many tokens: at most the power of two that is an eighth of them, but 16.

    Example:
        >>> [block_for(tokens, 128) for tokens in (3600, 1024, 256, 16)], block_for(256, 2)
        ([128, 128, 32, 16], 2)
    """
    return min(block, max(16, 1 << max(0, (tokens // 8).bit_length() - 1)))


class Radial(Policy):
    """Keep the blocks of a fixed pattern.

    Args:
        decay, block, first_frame, adjacent: as of the method.
    """

    def __init__(self, decay: float, block: int, first_frame: bool | None, adjacent: float) -> None:
        self.decay, self.block, self.first_frame, self.adjacent = decay, block, first_frame, adjacent
        self._plans: dict[Layout, BlockPlan] = {}

    def begin_run(self) -> None:
        """Forget the patterns."""
        self._plans.clear()

    def plan(self, asked: Asked) -> BlockPlan | None:
        """The pattern, made once a run."""
        layout, device = asked.layout, asked.q.device
        if layout not in self._plans:
            grid = framed(layout.grid)
            block = block_for(grid[1] * grid[2], self.block)
            cut = Cut(layout, block, block, device=device)
            sink = sees_first_frame(layout, self.first_frame)
            mask = radial_blocks(grid, block, self.decay, sink, self.adjacent, device)
            self._plans[layout] = cut.plan(mask[None, None], lifetime=asked.steps)
        return self._plans[layout]


@register
@dataclass(frozen=True)
class RadialAttention(SparseMethod):
    """Radial Attention's settings; the defaults are those for Wan 2.1.

    Attributes:
        decay: width of the windows beyond the next frame; 0.95 for HunyuanVideo. Published for the length the model was
            trained on.
        block: tokens of a block, fewer where frames are small.
        first_frame: all tokens see the first frame; None: where the text is not among the tokens, as in Wan.
        adjacent: part of a frame within which neighbouring frames see each other; 0.5 in the authors' code for Wan.
        dense_steps: 12 of 50 steps.
        dense_layers: 0 for HunyuanVideo.

    Raises:
        DitaError: a setting out of range; on attaching, a model without attention inside its blocks.

    Example:
        >>> RadialAttention(decay=0.95, dense_layers=0).label()
        'dense_layers=0 decay=0.95'
    """

    decay: float = 0.2
    block: int = 128
    first_frame: bool | None = None
    adjacent: float = 1.0
    dense_steps: float = field(default=0.24, kw_only=True)
    dense_layers: int = field(default=1, kw_only=True)

    name: ClassVar[str] = "radial"
    title: ClassVar[str] = "Radial Attention"
    arxiv: ClassVar[str] = "2506.19852"
    axes: ClassVar[str] = "no score; windows that halve as the distance of frames doubles; fixed for the run"
    citation: ClassVar[str] = """@inproceedings{li2025radial,
  title={Radial Attention: {O(n log n)} Sparse Attention with Energy Decay for Long Video Generation},
  author={Li, Xingyang and Li, Muyang and Cai, Tianle and Xi, Haocheng and Yang, Shuo and Lin, Yujun and others},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("decay", self.decay, 0)
        check_whole("block", self.block, 1)
        check_number("adjacent", self.adjacent, 0, 1)

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        return Radial(self.decay, self.block, self.first_frame, self.adjacent)

    @classmethod
    def forced(cls) -> RadialAttention:
        """Blocks of one token, so that few suffice."""
        return cls(block=1, first_frame=False, adjacent=0.25, dense_layers=0, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[RadialAttention, ...]:
        """Wider and narrower windows; where frames are small, the narrowest one, the block, decides."""
        return (cls(), cls(adjacent=0.5), cls(block=16, adjacent=0.5), cls(block=16, adjacent=0.25))
