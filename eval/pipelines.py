"""The trained pipelines that ship with dita, by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dita.errors import DitaError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_MODELS = Path(__file__).resolve().parent / "models"
BUNDLED: dict[str, Path] = {"fashion-dit": _MODELS / "fashion-dit"}
_WEIGHTS = ("*.safetensors", "*.bin", "*.json")


def pipeline_folder(name_or_folder: str | Path) -> Path:
    """Find the folder of a bundled pipeline by name, or check that a given folder holds a pipeline.

    Raises:
        DitaError: neither a known name nor a folder with a model_index.json.

    Example:
        >>> pipeline_folder("fashion-dit").name
        'fashion-dit'
    """
    folder = BUNDLED.get(str(name_or_folder), Path(name_or_folder))
    if not (folder / "model_index.json").is_file():
        if str(name_or_folder) in BUNDLED:
            raise DitaError(f"the bundled pipeline {name_or_folder!r} is incomplete: {folder} has no model_index.json")
        raise DitaError(
            f"{str(name_or_folder)!r} is neither a bundled pipeline nor a folder with a model_index.json; bundled are "
            f"{', '.join(sorted(BUNDLED))}"
        )
    return folder


def load_pipeline(
    name_or_folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> DiffusionPipeline:
    """Load a bundled pipeline, or any diffusers pipeline from its local folder. Nothing is downloaded.

    Args:
        name_or_folder: "fashion-dit", or a folder written by `save_pretrained`.
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

    folder = pipeline_folder(name_or_folder)
    try:
        with _quiet():
            pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DitaError(f"diffusers could not load {folder}: {type(error).__name__}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device) if dtype == torch.float32 else pipe.to(device, dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def fingerprint(folder: str | Path) -> str:
    """Digest of the weights and configurations below a folder: 16 hex digits that change when any of them does.

    Example:
        >>> len(fingerprint("."))
        16
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _WEIGHTS for path in folder.rglob(pattern)}):
        content = path.read_bytes()
        digest.update(json.dumps([path.relative_to(folder).as_posix(), len(content)]).encode())
        digest.update(content)
    return digest.hexdigest()[:16]
