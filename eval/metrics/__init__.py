"""Image metrics: to the uncached run with the same seeds, and to the data.

Importing this package loads neither torchmetrics nor torchvision; the functions do when they are called.
"""

from dita.eval.metrics.frechet import Gaussian, frechet_distance
from dita.eval.metrics.garment import (
    ClassAccuracy,
    class_accuracy,
    fd_garment,
    garment_features,
    garment_perceptual_distance,
)
from dita.eval.metrics.pixel import PsnrSummary, psnr, ssim, summarize_psnr
from dita.eval.metrics.pretrained import InceptionDistance, frechet_inception_distance, lpips
from dita.eval.metrics.weights import find_weights

__all__ = [
    "ClassAccuracy",
    "Gaussian",
    "InceptionDistance",
    "PsnrSummary",
    "class_accuracy",
    "fd_garment",
    "find_weights",
    "frechet_distance",
    "frechet_inception_distance",
    "garment_features",
    "garment_perceptual_distance",
    "lpips",
    "psnr",
    "ssim",
    "summarize_psnr",
]
