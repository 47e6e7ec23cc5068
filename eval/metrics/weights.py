"""Finding the published weights that FID, KID and LPIPS are defined by."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dita.errors import DitaError

URLS: dict[str, str] = {
    "weights-inception-2015-12-05-6726825d.pth": (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    ),
    "alexnet-owt-7be5be79.pth": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg16-397923af.pth": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "squeezenet1_1-b8a52dc0.pth": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
INCEPTION, ALEXNET, VGG16, SQUEEZENET = URLS


def find_weights(name: str, path: str | Path | None = None, download: bool = True) -> Path:
    """Find a published weights file, downloading it as a last resort.

    Looks at `path` (a file, or a folder holding `name`), else in the folder `$DITA_WEIGHTS`, in torch hub's cache
    (`torch.hub.get_dir()/checkpoints`, moved by `$TORCH_HOME`), and then downloads into that cache.

    Args:
        name: one of the names in `URLS`.
        path: where the caller keeps the file; if given, nowhere else is looked.
        download: whether the network may be used.

    Returns:
        The path of an existing file.

    Raises:
        DitaError: the file was not found; the message names it, its address and where to put it.

    Example:
        >>> find_weights(ALEXNET)  # doctest: +SKIP
    """
    if name not in URLS:
        raise DitaError(f"unknown weights {name!r}; known are {', '.join(URLS)}")
    if path is not None:
        candidates = [Path(path) / name if Path(path).is_dir() else Path(path)]
    else:
        candidates = [Path(torch.hub.get_dir()) / "checkpoints" / name]
        if "DITA_WEIGHTS" in os.environ:
            candidates.insert(0, Path(os.environ["DITA_WEIGHTS"]) / name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    reason = "downloading was not allowed"
    if download and path is None:
        try:
            return _download(name, candidates[-1])
        except Exception as error:
            reason = f"the download failed ({type(error).__name__}: {error})"
    elif path is not None:
        reason = "a path was given, so nowhere else was looked"
    places = "".join(f"\n  {candidate}" for candidate in candidates)
    raise DitaError(
        f"the weights {name} are missing: {reason}. Looked for:{places}\n"
        f"Get the file from {URLS[name]} and put it in one of these places, or in a folder named by $DITA_WEIGHTS."
    )


def _download(name: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = name.rsplit("-", 1)[1].removesuffix(".pth")
    torch.hub.download_url_to_file(URLS[name], str(target), hash_prefix=digest, progress=True)
    return target


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Load a state dict without running code from the file.

    Raises:
        DitaError: the file is not a plain state dict of tensors.

    Example:
        >>> load_weights(Path("alexnet-owt-7be5be79.pth"))  # doctest: +SKIP
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DitaError(f"{path} could not be read as a state dict of tensors: {error}") from error
    if not isinstance(state, dict):
        raise DitaError(f"{path} holds a {type(state).__name__}; expected a state dict of tensors")
    return state
