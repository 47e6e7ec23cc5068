"""Several methods of dita at once, as one setting of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dita.caching.fitted import Fitted
from dita.errors import DitaError

if TYPE_CHECKING:
    from typing_extensions import Self

    from dita.config import Method

JOINT = " + "


@dataclass(frozen=True)
class Composition:
    """Methods attached together; a single one is attached as it is.

    Attributes:
        parts: at least two methods, in the order they are attached.

    Raises:
        DitaError: fewer than two.

    Example:
        >>> from dita.caching import TaylorSeer
        >>> from dita.kernels.sparse import AdaSpa
        >>> both = Composition((AdaSpa(density=0.3), TaylorSeer(interval=3)))
        >>> both.name, both.label()
        ('adaspa + taylorseer', 'adaspa density=0.3, taylorseer interval=3')
    """

    parts: tuple[Method, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise DitaError(f"a composition has at least two methods, got {len(self.parts)}")

    @property
    def name(self) -> str:
        """The names joined by " + "."""
        return JOINT.join(part.name for part in self.parts)

    @property
    def uncalibrated(self) -> bool:
        """Whether some part still lacks what a calibration measures."""
        return any(part.uncalibrated for part in self.parts)

    def calibrated(self, measure: Callable[..., Method]) -> Self:
        """Calibrate each part that needs it, by itself; `fitted` last, with the others at work.

        Args:
            measure: called with a part and the parts beside it, which are none but for `fitted`.
        """
        done = {n: part for n, part in enumerate(self.parts) if not part.uncalibrated}
        order = sorted(set(range(len(self.parts))) - set(done), key=lambda n: isinstance(self.parts[n], Fitted))
        for n in order:
            beside = [part for m, part in sorted(done.items()) if m != n] if isinstance(self.parts[n], Fitted) else []
            done[n] = measure(self.parts[n], beside)
        return replace(self, parts=tuple(part for _, part in sorted(done.items())))

    def label(self) -> str:
        """The settings of each part that differ from its defaults."""
        return ", ".join(f"{part.name} {part.label()}" for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Name and parts as plain values."""
        return {"method": self.name, "settings": {part.name: part.to_dict()["settings"] for part in self.parts}}
