"""CFG-Cache: the difference between the branches is kept, in low and high frequencies, for steps without a second one.

Lv et al., "FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality", ICLR 2025, arXiv
2410.19355. The attention part of FasterCache is not in here.

Kept: of d = u - c at steps with both branches, the low frequencies d_l, a disc of radius min(h, w) // 5 around zero of
its Fourier transform over rows and columns, and the rest d_h; frame by frame, float32. When: below timestep `below` the
unconditional branch runs at every `interval`-th step. How: elsewhere u = c + a d_l + b d_h. A weight is `low` or `high`
while the timestep is in its range, and 1 outside.

form "published": a and b are the products of the weights of all steps since d was measured, which is what the authors'
code and diffusers' do, multiplying in place: 1.1, 1.21, 1.33, 1.46 over four steps. "corrected": the weight of the step
at hand alone, as the paper writes it.

Defaults are diffusers': below 641 (of 1000, noise at the top), every 5th step, 1.1 for low frequencies between 99 and
901 and for high ones below 301.

Differs: the sum is taken of d's parts and not of the transforms of both branches, which is the same, for the transform
is linear. Latents packed into tokens are laid out on the grid of tokens, channel by channel, so that detail within a
token (2 x 2 pixels of Flux's latents) counts as neither; without a known grid the run is left alone and the report says
so. The first step of a second expert (Wan 2.2) is computed. A solver's second stage keeps a difference of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.loop import Run
from dita.registry import register
from dita.schedulers.guidance.moment import Moment, refuse_stream
from dita.schedulers.guidance.policy import GuidanceMethod, GuidancePolicy, Wanted

FORMS = ("published", "corrected")


def low_frequencies(x: torch.Tensor) -> torch.Tensor:
    """The part of x within a disc of radius min(h, w) // 5 around frequency zero.

    Args:
        x: [..., h, w].

    Returns:
        float32, of the same shape.

    Example:
        >>> low_frequencies(torch.full((1, 2, 2), 3.0))
        tensor([[[3., 3.],
                 [3., 3.]]])
    """
    height, width = x.shape[-2:]
    rows, columns = (torch.fft.fftfreq(size, 1 / size, device=x.device) for size in (height, width))
    disc = rows[:, None].square() + columns.square() <= (min(height, width) // 5) ** 2
    return torch.fft.ifft2(torch.fft.fft2(x.float()) * disc).real


def on_grid(x: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Latents with rows and columns last: packed tokens [B, N, C] as [B, frames, C, h, w], others as they are.

    Example:
        >>> on_grid(torch.arange(4.0).view(1, 4, 1), (1, 2, 2)).flatten(0, 2)
        tensor([[[0., 1.],
                 [2., 3.]]])
    """
    return x.unflatten(1, (-1, *grid[-2:])).movedim(-1, 2) if x.ndim == 3 else x


@dataclass
class Kept:
    """The difference of the branches at one evaluation.

    Attributes:
        low, high: float32, as `Moment.guided` cuts outputs; with the weights so far in the published form.
        shape: of the transformer's input.
    """

    low: torch.Tensor
    high: torch.Tensor
    shape: tuple[int, ...]


