"""The trained pipelines that ship with dita, by name."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dita.errors import DitaError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_MODELS = Path(__file__).resolve().parent / "models"
BUNDLED: dict[str, Path] = {name: _MODELS / name for name in ("fashion-dit", "fashion-flux", "fashion-wan")}
_WEIGHTS = ("*.safetensors", "*.bin", "*.json")
_MODEL = ("model_index.json", "config.json")  # of the JSON files beside them: the others tell of the model
_WHOLE = 64 * 2**20  # bytes up to which a file is read whole for its fingerprint
_PIECE = 2**20


def pipeline_folder(name_or_folder: str | Path) -> Path:
    """Find the folder of a pipeline: bundled by name, on this machine, or on the Hugging Face hub.

    Args:
        name_or_folder: a bundled name, a folder with a model_index.json, or a hub id such as "owner/name", which is
            taken from the hub's cache or downloaded.

    Raises:
        DitaError: it is none of these.

    Example:
        >>> pipeline_folder("fashion-dit").name
        'fashion-dit'
    """
    folder = BUNDLED.get(str(name_or_folder), Path(name_or_folder))
    if (folder / "model_index.json").is_file():
        return folder
    if str(name_or_folder) in BUNDLED:
        raise DitaError(f"the bundled pipeline {name_or_folder!r} is incomplete: {folder} has no model_index.json")
    known = f"bundled are {', '.join(sorted(BUNDLED))}"
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_folder)):
        raise DitaError(
            f"{str(name_or_folder)!r} is neither a bundled pipeline, nor a folder with a model_index.json, nor a hub "
            f"id such as owner/name; {known}"
        )
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(str(name_or_folder)))
    except Exception as error:
        raise DitaError(
            f"{str(name_or_folder)!r} is no folder here and the hub did not deliver it ({type(error).__name__}: "
            f"{error}); download it on a machine with access and give its folder; {known}"
        ) from error


def load_pipeline(
    name_or_folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> DiffusionPipeline:
    """Load a bundled pipeline, or any diffusers pipeline from its folder or hub id.

    Args:
        name_or_folder: see `pipeline_folder`.
        dtype: of the weights in memory.
        device: where to put it.

    Returns:
        A stock diffusers pipeline without a progress bar of its own.

    Raises:
        DitaError: the name is unknown, or diffusers cannot load the folder.

    Example:
        >>> pipe = load_pipeline("fashion-dit")  # doctest: +SKIP
        >>> pipe(class_labels=[7], guidance_scale=3.0, output_type="pt").images.shape  # doctest: +SKIP
        torch.Size([1, 1, 32, 32])
    """
    from diffusers import DiffusionPipeline

    import dita.eval.vae  # noqa: F401  # diffusers loads a class of ours only if its module is imported

    folder = pipeline_folder(name_or_folder)
    try:
        with quiet():
            pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    except Exception as error:
        raise DitaError(f"diffusers could not load {folder}: {type(error).__name__}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back progress bars, the remark that our VAE is not the expected class, and the word on torch_dtype."""
    from diffusers.utils import logging
    from transformers.utils import logging as other

    level, bars = (
        logging.get_verbosity(),
        [library for library in (logging, other) if library.is_progress_bar_enabled()],
    )
    logging.set_verbosity_error()
    for library in bars:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        for library in bars:
            library.enable_progress_bar()


def fingerprint(folder: str | Path) -> str:
    """Digest of the weights and configurations below a folder: 16 hex digits that change when any of them does.

    What stands in the folder itself to tell of the model (how it was trained, what it scored) does not count.
    Of files above 64 MiB sixteen pieces of 1 MiB and the size are read, so that large models cost no minutes.

    Example:
        >>> len(fingerprint("."))
        16
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _WEIGHTS for path in folder.rglob(pattern)}):
        if path.parent == folder and path.suffix == ".json" and path.name not in _MODEL:
            continue
        size = path.stat().st_size
        digest.update(json.dumps([path.relative_to(folder).as_posix(), size]).encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            for start in range(0, size, size // 16):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()[:16]
