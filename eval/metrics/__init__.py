"""Metrics of images and clips: to the uncached run with the same seeds, to the data, and to the prompt.

Importing this package loads neither torchmetrics nor torchvision nor transformers; the functions do when called.
"""

from dita.eval.metrics.bootstrap import Interval, bootstrap_interval, bootstrap_rows
from dita.eval.metrics.clip_score import clip_score, load_clip
from dita.eval.metrics.frechet import Gaussian, frechet_distance
from dita.eval.metrics.garment import (
    ClassAccuracy,
    class_accuracy,
    fd_garment,
    garment_features,
    garment_perceptual_distance,
)
from dita.eval.metrics.kernel import KernelDistance, kernel_distance
from dita.eval.metrics.latent import latent_l1, latent_l2
from dita.eval.metrics.pixel import PsnrSummary, psnr, ssim, summarize_psnr
from dita.eval.metrics.pretrained import (
    InceptionDistance,
    KernelInceptionDistance,
    frechet_inception_distance,
    lpips,
)
from dita.eval.metrics.video import flicker, flicker_difference, motion_consistency, per_frame
from dita.eval.metrics.weights import find_weights

__all__ = [
    "ClassAccuracy",
    "Gaussian",
    "InceptionDistance",
    "Interval",
    "KernelDistance",
    "KernelInceptionDistance",
    "PsnrSummary",
    "bootstrap_interval",
    "bootstrap_rows",
    "class_accuracy",
    "clip_score",
    "fd_garment",
    "find_weights",
    "flicker",
    "flicker_difference",
    "frechet_distance",
    "frechet_inception_distance",
    "garment_features",
    "garment_perceptual_distance",
    "kernel_distance",
    "latent_l1",
    "latent_l2",
    "load_clip",
    "lpips",
    "motion_consistency",
    "per_frame",
    "psnr",
    "ssim",
    "summarize_psnr",
]
