"""Where anchors are kept between steps, and in what precision.

LightCache (Xiao et al., "LightCache: Memory-Efficient, Training-Free Acceleration for Video Generation",
arXiv 2510.05367) swaps cached features to host memory while the next step runs. Here every method can.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dita.errors import DitaError
from dita.seams import Features

PLACES = ("device", "host")
PRECISIONS: dict[str, torch.dtype | None] = {"": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the elements of tensors; None counts nothing.

    Example:
        >>> bytes_of([torch.ones(3, 2), None, torch.ones(2, dtype=torch.bfloat16)])
        28
    """
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True)
class Storage:
    """How the features of a history are kept.

    Attributes:
        place: "device", where they were computed, or "host": pinned memory, written on a stream of its own while the
            model goes on, and read back when a forecast needs them. Without a GPU the two are the same.
        precision: "" as computed, "bf16" or "fp16"; only floating tensors of more bits are rounded.

    Raises:
        DitaError: neither.

    Example:
        >>> Storage("host", "bf16").put((torch.ones(2),), ())[0].dtype
        torch.bfloat16
    """

    place: str = "device"
    precision: str = ""

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise DitaError(f"keep_on is {self.place!r}; expected one of {', '.join(PLACES)}")
        if self.precision not in PRECISIONS:
            raise DitaError(f"keep_as is {self.precision!r}; expected one of {', '.join(map(repr, PRECISIONS))}")

    def put(self, features: Features, spare: Features) -> Features:
        """Copy features to where they are kept.

        Args:
            features: of a site.
            spare: tensors of the same kind that may be written over, or ().
        """
        old = spare if len(spare) == len(features) else (None,) * len(features)
        return tuple(self._put(new, room) for new, room in zip(features, old, strict=True))

    def get(self, kept: Features, like: tuple[torch.dtype, torch.device] | None) -> Features:
        """Bring kept features back to a dtype and device; None for as they are."""
        if like is None or (self.place == "device" and not self.precision):
            return kept
        if self.place == "host" and like[1].type == "cuda":
            # The copies to the host were put on their stream long ago; the host itself waits for nothing.
            torch.cuda.current_stream(like[1]).wait_stream(side_stream(like[1]))
        return tuple(None if t is None else t.to(like[1], like[0], non_blocking=True) for t in kept)

    def dtype_of(self, feature: torch.Tensor) -> torch.dtype:
        """The dtype in which a feature is kept.

        Example:
            >>> Storage(precision="fp16").dtype_of(torch.ones(2)), Storage().dtype_of(torch.ones(2))
            (torch.float16, torch.float32)
        """
        wanted = PRECISIONS[self.precision]
        shrinks = wanted is not None and feature.is_floating_point() and feature.element_size() > wanted.itemsize
        return wanted if wanted is not None and shrinks else feature.dtype

    def _put(self, new: torch.Tensor | None, room: torch.Tensor | None) -> torch.Tensor | None:
        if new is None:
            return None
        dtype = self.dtype_of(new)
        away = self.place == "host" and new.is_cuda
        device = torch.device("cpu") if away else new.device
        fits = room is not None and room.shape == new.shape and room.dtype == dtype and room.device == device
        if not fits:
            room = torch.empty(new.shape, dtype=dtype, device=device, pin_memory=away)
        assert room is not None
        if not away:
            return room.copy_(new)
        stream = side_stream(new.device)
        stream.wait_stream(torch.cuda.current_stream(new.device))
        with torch.cuda.stream(stream):
            # Rounded on the device first, so that half as much crosses the bus.
            room.copy_(new.to(dtype), non_blocking=True)
        new.record_stream(stream)
        return room


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device's features travel to the host."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
