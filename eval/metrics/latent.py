"""How far a run's latents are from those of the reference run, before the VAE decodes either.

The relative L1 distance is the one by which TeaCache (Liu et al., CVPR 2025, arXiv 2411.19108) compares steps of one
run; here it compares two runs at the same step. Latents have no fixed range, so both distances are relative.
"""

from __future__ import annotations

import torch

from dita.errors import DitaError


def latent_l1(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Relative L1 distance of each sample: sum of |difference| over sum of |reference|.

    Args:
        latents: float [N, ...], of any dtype; images, videos and packed tokens alike.
        reference: the same shape, from the run without caching with the same seeds.

    Returns:
        float64 [N]; 0 for identical latents, 1 for latents that are all zero.

    Raises:
        DitaError: shapes differ, a value is NaN or infinite, or a reference is all zero.

    Example:
        >>> latent_l1(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([1.50], dtype=torch.float64)
    """
    return _relative(latents, reference, 1)


def latent_l2(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Relative L2 distance of each sample: Euclidean norm of the difference over that of the reference.

    -20 log10 of it is the signal-to-noise ratio in dB.

    Args:
        latents: float [N, ...], of any dtype.
        reference: the same shape, from the run without caching with the same seeds.

    Returns:
        float64 [N]; 0 for identical latents, 1 for latents that are all zero.

    Raises:
        DitaError: shapes differ, a value is NaN or infinite, or a reference is all zero.

    Example:
        >>> latent_l2(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])).round(decimals=4)
        tensor([1.3333], dtype=torch.float64)
    """
    return _relative(latents, reference, 2)


def _relative(latents: torch.Tensor, reference: torch.Tensor, order: int) -> torch.Tensor:
    if latents.shape != reference.shape or latents.ndim < 2 or latents.numel() == 0:
        raise DitaError(
            f"latents have shape {tuple(latents.shape)}, their reference {tuple(reference.shape)}; expected the same "
            "[N, ...] with at least one value per sample"
        )
    latents, reference = latents.double().flatten(1), reference.double().flatten(1)
    for name, values in (("latents", latents), ("reference", reference)):
        if not values.isfinite().all():
            bad = (~values.isfinite()).any(1).nonzero().flatten().tolist()
            raise DitaError(f"{name} hold NaN or infinite values in samples {bad}; the run that made them went wrong")
    scale = torch.linalg.vector_norm(reference, order, dim=1)
    if (scale == 0).any():
        zero = (scale == 0).nonzero().flatten().tolist()
        raise DitaError(f"the reference is all zero in samples {zero}; a relative distance to it does not exist")
    return torch.linalg.vector_norm(latents - reference, order, dim=1) / scale
