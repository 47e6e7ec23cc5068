"""Increment-calibrated caching: on skipped steps every linear layer adds a low-rank image of its input's change.

Chen et al., "Accelerating Diffusion Transformer via Increment-Calibrated Caching with Channel-Aware Singular Value
Decomposition", CVPR 2025, arXiv 2505.05829.

Kept: input X and output Y of every linear layer of attention and MLP at the computed step. When: steps whose number
is a multiple of `interval` are computed. How: y = Y + A B (x - X) with A B the best approximation of the layer's
weight of rank `rank`; attention itself, norms and activations run. With `aware` "activation" the singular value
decomposition is that of diag(l) W diag(r), scaled back afterwards, where l and r are the layer's mean absolute output
and input per channel, scaled to 0..1, to the power of 1/2, plus 1e-6 and at least a hundredth of the largest; with
"change" those of their change between adjacent steps; with "none" of W alone.

No step is skipped as a whole: a layer costs rank (in + out) / (in out) of what it did; the kept pairs take about 16
tensors of the model's width per block. Differences: the statistics come from one run (the authors take 256 images),
and their limit on the ratio of scales is not known to us: it is 100 here. Confidence: medium.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from dita.anatomy import Anatomy
from dita.caching.engine import Recipe
from dita.caching.forecast import Forecast
from dita.caching.history import History
from dita.caching.policy import Periodic, View
from dita.caching.table import CalibratedMethod, Measurement, Recorder, measure
from dita.config import check_whole
from dita.errors import DitaError
from dita.registry import register
from dita.seams import Call, Features, Site
from dita.table import Table, table_for

_KINDS = ("activation", "change", "none")


def low_rank(
    weight: torch.Tensor, rank: int, left: torch.Tensor | None = None, right: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best factors of a weight for the given importance of its output and input channels.

    Args:
        weight: [out, in].
        rank: at most min(out, in).
        left, right: scales [out] and [in], above 0; None for ones.

    Returns:
        A [out, rank] and B [rank, in] in float32; A B is the weight itself at full rank.

    Example:
        >>> a, b = low_rank(torch.diag(torch.tensor([3.0, 1.0])), 1)
        >>> (a @ b).diag()
        tensor([3., 0.])
    """
    weight = weight.detach().float()
    left = torch.ones(weight.shape[0], device=weight.device) if left is None else left.to(weight.device)
    right = torch.ones(weight.shape[1], device=weight.device) if right is None else right.to(weight.device)
    u, s, v = torch.linalg.svd(left[:, None] * weight * right, full_matrices=False)
    rank = min(rank, len(s))
    return u[:, :rank] * s[:rank] / left[:, None], v[:rank] / right


def scales(magnitude: torch.Tensor, ratio: float = 100.0) -> torch.Tensor:
    """Importance of channels from their mean magnitude [C]: scaled to 0..1, square root, and limited from below.

    Args:
        magnitude: per channel, 0 and above.
        ratio: of the largest importance to the smallest; factors are divided by it, and rounding errors with it.

    Example:
        >>> scales(torch.tensor([1.0, 2.0, 5.0]))
        tensor([0.0100, 0.5000, 1.0000])
    """
    low, high = magnitude.min(), magnitude.max()
    found = ((magnitude - low) / (high - low).clamp_min(1e-12)).sqrt() + 1e-6
    return found.clamp_min(found.max().item() / ratio)


@dataclass(frozen=True)
class Increment(Forecast):
    """The kept output, plus a low-rank image of how far the input has moved.

    Attributes:
        layers: site name -> linear layer.
        rank: of the image.
        table: site name -> mean magnitudes of output and input channels; empty for the plain decomposition.
    """

    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    rank: int = 1
    table: ChannelTable = field(default_factory=lambda: ChannelTable({}))

    @cached_property
    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Filled when a layer is first skipped."""
        return {}

    def _factors_of(self, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in self.factors:
            known = self.table.values.get(name)
            left, right = (scales(torch.tensor(row)) for row in known) if known else (None, None)
            weight: Any = self.layers[name].weight
            a, b = low_rank(weight, self.rank, left, right)
            self.factors[name] = (a.to(dtype), b.to(dtype))
        return self.factors[name]

    def forecast(self, history: History, base: Features, site: Site, call: Call) -> Features:
        """See `Forecast.forecast`; `base` is the layer's input."""
        kept, before = history.newest
        now = base[0]
        if kept is None or before is None or now is None or now.shape != before.shape:
            raise DitaError(f"{site.name} reads another shape than at the computed step; this is a bug in dita")
        a, b = self._factors_of(site.name, kept.dtype)
        moved = (now.float() - before.float()).to(kept.dtype)
        return (kept + moved @ b.T @ a.T,)