class CachedDifference(GuidancePolicy):
    """Keeps the difference of the branches and applies it while the unconditional one is left out.

    Args:
        config: the settings.
    """

    def __init__(self, config: CFGCache) -> None:
        self.config = config
        self._kept: dict[int, Kept] = {}

    def begin_run(self, run: Run) -> None:
        """See `GuidancePolicy.begin_run`."""
        self._kept.clear()
        self._grids: dict[tuple[int, ...], tuple[int, ...]] = {}
        config = getattr(run.scheduler, "config", {})
        self._upwards = bool(config.get("invert_sigmas"))  # Mochi counts from noise at 0

    def bytes_held(self) -> int:
        """See `GuidancePolicy.bytes_held`."""
        return sum(kept.low.nbytes + kept.high.nbytes for kept in self._kept.values())

    def timestep(self, moment: Moment) -> float:
        """From 0 to 1000, where all is noise."""
        return 1000 - moment.position.timestep if self._upwards else moment.position.timestep

    def wants(self, moment: Moment) -> Wanted:
        """See `GuidancePolicy.wants`."""
        refuse_stream(CFGCache.name, moment)
        config, position = self.config, moment.position
        kept = self._kept.get(position.stage)
        if self._grid(moment) is None:
            return Wanted("both", "the rows and columns of the tokens are not known")
        if kept is None or position.local_step == 0:
            return Wanted("both", "first step")
        if kept.shape != self._shape(moment):
            return Wanted("both", "the latents have another size than before")
        if self.timestep(moment) >= config.below:
            return Wanted("both", f"timestep {config.below:g} or above")
        if position.step % config.interval == 0:
            return Wanted("both", f"one step in {config.interval}", fresh=True)
        return Wanted("cond", "the difference of the branches is kept")

    def uncond(self, moment: Moment, cond: torch.Tensor, uncond: torch.Tensor | None) -> torch.Tensor:
        """See `GuidancePolicy.uncond`."""
        refuse_stream(CFGCache.name, moment, cond)
        c, stage, grid = moment.guided(cond).float(), moment.position.stage, self._grid(moment)
        if uncond is not None:
            if grid is not None:
                difference = moment.guided(uncond).float() - c
                low = low_frequencies(on_grid(difference, grid))
                low = low.movedim(2, -1).flatten(1, 3) if c.ndim == 3 else low
                self._kept[stage] = Kept(low, difference - low, self._shape(moment))
            return uncond
        kept, (low, high) = self._kept[stage], self.weights(self.timestep(moment))
        if self.config.form == "published":
            kept.low, kept.high = kept.low * low, kept.high * high
            low = high = 1.0
        return moment.with_guided(cond, c + low * kept.low + high * kept.high)

    def weights(self, timestep: float) -> tuple[float, float]:
        """Of low and high frequencies at one step."""
        config = self.config
        low = config.low if config.low_range[0] < timestep < config.low_range[1] else 1.0
        return low, config.high if config.high_range[0] < timestep < config.high_range[1] else 1.0

    def _shape(self, moment: Moment) -> tuple[int, ...]:
        return () if moment.request is None else tuple(moment.request.latents.shape[1:])

    def _grid(self, moment: Moment) -> tuple[int, ...] | None:
        """Where packed tokens lie; () if they are not packed, None if it is not known."""
        shape = self._shape(moment)
        if len(shape) != 2:
            return ()
        if shape not in self._grids:
            self._grids[shape] = moment.grid()
        grid, tokens = self._grids[shape], moment.tokens or shape[0]
        return grid if grid and tokens % (grid[-2] * grid[-1]) == 0 else None


@register
@dataclass(frozen=True)
class CFGCache(GuidanceMethod):
    """The settings of CFG-Cache; the defaults are diffusers'.

    Attributes:
        interval: below `below`, steps from one unconditional branch to the next; 1 computes all.
        below: timestep, 0 to 1000, from which downwards branches are left out; above 1000: from the second step.
        low, high: weights of the kept low and high frequencies. The authors take 1.05 and 1.1 for Vchitect-2.0, in
            other ranges, and 1.15 for Mochi.
        low_range, high_range: timesteps between which they count, exclusive.
        form: "published" (weights of successive steps multiply) or "corrected".

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> CFGCache(form="corrected", interval=3).label()
        'interval=3 form=corrected'
    """

    interval: int = 5
    below: float = 641.0
    low: float = 1.1
    high: float = 1.1
    low_range: tuple[float, float] = (99.0, 901.0)
    high_range: tuple[float, float] = (-1.0, 301.0)
    form: str = "published"

    name: ClassVar[str] = "cfg-cache"
    title: ClassVar[str] = "CFG-Cache (FasterCache)"
    arxiv: ClassVar[str] = "2410.19355"
    axes: ClassVar[str] = "difference of the branches in two bands; every n-th step; weighted reuse"
    citation: ClassVar[str] = """@inproceedings{lv2025fastercache,
  title={FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality},
  author={Lv, Zhengyao and Si, Chenyang and Song, Junhao and Yang, Zhenyu and Qiao, Yu and Liu, Ziwei and
    Wong, Kwan-Yee K.},
  booktitle={International Conference on Learning Representations},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_number("below", self.below, 0)
        check_number("low", self.low, 0)
        check_number("high", self.high, 0)
        for name, ends in (("low_range", self.low_range), ("high_range", self.high_range)):
            if not isinstance(ends, tuple) or len(ends) != 2:
                raise DitaError(f"{name} is {ends!r}; expected two timesteps")
            for end in ends:
                check_number(f"an end of {name}", end, -1)
        if self.form not in FORMS:
            raise DitaError(f"form is {self.form!r}; expected one of {', '.join(FORMS)}")

    def policy(self, anatomies: tuple[Anatomy, ...]) -> CachedDifference:
        """See `GuidanceMethod.policy`."""
        return CachedDifference(self)

    @classmethod
    def disabled(cls) -> CFGCache:
        """Every branch computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> CFGCache:
        """Every fourth step from the first on, whatever the timestep."""
        return cls(interval=4, below=1001.0)

    @classmethod
    def ladder(cls) -> tuple[CFGCache, ...]:
        """Every second and fifth step of the published range, then the corrected form from the first step on."""
        return (
            cls(interval=2),
            cls(),
            cls(form="corrected"),
            cls(interval=2, below=1001.0, form="corrected"),
            cls(below=1001.0, form="corrected"),
        )
