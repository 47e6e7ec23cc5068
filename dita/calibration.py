"""Measuring the numbers a method needs on the user's own pipeline."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dita.config import Method
from dita.errors import DitaError, DitaWarning
from dita.files import read_text
from dita.registry import resolve

if TYPE_CHECKING:
    from dita.caching.fitted import Fitted

BESIDE = "dita.safetensors"
"""Name of a calibration in the folder that a pipeline was loaded from."""
Call = Callable[[Any], Any]


def calibrate(
    pipe: Any,
    method: str | Method = "fitted",
    call: Call | None = None,
    save: str | Path | bool | None = None,
    *,
    calls: Sequence[Call] = (),
    beside: Sequence[str | Method] = (),
    speedup: float | None = None,
    psnr: float | None = None,
    budget: float | None = None,
    **options: Any,
) -> Method:
    """Run the pipeline in full, and return the method with the numbers measured.

    Args:
        pipe: the pipeline to measure on; it comes back as it was, accelerated or not.
        method: a name or config of a method that measures numbers, whether it needs them or does without.
        call: runs the pipeline once, for instance ``lambda p: p("a prompt", num_inference_steps=28)``.
        save: file to write the calibrated method to: JSON, which `dita.load_method` reads, or for "fitted" a name that
            ends in .safetensors. True puts it where `accelerate_pipeline` without a method looks for it.
        calls: more of them, for "fitted": a few prompts, each with a seed of its own.
        beside: for "fitted", methods that it will be attached with, such as sparse attention; they are at work in all
            of the runs, whose full ones are then what quality is measured by. Leave out those that change guidance
            from step to step: what is forecast are the branches, see docs/fitted.md.
        speedup: for "fitted", of a whole run, by what its steps take in the calibration.
        psnr: for "fitted", in dB, of what the first call returns, to what it returns in full; as few steps are computed
            as that takes, found in a handful of accelerated runs.
        budget: for "fitted", computed steps of a run; for other methods their own setting of that name.
        options: settings of the method.

    Raises:
        DitaError: the method has nothing to calibrate, a call ran no sampling loop, or what is asked does not fit.

    Example:
        >>> magcache = calibrate(pipe, "magcache", lambda p: p("a prompt"), save="flux.json")  # doctest: +SKIP
        >>> fitted = calibrate(pipe, calls=[lambda p: p("a prompt")], speedup=3, save="x.safetensors")  # doctest: +SKIP
        >>> pipe = accelerate_pipeline(pipe, "fitted", calibration="x.safetensors")  # doctest: +SKIP
    """
    from dita.caching.fitted import Fitted

    if sum(value is not None for value in (speedup, psnr, budget)) > 1:
        raise DitaError("speedup, psnr and budget each decide how many steps are computed; give one of them")
    config = resolve(method, **options)
    wanted = {"speedup": speedup, "full" if isinstance(config, Fitted) else "budget": budget}
    config = config.replace(**{name: value for name, value in wanted.items() if value is not None})
    runs = [*([] if call is None else [call]), *calls]
    if not runs:
        raise DitaError('calibrating needs a call that runs the pipeline: calls=[lambda p: p("a prompt")]')
    if not config.needs_calibration and type(config).calibrated is Method.calibrated:
        raise DitaError(f"{config.name} has no numbers to measure; attach it with accelerate_pipeline as it is")
    if isinstance(config, Fitted):
        result = _fit(pipe, config, runs, psnr, beside)
    elif len(runs) > 1 or psnr is not None or beside:
        raise DitaError(f"{config.name} measures one call, and has no target; only fitted takes calls, beside and psnr")
    else:
        result = config.calibrated(pipe, runs[0])
    if save is not None and save is not False:
        _save(pipe, result, save)
    return result


def _fit(pipe: Any, config: Fitted, calls: list[Call], psnr: float | None, beside: Sequence[str | Method]) -> Fitted:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("calibrating", total=len(calls) + 1)
        return config.calibrated_on(pipe, calls, lambda: progress.advance(task), psnr, beside)


def _save(pipe: Any, result: Method, save: str | Path | bool) -> None:
    from dita.caching.fitted import Fitted

    path = _own_path(pipe) if save is True else Path(str(save))
    if path.suffix == ".safetensors":
        if not isinstance(result, Fitted):
            raise DitaError(f"{result.name} is saved as JSON; give a file that ends in .json")
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path)
    else:
        path.write_text(result.to_json() + "\n")


def _own_path(pipe: Any) -> Path:
    """Where the calibration of a pipeline's model is kept."""
    from dita.session import model_of

    folder = os.environ.get("DITA_CALIBRATIONS") or Path.home() / ".cache" / "dita" / "calibrations"
    return Path(folder) / f"{model_of(pipe).replace(':', '-')}.safetensors"


def present(pipe: Any) -> Fitted | None:
    """The calibration that is there for a pipeline: beside it, or where ``calibrate(..., save=True)`` puts it.

    Args:
        pipe: a diffusers pipeline.

    Returns:
        None if there is none of its model. One that cannot be read is passed over with a warning.

    Example:
        >>> present(pipe)  # doctest: +SKIP
        Fitted(calibration='flux/dita.safetensors')
    """
    from dita.caching.fitted import Fitted
    from dita.session import model_of

    source = getattr(pipe, "name_or_path", None)
    folder = isinstance(source, (str, os.PathLike)) and str(source) and Path(source).is_dir()
    beside = [Path(str(source)) / BESIDE] if folder else []
    model = model_of(pipe)
    for path in (*beside, _own_path(pipe)):
        if path.is_file():
            fitted = Fitted(calibration=str(path))
            try:
                table = fitted.fit[0]
            except DitaError as error:
                warnings.warn(f"{error}; it is passed over", DitaWarning, stacklevel=3)
                continue
            if table is not None and table.model == model:
                return fitted
    return None


def load_method(path: str | Path) -> Method:
    """Read a method that `calibrate` or `Method.to_json` wrote.

    Raises:
        DitaError: no such file, or not a method.

    Example:
        >>> load_method("flux.json")  # doctest: +SKIP
    """
    if Path(path).suffix == ".safetensors":
        from dita.caching.fitted import Fitted

        return Fitted.read(path)
    return Method.from_json(read_text(path, "dita.calibrate(..., save=...)"))
