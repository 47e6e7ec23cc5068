"""VORTA's coreset attention: half of the image tokens attend to each other, the rest copies the centre of its window.

See `dita.kernels.sparse.vorta` for the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dita.attention_view import Attended
from dita.kernels.sparse.layout import Layout

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Windows:
    """Image tokens in windows; those at the end of an axis may be short.

    Attributes:
        places: int64 [W, n], numbers of image tokens, the centre first, -1 at the end of a short window.
        kept: bool [W, n - 1], True for as many places as margins of the window stay, left-aligned.
        dropped: bool [W, n - 1], the places of the other margins, right after them.
    """

    places: torch.Tensor
    kept: torch.Tensor
    dropped: torch.Tensor

    def to(self, device: torch.device | str) -> Windows:
        """The same on another device."""
        return Windows(self.places.to(device), self.kept.to(device), self.dropped.to(device))

    @property
    def tokens(self) -> int:
        """How many image tokens stay."""
        return len(self.places) + int(self.kept.sum())


def windows(grid: Grid, size: Grid) -> Windows:
    """Cut a grid into windows of which half the tokens stay, the centre among them.

    Args:
        grid: frames, rows, columns.
        size: of a window. The centre is at half of it, rounded down.

    Example:
        >>> half = windows((1, 3, 5), (1, 3, 2))
        >>> half.places
        tensor([[ 6,  0,  1,  5, 10, 11],
                [ 8,  2,  3,  7, 12, 13],
                [ 9,  4, 14, -1, -1, -1]])
        >>> half.kept.sum(1)
        tensor([2, 2, 0])
    """
    counts = [-(-cells // side) for cells, side in zip(grid, size, strict=True)]
    f, r, c = (count * side for count, side in zip(counts, size, strict=True))
    padded = torch.full((f, r, c), -1)
    padded[: grid[0], : grid[1], : grid[2]] = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
    boxes = padded.view(counts[0], size[0], counts[1], size[1], counts[2], size[2]).permute(0, 2, 4, 1, 3, 5)
    boxes = boxes.reshape(-1, size[0] * size[1] * size[2])
    # Where the centre of each window is, in a window of full size.
    middles = [
        (cells - side * torch.arange(count)).clamp(max=side) // 2
        for cells, side, count in zip(grid, size, counts, strict=True)
    ]
    centre = middles[0][:, None, None] * size[1] + middles[1][:, None]
    centre = (centre * size[2] + middles[2]).flatten()[:, None]
    place = torch.arange(boxes.shape[1])
    rank = torch.where(place == centre, 0, torch.where(boxes < 0, 2, 1))
    boxes = boxes.gather(1, rank.argsort(dim=1, stable=True))
    present = (boxes >= 0).sum(1, keepdim=True)
    stay = (present // 2 - 1).clamp_min(0)
    return Windows(boxes, place[:-1] < stay, (place[:-1] >= stay) & (place[:-1] < present - 1))


def coreset_attention(seen: Attended, layout: Layout, half: Windows) -> torch.Tensor:
    """Attend with the tokens that stay, and give the others the output of their window's centre.

    Of a window those margins stay whose queries are least like the centre's, by their cosine. Text stays.

    Args:
        seen: q, k, v [B, H, N, D] with equally many heads; a mask only over keys.
        layout: of the tokens.
        half: of the layout's grid, on the same device.

    Returns:
        [B, H, N, D].

    Example:
        >>> q = torch.randn(1, 2, 24, 8)
        >>> coreset_attention(Attended(q, q, q), Layout((2, 3, 4)), windows((2, 3, 4), (2, 3, 2))).shape
        torch.Size([1, 2, 24, 8])
    """
    q, (batch, heads, _, width) = seen.q, seen.q.shape
    image = torch.nn.functional.normalize(q[:, :, layout.visual_slice].float(), dim=-1)
    places = half.places.clamp_min(0)
    gathered = image.index_select(2, places.flatten()).view(batch, heads, *places.shape, width)
    like = (gathered[..., 1:, :] * gathered[..., :1, :]).sum(-1)
    order = like.masked_fill(half.places[:, 1:] < 0, torch.inf).argsort(dim=-1, stable=True)
    margins = places[:, 1:].expand(batch, heads, -1, -1).gather(-1, order)
    centres, first = half.places[:, 0].expand(batch, heads, -1), layout.text if layout.text_first else 0
    text = torch.arange(layout.tokens, device=q.device)[layout.text_slice].expand(batch, heads, -1)
    staying = torch.cat([centres + first, margins[..., half.kept] + first, text], -1)
    index = staying[..., None].expand(-1, -1, -1, width)
    mask = None
    if seen.key_mask is not None:
        mask = seen.key_mask[:, None].expand(-1, heads, -1).gather(2, staying)[:, :, None]
    keys, values = seen.k.gather(2, index), seen.v.gather(2, index)
    some = Attended(q.gather(2, index), keys, values, mask, seen.scale).attend()
    out = torch.empty_like(q).scatter_(2, index, some)
    owner = torch.arange(len(places), device=q.device)[:, None].expand_as(half.dropped)[half.dropped]
    gone = (margins[..., half.dropped] + first)[..., None].expand(-1, -1, -1, width)
    return out.scatter_(2, gone, some.index_select(2, owner))
