"""CLIPScore: how well an image fits the prompt it was made from, by the cosine of CLIP's embeddings of the two."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dita.errors import DitaError, DitaWarning
from dita.eval.metrics.pixel import check_images, check_videos

CLIP = "openai/clip-vit-base-patch32"
"""The network of the paper, by its hub id."""

_NEEDED = {
    "config.json": ("config.json",),
    "the weights (model.safetensors)": ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    "preprocessor_config.json": ("preprocessor_config.json", "processor_config.json"),
    "the tokenizer (tokenizer.json, or vocab.json and merges.txt)": ("tokenizer.json", "vocab.json"),
}


class Clip(NamedTuple):
    """A loaded CLIP model with its processor, and where it came from."""

    model: Any
    processor: Any
    source: str


def load_clip(model: str | Path = CLIP, download: bool = True) -> Clip:
    """Load a CLIP model once, for several calls of `clip_score`.

    A folder is read as it is. A hub id is looked for in the folder of the same last name under `$DITA_WEIGHTS`, then
    in the hub's cache, and is downloaded as a last resort.

    Args:
        model: folder written by `save_pretrained` or copied from the hub, or a hub id.
        download: whether the network may be used.

    Raises:
        DitaError: it was not found, a file is missing, or it is no CLIP model; the message says which, where was
            looked, and where to put it.

    Example:
        >>> load_clip("clip-vit-base-patch32", download=False)  # doctest: +SKIP
    """
    folder = Path(model)
    if not folder.is_dir() and "DITA_WEIGHTS" in os.environ:
        folder = Path(os.environ["DITA_WEIGHTS"]) / folder.name
    if folder.is_dir():
        missing = [name for name, files in _NEEDED.items() if not any((folder / file).is_file() for file in files)]
        if missing:
            raise DitaError(
                f"{folder} lacks {', '.join(missing)}; expected a CLIP model as on https://huggingface.co/{CLIP}, "
                "all of whose files lie in one folder"
            )
        return _load(str(folder), local=True)
    if isinstance(model, Path) or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise DitaError(
            f"there is no folder {str(model)!r}; expected a folder with a CLIP model, or a hub id like {CLIP}"
        )
    return _from_hub(str(model), download)


def _from_hub(name: str, download: bool) -> Clip:
    from huggingface_hub.constants import HF_HUB_CACHE

    reason = "downloading was not allowed"
    for local in (True, False) if download else (True,):
        try:
            return _load(name, local)
        except OSError as error:
            if not local:
                reason = f"the download failed ({type(error).__name__}: {str(error).splitlines()[0]})"
    raise DitaError(
        f"the CLIP model {name} is missing: {reason}. It was looked for in the hub's cache, {HF_HUB_CACHE}.\n"
        f"Run `hf download {name}` where the network can be used, or copy the files of https://huggingface.co/{name} "
        f"into a folder and pass its path, or call the folder {name.split('/')[1]} and put it into $DITA_WEIGHTS."
    )


def _load(source: str, local: bool) -> Clip:
    from transformers import AutoConfig, CLIPModel, CLIPProcessor

    kind = AutoConfig.from_pretrained(source, local_files_only=local).model_type
    if kind != "clip":
        raise DitaError(f"{source} holds a model of type {kind!r}; expected 'clip'")
    model: Any = CLIPModel.from_pretrained(source, local_files_only=local)
    return Clip(
        model.eval().requires_grad_(False), CLIPProcessor.from_pretrained(source, local_files_only=local), source
    )


def clip_score(
    samples: torch.Tensor,
    prompts: Sequence[str],
    model: str | Path | Clip = CLIP,
    download: bool = True,
    batch: int = 32,
) -> torch.Tensor:
    """CLIPScore (Hessel et al. 2021, arXiv 2104.08718) of each image or clip to its prompt: 100 * max(cosine, 0).

    Pixels have 8 bits, the model's own processor resizes and normalises them, and the prompt is taken as it is. The
    paper scales by 2.5 instead of 100 and puts "A photo depicts" before each caption, so its numbers are others. The
    score of a clip is the mean over the scores of its frames, of which the order therefore does not matter. Scores
    of different CLIP models cannot be compared.

    Args:
        samples: images, float [N, 1 or 3, H, W], or clips, float [N, T, 1 or 3, H, W], in [0, 1]; grey is repeated.
        prompts: N strings. What goes beyond the model's length (77 tokens) is cut, with a `DitaWarning`.
        model: folder, hub id, or what `load_clip` returned; it is moved to the device of `samples`.
        download: whether the network may be used to get the model.
        batch: images at a time.

    Returns:
        float32 [N] in [0, 100], on the CPU.

    Raises:
        DitaError: the model cannot be had, there are not as many prompts as samples, or the samples do not fit.

    Example:
        >>> clip_score(torch.rand(2, 3, 64, 64), ["a red bag", "two boots"])  # doctest: +SKIP
        tensor([21.3, 20.9])
    """
    samples = check_videos(samples, "samples") if samples.ndim == 5 else check_images(samples, "samples")[:, None]
    count, frames, channels = samples.shape[:3]
    if channels not in (1, 3):
        raise DitaError(f"samples have {channels} channels; CLIP takes 3, and grey is repeated")
    if isinstance(prompts, str) or len(prompts) != count:
        came = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise DitaError(f"there are {count} samples and {came}; expected a list of one prompt for each sample")
    clip = model if isinstance(model, Clip) else load_clip(model, download)
    clip.model.to(samples.device)
    flat = samples.flatten(0, 1)
    images = torch.cat([_embed_images(part, clip) for part in flat.split(batch)])
    texts = torch.cat([_embed_prompts(list(prompts[i : i + batch]), clip) for i in range(0, count, batch)])
    cosine = (images.reshape(count, frames, -1) * texts[:, None]).sum(2)
    return (100 * cosine.clamp(min=0)).mean(1).cpu()


@torch.no_grad()
def _embed_images(images: torch.Tensor, clip: Clip) -> torch.Tensor:
    pixels = (255 * images.expand(-1, 3, -1, -1)).round().clamp(0, 255).byte()
    inputs = clip.processor(images=list(pixels.cpu()), return_tensors="pt", input_data_format="channels_first")
    return _unit(clip.model.get_image_features(pixel_values=inputs["pixel_values"].to(images.device)))


@torch.no_grad()
def _embed_prompts(prompts: list[str], clip: Clip) -> torch.Tensor:
    longest = clip.model.config.text_config.max_position_embeddings
    inputs = clip.processor(text=prompts, return_tensors="pt", padding=True, truncation=True, max_length=longest)
    cut = [text for text in prompts if len(clip.processor.tokenizer(text)["input_ids"]) > longest]
    if cut:
        warnings.warn(
            f"{len(cut)} prompts exceed CLIP's {longest} tokens and are cut: {cut[:3]}", DitaWarning, stacklevel=3
        )
    device = clip.model.device
    ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
    return _unit(clip.model.get_text_features(input_ids=ids, attention_mask=mask))


def _unit(found: Any) -> torch.Tensor:
    # A tensor in transformers 4, an output object in 5.
    features = getattr(found, "pooler_output", found)
    return torch.nn.functional.normalize(features.float(), dim=-1)
