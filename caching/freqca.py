"""FreqCa: reuse the low frequencies of the trunk's residual, forecast the high ones.

Liu et al., "FreqCa: Accelerating Image Generation and Editing via Frequency-Aware Caching", NeurIPS 2026, arXiv
2510.08669.

Kept: one tensor, the residual of the image stream over all blocks. When: the first `warmup` steps, then every
`interval`-th. How: split over the token grid by an orthonormal cosine transform of rows and columns; frequencies no
further from the origin than `cutoff` of the furthest are the low band, which is reused, and the rest is forecast by a
Hermite sum (see HiCache) of order `order`. With the transform "fft" the split is by a Fourier transform along the
tokens, which the authors use for Qwen-Image. The arithmetic is in float32.

Differences: the bands being linear, the forecast is taken over the whole residual and its low band put back, which
needs one transform per skipped step and no memory for bands. The authors' cosine transform assumes a square grid; here
rows and columns may differ, video is transformed frame by frame, and where a model does not tell its grid the Fourier
transform stands in. Their experimental look-ahead schedule is not built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.base import ForecastingMethod
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.history import History
from dita.caching.policy import FixedInterval
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.registry import register
from dita.seams import Call, Features, Site


@lru_cache(maxsize=64)
def cosine_transform(length: int) -> torch.Tensor:
    """The orthonormal cosine transform (DCT-II) of a row.

    Returns:
        float32 [length, length]: frequency, place.

    Example:
        >>> cosine_transform(4)[0]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    place = torch.arange(length, dtype=torch.float64) + 0.5
    waves = torch.cos(math.pi / length * torch.arange(length, dtype=torch.float64)[:, None] * place)
    return (waves / waves.norm(dim=1, keepdim=True)).float()


