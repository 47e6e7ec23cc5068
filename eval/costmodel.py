"""What a denoising step costs: operations counted from the model's shape, time and energy fitted to measured runs.

The form of the model, time = operations / (utilisation * peak rate of the device) and energy = power * time, is that
of "Video Killed the Energy Budget" (Delavande et al. 2025, arXiv 2509.19222). The utilisation is fitted to your own
runs, never taken from there; here a fixed time per call is fitted along with it.

A density is a share of the operations of self-attention; what choosing, copying and smaller products take on top is
not in it, a quarter to two fifths of the thinned attention on a CPU (eval/results/attention/breakdown.md). Energy is
time at a power that the caller names; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dita.errors import DitaError
from dita.eval.modelshape import ModelShape, Patch

__all__ = ["CostModel", "ModelShape", "flop_parts", "step_flops", "tokens"]


def tokens(height: int, width: int, frames: int = 1, patch: Patch = (1, 2, 2), vae: tuple[int, int] = (4, 8)) -> int:
    """Number of image tokens of one sample.

    Args:
        height: pixels.
        width: pixels.
        frames: 1 for an image. A video VAE keeps the first frame and folds the others: 81 frames at a factor of 4 give
            21.
        patch: frames, rows and columns of the latent in one token, such as `ModelShape.patch`.
        vae: by how much the VAE shrinks time, and height and width; the first plays no part for images.

    Raises:
        DitaError: the size does not divide into whole tokens.

    Example:
        >>> tokens(480, 832, 81), tokens(1024, 1024)
        (32760, 4096)
    """
    time, space = vae
    latent = ((frames - 1) // time + 1, height // space, width // space)
    whole = (frames - 1) % time == 0 and height % space == 0 and width % space == 0
    if (
        min(height, width, frames, *patch, *vae) < 1
        or not whole
        or any(a % b for a, b in zip(latent, patch, strict=True))
    ):
        raise DitaError(
            f"{frames} frames of {height}x{width} pixels do not divide into whole tokens: expected multiples of "
            f"{space * patch[1]} and {space * patch[2]} pixels, and 1 frame more than a multiple of {time}, so that a "
            f"multiple of {patch[0]} frames is left after the VAE"
        )
    return latent[0] // patch[0] * (latent[1] // patch[1]) * (latent[2] // patch[2])


def flop_parts(
    shape: ModelShape,
    tokens: int,
    text_tokens: int = 0,
    density: float = 1.0,
    guidance_calls: int = 2,
    batch: int = 1,
) -> dict[str, int]:
    """Floating-point operations of one denoising step, by where they arise.

    Matrix products, convolutions and attention only, a multiplication with its addition counted as two, as in
    `count_flops`. With l image tokens, t text tokens, n = l + t, width d and MLP width f, each layer takes

    - dit: 8 l d^2 for the projections, 4 l^2 d for the products of self-attention, 4 l d f for the MLP;
    - cross: the same, and for attention to the text 4 l d^2 + 4 t d^2 and 4 l t d;
    - joint: 8 n d^2, 4 n^2 d and 4 n d f.

    Args:
        shape: sizes of the model.
        tokens: image tokens of one sample, l.
        text_tokens: text tokens of one sample, t, padding included where the pipeline keeps it.
        density: share of the products of self-attention that a sparse kernel computes, in (0, 1].
        guidance_calls: passes of each sample through the model, batched or one by one: 2 under classifier-free
            guidance, 1 without.
        batch: samples.

    Returns:
        Operations by "projections", "attention" (self or joint), "cross" (attention to the text with its
        projections), "mlp" and "embedding" (tokens in and out, text, timestep, modulation).

    Raises:
        DitaError: a number makes no sense, or text tokens were given to a model without text or the reverse.

    Example:
        >>> small = ModelShape("dit", layers=1, width=8, heads=2, ffn_width=32, in_features=4, out_features=4)
        >>> flop_parts(small, tokens=16, guidance_calls=1)
        {'projections': 8192, 'attention': 8192, 'cross': 0, 'mlp': 16384, 'embedding': 2048}
    """
    if min(tokens, guidance_calls, batch) < 1 or not 0 < density <= 1:
        raise DitaError(
            f"tokens={tokens}, guidance_calls={guidance_calls}, batch={batch}, density={density}; expected at least 1 "
            "of each and a density in (0, 1]"
        )
    if (text_tokens > 0) != (shape.kind != "dit") or text_tokens < 0:
        raise DitaError(
            f"text_tokens is {text_tokens} for a model of kind {shape.kind!r}; expected 0 for dit, else above 0"
        )
    d, f, layers, dual = shape.width, shape.ffn_width, shape.layers, shape.dual_layers
    joint = tokens + text_tokens if shape.kind == "joint" else tokens
    ending = text_tokens if shape.text_ends else 0
    cross = 4 * d * d * (tokens + text_tokens) + 4 * tokens * text_tokens * d if shape.kind == "cross" else 0
    embedded = shape.text_width * d + (shape.text_layers - 1) * d * d
    parts = {
        "projections": 8 * d * d * (layers * joint + dual * tokens) - 2 * d * d * ending,
        "attention": round(4 * d * density * (layers * joint**2 + dual * tokens**2)),
        "cross": layers * cross,
        "mlp": 4 * d * f * (layers * joint - ending),
        "embedding": 2 * (tokens * d * (shape.in_features + shape.out_features) + text_tokens * embedded)
        + 2 * shape.vector_weights,
    }
    return {name: guidance_calls * batch * count for name, count in parts.items()}


def step_flops(
    shape: ModelShape,
    tokens: int,
    text_tokens: int = 0,
    density: float = 1.0,
    guidance_calls: int = 2,
    batch: int = 1,
) -> int:
    """Floating-point operations of one denoising step: the sum of `flop_parts`, whose arguments it takes.

    Example:
        >>> small = ModelShape("dit", layers=1, width=8, heads=2, ffn_width=32, in_features=4, out_features=4)
        >>> step_flops(small, tokens=16) == 2 * step_flops(small, tokens=16, guidance_calls=1)
        True
    """
    return sum(flop_parts(shape, tokens, text_tokens, density, guidance_calls, batch).values())


@dataclass(frozen=True)
class CostModel:
    """Time and energy of calls as a function of their operations, fitted to measured calls of one model and device.

    One rate for all operations is the simplification: attention and matrix products run at different rates, so a
    model fitted where one of them dominates is off where the other does. Fit on sizes around those of interest.

    Attributes:
        rate: operations per second beyond the overhead; utilisation times peak.
        overhead: seconds of each call that do not depend on its operations, at least 0.
        peak: the device's peak rate in operations per second for the data type used, if given.
        errors: of each fitted measurement, predicted over measured time less 1.
    """

    rate: float
    overhead: float = 0.0
    peak: float | None = None
    errors: tuple[float, ...] = ()

    @classmethod
    def fit(cls, measured: Sequence[tuple[float, float]], peak: float | None = None) -> CostModel:
        """Fit rate and overhead to measured calls by least squares of the relative errors.

        An overhead that comes out negative is set to 0 and the rate fitted again.

        Args:
            measured: operations and seconds of each call, with at least two different numbers of operations.
            peak: peak operations per second of the device, which `utilisation` is relative to.

        Raises:
            DitaError: there are too few measurements, one is not positive, time does not grow with the operations, or
                the rate exceeds the peak.

        Example:
            >>> model = CostModel.fit([(1e9, 0.6), (2e9, 1.1), (4e9, 2.1)], peak=4e9)
            >>> round(model.rate / 1e9, 6), round(model.overhead, 6), round(model.utilisation, 6)
            (2.0, 0.1, 0.5)
        """
        if len({flops for flops, _ in measured}) < 2 or min(min(pair) for pair in measured) <= 0:
            raise DitaError(
                f"measured is {list(measured)[:6]}; expected pairs of operations and seconds, all positive, for at "
                "least two different numbers of operations"
            )
        flops, seconds = torch.tensor(measured, dtype=torch.float64).T
        scale = flops.mean()
        terms = torch.stack([flops / scale, torch.ones_like(flops)], 1) / seconds[:, None]
        slope, overhead = (
            torch.linalg.lstsq(terms, torch.ones(len(flops), 1, dtype=torch.float64)).solution[:, 0].tolist()
        )
        if slope <= 0:
            raise DitaError(
                f"the seconds of {list(measured)[:6]} do not grow with the operations; measure larger calls"
            )
        if overhead < 0:
            overhead, column = 0.0, terms[:, 0]
            slope = (column.sum() / column.square().sum()).item()
        rate = scale.item() / slope
        if peak is not None and rate > peak:
            raise DitaError(f"the calls ran at {rate:.3g} operations per second, above the given peak of {peak:.3g}")
        errors = (flops / rate + overhead) / seconds - 1
        return cls(rate, overhead, peak, tuple(errors.tolist()))

    @property
    def utilisation(self) -> float:
        """Share of the peak rate that is reached beyond the overhead, the paper's mu.

        Raises:
            DitaError: no peak was given.
        """
        if self.peak is None:
            raise DitaError("there is no peak rate; pass CostModel.fit(..., peak=operations per second of the device)")
        return self.rate / self.peak

    def seconds(self, flops: float, calls: int = 1) -> float:
        """Predict the time of `calls` calls that take `flops` operations together.

        Example:
            >>> CostModel(rate=1e9, overhead=0.1).seconds(2e9, calls=2)
            2.2
        """
        return flops / self.rate + calls * self.overhead

    def energy(self, flops: float, power: float, calls: int = 1) -> float:
        """Predict the energy in joules at a constant draw of `power` watts, such as the device's under full load.

        Raises:
            DitaError: the power is not positive.

        Example:
            >>> CostModel(rate=1e9).energy(3e9, power=50)
            150.0
        """
        if power <= 0:
            raise DitaError(f"power is {power} W; expected a positive number")
        return power * self.seconds(flops, calls)
