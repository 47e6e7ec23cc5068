"""EfficientVLA's rule for diffusion action heads: attention and MLP outputs kept for a fixed number of steps.

Yang et al., "EfficientVLA: Training-Free Acceleration and Compression for Vision-Language-Action Models", NeurIPS
2025, arXiv 2506.10100.

Kept: outputs of every attention and MLP before the adaLN gate. When: the steps whose number is a multiple of
`interval`, 5 as published (two of the ten DDIM steps of CogACT). How: reuse.

Only the action head's cache is built: the pruning of language layers and visual tokens belongs to another model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dita.anatomy import Anatomy
from dita.caching.base import CachingMethod
from dita.caching.engine import Recipe
from dita.caching.policy import Periodic
from dita.config import check_whole
from dita.registry import register


@register
@dataclass(frozen=True)
class EfficientVLA(CachingMethod):
    """EfficientVLA's settings.

    Attributes:
        interval: steps whose number is a multiple of it are computed; 1 computes all.

    Raises:
        DitaError: a setting out of range.

    Example:
        >>> EfficientVLA(interval=2).label()
        'interval=2'
    """

    interval: int = 5

    name: ClassVar[str] = "efficientvla"
    title: ClassVar[str] = "EfficientVLA (action head)"
    arxiv: ClassVar[str] = "2506.10100"
    axes: ClassVar[str] = "modules; fixed interval; reuse"
    seams: ClassVar[frozenset[str]] = frozenset({"module"})
    citation: ClassVar[str] = """@inproceedings{yang2025efficientvla,
  title={EfficientVLA: Training-Free Acceleration and Compression for Vision-Language-Action Models},
  author={Yang, Yantai and Wang, Yuhao and Wen, Zichen and Luo, Zhongwei and Zou, Chang and Zhang, Zhipeng and
    Wen, Chuan and Zhang, Linfeng},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_whole("interval", self.interval, 1)

    def recipe(self, anatomy: Anatomy) -> Recipe:
        """Fixed interval over modules."""
        return Recipe(what="module", when=lambda: Periodic(self.interval), keep="output")

    @classmethod
    def disabled(cls) -> EfficientVLA:
        """Every step computed."""
        return cls(interval=1)

    @classmethod
    def forced(cls) -> EfficientVLA:
        """Every other step reused."""
        return cls(interval=2)

    @classmethod
    def ladder(cls) -> tuple[EfficientVLA, ...]:
        """Intervals 2 to 5."""
        return tuple(cls(interval=n) for n in (2, 3, 5))
