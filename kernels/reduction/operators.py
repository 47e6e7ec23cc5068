"""The reducers: pairs of operators, one that makes M tokens of N and one that makes N of M again.

Tokens are [B, N, C]; where every head is reduced by itself, B counts heads too. All are deterministic, on a GPU too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dita.kernels.tokens import gather_tokens


@dataclass(frozen=True)
class Pruned:
    """Keep some tokens; each dropped one later gets a copy of what became of the one that stands in for it.

    Attributes:
        positions: int64 [B or 1, M], the kept tokens.
        stand_in: int64 [B or 1, N], for every token the place, from 0 to M - 1, of the kept one that it gets back.
        sizes: [B, M], how many tokens each stands for, or None.

    Example:
        >>> pair = Pruned(torch.tensor([[2, 0]]), torch.tensor([[1, 1, 0]]))
        >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> pair.reduce(x).flatten(), pair.restore(pair.reduce(x)).flatten()
        (tensor([3., 1.]), tensor([1., 1., 3.]))
    """

    positions: torch.Tensor
    stand_in: torch.Tensor
    sizes: torch.Tensor | None = None

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The kept tokens [B, M, C]."""
        return gather_tokens(x, self.positions.expand(len(x), -1))

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """Copies [B, N, C]."""
        return gather_tokens(y, self.stand_in.expand(len(y), -1))


@dataclass(frozen=True)
class Merged(Pruned):
    """The same, but what is kept is the mean of all tokens that it stands for.

    Example:
        >>> pair = Merged(torch.tensor([[2, 0]]), torch.tensor([[1, 1, 0]]))
        >>> pair.reduce(torch.tensor([[[1.0], [2.0], [3.0]]])).flatten()
        tensor([3.0000, 1.5000])
    """

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The means [B, M, C], taken in float32."""
        count = self.positions.shape[-1]
        labels = self.stand_in.expand(len(x), -1)
        # Sorted by group the sums are the same from run to run; sums that are scattered on a GPU are not.
        ordered = gather_tokens(x, labels.argsort(dim=1, stable=True)).float()
        counts = group_sizes(labels, count)
        means = torch.segment_reduce(ordered.flatten(0, 1), "sum", lengths=counts.flatten(), axis=0, unsafe=True)
        return (means.view(len(x), count, -1) / counts.clamp_min(1)[..., None]).to(x.dtype)


def group_sizes(stand_in: torch.Tensor, count: int) -> torch.Tensor:
    """How many tokens each kept one stands for.

    Args:
        stand_in: int64 [B, N].
        count: M.

    Returns:
        int64 [B, M].

    Example:
        >>> group_sizes(torch.tensor([[1, 1, 0]]), 2)
        tensor([[1, 2]])
    """
    ordered = stand_in.sort(dim=1).values.contiguous()
    edges = torch.arange(count + 1, device=stand_in.device).expand(len(stand_in), -1).contiguous()
    return torch.searchsorted(ordered, edges).diff(dim=1)


@dataclass(frozen=True)
class Mixed:
    """Every reduced token is a weighted mean of many, and every restored one of many reduced.

    The pair (A, U): A has rows that sum to 1, and U is A transposed with its rows scaled to sum to 1, so that constant
    tokens come back as they were. Where each token belongs to one group, A is the mean of it and U a copy: the
    pseudo-inverse. A bare A^T would shrink everything by M / N.

    Attributes:
        positions: int64 [B, M].
        down: A, [B, W, D, n]: of W windows, each with D reduced tokens and n tokens; zero in places without either.
        up: U, [B, W, n, D].
        members: int64 [W, n], tokens of the windows, -1 for none; None for one window of all in order.
        kept: bool [W, D], where a window has a reduced token; None for everywhere.
        sizes: as of `Pruned`.
    """

    positions: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    members: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    sizes: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        logits: torch.Tensor,
        positions: torch.Tensor,
        members: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Mixed:
        """The pair whose A is the softmax of logits over the tokens of a window.

        Args:
            logits: float32 [B, W, D, n].
            positions, members, kept: see the attributes.
            dtype: of the weights.

        Example:
            >>> pair = Mixed.of(torch.tensor([[[[9.0, 9.0, -99.0], [-99.0, -99.0, 9.0]]]]), torch.tensor([[0, 2]]))
            >>> x = torch.tensor([[[1.0], [2.0], [3.0]]])
            >>> pair.reduce(x).flatten(), pair.restore(pair.reduce(x)).flatten()
            (tensor([1.5000, 3.0000]), tensor([1.5000, 1.5000, 3.0000]))
        """
        if members is not None:
            logits = logits.masked_fill((members < 0)[:, None, :], -torch.inf)
        # Out of logits twice: a quotient of the weights would be 0 / 0 for tokens that no destination resembles.
        log_down = logits.log_softmax(-1)
        if kept is not None:
            log_down = log_down.masked_fill(~kept[..., None], -torch.inf)
        up = log_down.transpose(-2, -1).softmax(-1).nan_to_num(0.0)
        return cls(positions, log_down.exp().to(dtype), up.to(dtype), members, kept)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """A x, [B, M, C]."""
        down = self.down.to(x.dtype)
        if self.members is None:
            return down[:, 0] @ x
        y = down @ x[:, self.members.clamp_min(0)]
        return y[:, self.kept] if self.kept is not None else y.flatten(1, 2)

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """U y, [B, N, C]."""
        up = self.up.to(y.dtype)
        if self.members is None:
            return up[:, 0] @ y
        windows = y.new_zeros(len(y), self.up.shape[1], self.up.shape[3], y.shape[-1])
        if self.kept is not None:
            windows[:, self.kept] = y
        else:
            windows = y.view_as(windows)
        present = self.members >= 0
        order = self.members[present].argsort()
        return (up @ windows)[:, present][:, order]

    def weighed(self) -> torch.Tensor:
        """How many tokens each reduced one stands for, [B, M]: the column sums of U."""
        sizes = self.up.float().sum(-2)
        return sizes[:, self.kept] if self.kept is not None else sizes.flatten(1)
