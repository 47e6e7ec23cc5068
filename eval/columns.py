"""What a row of a sweep can hold: the measures of quality, and the columns of the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


def psnr_of(row: Mapping[str, Any]) -> float:
    """Mean PSNR of a row in dB; inf if every image was identical, -inf if there is none.

    Example:
        >>> psnr_of({"psnr": None, "identical": 16, "samples": 16})
        inf
    """
    if row.get("psnr") is not None:
        return float(row["psnr"])
    return math.inf if row.get("samples") and row.get("identical") == row.get("samples") else -math.inf


def interval_of(row: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """The 95 % interval of the mean of a row's field, in the field's unit; None if none was measured.

    Example:
        >>> interval_of({"psnr": 33.8, "intervals": {"psnr": [32.9, 34.7]}}, "psnr")
        (32.9, 34.7)
    """
    ends = (row.get("intervals") or {}).get(name)
    return None if ends is None else (float(ends[0]), float(ends[1]))


class Metric(NamedTuple):
    """One measure of quality.

    Attributes:
        name: the field of a row, a float in no unit unless `title` names one.
        title: heading of its column and label of its axis.
        form: how a value is written; a share ends in "%".
        meaning: what it compares, in a phrase.
        better: "higher", "lower" or, for a signed difference, "zero".
    """

    name: str
    title: str
    form: str
    meaning: str
    better: str = "lower"

    def rank(self, value: float) -> float:
        """A number that is the larger, the better the value.

        Example:
            >>> METRICS[1].rank(0.9) > METRICS[1].rank(0.8)
            True
        """
        return {"higher": value, "lower": -value, "zero": -abs(value)}[self.better]

    def value(self, row: Mapping[str, Any]) -> float | None:
        """The row's value; inf for the PSNR of identical images, None if there is none.

        Example:
            >>> METRICS[0].value({"psnr": 33.84})
            33.84
        """
        value = psnr_of(row) if self.name == "psnr" else row.get(self.name)
        return None if value is None or value == -math.inf else float(value)

    def text(self, row: Mapping[str, Any]) -> str:
        """The value in words.

        Example:
            >>> METRICS[0].text({"psnr": 33.84})
            '33.8'
        """
        value = self.value(row)
        return "" if value is None else "identical" if value == math.inf else format(value, self.form)


METRICS: tuple[Metric, ...] = (
    Metric("psnr", "PSNR dB", ".1f", "to the plain run, same seeds; mean over images that differ", "higher"),
    Metric("ssim", "SSIM", ".3f", "to the plain run, same seeds", "higher"),
    Metric("perceptual", "perceptual dist.", ".4f", "to the plain run, over the layers of the bundled network"),
    Metric("lpips", "LPIPS", ".4f", "to the plain run, AlexNet"),
    Metric("latent_l1", "latent L1", ".4f", "relative L1 distance of the latents to the plain run's"),
    Metric("latent_l2", "latent L2", ".4f", "relative L2 distance of the latents to the plain run's"),
    Metric("fd_garment", "FD-garment", ".2f", "Frechet distance to the test set, bundled classifier"),
    Metric("fd_world", "FD-world", ".2f", "Frechet distance to unseen real scenes or clips, bundled world network"),
    Metric(
        "kid",
        "KID",
        ".4f",
        "kernel distance to the real data, Inception-v3; its mean does not depend on the number of samples",
    ),
    Metric("fid", "FID", ".2f", "Frechet distance to the test set, Inception-v3"),
    Metric("class_accuracy", "class acc.", ".1%", "images recognised as the class asked for", "higher"),
    Metric(
        "semantic_accuracy", "semantic acc.", ".1%", "samples in which all that the caption asks is right", "higher"
    ),
    Metric("garment_accuracy", "garment acc.", ".1%", "samples with the garments that the caption asks for", "higher"),
    Metric("colour_accuracy", "colour acc.", ".1%", "samples with the colours that the caption asks for", "higher"),
    Metric("place_accuracy", "place acc.", ".1%", "samples with every garment where the caption asks for it", "higher"),
    Metric("motion_accuracy", "motion acc.", ".1%", "samples that move as the caption asks", "higher"),
    Metric(
        "accuracy_change",
        "acc. change",
        "+.1%",
        "samples that are what was asked for, less the plain run's; the interval is of the pairs with the same seed",
        "higher",
    ),
    Metric("clip_score", "CLIP score", ".2f", "likeness of sample and prompt, 0 to 100", "higher"),
    Metric(
        "flicker_difference",
        "flicker diff.",
        ".4f",
        "change from frame to frame, less the plain run's; 0 is best",
        "zero",
    ),
    Metric(
        "motion_consistency", "motion cons.", ".3f", "agreement of the motion with the plain run's, -1 to 1", "higher"
    ),
)


def _none(row: Mapping[str, Any]) -> str:
    return ""


class Column(NamedTuple):
    """One column of the table.

    Attributes:
        title: heading.
        text: how a row becomes text.
        meaning: what the heading means.
        spread: how the 95 % interval of a row becomes text, such as "[32.9, 34.7]".
        context: shown only where the rows differ in it.
    """

    title: str
    text: Callable[[Mapping[str, Any]], str]
    meaning: str
    spread: Callable[[Mapping[str, Any]], str] = _none
    context: bool = False


def _number(name: str, form: str, factor: float = 1.0) -> Callable[[Mapping[str, Any]], str]:
    def text(row: Mapping[str, Any]) -> str:
        value = row.get(name)
        return "" if value is None else format(value if factor == 1 else value * factor, form)

    return text


def _word(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: str(row.get(name) or "")


def _spread(name: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    def text(row: Mapping[str, Any]) -> str:
        ends = interval_of(row, name)
        return "" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"

    return text


COLUMNS: tuple[Column, ...] = (
    Column("method", lambda row: row["method"], "registry name"),
    Column("setting", lambda row: row["label"], "what varies in the sweep, and all else that is not at its default"),
    Column("origin", lambda row: "peer" if row.get("origin") == "peer" else "", "peer: another library's method"),
    Column("task", _word("task"), "pipeline", context=True),
    Column("media", _word("media"), "what a sample is", context=True),
    Column("frames", _word("frames"), "frames of a video", context=True),
    Column(
        "speedup",
        _number("speedup", ".2f"),
        "plain seconds / own seconds, the same batch one after the other; median",
        _spread("speedup", ".2f"),
    ),
    Column("ms/sample", _number("seconds_per_image", ".1f", 1000), "wall-clock time of a whole run, per sample"),
    Column("FLOPs", _number("flops_ratio", ".1%"), "operations counted in the first batch, of the plain run's"),
    Column("computed", _number("computed_fraction", ".1%"), "transformer steps computed, of the plain run's"),
    Column(
        "density", _number("density", ".1%"), "pairs of tokens that attention computed, of all, over computed layers"
    ),
    Column("cache MiB", _number("peak_cache_bytes", ".2f", 2**-20), "largest extra memory held, for one batch"),
    Column("peak MiB", _number("peak_memory_bytes", ".0f", 2**-20), "most GPU memory in use during a run"),
    Column(
        "RSS MiB",
        _number("peak_resident_bytes", ".0f", 2**-20),
        "by how much the process grew at most during a run on a CPU: all of its memory, not tensors alone",
    ),
    *(Column(each.title, each.text, each.meaning, _spread(each.name, each.form)) for each in METRICS),
    Column("samples", _number("samples", "d"), "samples drawn"),
)
