"""All quality numbers of a set of samples: observed sample by sample, so that processes can share the work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from dita.errors import DitaError
from dita.eval.classifier import BUNDLED as CLASSIFIER
from dita.eval.classifier import FashionClassifier, load_classifier
from dita.eval.data import load_fashion_mnist
from dita.eval.metrics import (
    Gaussian,
    KernelInceptionDistance,
    bootstrap_interval,
    flicker_difference,
    frechet_distance,
    garment_features,
    garment_perceptual_distance,
    kernel_distance,
    latent_l1,
    latent_l2,
    lpips,
    motion_consistency,
    per_frame,
    psnr,
    ssim,
    summarize_psnr,
)
from dita.eval.metrics.pretrained import require
from dita.eval.metrics.semantic import semantics
from dita.eval.metrics.weights import ALEXNET, INCEPTION, find_weights
from dita.eval.metrics.world import world_perceptual_distance
from dita.eval.pipelines import fingerprint
from dita.eval.reference import Reference, load_reference
from dita.eval.sampling import Drawn, Sampling
from dita.eval.task import Task
from dita.eval.worldnet import BUNDLED as WORLDNET
from dita.eval.worldnet import WorldNet, load_worldnet

Values = dict[str, torch.Tensor]  # by metric: one number or one feature vector a sample


@dataclass
class Judge:
    """Compares samples with the plain run's, whatever they show.

    Attributes:
        lpips: whether LPIPS is computed too.
        fid: whether FID is; only for judges that know the data.
        clip: folder or hub id of a CLIP model for the CLIP score, or None.
        device: where the big networks run.

    Example:
        >>> Judge().floor(64)
        {}
    """

    lpips: bool = False
    fid: bool = False
    clip: str | None = None
    device: str | torch.device = "cpu"
    asked: ClassVar[str] = ""  # the metric that says whether a sample is what was asked for

    @property
    def identity(self) -> str:
        """What a row's numbers depend on here."""
        return f"lpips={self.lpips} fid={self.fid} clip={self.clip}"

    def observe(self, drawn: Drawn, plain: Drawn | None, sampling: Sampling, indices: range) -> Values:
        """Look at the samples of one call.

        Args:
            drawn: the samples.
            plain: the plain run's samples with the same seeds; None if these are they.
            sampling: what was asked for.
            indices: which samples they are.

        Returns:
            Per metric a tensor with one entry a sample, to be joined over calls and given to `summarise`.
        """
        values = self._against_data(drawn.media, sampling, indices)
        if plain is not None and self.asked in values:
            values["accuracy_change"] = values[self.asked] - self._right(plain.media, sampling, indices)
        if self.clip is not None:
            from dita.eval.metrics import clip_score

            values["clip_score"] = clip_score(drawn.media, sampling.captions(indices), self.clip)
        if plain is not None:
            values |= self._against_plain(drawn, plain)
        return values

    def summarise(self, values: Values) -> dict[str, Any]:
        """Turn joined observations into the numbers of a row, JSON values, with 95 % intervals of the means."""
        values = dict(values)
        result: dict[str, Any] = {}
        intervals: dict[str, list[float]] = {}
        if "psnr" in values:
            each = values.pop("psnr")
            summary = summarize_psnr(each)
            result |= {
                "psnr": _finite(summary.mean),
                "psnr_pooled": _finite(summary.pooled),
                "psnr_worst": _finite(summary.worst),
                "identical": summary.identical,
            }
            if each.isfinite().any():
                intervals["psnr"] = _interval(each[each.isfinite()])
        for name in [name for name in values if values[name].ndim == 1]:
            each = values.pop(name).double()
            result[name] = each.mean().item()
            intervals[name] = _interval(each)
        return {**result, **self._distances(values), "intervals": intervals}

    def floor(self, samples: int) -> dict[str, float]:
        """The same numbers for real samples, as far as there are any."""
        return {}

    def _against_data(self, media: torch.Tensor, sampling: Sampling, indices: range) -> Values:
        return {}

    def _right(self, media: torch.Tensor, sampling: Sampling, indices: range) -> torch.Tensor:
        """1 where a sample is what was asked for, else 0: float32 [N]."""
        raise NotImplementedError

    def _distances(self, features: Values) -> dict[str, float]:
        return {}

    def _against_plain(self, drawn: Drawn, plain: Drawn) -> Values:
        media, reference = drawn.media, plain.media
        video = media.ndim == 5
        values: Values = {
            "psnr": psnr(media, reference),
            "ssim": (per_frame(ssim) if video else ssim)(media, reference),
        }
        if video and media.shape[1] > 1:
            values["flicker_difference"] = flicker_difference(media, reference)
            values["motion_consistency"] = motion_consistency(media, reference)
        if self.lpips:
            pair = media.to(self.device), reference.to(self.device)
            measured = per_frame(_cached_lpips) if video else _cached_lpips
            values["lpips"] = measured(*pair).cpu()
        if drawn.latents is not None and plain.latents is not None:
            values["latent_l1"] = latent_l1(drawn.latents, plain.latents)
            values["latent_l2"] = latent_l2(drawn.latents, plain.latents)
        return values


