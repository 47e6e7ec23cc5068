"""Measuring the numbers a method needs on the user's own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dita.config import Method
from dita.errors import DitaError
from dita.registry import resolve


def calibrate(
    pipe: Any, method: str | Method, call: Callable[[Any], Any], save: str | Path | None = None, **options: Any
) -> Method:
    """Run the pipeline once, in full, and return the method with the numbers measured.

    Args:
        pipe: the pipeline to measure on; it comes back as it was, accelerated or not.
        method: a name or config of a method that measures numbers, whether it needs them or does without.
        call: runs the pipeline once, for instance ``lambda p: p("a prompt", num_inference_steps=28)``.
        save: file to write the calibrated method to, as JSON; `dita.load_method` reads it.
        options: settings of the method.

    Raises:
        DitaError: the method has nothing to calibrate, or the call ran no sampling loop.

    Example:
        >>> magcache = calibrate(pipe, "magcache", lambda p: p("a prompt"), save="flux.json")  # doctest: +SKIP
        >>> pipe = accelerate_pipeline(pipe, magcache)  # doctest: +SKIP
    """
    config = resolve(method, **options)
    if not config.needs_calibration and type(config).calibrated is Method.calibrated:
        raise DitaError(f"{config.name} has no numbers to measure; attach it with accelerate_pipeline as it is")
    result = config.calibrated(pipe, call)
    if save is not None:
        Path(save).write_text(result.to_json() + "\n")
    return result


def load_method(path: str | Path) -> Method:
    """Read a method that `calibrate` or `Method.to_json` wrote.

    Raises:
        DitaError: no such file, or not a method.

    Example:
        >>> load_method("flux.json")  # doctest: +SKIP
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise DitaError(f"cannot read {path}: {error.strerror}; dita.calibrate(..., save=...) writes it") from None
    return Method.from_json(text)
