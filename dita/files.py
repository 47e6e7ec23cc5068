"""Reading what users hand over: tensors from safetensors and text, of which nothing is executed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dita.errors import DitaError

if TYPE_CHECKING:
    import torch


def read_text(path: str | Path, maker: str) -> str:
    """The text of a file.

    Args:
        path: of the file.
        maker: what writes such files, for the message.

    Raises:
        DitaError: no such file, or no text.

    Example:
        >>> read_text("none.json", "dita.calibrate")
        Traceback (most recent call last):
        dita.errors.DitaError: cannot read none.json: No such file or directory; dita.calibrate writes it
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DitaError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; {maker} writes it") from None


def read_tensors(path: str | Path, what: str, maker: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and the texts in its header.

    Args:
        path: of the file.
        what: it holds, and `maker`, which writes such files, for messages.

    Raises:
        DitaError: no such file, no safetensors, or a number in it is not finite.

    Example:
        >>> read_tensors("none.safetensors", "the fit", "dita.calibrate")
        Traceback (most recent call last):
        dita.errors.DitaError: cannot read the fit none.safetensors: No such file or directory...
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            texts = dict(file.metadata() or {})
    except (OSError, ValueError, SafetensorError) as error:
        raise DitaError(f"cannot read {what} {path}: {error}; {maker} writes it") from None
    wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if wrong:
        raise DitaError(f"{what} {path} is damaged: {', '.join(wrong[:3])} holds numbers that are not finite")
    return tensors, texts
