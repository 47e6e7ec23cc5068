"""CLIPScore with a tiny CLIP of random weights in the published format: no network, no download."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dita.errors import DitaError, DitaWarning
from dita.eval.metrics import clip_score, load_clip

PROMPTS = ["a red bag", "two blue boots on grass", "a coat"]
LENGTH = 24


def save_tokenizer(folder: Path) -> int:
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH).save_pretrained(folder)
    return len(tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIP of two layers of width 16 on 32x32 pixels, which spells prompts letter by letter."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    path = tmp_path_factory.mktemp("clip") / "tiny-clip"
    words = save_tokenizer(path)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {"vocab_size": words, "max_position_embeddings": LENGTH, **ends, **size}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **size}, projection_dim=8)
    model = CLIPModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "position" not in name:  # else all embeddings point one way
            parameter.data = 1.5 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    model.save_pretrained(path)
    square = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(path)
    return path


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Patches of different greys or colours, in [0, 1], with noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((*shape[:-2], 4, 4), generator=generator)
    tiles = coarse.repeat_interleave(shape[-2] // 4, -2).repeat_interleave(shape[-1] // 4, -1)
    return 0.9 * tiles + 0.1 * torch.rand(shape, generator=generator)


def by_hand(folder: Path, pixels: torch.Tensor, prompt: str) -> float:
    """From PIL images by the forward of the whole model: its logits are the cosines, scaled."""
    from torchvision.transforms.functional import to_pil_image
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    picture = to_pil_image((255 * pixels.expand(3, -1, -1)).round().byte())
    with torch.no_grad():
        logits = model(**processor(text=[prompt], images=[picture], return_tensors="pt")).logits_per_image
    return (100 * logits / model.logit_scale.exp()).clamp(min=0).item()


@pytest.mark.parametrize("shape", [(3, 3, 48, 40), (3, 1, 32, 32)], ids=["rgb", "grey"])
def test_score_is_the_clamped_cosine_of_the_models_own_forward(folder, shape):
    samples = images(*shape)
    expected = [by_hand(folder, pixels, prompt) for pixels, prompt in zip(samples, PROMPTS, strict=True)]
    assert clip_score(samples, PROMPTS, folder, batch=2).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert max(expected) > 1


def test_negative_cosines_score_zero(folder):
    samples = images(24, 3, 32, 32, seed=1)
    prompts = [f"{letter} bag" for letter in "abcdefghijklmnopqrstuvwx"]
    scores = clip_score(samples, prompts, folder)
    clip = load_clip(folder)
    found = clip.model(
        **clip.processor(text=prompts, images=list((255 * samples).round().byte()), return_tensors="pt", padding=True)
    )
    cosine = (found.image_embeds * found.text_embeds).sum(1)
    assert (cosine < 0).any() and (cosine > 0).any()
    assert scores[cosine < 0].tolist() == [0] * int((cosine < 0).sum())
    torch.testing.assert_close(scores, (100 * cosine).clamp(min=0), rtol=1e-3, atol=1e-3)


def test_a_clip_scores_the_mean_of_its_frames(folder):
    videos = images(3, 4, 3, 32, 32, seed=3)
    frames = torch.stack([clip_score(videos[:, t], PROMPTS, folder) for t in range(4)])
    found = clip_score(videos, PROMPTS, folder, batch=5)
    torch.testing.assert_close(found, frames.mean(0), rtol=1e-4, atol=1e-4)
    assert frames.std(0).max() > 0


def test_a_loaded_model_is_used_again(folder):
    clip = load_clip(folder, download=False)
    samples = images(3, 3, 32, 32)
    assert torch.equal(clip_score(samples, PROMPTS, clip), clip_score(samples, PROMPTS, str(folder)))
    assert clip.source == str(folder)


def test_a_prompt_that_is_too_long_is_cut_and_said_so(folder):
    fits = "abcdefghijklmnopqrstuvwxyz"[: LENGTH - 2]
    samples = images(8, 3, 32, 32)
    with pytest.warns(DitaWarning, match=f"1 prompts exceed CLIP's {LENGTH} tokens"):
        cut = clip_score(samples, [f"{fits} and more", *["a bag"] * 7], folder)
    torch.testing.assert_close(cut, clip_score(samples, [fits, *["a bag"] * 7], folder))
    with pytest.warns(DitaWarning, match="8 prompts exceed"):
        cut = clip_score(samples, [f"{fits} and more"] * 8, folder)
    assert cut.max() > 1
    torch.testing.assert_close(cut, clip_score(samples, [fits] * 8, folder))


def test_a_model_is_found_in_the_weights_folder_and_in_the_hubs_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("DITA_WEIGHTS", str(folder.parent))
    assert load_clip("owner/tiny-clip", download=False).source == str(folder)
    monkeypatch.delenv("DITA_WEIGHTS")
    with pytest.raises(DitaError) as caught:
        load_clip("owner/tiny-clip", download=False)
    for part in ("owner/tiny-clip", "not allowed", constants.HF_HUB_CACHE, "hf download", "DITA_WEIGHTS"):
        assert part in str(caught.value)
    with pytest.raises(DitaError, match="the download failed"):
        load_clip("owner/tiny-clip")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("model.safetensors", "weights"), ("*config.json", "config.json"), ("*token*", "tokenizer")],
)
def test_a_missing_file_is_named(folder, tmp_path, pattern, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for file in copy.glob(pattern):
        file.unlink()
    with pytest.raises(DitaError, match=f"copy lacks .*{message}"):
        load_clip(copy)


def test_what_is_no_clip_is_refused(folder, tmp_path):
    with pytest.raises(DitaError, match="there is no folder"):
        load_clip(tmp_path / "absent")
    with pytest.raises(DitaError, match="there is no folder './absent'"):
        load_clip("./absent")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(DitaError, match="type 'vit'; expected 'clip'"):
        load_clip(copy)


@pytest.mark.parametrize(
    ("samples", "prompts", "message"),
    [
        pytest.param(torch.rand(2, 3, 32, 32), ["one"], "2 samples and 1 prompts", id="count"),
        pytest.param(torch.rand(3, 3, 32, 32), "bag", "one string", id="string"),
        pytest.param(torch.rand(1, 4, 32, 32), ["one"], "4 channels", id="channels"),
        pytest.param(torch.rand(3, 32, 32), ["one"], "N, C, H, W", id="rank"),
        pytest.param(2 * torch.ones(1, 2, 3, 8, 8), ["one"], "expected .0, 1.", id="range"),
    ],
)
def test_unfit_samples_are_refused(samples, prompts, message):
    with pytest.raises(DitaError, match=message):
        clip_score(samples, prompts, "owner/never-loaded", download=False)
