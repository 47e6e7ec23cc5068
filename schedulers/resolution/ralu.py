"""Region-adaptive latent upsampling: a small picture, then full resolution where its edges are, then everywhere.

Jeong et al., "Upsample What Matters: Region-Adaptive Latent Sampling for Accelerated Diffusion Transformers", 2025,
arXiv 2507.08422.

What: tokens of the latents. When: three stages of N steps that end at times e (0 is noise, 1 the picture): all tokens
at half the resolution; the share of them with most edges, in the decoded estimate of x0, at full resolution among the
others; all at full resolution. How: a token is enlarged by copies. With t = e at the end of a stage, x becomes b
copies(x) + a n with b = 1 / (Z (1 - e) + e) and a = 1 - s, where n has covariance I - (1 / Z^2) 1 1^T among the four
copies: x is then as at time s = b e, signal and white noise alike, and the next stage starts there. Each stage has a
shift h of its own.

Published for FLUX.1-dev, in place of 50 steps: N = (5, 6, 7), e = (0.3, 0.45, 1), h = (5.019, 2.589, 2.226), Z =
6.317, 0.3 of the tokens (4x faster); N = (2, 3, 5), e = (0.2, 0.3, 1), h = (8.141, 2.856, 2.193), Z = 6.261, 0.1 (7x).
For others h and Z are fitted (`matching`); the paper's models have a shift of 3, and for one of 1 the fit puts the
clock back almost to noise. A run has the steps N, whatever number the pipeline is called with.

Differs from the paper: tokens that are not enlarged get noise of variance 1 - 1 / Z^2 instead of 1, without which
theirs is above the level (`exact=False` as published); noise is drawn group by group instead of from one covariance
matrix; edges are Sobel's gradients between the thresholds of the Canny detector it uses, in the whole range of the
picture, ties broken by steepness instead of at random; films, and pipelines without a decoder of pictures, choose by
the edges of the latents. The noise it begins with is averaged, not thinned. Flux takes one list of ids for a batch, so
that its samples run one by one in the second stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.loop import Request, Runner
from dita.registry import register
from dita.schedulers.resolution.edges import most_edges
from dita.schedulers.resolution.layout import Layout
from dita.schedulers.resolution.matching import matched, starts
from dita.schedulers.resolution.mixture import (
    Copies,
    Mixture,
    copied,
    lacking,
    latents_of,
    sequence_of,
    tokens_in,
    tokens_of,
)
from dita.schedulers.resolution.positions import check_positions, run_at
from dita.schedulers.resolution.staged import Ending, StagedLoop, StagedMethod
from dita.schedulers.resolution.stages import Stage, shifted

_PUBLISHED: dict[tuple[tuple[int, ...], tuple[float, ...]], tuple[float, float, float, float]] = {
    ((5, 6, 7), (0.3, 0.45, 1.0)): (5.019, 2.589, 2.226, 6.317),
    ((2, 3, 5), (0.2, 0.3, 1.0)): (8.141, 2.856, 2.193, 6.261),
}  # at a shift of 3


class RegionAdaptive(StagedLoop):
    """The three stages.

    Args:
        settings: of the method.
        pipe: the pipeline.
        fit: shifts of the stages, and Z.
    """

    def __init__(self, settings: RALU, pipe: Any, fit: tuple[float, float, float, float]) -> None:
        super().__init__(settings.name, pipe, settings.stretched)
        self.settings, self.pipe, self.fit = settings, pipe, fit
        self.mixture: Mixture | None = None

    def plan(self, levels: tuple[float, ...]) -> tuple[Stage, ...]:
        """See `StagedLoop.plan`; of the pipeline's levels only the ends count."""
        settings, stages = self.settings, []
        first = starts(settings.ends, self.fit[3])
        for n, (steps, own) in enumerate(zip(settings.steps, self.fit, strict=False)):
            begin, end = (shifted(1 - time, 1 / own) for time in (first[n], settings.ends[n]))
            inner = [shifted(begin + (end - begin) * i / steps, own) for i in range(steps + 1)]
            stages.append(Stage(1.0 if n == 2 else 0.5, tuple(min(levels[0], max(levels[-1], v)) for v in inner)))
        return tuple(stages)

    def _forget(self) -> None:
        super()._forget()
        self.mixture = None

    def check_layout(self, layout: Layout) -> None:
        """See `StagedLoop.check_layout`."""
        if layout.rows % 2 or layout.columns % 2:
            raise DitaError(
                f"ralu enlarges tokens 2x2, but the picture has {layout.rows} x {layout.columns} of them; ask for a "
                "height and width with even numbers"
            )

    def call(self, stage: int, request: Request, run: Runner) -> Any:
        """See `StagedLoop.call`."""
        if stage != 1 or self.mixture is None:
            return super().call(stage, request, run)
        layout, mixture = self._known(), self.mixture
        ratio = (layout.frames * mixture.count, layout.tokens(layout.full))
        share = mixture.enlarged.shape[2] / (mixture.enlarged.shape[2] + mixture.kept.shape[2])
        request = replace(request, tokens=ratio, reason=f"stage 2: {share:.0%} of the small picture enlarged")
        places = mixture.positions(2.0 if self.stretched else 1.0, self.stretched)
        grid = layout.full if self.stretched else mixture.grid
        return run_at(request, run, layout, grid, places, request.latents)

    def fitted(self, stage: int, sample: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `StagedLoop.fitted`."""
        return (sample, output) if stage == 1 else super().fitted(stage, sample, output)

    def leads_elsewhere(self, stage: int) -> bool:
        """See `StagedLoop.leads_elsewhere`."""
        return stage < 2

    def lead_over(self, ending: Ending) -> torch.Tensor:
        """See `StagedLoop.lead_over`."""
        layout, low, settings = self._known(), self.grid(0), self.settings
        level, start = self.stages[ending.stage].levels[-1], self.stages[ending.stage + 1].levels[0]
        x = ending.sample.float() + (level - ending.level) * ending.velocity
        if ending.stage == 0:
            clean = layout.opened(ending.clean(), low)
            count = int(low[0] * low[1] * settings.enlarged)
            decode = settings.edges == "picture"
            self.mixture = Mixture.of(low, most_edges(self.pipe, clean, low, count, decode))
            kept, enlarged = self.mixture.chosen(tokens_of(layout, x, low))
            enlarged = self._enlarged(enlarged, level, start)
            kept = self._renoised(kept, level, start)
            both = torch.cat([kept, enlarged.flatten(2, 3)], dim=2)
            return sequence_of(layout, both)
        assert self.mixture is not None
        kept, enlarged = self.mixture.split(tokens_in(layout, x))
        whole = self.mixture.assembled(self._enlarged(kept, level, start), self._renoised(enlarged, level, start))
        return latents_of(layout, whole, layout.full)

    def _enlarged(self, tokens: torch.Tensor, level: float, start: float) -> torch.Tensor:
        """Copies at the start of the next stage: [B, F, n, c, p, q] to [B, F, n, 4, c, p, q]."""
        how = self.settings.copies
        big = copied(tokens, how)
        noise = lacking(self.noise(big.shape, big), how, self.fit[3])
        return big * ((1 - start) / (1 - level)) + start * noise

    def _renoised(self, tokens: torch.Tensor, level: float, start: float) -> torch.Tensor:
        """The other tokens at the start of the next stage."""
        spread = (1 - self.fit[3] ** -2) ** 0.5 if self.settings.exact else 1.0
        return tokens * ((1 - start) / (1 - level)) + start * spread * self.noise(tokens.shape, tokens)


@register
@dataclass(frozen=True)
class RALU(StagedMethod):
    """The settings of region-adaptive latent upsampling.

    Attributes:
        steps: of each of the three stages; () for the plain run.
        ends: times at which they end, from 0 (noise) to 1 (the picture); the last is 1.
        enlarged: share of the small picture's tokens that are enlarged before the others.
        shifts: of the stages; None for the published or fitted ones.
        z: divides the correlation of the added noise, at least 2; None as for `shifts`.
        edges: choose by those of the decoded "picture", or of the "latents".
        copies: of whole "tokens", as published, or of their "pixels".
        exact: tokens that are not enlarged get just the noise they lack; False as published.
        stretched: tokens of a small picture are told to lie as far apart as in the large one; see `StagedMethod`.

    Raises:
        DitaError: a setting out of range; on attaching, a pipeline that is not flow matching from noise, or whose model
            cannot be told where tokens lie.

    Example:
        >>> RALU((2, 3, 5), (0.2, 0.3, 1.0), 0.1).label()
        'steps=(2, 3, 5) ends=(0.2, 0.3, 1.0) enlarged=0.1'
    """

    steps: tuple[int, ...] = (5, 6, 7)
    ends: tuple[float, ...] = (0.3, 0.45, 1.0)
    enlarged: float = 0.3
    shifts: tuple[float, ...] | None = None
    z: float | None = None
    edges: str = "picture"
    copies: Copies = "tokens"
    exact: bool = True

    name: ClassVar[str] = "ralu"
    title: ClassVar[str] = "RALU"
    arxiv: ClassVar[str] = "2507.08422"
    axes: ClassVar[str] = "tokens of two resolutions; half, edges enlarged, full; correlated noise puts the clock back"
    citation: ClassVar[str] = """@article{jeong2025upsample,
  title={Upsample What Matters: Region-Adaptive Latent Sampling for Accelerated Diffusion Transformers},
  author={Jeong, Wongi and Lee, Kyungryeol and Seo, Hoigi and Chun, Se Young},
  journal={arXiv preprint arXiv:2507.08422},
  year={2025}
}"""

    def validate(self) -> None:
        """Check lengths and ranges."""
        if self.steps == ():
            return
        for name, values in (("steps", self.steps), ("ends", self.ends), ("shifts", self.shifts or self.ends)):
            if not isinstance(values, tuple) or len(values) != 3:
                raise DitaError(f"{name} is {values!r}; expected three values, one for each stage")
        for steps, end in zip(self.steps, self.ends, strict=True):
            check_whole("steps", steps, 1)
            check_number("ends", end, 0.001, 1)
        if not self.ends[0] < self.ends[1] < self.ends[2] == 1:
            raise DitaError(f"ends is {self.ends}; expected times that rise to 1")
        for shift in self.shifts or ():
            check_number("shifts", shift, 0.01, 100)
        if self.z is not None:
            check_number("z", self.z, 2)
        if (self.shifts is None) != (self.z is None):
            raise DitaError("shifts and z belong together: give both or neither")
        check_number("enlarged", self.enlarged, 0, 1)
        for name, value, known in (
            ("edges", self.edges, ("picture", "latents")),
            ("copies", self.copies, ("tokens", "pixels")),
        ):
            if value not in known:
                raise DitaError(f"{name} is {value!r}; expected {' or '.join(known)}")

    def fit(self, shift: float) -> tuple[float, float, float, float]:
        """Shifts of the stages and Z, for a pipeline whose own schedule has this shift.

        Example:
            >>> RALU().fit(3.0)
            (5.019, 2.589, 2.226, 6.317)
        """
        if self.shifts is not None and self.z is not None:
            first, second, third = self.shifts
            return first, second, third, self.z
        if shift == 3.0 and (self.steps, self.ends) in _PUBLISHED:
            return _PUBLISHED[self.steps, self.ends]
        return matched(self.steps, self.ends, shift)

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> StagedLoop:
        """See `StagedMethod.make`."""
        for anatomy in anatomies:
            check_positions(self.name, anatomy.model)
        return super().make(anatomies, pipe)

    def staged(self, pipe: Any) -> RegionAdaptive:
        """See `StagedMethod.staged`."""
        config = dict(getattr(getattr(pipe, "scheduler", None), "config", {}))
        shift = config.get("shift", config.get("flow_shift")) or 1.0
        return RegionAdaptive(self, pipe, self.fit(float(shift)) if self.steps else (1.0, 1.0, 1.0, 2.0))

    @classmethod
    def disabled(cls) -> RALU:
        """No stages."""
        return cls(())

    @classmethod
    def forced(cls) -> RALU:
        """Eight steps."""
        return cls((2, 3, 3))

    @classmethod
    def ladder(cls) -> tuple[RALU, ...]:
        """Both published settings, and one before and between them."""
        return (cls((6, 6, 12)), cls(), cls((3, 4, 6), (0.25, 0.4, 1.0), 0.2), cls((2, 3, 5), (0.2, 0.3, 1.0), 0.1))
