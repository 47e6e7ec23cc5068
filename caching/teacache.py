"""TeaCache: skip while the accumulated, rescaled change of what the first block reads stays small.

Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", CVPR 2025, arXiv 2411.19108.

Kept: the residual of the image stream over all blocks. When: the relative L1 change, since the step before, of the
input of the first block's attention (normalised, and modulated by the timestep embedding) goes through a polynomial
of degree 4 that maps it to the change of the model's output; the results are added up, and a step is skipped while
the sum stays below `threshold`. A computed step sets the sum to 0. The first and the last step are computed. How:
reuse.

The authors' polynomials for FLUX, HunyuanVideo, LTX-Video and Mochi are built in. Those for Wan and CogVideoX take the
time embedding itself, which does not depend on the prompt, and are not used; those for Lumina2, HiDream and Open-Sora
could not be had. For these and all other models `dita.calibrate` fits a polynomial to one run of the user's. Users
could not reproduce the authors' fit for FLUX.

Differences: the change is taken per sample and the largest counts. A fitted polynomial is held at its ends outside
the range of changes it was fitted to, and at 0 from below, since such fits blow up and turn negative there; the
published ones are used as they are.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.policy import Guards, Verdict, View, against, relative_l1
from dita.caching.storage import bytes_of
from dita.caching.table import CalibratedMethod, Measurement, Recorder, TablePolicy, measure, stream_key
from dita.config import check_number
from dita.registry import register
from dita.seams import Features, Site
from dita.table import Table, has_form, table_for

_DEGREE = 4
_PUBLISHED = {
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "ltx-video": (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
    "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
}


@dataclass(frozen=True)
class Rescaling(Table):
    """The polynomial from the change of the modulated input to that of the output.

    Attributes:
        values: "coefficients", highest power first, and "range", the smallest and largest change fitted to; () without
            limits. The rest as in `Table`.
    """

    noun: ClassVar[str] = "rescaling polynomial"
    form: ClassVar[Any] = {"coefficients": [float]}

    __hash__ = Table.__hash__

    @classmethod
    def published(cls, family: str) -> Rescaling | None:
        """The authors' polynomial for a model family, or None."""
        return cls({"coefficients": _PUBLISHED[family], "range": ()}) if family in _PUBLISHED else None

    def verify(self) -> None:
        """See `Table.verify`."""
        super().verify()
        limits = self.values["range"]
        if limits and not (has_form(limits, (float, float)) and limits[0] <= limits[1]):
            raise ValueError(f"a range of {limits!r}")

    def __call__(self, change: float) -> float:
        """Evaluate.

        Example:
            >>> polynomial = Rescaling({"coefficients": (2.0, 1.0), "range": (0.0, 1.0)})
            >>> polynomial(0.5), polynomial(3.0)
            (2.0, 3.0)
        """
        limits = self.values["range"]
        x = min(max(change, limits[0]), limits[1]) if limits else change
        total = 0.0
        for coefficient in self.values["coefficients"]:
            total = total * x + coefficient
        return max(total, 0.0) if limits else total


class EntryChange(TablePolicy):
    """Skip while the rescaled change of the modulated input adds up to little.

    Args:
        threshold: largest sum, exclusive; 0 never skips.
        rescaling: the polynomial.
    """

    def __init__(self, threshold: float, rescaling: Rescaling) -> None:
        super().__init__(rescaling)
        self.threshold, self.rescaling = threshold, rescaling
        self._now: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self._sums: list[float] = []

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Take what the first attention is about to read."""
        if site.kind == "entry" and outputs[0] is not None:
            self._last, self._now = self._now, outputs[0].clone()

    def decide(self, view: View) -> Verdict:
        """Add this step's change."""
        if self.threshold <= 0 or self._now is None or self._last is None:
            return Verdict(True, "threshold 0" if self.threshold <= 0 else "first step")
        changes = relative_l1(self._now, self._last).tolist()  # few numbers, of which the host has to hear anyway
        sums = self._sums or [0.0] * len(changes)
        self._sums = [total + self.rescaling(change) for total, change in zip(sums, changes, strict=True)]
        worst = math.nan if any(map(math.isnan, self._sums)) else max(self._sums)
        return Verdict(not worst < self.threshold, against("input change", self.threshold), worst)

    def computed(self, view: View) -> None:
        """Start anew."""
        self._sums, self._last = [], None

    def skipped(self, view: View) -> None:
        """What the step before read has done its service."""
        self._last = None

    def keeps(self, site: Site, inputs: Features, outputs: Features) -> Features:
        """What the first attention read at the last step."""
        return outputs[:1] if site.kind == "entry" else ()

    def bytes_held(self) -> int:
        """Bytes of the inputs kept."""
        return bytes_of([self._now, self._last])


