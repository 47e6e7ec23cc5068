"""How much of the foreground each block attends to, measured during a run (ProfilingDiT, arXiv 2504.03140).

The foreground is that of the predicted noise; the attention is that which an image token receives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from dita.anatomy import Anatomy
from dita.attention_view import Attended
from dita.caching.policy import View
from dita.caching.table import Measurement, Recorder
from dita.errors import DitaError
from dita.grid import channel_axis
from dita.seams import Features, Site

_EVERY = 5  # steps between two profiled ones: the authors find the shares steady over the run


def foreground(noise: torch.Tensor) -> torch.Tensor:
    """Cut the tokens in two by their first principal component; the part that touches the border less is wanted.

    Args:
        noise: predicted noise per token [B, C, T, H, W].

    Returns:
        bool [B, T, H, W]; all False for a sample that is constant.

    Example:
        >>> noise = torch.zeros(1, 2, 1, 4, 4)
        >>> noise[..., 1:3, 1:3] = 1
        >>> foreground(noise)[0, 0].long().tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    """
    border = torch.ones(noise.shape[2:], dtype=torch.bool, device=noise.device)
    border[:, 1:-1, 1:-1] = False
    masks = []
    for sample in noise:
        tokens = sample.flatten(1).T.double()
        tokens = tokens - tokens.mean(0)
        score = tokens @ torch.linalg.eigh(tokens.T @ tokens)[1][:, -1]
        ordered = score.sort()[0]
        count = torch.arange(1, len(score), device=score.device)
        # With the total 0, the variance between the two parts is sum^2 (1/n + 1/m) up to a factor.
        between = ordered.cumsum(0)[:-1].square() * (1 / count + 1 / (len(score) - count))
        mask = (score > ordered[between.argmax()]).reshape(border.shape)
        # Of parts alike the smaller one, then the one without the first corner: the component's sign says nothing.
        masks.append(min((mask, ~mask), key=lambda part: _size(part & border, part, part.flatten()[:1])))
    return torch.stack(masks)


def _size(*parts: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(part.sum()) for part in parts)


def foreground_share(received: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """The share R of the foreground that is among the half of its frame with the most attention.

    Args:
        received: attention per token [B, T, H, W].
        mask: the foreground, bool of the same shape.

    Returns:
        one number per frame that has a foreground.

    Example:
        >>> foreground_share(torch.tensor([[[[3.0, 2.0, 1.0, 0.0]]]]), torch.tensor([[[[True, False, True, False]]]]))
        [0.5]
    """
    frames, masks = received.flatten(0, 1).flatten(1), mask.flatten(0, 1).flatten(1)
    high = frames > frames.quantile(0.5, dim=1, keepdim=True)
    counts = masks.sum(1)
    shares = (high & masks).sum(1) / counts.clamp_min(1)
    return shares[counts > 0].tolist()


def noise_per_token(noise: torch.Tensor, axis: int, grid: Sequence[int]) -> torch.Tensor:
    """A model's output averaged over each token's patch.

    Args:
        noise: packed tokens [B, N, C], [B, C, H, W] or a film with its channels at `axis`.
        axis: of the channels.
        grid: frames, rows and columns of tokens.

    Returns:
        float32 [B, C, T, H, W].

    Example:
        >>> noise_per_token(torch.ones(1, 4, 8, 8), 1, (1, 4, 4)).shape
        torch.Size([1, 4, 1, 4, 4])
    """
    noise = noise.detach().float().movedim(axis, 1)
    if noise.ndim == 3:
        return noise.unflatten(2, tuple(grid))
    size = (grid[0], grid[1], grid[2])
    return functional.adaptive_avg_pool3d(noise if noise.ndim == 5 else noise[:, :, None], size)


class Profiler(Recorder):
    """Compares what the blocks attend to with the foreground of the predicted noise, every few steps.

    Watches the model and the attention in its self-attention modules; leaves the shares of each block in the sink, by
    its number.

    Args:
        sink: what it fills.
        anatomy: of the model.
    """

    def __init__(self, sink: Measurement, anatomy: Anatomy) -> None:
        super().__init__(sink)
        self.anatomy = anatomy
        self._received: dict[int, list[torch.Tensor]] = {}

    def attended(self, site: Site, seen: Attended, view: View) -> None:
        """Sum the columns of self-attention's map over the image tokens."""
        count, tokens = seen.q.shape[2], math.prod(view.grid)
        if view.position.local_step % _EVERY or seen.k.shape[2] != count:
            return
        image = slice(None) if count == tokens else None
        if count > tokens and self.anatomy.text_at:
            image = slice(count - tokens, None) if self.anatomy.text_at == "first" else slice(tokens)
        if not view.grid or image is None:
            raise DitaError(
                f"profilingdit cannot tell which of the {count} queries in {site.name} of {self.anatomy.name} are the "
                f"image tokens {view.grid}: give the profile as `table`, or use another method"
            )
        self._received.setdefault(site.block, []).append(seen.received(image)[:, image])

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """The predicted noise is there: find its foreground."""
        noise, latents = outputs[0], inputs[0] if inputs else None
        if site.kind != "model" or not self._received or noise is None or latents is None:
            return
        axis = channel_axis(self.anatomy.model, latents)
        # Models that also predict a variance return it behind the noise.
        noise = noise.narrow(axis, 0, min(noise.shape[axis], latents.shape[axis]))
        mask = foreground(noise_per_token(noise, axis, view.grid))
        for block, pieces in self._received.items():
            # Some processors attend sample by sample, some blocks more than once.
            received = torch.cat(pieces).unflatten(0, (-1, len(mask))).mean(0).unflatten(1, view.grid)
            self.sink.seen.setdefault(str(block), []).extend(foreground_share(received, mask))
        self._received.clear()