@dataclass(frozen=True)
class ChannelTable(Table):
    """Mean magnitudes of each layer's channels: site name -> those of its output and of its input."""

    noun: ClassVar[str] = "table of channels' magnitudes"
    form: ClassVar[Any] = {str: ([float], [float])}

    __hash__ = Table.__hash__

    def check_widths(self, anatomy: Anatomy) -> None:
        """Raise `DitaError` unless the layers have as many channels."""
        for part in anatomy.linears:
            weight: Any = part.module.weight
            widths, wanted = self.values.get(part.site.name), tuple(weight.shape)
            if widths is not None and tuple(map(len, widths)) != wanted:
                raise DitaError(f"this {self.noun} has not {wanted} channels for {part.site.name}: calibrate again")


class _Recorder(Recorder):
    """Sums magnitudes of inputs and outputs, or of their changes."""

    def __init__(self, sink: Measurement, changes: bool) -> None:
        super().__init__(sink)
        self.changes = changes
        self._last: dict[Site, tuple[torch.Tensor, torch.Tensor]] = {}

    def saw(self, site: Site, inputs: Features, outputs: Features, view: View) -> None:
        """Add one step."""
        if site.role != "linear" or not inputs or inputs[0] is None or outputs[0] is None:
            return
        pair = (outputs[0].detach().float(), inputs[0].detach().float())
        seen = pair
        if self.changes:
            last = self._last.get(site)
            self._last[site] = (pair[0].clone(), pair[1].clone())
            if last is None or last[0].shape != pair[0].shape:
                return
            seen = (pair[0] - last[0], pair[1] - last[1])
        sums = self.sink.seen.setdefault(site.name, [0.0, 0.0])
        for number, tensor in enumerate(seen):
            sums[number] = sums[number] + tensor.abs().flatten(0, -2).mean(0)


@register
@dataclass(frozen=True)
class ICC(CalibratedMethod):
    """Increment-calibrated caching's settings.

    Attributes:
        interval: steps whose number is a multiple of it are computed; 1 computes all. Published: 2 and 3.
        rank: of the calibration; 128 for DiT-XL, whose width is 1152.
        aware: "activation" or "change", whose statistics are calibrated, or "none", which needs no calibration.
        table: mean magnitudes per channel, from `dita.calibrate`.

    Raises:
        DitaError: a setting out of range; on attaching, no calibration, or one of another model.

    Example:
        >>> ICC(interval=3, rank=64).label()
        'interval=3 rank=64'
    """

    interval: int = 2
    rank: int = 128
    aware: str = "activation"
    table: ChannelTable | None = field(default=None, repr=False)

    name: ClassVar[str] = "icc"
    table_kind: ClassVar[type[Table] | None] = ChannelTable
    title: ClassVar[str] = "Increment-calibrated caching"
    arxiv: ClassVar[str] = "2505.05829"
    confidence: ClassVar[str] = "medium"
    axes: ClassVar[str] = "input and output of linear layers; fixed interval; reuse plus a low-rank image of the change"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    bound: ClassVar[bool] = False
    shaping: ClassVar[tuple[str, ...]] = ("aware",)
    citation: ClassVar[str] = """@inproceedings{chen2025icc,
  title={Accelerating Diffusion Transformer via Increment-Calibrated Caching with Channel-Aware Singular Value
    Decomposition},
  author={Chen, Zhiyuan and Li, Keyi and Jia, Yifan and Ye, Le and Ma, Yufei},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)
        check_whole("rank", self.rank, 1)
        if self.aware not in _KINDS:
            raise DitaError(f"aware is {self.aware!r}; expected one of {', '.join(_KINDS)}")

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Linear layers."""
        anatomy.require("module", self.name)
        if not anatomy.linears:
            raise DitaError(f"icc found no linear layer in the attention and MLP modules of {anatomy.name}")
        table = ChannelTable({})
        if self.interval > 1 and self.aware != "none":
            table = table_for(self.name, self.table, anatomy)
            table.check_widths(anatomy)
        layers = {part.site.name: part.module for part in anatomy.linears}
        return Recipe(
            what="module",
            when=lambda: Periodic(self.interval),
            how=Increment(layers=layers, rank=self.rank, table=table),
            keep="pair",
            sites=tuple(part.site for part in anatomy.linears),
        )

    def calibrated(self, pipe: Any, call: Callable[[Any], Any]) -> ICC:
        """Measure magnitudes per channel in one full run; the pipeline comes back as it was."""
        if self.aware == "none":
            return self

        def build(anatomy: Anatomy, sink: Measurement) -> Recipe:
            anatomy.require("module", self.name)
            watch = tuple(part.site for part in anatomy.linears)
            return Recipe(what="trunk", when=lambda: _Recorder(sink, self.aware == "change"), keep="pair", watch=watch)

        sink = measure(pipe, call, build)
        values = {name: [row.tolist() for row in sums] for name, sums in sink.seen.items()}
        return replace(self, table=sink.table(ChannelTable, values, pipe))

    @classmethod
    def disabled(cls) -> ICC:
        """Every step computed; needs no calibration."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> ICC:
        """Every other step, at a rank far below any model's width."""
        return cls(rank=2)

    @classmethod
    def ladder(cls) -> tuple[ICC, ...]:
        """Ranks 64, 32 and 16 at intervals 2 and 3."""
        return (cls(rank=64), cls(rank=32), cls(interval=3, rank=32), cls(interval=3, rank=16))