def fit(changes: Sequence[float], outcomes: Sequence[float]) -> list[float]:
    """Fit the polynomial by least squares: of degree 4 as published, lower where the points cannot bear that.

    Args:
        changes: of the modulated input, at least one.
        outcomes: changes of the model's output, as many.

    Returns:
        coefficients, the highest power first.

    Example:
        >>> [round(c, 3) for c in fit([0.1, 0.2, 0.4], [0.2, 0.4, 0.8])]
        [0.0, 2.0, 0.0]
        >>> fit([0.1, 0.1, 0.1], [0.25, 0.25, 0.25])
        [0.25]
    """
    import numpy as np

    for degree in range(min(_DEGREE, len(changes) - 1), 0, -1):
        with warnings.catch_warnings():
            warnings.simplefilter("error", np.exceptions.RankWarning)
            with contextlib.suppress(np.exceptions.RankWarning):
                found = np.polynomial.Polynomial.fit(changes, outcomes, degree).convert().coef
                return [0.0] * (degree + 1 - len(found)) + [float(c) for c in found[::-1]]
    return [float(np.mean(outcomes))]


class _Recorder(Recorder):
    """Writes down both changes at each step."""

    def __init__(self, sink: Measurement) -> None:
        super().__init__(sink)
        self._last: dict[str, torch.Tensor] = {}
        self._changes: dict[str, float] = {}

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Measure the change of the entry and of the model's output."""
        new = outputs[0]
        if site.kind not in ("entry", "model") or new is None:
            return
        old = self._last.get(site.kind)
        if old is not None and old.shape == new.shape:
            self._changes[site.kind] = relative_l1(new, old).mean().item()
        self._last[site.kind] = new.detach().clone()

    def computed(self, view: View) -> None:
        """Pair them."""
        if len(self._changes) == 2:
            pair = (self._changes["entry"], self._changes["model"])
            self.sink.seen.setdefault(stream_key(view.position), []).append(pair)
        self.note(view)


@register
@dataclass(frozen=True)
class TeaCache(CalibratedMethod):
    """TeaCache's settings.

    Attributes:
        threshold: largest accumulated change that still skips, exclusive; 0 computes all. Published: FLUX 0.25, 0.4,
            0.6 and 0.8; HunyuanVideo 0.1 and 0.15; LTX-Video 0.03 and 0.05; Mochi 0.06 and 0.09.
        table: the polynomial, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no polynomial, or one of another model.

    Example:
        >>> TeaCache(threshold=0.25).label()
        'threshold=0.25'
    """

    threshold: float = 0.15
    table: Rescaling | None = field(default=None, repr=False)

    name: ClassVar[str] = "teacache"
    title: ClassVar[str] = "TeaCache"
    arxiv: ClassVar[str] = "2411.19108"
    axes: ClassVar[str] = "image residual of the trunk; accumulated change of the modulated input, rescaled; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"block"})
    table_kind: ClassVar[type[Table] | None] = Rescaling
    shaping: ClassVar[tuple[str, ...]] = ()
    citation: ClassVar[str] = """@inproceedings{liu2025teacache,
  title={Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model},
  author={Liu, Feng and Zhang, Shiwei and Wang, Xiaofeng and Wei, Yujie and Qiu, Haonan and Zhao, Yuzhong and
    Zhang, Yingya and Ye, Qixiang and Wan, Fang},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("threshold", self.threshold, 0)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """The trunk's image residual, with the first block's entry watched."""
        anatomy.require("block", self.name)
        rescaling = Rescaling({"coefficients": (), "range": ()})
        if self.threshold > 0:
            rescaling = table_for(self.name, self.table or Rescaling.published(anatomy.family), anatomy)
        return Recipe(
            what="trunk",
            when=lambda: EntryChange(self.threshold, rescaling),
            guards=Guards(warmup=1, tail=1),
            text=False,
            watch=(anatomy.entry(0),),
        )

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> TeaCache:
        """Fit the polynomial to one full run; the pipeline comes back as it was."""
        import numpy as np

        def build(anatomy: Anatomy, sink: Measurement) -> Recipe:
            anatomy.require("block", self.name)
            watch = (anatomy.entry(0), Site("model", "model"))
            return Recipe(what="trunk", when=lambda: _Recorder(sink), text=False, watch=watch)

        sink = measure(pipe, call, build)
        entry, output = np.array([pair for pairs in sink.seen.values() for pair in pairs]).reshape(-1, 2).T
        coefficients = fit(entry, output) if len(entry) else [0.0]
        limits = (float(entry.min()), float(entry.max())) if len(entry) else (0.0, 1.0)
        values = {"coefficients": coefficients, "range": limits}
        return replace(self, table=sink.table(Rescaling, values, pipe))

    @classmethod
    def disabled(cls) -> TeaCache:
        """Every step computed; needs no polynomial."""
        return cls(threshold=0.0)

    @classmethod
    def forced(cls) -> TeaCache:
        """Skips at any change."""
        return cls(threshold=1e9)

    @classmethod
    def ladder(cls) -> tuple[TeaCache, ...]:
        """Thresholds 0.05 to 0.4."""
        return tuple(cls(threshold=t) for t in (0.05, 0.1, 0.2, 0.4))
