"""ParaDiGMS: several future steps are solved at once by Picard iteration, in one call of the transformer.

Shih et al., "Parallel Sampling of Diffusion Models", NeurIPS 2023, arXiv 2305.16317.

Kept: guesses of the next `window` states, at first all equal to the last one known. When: at the first call of a step
whose sample is not known yet, the transformer is evaluated at all of them in one batch. How: with drift_j the
scheduler's own step from state j less that state, x_(i+1) = x_0 + sum over j <= i of drift_j. A state counts as known
while the mean square of its change is at most (tolerance sigma)^2, where sigma^2 is the variance of DDPM's step from
there; the first state that fails is known too, for all it is made of is. Later steps whose samples are known leave the
transformer out. The first new state of a window is the scheduler's own step, so that k iterations make k states exact,
and a tolerance of 0 gives the plain run up to the rounding of a larger batch.

This buys latency with arithmetic: fewer calls in a row, of more rows each. It helps where a call of one sample leaves
the device idle, or where a batch is spread over several; on one busy GPU, or on a CPU, it is slower than the plain
sampler. The report's reasons count calls and rows; a row is one branch of one state of one sample.

The scheduler must be of first order and deterministic (`first_order.FIRST_ORDER`; DDIM with eta 0). Guidance comes in
one batch or branch by branch; the pipeline's formula is recognised by its result. Where a pipeline combines branches,
or calls the transformer, in a way that is not known here, the run goes on step by step and a remark says why. After
attaching, one more call sees whether the transformer reads a timestep for each row; one that does not is refused.

Caches count steps and guidance methods decide by step: neither means anything within a window, so that they are
excluded. So are methods inside a layer that keep something of a row for the next step, where the row is another state.
Other sparse attention and token reduction go along; their dense first steps are those of the first state in a window.
Methods that choose timesteps do so step by step as well; their list goes along in a scheduler that holds it
(`dita.schedulers.timesteps.listed`).

Differs from the paper: each sample slides by its own errors and does not depend on its batch mates, where the authors
slide all by the worst. Flow matching and Euler's scheduler use the variance of the ancestral step between the same two
noise levels, which for DDIM is the paper's; a last step without noise takes the variance of the one before it. Samplers
that draw noise (the authors' ParaDDPM) and of second order (ParaDPM-Solver) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.registry import register
from dita.schedulers.base import SamplingMethod
from dita.schedulers.solvers.first_order import check_first_order
from dita.schedulers.solvers.picard_loop import PicardLoop


@register
@dataclass(frozen=True)
class Picard(SamplingMethod):
    """The settings of ParaDiGMS; the defaults are diffusers'.

    Attributes:
        window: most states of one sample that are evaluated at once; 1 is the plain sampler.
        tolerance: largest root mean square change of a state that counts as known, in standard deviations of the
            ancestral step's noise; 0 goes on until nothing changes at all.

    Raises:
        DitaError: a setting out of range; on attaching, a scheduler that is not of first order or draws noise, or a
            pipeline with two transformers.

    Example:
        >>> Picard(window=16, tolerance=0.05).label()
        'window=16 tolerance=0.05'
    """

    window: int = 10
    tolerance: float = 0.1

    name: ClassVar[str] = "picard"
    title: ClassVar[str] = "ParaDiGMS"
    arxiv: ClassVar[str] = "2305.16317"
    axes: ClassVar[str] = "future states in one batch; change of each against its noise; Picard iteration"
    seams: ClassVar[frozenset[str]] = frozenset({"step", "model"})
    joint: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset(
        {"solver", "guidance", "timesteps", "which steps are reused", "what a layer keeps from step to step"}
    )
    citation: ClassVar[str] = """@inproceedings{shih2023parallel,
  title={Parallel Sampling of Diffusion Models},
  author={Shih, Andy and Belkhale, Suneel and Ermon, Stefano and Sadigh, Dorsa and Anari, Nima},
  booktitle={Advances in Neural Information Processing Systems},
  year={2023}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("window", self.window, 1)
        check_number("tolerance", self.tolerance, 0)

    def make(self, anatomies: tuple[Anatomy, ...], pipe: Any) -> PicardLoop:
        """See `SamplingMethod.make`."""
        if pipe is not None:
            check_first_order(pipe.scheduler, self.name)
        if len(anatomies) > 1:
            names = ", ".join(anatomy.name for anatomy in anatomies)
            raise DitaError(
                f"picard evaluates future steps by the transformer of the present one; this pipeline changes between "
                f"several ({names}): use it on a pipeline with one"
            )
        return PicardLoop(self.window, self.tolerance)

    @classmethod
    def disabled(cls) -> Picard:
        """One state at a time."""
        return cls(window=1)

    @classmethod
    def forced(cls) -> Picard:
        """Every guess is taken for known."""
        return cls(window=4, tolerance=1e6)

    @classmethod
    def ladder(cls) -> tuple[Picard, ...]:
        """From close to the plain sampler to a window of 16 states."""
        return (cls(window=4, tolerance=0.05), cls(window=8, tolerance=0.05), cls(), cls(window=16))
