"""Sequences of tokens of two resolutions, and noise that is white after a token was copied.

Tokens are [B, F, M, c, p, q]: samples, frames, tokens of a frame, and the latent pixels of one. A mixture lists the
tokens that stay at half the resolution, then those of full resolution, four for each that was enlarged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat

from dita.schedulers.resolution.layout import Layout

Copies = Literal["tokens", "pixels"]
_ORDER = {"tokens": "(i a) (j b)", "pixels": "(a i) (b j)"}  # of a 2x2 group (i, j) of copies, in rows and columns


@dataclass(frozen=True)
class Mixture:
    """Which tokens of each sample and frame are at which resolution.

    Attributes:
        grid: rows and columns of tokens at half the resolution.
        kept: int64 [B, F, K], tokens that stay, by number in that grid.
        enlarged: int64 [B, F, L], the others.

    Example:
        >>> mixture = Mixture.of((1, 3), torch.tensor([[[1]]]))
        >>> mixture.kept, mixture.count
        (tensor([[[0, 2]]]), 6)
        >>> mixture.positions(1.0)[0, 0].tolist()
        [[0.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 1.5], [0.5, 1.0], [0.5, 1.5]]
    """

    grid: tuple[int, int]
    kept: torch.Tensor
    enlarged: torch.Tensor

    @classmethod
    def of(cls, grid: tuple[int, int], enlarged: torch.Tensor) -> Mixture:
        """Keep all tokens but these, int64 [B, F, L] with rising numbers."""
        total = grid[0] * grid[1]
        free = torch.ones((*enlarged.shape[:2], total), dtype=torch.bool, device=enlarged.device)
        free.scatter_(2, enlarged, False)
        kept = free.nonzero()[:, 2].view(*enlarged.shape[:2], total - enlarged.shape[2])
        return cls(grid, kept, enlarged)

    @property
    def count(self) -> int:
        """Tokens of a frame."""
        return self.kept.shape[2] + 4 * self.enlarged.shape[2]

    def positions(self, unit: float, centred: bool = False) -> torch.Tensor:
        """Row and column of every token, float32 [B, F, M, 2].

        Args:
            unit: distance of neighbours at half the resolution. 1 counts as the small picture does, so that tokens of
                full resolution have halves; 2 as the large one.
            centred: a token that stays lies in the middle of those that it would be enlarged to, not at the first.
        """
        columns, both = self.grid[1], (self.kept, self.enlarged)
        low, high = (unit * torch.stack([index // columns, index % columns], -1).float() for index in both)
        low = low + (0.25 * unit if centred else 0.0)
        offsets = unit * torch.tensor([[0.0, 0.0], [0.0, 0.5], [0.5, 0.0], [0.5, 0.5]], device=high.device)
        return torch.cat([low, rearrange(high[..., None, :] + offsets, "b f l four two -> b f (l four) two")], dim=2)

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two parts of a mixture: [B, F, K, c, p, q] and [B, F, L, 4, c, p, q]."""
        count = self.kept.shape[2]
        return tokens[:, :, :count], rearrange(tokens[:, :, count:], "b f (l four) c p q -> b f l four c p q", four=4)

    def chosen(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the small picture, [B, F, N, c, p, q], that stay and that are enlarged."""
        kept, enlarged = (
            torch.take_along_dim(tokens, index[..., None, None, None], dim=2) for index in (self.kept, self.enlarged)
        )
        return kept, enlarged

    def assembled(self, kept: torch.Tensor, enlarged: torch.Tensor) -> torch.Tensor:
        """All tokens of the large picture in order, from both parts at full resolution.

        Args:
            kept, enlarged: [B, F, K, 4, c, p, q] and [B, F, L, 4, c, p, q].

        Returns:
            [B, F, 4 N, c, p, q].
        """
        rows, columns = self.grid
        order = torch.cat([self.kept, self.enlarged], dim=2)[..., None, None, None, None]
        groups = torch.cat([kept, enlarged], dim=2)
        inverse = order.argsort(dim=2).expand(*groups.shape)
        sorted_groups = groups.gather(2, inverse)
        return rearrange(sorted_groups, "b f (h w) (i j) c p q -> b f (h i w j) c p q", h=rows, w=columns, i=2, j=2)


def tokens_of(layout: Layout, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Latents of so many rows and columns of tokens as [B, F, N, c, p, q]."""
    p = layout.patch
    return rearrange(layout.opened(latents, grid), "b c f (h p) (w q) -> b f (h w) c p q", p=p, q=p)


def latents_of(layout: Layout, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The inverse of `tokens_of`."""
    return layout.closed(rearrange(tokens, "b f (h w) c p q -> b c f (h p) (w q)", h=grid[0], w=grid[1]))


def sequence_of(layout: Layout, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens in any number as a model takes them: packed, or side by side in a picture one token high."""
    if layout.ndim == 3:
        return rearrange(tokens, "b f m c p q -> b (f m) (c p q)")
    strip = rearrange(tokens, "b f m c p q -> b c f p (m q)")
    return strip if layout.ndim == 5 else strip[:, :, 0]


def tokens_in(layout: Layout, sequence: torch.Tensor) -> torch.Tensor:
    """The inverse of `sequence_of`."""
    p = layout.patch
    if layout.ndim == 3:
        return rearrange(sequence, "b (f m) (c p q) -> b f m c p q", f=layout.frames, p=p, q=p)
    strip = sequence if layout.ndim == 5 else sequence[:, :, None]
    return rearrange(strip, "b c f p (m q) -> b f m c p q", q=p)


def copied(tokens: torch.Tensor, how: Copies) -> torch.Tensor:
    """Tokens enlarged 2x2, [..., c, p, q] to [..., 4, c, p, q].

    Args:
        how: "tokens" repeats the whole token four times, "pixels" each of its pixels.

    Example:
        >>> copied(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]), "pixels")[1, 0]
        tensor([[1., 1.],
                [1., 1.]])
    """
    big = repeat(tokens, f"... c a b -> ... c {_ORDER[how]}", i=2, j=2)
    return rearrange(big, "... c (i p) (j q) -> ... (i j) c p q", i=2, j=2)


def lacking(noise: torch.Tensor, how: Copies, z: float) -> torch.Tensor:
    """White noise turned into the noise that enlarged tokens lack: I - (1 / Z^2) 1 1^T among four copies.

    In a group the mean is shrunk by sqrt(1 - 4 / Z^2) and deviations from it stay, which is a root of that matrix.

    Args:
        noise: standard normal, [..., 4, c, p, q].
        z: at least 2.

    Example:
        >>> lacking(torch.ones(4, 1, 1, 1), "tokens", 2.0).abs().max()
        tensor(0.)
    """
    big = rearrange(noise, "... (i j) c p q -> ... c (i p) (j q)", i=2, j=2)
    grouped = rearrange(big, f"... c {_ORDER[how]} -> ... c a b i j", i=2, j=2)
    mean = grouped.mean(dim=(-2, -1), keepdim=True)
    grouped = grouped + ((1 - 4 / z**2) ** 0.5 - 1) * mean
    big = rearrange(grouped, f"... c a b i j -> ... c {_ORDER[how]}")
    return rearrange(big, "... c (i p) (j q) -> ... (i j) c p q", i=2, j=2)