def _cached_lpips(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return lpips(images, reference, download=False)


@dataclass
class GarmentJudge(Judge):
    """Reads grey garments by class: fashion-dit."""

    asked: ClassVar[str] = "class_accuracy"
    classifier: FashionClassifier = field(default_factory=load_classifier)
    reference: Reference = field(default_factory=load_reference)
    _inception: KernelInceptionDistance | None = field(default=None, repr=False)

    @property
    def identity(self) -> str:
        return f"{super().identity} {fingerprint(CLASSIFIER)}"

    def floor(self, samples: int) -> dict[str, float]:
        return _floor(self.reference, samples, "class_accuracy", "fd_garment")

    def _against_data(self, media: torch.Tensor, sampling: Sampling, indices: range) -> Values:
        if media.shape[1:] != (1, 32, 32):
            raise DitaError(f"samples have shape {tuple(media.shape[1:])}; the garment judge reads [1, 32, 32]")
        values = {
            "class_accuracy": self._right(media, sampling, indices),
            "fd_garment": garment_features(media, self.classifier),
        }
        if self.fid:
            if self._inception is None:
                real = (load_fashion_mnist("test")[0] + 1) / 2
                self._inception = KernelInceptionDistance(real.to(self.device), download=False)
            values["fid"] = self._inception.features(media.to(self.device)).cpu()
        return values

    def _right(self, media: torch.Tensor, sampling: Sampling, indices: range) -> torch.Tensor:
        labels = sampling.labels()[indices.start : indices.stop]
        return (self.classifier(2 * media - 1).argmax(1) == labels).float()

    def _against_plain(self, drawn: Drawn, plain: Drawn) -> Values:
        distance = garment_perceptual_distance(drawn.media, plain.media, self.classifier)
        return {**super()._against_plain(drawn, plain), "perceptual": distance}

    def _distances(self, features: Values) -> dict[str, float]:
        data = {"fd_garment": self.reference.test}
        if "fid" not in features or self._inception is None:
            return _frechet(features, data)
        real = self._inception.real.cpu()
        distance = kernel_distance(features["fid"], real).mean
        return {**_frechet(features, {**data, "fid": Gaussian.fit(real)}), "kid": distance}


@dataclass
class WorldJudge(Judge):
    """Reads scenes and clips of the bundled world: fashion-flux, fashion-wan."""

    asked: ClassVar[str] = "semantic_accuracy"
    kind: str = "scene"
    net: WorldNet = field(default_factory=load_worldnet)
    reference: Reference | None = None

    def __post_init__(self) -> None:
        if self.reference is None:
            self.reference = load_reference(WORLDNET / f"{self.kind}.safetensors")

    @property
    def identity(self) -> str:
        return f"{super().identity} {self.kind} {fingerprint(WORLDNET)}"

    def floor(self, samples: int) -> dict[str, float]:
        assert self.reference is not None
        return _floor(self.reference, samples, "semantic_accuracy", "fd_world")

    def _against_data(self, media: torch.Tensor, sampling: Sampling, indices: range) -> Values:
        found = semantics(media, sampling.captions(indices), self.net)
        return {
            "semantic_accuracy": found.whole,
            **{f"{name}_accuracy": values for name, values in found.parts.items()},
            "fd_world": self.net.features(2 * media - 1),
        }

    def _right(self, media: torch.Tensor, sampling: Sampling, indices: range) -> torch.Tensor:
        return semantics(media, sampling.captions(indices), self.net).whole

    def _against_plain(self, drawn: Drawn, plain: Drawn) -> Values:
        distance = world_perceptual_distance(drawn.media, plain.media, self.net)
        return {**super()._against_plain(drawn, plain), "perceptual": distance}

    def _distances(self, features: Values) -> dict[str, float]:
        assert self.reference is not None
        return _frechet(features, {"fd_world": self.reference.test})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(values: torch.Tensor) -> list[float]:
    interval = bootstrap_interval(values)
    return [interval.low, interval.high]


def _frechet(features: Values, data: dict[str, Gaussian]) -> dict[str, float]:
    fitted = {name: Gaussian.fit(features[name]) for name in data if len(features.get(name, ())) > 1}
    return {name: frechet_distance(gaussian, data[name]) for name, gaussian in fitted.items()}


def _floor(reference: Reference, samples: int, accuracy: str, distance: str) -> dict[str, float]:
    result = {accuracy: reference.test_accuracy}
    if 2 <= samples <= len(reference.train_features):
        result[distance] = reference.floor(samples)
    return result


def make_judge(
    task: Task,
    published_metrics: bool | None = None,
    device: str | torch.device = "cpu",
    clip: str | Path | None = None,
) -> Judge:
    """Build the judge of a sweep.

    Args:
        task: whose `judge` decides what is read in the samples.
        published_metrics: whether FID and LPIPS are computed too. True: both, downloading the weights if need be.
            False: neither. None: LPIPS if its weights are on this machine already, FID if besides there is a GPU,
            since its network takes half an hour for the 10,000 test images on a CPU.
        device: where their networks run.
        clip: folder or hub id of a CLIP model; None leaves the CLIP score out.

    Raises:
        DitaError: they were demanded and their weights or packages cannot be had.

    Example:
        >>> make_judge(Task(), False).lpips
        False
    """
    wanted = {"lpips": ("torchvision", ALEXNET, True)}
    if task.judge == "garment":
        wanted["fid"] = ("torch_fidelity", INCEPTION, torch.device(device).type != "cpu")
    options: dict[str, Any] = {"device": device, "clip": None if clip is None else str(clip)}
    for name, (module, weights, cheap) in wanted.items():
        if published_metrics is False or (published_metrics is None and not cheap):
            continue
        try:
            require(module)
            find_weights(weights, download=bool(published_metrics))
            options[name] = True
        except DitaError:
            if published_metrics:
                raise
    if task.judge == "garment":
        return GarmentJudge(**options)
    return Judge(**options) if task.judge == "none" else WorldJudge(kind=task.judge, **options)
