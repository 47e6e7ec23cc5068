"""Whether what a stream keeps is finite, told without making a GPU wait."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dita.caching.storage import Storage


class Finite:
    """Looks at features as they are kept, and remembers on their device whether one could not be kept as a number.

    The answer is asked for at a later step, on the host. On a GPU it is copied there when a call ends, and read once it
    has arrived: a method that decides from a number of its own has waited for that by then, one with a fixed schedule
    does not wait, and learns it a step later at worst.

    Example:
        >>> finite = Finite()
        >>> finite.saw([torch.tensor([1.0, float("nan")])], Storage())
        >>> finite.end_call(), finite.holds
        (None, False)
    """

    def __init__(self) -> None:
        self._now: torch.Tensor | None = None
        self._new = False  # something was looked at since the answer was last sent
        self._host: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._bad = False

    def saw(self, tensors: Iterable[torch.Tensor | None], storage: Storage) -> None:
        """Look at features that are about to be kept.

        Args:
            tensors: of any shape; None is passed over.
            storage: what overflows in the precision that it keeps is not finite either.
        """
        for tensor in tensors:
            if tensor is None or not tensor.is_floating_point() or not tensor.numel():
                continue
            exact = torch.promote_types(tensor.dtype, torch.float32)
            low, high = torch.aminmax(tensor)  # thirty times as fast as an infinity norm on a CPU, and keeps NaN too
            fine = torch.maximum(high, -low).to(exact) <= torch.finfo(storage.dtype_of(tensor)).max
            self._now = fine if self._now is None or self._now.device != fine.device else self._now & fine
            self._new = True

    def end_call(self) -> None:
        """Send the answer to the host."""
        if self._now is None or not self._new:
            return
        self._new = False
        if self._now.device.type == "cuda":
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(self._now, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = self._now

    @property
    def holds(self) -> bool:
        """Nothing is known to be other than finite."""
        if self._host is not None and (self._arrived is None or self._arrived.query()):
            self._bad = self._bad or not bool(self._host)
            self._host = None
        return not self._bad