def low_band(
    tokens: torch.Tensor, grid: tuple[int, ...], cutoff: float, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """The low frequencies of tokens: over the grid by cosines, frame by frame, or along the tokens by Fourier.

    Args:
        tokens: [B, N, C], any float dtype.
        grid: frames, rows, columns with N tokens in all; anything else takes the Fourier transform along N.
        cutoff: of the greatest frequency (its distance to the origin on a grid), included.
        onto: float32 [B, N, C] that it is added to; None for nothing.

    Returns:
        float32 [B, N, C].

    Example:
        >>> low_band(torch.arange(4.0).view(1, 4, 1), (1, 2, 2), 0.1).flatten()
        tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """
    batch, count, channels = tokens.shape
    if len(grid) != 3 or math.prod(grid) != count:
        frequencies = torch.fft.fftfreq(count, device=tokens.device).abs()
        kept = (frequencies <= cutoff * frequencies.max()).view(1, -1, 1)
        low = torch.fft.ifft(torch.fft.fft(tokens.float(), dim=1) * kept, dim=1).real
        return low if onto is None else onto + low
    frames, rows, columns = grid
    planes = tokens.float().reshape(batch * frames, rows, columns, channels)
    waves = low_waves(rows, columns, cutoff, tokens.device)
    if waves is not None:
        flat = planes.flatten(1, 2)
        there, back = waves @ flat, waves.T.expand(len(flat), -1, -1)
        low = back @ there if onto is None else torch.baddbmm(onto.reshape(flat.shape), back, there)
        return low.reshape(batch, count, channels)
    down, across = (cosine_transform(n).to(tokens.device) for n in (rows, columns))
    spectrum = torch.einsum("ur,vc,brcd->buvd", down, across, planes)
    spectrum *= _is_low(rows, columns, cutoff).to(tokens.device)[None, :, :, None]
    low = torch.einsum("ur,vc,buvd->brcd", down, across, spectrum).reshape(batch, count, channels)
    return low if onto is None else onto + low


def _is_low(rows: int, columns: int, cutoff: float) -> torch.Tensor:
    distance = torch.hypot(torch.arange(rows)[:, None].float(), torch.arange(columns)[None].float())
    return distance <= cutoff * distance.max()


@lru_cache(maxsize=16)
def low_waves(rows: int, columns: int, cutoff: float, device: torch.device) -> torch.Tensor | None:
    """The plane waves of the low band, of length 1, if projecting on them is cheaper than a transform there and back.

    Args:
        rows, columns: of the grid of tokens.
        cutoff: of the greatest frequency, included.
        device: where they are wanted.

    Returns:
        float32 [waves, rows * columns]; None if the waves are more than rows and columns together.

    Example:
        >>> low_waves(2, 2, 0.1, torch.device("cpu"))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    up, along = _is_low(rows, columns, cutoff).nonzero(as_tuple=True)
    if len(up) > rows + columns:
        return None
    waves = cosine_transform(rows)[up][:, :, None] * cosine_transform(columns)[along][:, None, :]
    return waves.flatten(1).to(device)


@dataclass(frozen=True)
class BandForecast(Forecast):
    """A forecast whose low band is the newest anchor's."""

    cutoff: float = 0.1
    transform: str = "dct"

    def forecast(self, history: History, base: Features, site: Site, call: Call) -> Features:
        """See `Forecast.forecast`."""
        weights = self.weights(call.position.step, history.steps)
        ahead = history.combine(weights, base)
        # What the low band has too much of: the newest anchor less the forecast.
        excess = history.combine([(place == 0) - weight for place, weight in enumerate(weights)])
        grid = call.grid if self.transform == "dct" else ()
        return tuple(
            new if more is None or new is None else low_band(more, grid, self.cutoff, new.float()).to(new.dtype)
            for new, more in zip(ahead, excess, strict=True)
        )


@register
@dataclass(frozen=True)
class FreqCa(ForecastingMethod):
    """FreqCa's settings.

    Attributes:
        interval: one computed step, then interval - 1 forecast ones; 1 computes all. Published: 6 and 9.
        order: of the high band's forecast, 0 to 5.
        cutoff: of the greatest frequency, up to which is the low band, from 0 to 1.
        scale: of the Hermite polynomials.
        warmup: first steps that are all computed.
        transform: "dct" over the token grid, or "fft" along the tokens.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> FreqCa(interval=9).label()
        'interval=9'
    """

    interval: int = 6
    order: int = 2
    cutoff: float = 0.1
    scale: float = 0.71
    warmup: int = 3
    transform: str = "dct"

    name: ClassVar[str] = "freqca"
    title: ClassVar[str] = "FreqCa"
    arxiv: ClassVar[str] = "2510.08669"
    axes: ClassVar[str] = "image residual of the trunk; fixed interval; low band reused, high band by Hermite forecast"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    citation: ClassVar[str] = """@inproceedings{liu2026freqca,
  title={FreqCa: Accelerating Image Generation and Editing via Frequency-Aware Caching},
  author={Liu, Jiacheng and Cai, Peiliang and Zhou, Qinming and Lin, Yuqi and Kong, Deyang and Huang, Benhao and
    Pan, Yupei and Xu, Haowen and Zou, Chang and Tang, Junshu and Zheng, Shikang and Zhang, Linfeng},
  booktitle={Advances in Neural Information Processing Systems},
  year={2026}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_whole("warmup", self.warmup, 1)
        check_number("cutoff", self.cutoff, 0, 1)
        check_number("scale", self.scale, 1e-3, 1)
        if self.transform not in ("dct", "fft"):
            raise DitaError(f"transform is {self.transform!r}; expected 'dct' or 'fft'")
        Forecast(self.order, "hermite", self.scale)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Fixed interval over the trunk's image residual."""
        return Recipe(
            what="trunk",
            when=lambda: FixedInterval(self.interval, self.warmup),
            how=BandForecast(self.order, "hermite", self.scale, self.amplification, self.cutoff, self.transform),
            text=False,
            oldest_anchor=self.warmup - 2,
        )

    @classmethod
    def disabled(cls) -> FreqCa:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> FreqCa:
        """Every other step forecast."""
        return cls(interval=2, warmup=1)

    @classmethod
    def ladder(cls) -> tuple[FreqCa, ...]:
        """Intervals 3 to 9, with a warm-up of 5 as for TaylorSeer."""
        return tuple(cls(interval=n, warmup=5) for n in (3, 4, 6, 9))
