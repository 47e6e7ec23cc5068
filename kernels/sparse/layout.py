"""How the tokens of one attention lie, and how they are cut into blocks: image tokens first, then the text.

Attention does not care in which order its tokens come, so every plan puts the image tokens first, in an order of the
policy's choosing, and the text into blocks of its own behind them, wherever the model has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dita.errors import DitaError
from dita.kernels.plan import BlockPlan, arrange, block_count


@dataclass(frozen=True)
class Layout:
    """The tokens of one self- or joint attention.

    Attributes:
        grid: frames, rows and columns of image tokens, flattened in this order.
        text: how many text tokens there are.
        text_first: they come before the image tokens, not after them.
    """

    grid: tuple[int, int, int]
    text: int = 0
    text_first: bool = False

    @property
    def visual(self) -> int:
        """How many image tokens there are."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.visual + self.text

    @property
    def visual_slice(self) -> slice:
        """Where the image tokens are."""
        return slice(self.text, None) if self.text_first else slice(0, self.visual)

    @property
    def text_slice(self) -> slice:
        """Where the text tokens are."""
        return slice(0, self.text) if self.text_first else slice(self.visual, None)


class Cut:
    """One way to cut the tokens of a layout into blocks.

    Args:
        layout: the tokens.
        block_q, block_k: tokens of a block of queries and of keys, one a multiple of the other.
        order: int64 [V'] or [B', H', V'], numbers of image tokens (from 0) in the order they are cut, -1 for an empty
            place; None for the order they come in. Each image token once.
        device: of the tensors.

    Attributes:
        order: of all tokens, for a plan; None where they are cut as they come.
        rows, columns: blocks of queries and keys that hold image tokens.
        text_rows, text_columns: blocks behind them that hold text.

    Example:
        >>> cut = Cut(Layout((1, 2, 3), text=2, text_first=True), 4, 4)
        >>> cut.order.tolist(), cut.rows, cut.text_rows
        ([2, 3, 4, 5, 6, 7, -1, -1, 0, 1], 2, 1)
    """

    def __init__(
        self,
        layout: Layout,
        block_q: int,
        block_k: int,
        order: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        large, small = max(block_q, block_k), min(block_q, block_k)
        if small < 1 or large % small:
            raise DitaError(f"expected blocks of which one is a multiple of the other, got {block_q} and {block_k}")
        self.layout, self.block_q, self.block_k = layout, block_q, block_k
        places = layout.visual if order is None else order.shape[-1]
        missing = -places % large
        self.rows, self.columns = block_count(places, block_q), block_count(places, block_k)
        self.text_rows, self.text_columns = block_count(layout.text, block_q), block_count(layout.text, block_k)
        self.order: torch.Tensor | None = None
        self._holes = False
        if order is None and (layout.text == 0 or (not layout.text_first and not missing)):
            return
        visual = torch.arange(layout.visual, device=device) if order is None else order
        first = layout.text if layout.text_first else 0
        visual = torch.where(visual >= 0, visual + first, visual)
        parts = [visual]
        if layout.text:
            self.rows, self.columns = (places + missing) // block_q, (places + missing) // block_k
            if missing:
                parts.append(visual.new_full((*visual.shape[:-1], missing), -1))
            text = torch.arange(layout.tokens, device=visual.device)[layout.text_slice]
            parts.append(text.expand(*visual.shape[:-1], -1))
        self.order = torch.cat(parts, -1)
        self._holes = bool((self.order < 0).any())

    def plan(self, mask: torch.Tensor, lifetime: int = 0) -> BlockPlan:
        """Turn a mask over image blocks into a plan: text sees and is seen by all, every block sees its own tokens.

        Args:
            mask: bool [B', H', rows, columns].
            lifetime: as of the plan.

        Raises:
            DitaError: a mask of another shape.
        """
        if mask.shape[-2:] != (self.rows, self.columns):
            raise DitaError(f"expected a mask over {(self.rows, self.columns)} blocks, got {tuple(mask.shape)}")
        mask = mask | self.diagonal(mask.device)
        mask = torch.nn.functional.pad(mask, (0, self.text_columns, 0, self.text_rows), value=True)
        return BlockPlan.of_mask(mask, self.block_q, self.block_k, self.order, self.order, lifetime, self._holes)

    def diagonal(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Bool [rows, columns], True where a block of queries and one of keys share tokens.

        Example:
            >>> Cut(Layout((1, 2, 4)), 2, 4).diagonal().int()
            tensor([[1, 0],
                    [1, 0],
                    [0, 1],
                    [0, 1]], dtype=torch.int32)
        """
        starts = torch.arange(self.rows, device=device) * self.block_q
        others = torch.arange(self.columns, device=device) * self.block_k
        return (starts[:, None] < others + self.block_k) & (others < starts[:, None] + self.block_q)

    def blocks(self, x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The image tokens cut into blocks.

        Args:
            x: [B, H, N, D], all tokens.
            block: tokens of a block, such as `block_q`.

        Returns:
            [B, H, T, block, D], 0 in places without a token, and bool [B' or 1, H' or 1, T, block], True where one is.

        Example:
            >>> Cut(Layout((1, 1, 3)), 2, 2).blocks(torch.ones(1, 1, 3, 1), 2)[0].flatten()
            tensor([1., 1., 1., 0.])
        """
        count = self.rows if block == self.block_q else self.columns
        if self.order is None:
            present = torch.ones(1, 1, self.layout.visual, dtype=torch.bool, device=x.device)
            moved = x[:, :, self.layout.visual_slice]
        else:
            order = self.order[..., : min(count * block, self.order.shape[-1] - self.layout.text)]
            present = (order >= 0).view(*(1,) * (3 - order.ndim), *order.shape)
            moved = arrange(x, order).masked_fill(~present[..., None], 0)
        short = count * block - moved.shape[2]
        moved = torch.nn.functional.pad(moved, (0, 0, 0, short))
        present = torch.nn.functional.pad(present, (0, short))
        return moved.unflatten(2, (count, block)), present.unflatten(2, (count, block))

    def valid(self, key_mask: torch.Tensor | None, present: torch.Tensor) -> torch.Tensor:
        """Where a block of keys holds an image token that counts.

        Args:
            key_mask: bool [B, N] over all tokens; None for all.
            present: as `blocks` returned it for keys.

        Returns:
            bool [B' or 1, H' or 1, T, block].

        Example:
            >>> cut = Cut(Layout((1, 1, 3)), 2, 2)
            >>> _, present = cut.blocks(torch.ones(1, 1, 3, 1), 2)
            >>> cut.valid(torch.tensor([[True, False, True]]), present).flatten().tolist()
            [True, False, True, False]
        """
        if key_mask is None:
            return present
        return self.blocks(key_mask[:, None, :, None].float(), present.shape[-1])[0][..., 0] > 0

    def means(self, x: torch.Tensor, block: int) -> torch.Tensor:
        """The mean image token of every block: float32 [B, H, T, D], 0 for a block without tokens.

        Example:
            >>> Cut(Layout((1, 1, 3)), 2, 2).means(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), 2).flatten()
            tensor([2., 5.])
        """
        tokens, present = self.blocks(x, block)
        return tokens.float().sum(3) / present.sum(3).clamp_min(1)[..., None]
