"""HarmoniCa: a learned router says of every module at every step whether it is computed.

Huang et al., "HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in Diffusion Transformer
Acceleration", ICML 2025, arXiv 2410.01723.

Kept: outputs of attention and MLP modules, before the adaLN gate. When: a module runs at a step if the sigmoid of the
router's logit for the two is above `threshold`; the first step always runs. How: reuse of the newest output.

The router is trained without data on whole trajectories from noise. At each step of one, the model's output in full and
that with every module's output blended, r new + (1 - r) kept with r the sigmoid, are compared on the same latents, and
the step's logits take one step of Adam down proxy * mean squared difference + `beta` * mean r. What is kept is the
blended output, without gradient, replaced where r is above `threshold`; the trajectory goes on with the blended model's
output. The proxy is the squared change of the final latents when the router is followed at that step too, as at all
steps before it, and is measured again every `refresh` trajectories. Logits stay within 5; no weight changes.

Differences, mostly because thousands of trajectories are out of reach without a cluster: there are a dozen, at a higher
rate that falls to zero; `stride` steps share a proxy; logits start at -1, not from noise. beta is relative, to the
number of modules and to the median over steps of proxy times difference before the training, so that one value serves
many models (the authors' is 7e-8 for the sum over DiT-XL's modules). The difference is that of the transformer's
output, guided in the proxy only. The authors' first step blends 0.7 % of what the last trajectory left behind.

With r near its optimum, 1 - beta / (2 proxy c) for a module whose share of the difference is (1 - r)^2 c, a threshold t
computes what a beta larger by 1 / (1 - t) would leave: one trained table serves a ladder of thresholds.

Limit: with many steps, a module blended at r = 0.2 at each follows its output closely enough for the objective, so that
routers settle between 0.1 and 0.3, where the threshold computes too much or lets outputs age. On fashion-dit with 50
steps the router trained here is far behind a fixed interval (eval/models/calibrations).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from dita.anatomy import Anatomy
from dita.caching.bac import ScheduledSites
from dita.caching.engine import Recipe
from dita.caching.harmonica_training import Training, train_router
from dita.caching.table import CalibratedMethod
from dita.config import check_number, check_whole
from dita.registry import register
from dita.table import Table, table_for


@register
@dataclass(frozen=True)
class HarmoniCa(CalibratedMethod):
    """HarmoniCa's settings.

    Attributes:
        threshold: sigmoid above which a module is computed; 0 computes all. Published: 0.1.
        beta: of the training: what a computed module costs against the error; with more of it more is skipped.
        iterations: trajectories of the training, each three to four times as long as a plain run; with 0 the router
            stays as it starts.
        rate: of Adam at the beginning; it falls to zero.
        refresh: trajectories between two measurements of the proxy.
        stride: steps that share one value of the proxy, 1 as published; a measurement takes steps / (2 stride) runs.
        seed: of the first trajectory.
        table: the router's sigmoids, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no calibration, or one of another model; while
            running, another number of steps than it was made for.

    Example:
        >>> HarmoniCa(threshold=0.5).label()
        'threshold=0.5'
    """

    threshold: float = 0.1
    beta: float = 3.0
    iterations: int = 12
    rate: float = 0.4
    refresh: int = 2
    stride: int = 10
    seed: int = 0
    table: Table | None = field(default=None, repr=False)

    name: ClassVar[str] = "harmonica"
    title: ClassVar[str] = "HarmoniCa"
    arxiv: ClassVar[str] = "2410.01723"
    axes: ClassVar[str] = "modules, each on a schedule of its own learned from trajectories; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    shaping: ClassVar[tuple[str, ...]] = ("beta", "iterations", "rate", "refresh", "stride")
    trained: ClassVar[bool] = True
    citation: ClassVar[str] = """@inproceedings{huang2025harmonica,
  title={HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in Diffusion Transformer
    Acceleration},
  author={Huang, Yushi and Wang, Zining and Gong, Ruihao and Liu, Jing and Zhang, Xinjie and Guo, Jinyang and
    Liu, Xianglong and Zhang, Jun},
  booktitle={Proceedings of the International Conference on Machine Learning},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("threshold", self.threshold, 0, 1)
        check_number("beta", self.beta, 0)
        check_number("rate", self.rate, 0)
        check_whole("iterations", self.iterations, 0)
        check_whole("refresh", self.refresh, 1)
        check_whole("stride", self.stride, 1)
        check_whole("seed", self.seed, 0)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Modules, each by its column of the router."""
        anatomy.require("module", self.name)
        table, schedule = Table({}), {}
        if self.threshold > 0:
            table = table_for(self.name, self.table, anatomy)
            schedule = {
                site: frozenset(step for step, sigmoid in enumerate(row) if sigmoid > self.threshold)
                for site, row in table.values.items()
            }
        return Recipe(what="module", when=lambda: ScheduledSites(schedule, table), keep="output")

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> HarmoniCa:
        """Train the router; `call` is run many times, each under another seed of torch's global generator."""
        training = Training(self.threshold, self.beta, self.rate)
        train_router(pipe, call, training, self.iterations, self.refresh, self.stride, self.seed)
        return replace(self, table=training.sink.table(Table, training.sigmoids(), pipe))

    @classmethod
    def disabled(cls) -> HarmoniCa:
        """Every step computed; needs no calibration."""
        return cls(threshold=0.0)

    @classmethod
    def forced(cls) -> HarmoniCa:
        """Nothing is ever due after the first step, whatever a router says; it is not trained."""
        return cls(threshold=1.0, iterations=0)

    @classmethod
    def ladder(cls) -> tuple[HarmoniCa, ...]:
        """Thresholds 0.1 to 0.5 on one router."""
        return tuple(cls(threshold=t) for t in (0.1, 0.15, 0.2, 0.3, 0.5))
