"""What a guidance method may know of a model evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dita.errors import DitaError
from dita.grid import Grid, channel_axis, token_grid
from dita.loop import Request
from dita.seams import Position


@dataclass(frozen=True)
class Moment:
    """A model evaluation under guidance.

    Attributes:
        position: where it stands; its branch is "".
        scale: the pipeline's guidance scale, None if it does not tell.
        batch: samples of one branch.
        request: the call of the transformer that asks, of one branch or both.
        tokens: how many tokens the pipeline's packed latents have; 0 where they are not packed or not known. Editing
            models put out those of the reference image besides, after them.
    """

    position: Position
    scale: float | None
    batch: int
    request: Request | None = field(default=None, repr=False, compare=False)
    tokens: int = 0

    def guided(self, output: torch.Tensor) -> torch.Tensor:
        """The part of an output that the solver steps: no learned variance, no tokens of a reference image.

        Args:
            output: [B, ...] as the transformer shapes it.

        Returns:
            a view.

        Example:
            >>> Moment(Position(0, 8, 0, "", 0, 8, 0), 3.0, 1, tokens=2).guided(torch.ones(1, 5, 4)).shape
            torch.Size([1, 2, 4])
        """
        latents = None if self.request is None else self.request.latents
        if self.request is not None and latents is not None and latents.ndim == output.ndim:
            axis = channel_axis(self.request.anatomy.model, latents)
            output = output.narrow(axis, 0, min(latents.shape[axis], output.shape[axis]))
        tokens = self.tokens if output.ndim == 3 else 0
        return output.narrow(1, 0, min(tokens, output.shape[1])) if tokens else output

    def with_guided(self, output: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """An output with another value of the part that `guided` cuts out of it; `output` is left as it is.

        Example:
            >>> moment = Moment(Position(0, 8, 0, "", 0, 8, 0), 3.0, 1, tokens=1)
            >>> moment.with_guided(torch.ones(1, 2, 1), torch.zeros(1, 1, 1)).flatten()
            tensor([0., 1.])
        """
        if part.shape == output.shape:
            return part.to(output.dtype)
        changed = output.clone()
        self.guided(changed).copy_(part)
        return changed

    def grid(self) -> Grid:
        """Frames, rows and columns of the transformer's image tokens; () where the call does not tell."""
        if self.request is None or self.request.grid is not None:
            return () if self.request is None else self.request.grid or ()
        arguments = {**dict(zip(self.request.parameters, self.request.args, strict=False)), **self.request.kwargs}
        return token_grid(self.request.anatomy.model, arguments, self.request.latents)


def refuse_stream(name: str, moment: Moment, output: torch.Tensor | None = None) -> None:
    """For methods that keep something of each sample from step to step.

    Args:
        name: of the method.
        moment: the evaluation.
        output: of one branch, if it ran.

    Raises:
        DitaError: the samples of the batch belong to several runs, as "stream" makes it.
    """
    several = moment.request is not None and bool(moment.request.entries)
    if several or (output is not None and output.shape[0] != moment.batch):
        raise DitaError(
            f"{name} keeps numbers of each sample from step to step, but this batch holds samples of several runs; "
            "take rcfg, which keeps none, with stream"
        )
