"""Progressive resolution: the first part of the run on a smaller picture, the last part at full size.

ProRes of Zhang et al., "Training-Free Efficient Video Generation via Dynamic Token Carving" (Jenga), NeurIPS 2025,
arXiv 2505.16864.

What: height and width of the latents; frames stay. When: stages by shares of the steps. How: at the end of a stage x0
is estimated, enlarged, and noised to the level at which the next stage begins, whose schedule is shifted further.
Published are 0.75 and 1 of the size, half of the steps each, with shifts of 7 and 9; and 0.5, 0.75 and 1, up to 0.3,
0.5 and 1 of the steps, with shifts of 7, 9 and 11. Here shifts are factors on top of the pipeline's own schedule, 9 /
7 and 11 / 7. With `amplify`, as published, text is attended to more at reduced resolution (`amplifier.py`).

Differs from the paper: a stage ends at its share of the steps, where the authors' code runs one step more at the lower
resolution; x0 is taken at the noise level at which the model ran, where their code takes the next stage's. The noise
that a smaller stage begins with is the pipeline's own, averaged to unit variance exactly, not drawn at that size.
`amplify` has to be asked for, because what was measured was measured without. Their sparse kernel takes its bias, those
of dita take none, so that with `amplify` no other method may decide which attention is computed. Where text is attended
to apart from the image, as in Wan, a constant drops out of the softmax and the bias would change nothing: there it is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.config import check_number
from dita.errors import DitaError
from dita.registry import register
from dita.schedulers.resolution.amplifier import TextAmplifier
from dita.schedulers.resolution.staged import StagedLoop, StagedMethod, check_stages
from dita.schedulers.resolution.stages import Stage, shifted
from dita.seams import Handler


class Progressive(StagedLoop):
    """Stages along the pipeline's own schedule, each shifted further.

    Args:
        settings: of the method.
        pipe: the pipeline.
    """

    def __init__(self, settings: ProgressiveResolution, pipe: Any) -> None:
        super().__init__(settings.name, pipe, settings.stretched)
        self.settings = settings

    def plan(self, levels: tuple[float, ...]) -> tuple[Stage, ...]:
        """See `StagedLoop.plan`."""
        settings, steps = self.settings, len(levels) - 1
        bounds = [0, *(int(share * steps + 0.5) for share in settings.until)]
        if any(stop <= start for start, stop in zip(bounds, bounds[1:], strict=False)):
            raise DitaError(
                f"{self.name} has stages until {settings.until} of the run, which {steps} steps do not fill"
            )
        stages = []
        for n, factor in enumerate(settings.shifts):
            own = [shifted(level, factor) for level in levels[bounds[n] : bounds[n + 1]]]
            following = settings.shifts[min(n + 1, len(settings.shifts) - 1)]
            stages.append(Stage(settings.scales[n], (*own, shifted(levels[bounds[n + 1]], following))))
        return tuple(stages)


@register
@dataclass(frozen=True)
class ProgressiveResolution(StagedMethod):
    """The settings of progressive resolution.

    Attributes:
        scales: of height and width, one for each stage; the last is 1.
        until: share of the steps at which each stage ends; the last is 1.
        shifts: factor of each stage on the shift of the pipeline's schedule.
        stretched: tokens of a small picture are told to lie as far apart as in the large one; see `StagedMethod`.
        amplify: raise the scores of text at reduced resolution, on models with joint attention.

    Raises:
        DitaError: a setting out of range; on attaching, a pipeline that is not flow matching from noise, or with
            `amplify` a model without joint attention, or another method on attention.

    Example:
        >>> ProgressiveResolution(scales=(0.5, 1.0)).label()
        'scales=(0.5, 1.0)'
    """

    scales: tuple[float, ...] = (0.75, 1.0)
    until: tuple[float, ...] = (0.5, 1.0)
    shifts: tuple[float, ...] = (1.0, 1.2857)
    amplify: bool = field(default=False, kw_only=True)

    name: ClassVar[str] = "progressive-resolution"
    title: ClassVar[str] = "Progressive resolution (Jenga's ProRes)"
    arxiv: ClassVar[str] = "2505.16864"
    axes: ClassVar[str] = "resolution; rising by fixed shares of the run; x0 enlarged and noised anew"
    citation: ClassVar[str] = """@inproceedings{zhang2025jenga,
  title={Training-Free Efficient Video Generation via Dynamic Token Carving},
  author={Zhang, Yuechen and Xing, Jinbo and Xia, Bin and Liu, Shaoteng and Peng, Bohao and Tao, Xin and Wan, Pengfei
    and Lo, Eric and Jia, Jiaya},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    def validate(self) -> None:
        """Check lengths and ranges."""
        if not isinstance(self.amplify, bool):
            raise DitaError(f"amplify is {self.amplify!r}; expected True or False")
        check_stages(self.name, scales=self.scales, until=self.until, shifts=self.shifts)
        for scale, until, shift in zip(self.scales, self.until, self.shifts, strict=True):
            check_number("scales", scale, 0.05, 1)
            check_number("until", until, 0, 1)
            check_number("shifts", shift, 0.01, 100)
        if self.scales[-1] != 1 or self.until[-1] != 1:
            raise DitaError(f"scales end with {self.scales[-1]:g} and until with {self.until[-1]:g}; expected 1 and 1")
        if sorted(set(self.until)) != list(self.until):
            raise DitaError(f"until is {self.until}; expected shares that rise")

    @property
    def claimed(self) -> frozenset[str]:
        """See `Method.claimed`."""
        return self.claims | {"which attention is computed"} if self.amplify else self.claims

    def handler(self, anatomy: Anatomy) -> Handler:
        """See `Method.handler`."""
        return TextAmplifier(self.name, anatomy) if self.amplify else super().handler(anatomy)

    def staged(self, pipe: Any) -> Progressive:
        """See `StagedMethod.staged`."""
        return Progressive(self, pipe)

    @classmethod
    def disabled(cls) -> ProgressiveResolution:
        """One stage."""
        return cls((1.0,), (1.0,), (1.0,))

    @classmethod
    def forced(cls) -> ProgressiveResolution:
        """Half the size for half of the steps."""
        return cls((0.5, 1.0))

    @classmethod
    def ladder(cls) -> tuple[ProgressiveResolution, ...]:
        """Both published settings and three around them."""
        return (
            cls((0.75, 1.0), (0.3, 1.0)),
            cls(),
            cls((0.5, 1.0), (0.3, 1.0)),
            cls((0.5, 0.75, 1.0), (0.3, 0.5, 1.0), (1.0, 1.2857, 1.5714)),
            cls((0.5, 1.0), (0.5, 1.0)),
        )
