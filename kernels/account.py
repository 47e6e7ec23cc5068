"""What methods inside a layer tell about one call of a transformer: how dense each attention was, and why."""

from __future__ import annotations

from dita.seams import Call


class Account:
    """Densities of a call's attentions so far.

    Example:
        >>> account = Account()
        >>> account.count(0.5)
        >>> account.count(1.0, "dense first layers")
        >>> account.mean, account.sparse
        (0.75, 1)
    """

    def __init__(self) -> None:
        self.densities: list[float] = []
        self._reasons: dict[str, int] = {}

    def clear(self) -> None:
        """A call begins."""
        self.densities.clear()
        self._reasons.clear()

    def count(self, density: float, reason: str = "") -> None:
        """Add an attention; the reason, in words, is told of dense ones."""
        self.densities.append(density)
        if density == 1 and reason:
            self._reasons[reason] = self._reasons.get(reason, 0) + 1

    @property
    def mean(self) -> float:
        """Mean density; there must be one."""
        return sum(self.densities) / len(self.densities)

    @property
    def sparse(self) -> int:
        """How many were not dense."""
        return sum(density < 1 for density in self.densities)

    def write(self, call: Call, summary: str) -> None:
        """Write the densities, a summary of them and the reasons into the call."""
        call.density *= self.mean
        account = summary + "".join(f"; {count} x {reason}" for reason, count in self._reasons.items())
        call.sparsely = f"{call.sparsely}; {account}" if call.sparsely else account
