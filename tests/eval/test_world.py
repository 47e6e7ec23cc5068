from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dita.errors import DitaError
from dita.eval.vae import SpaceToDepthVAE
from dita.eval.world import (
    CLIP_FRAMES,
    COLOURS,
    GARMENTS,
    GROUND,
    MOTIONS,
    Clip,
    Item,
    Renderer,
    Scene,
    captions,
    read_caption,
    vocabulary,
)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer("test")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["scene", "clip"])
def test_captions_can_be_read_back(kind):
    texts = captions(kind, 300, seed=4)
    assert [str(read_caption(text)) for text in texts] == texts
    assert set(itertools.chain(*(text.split() for text in texts))) <= set(vocabulary())
    assert len(set(texts)) > 200


def test_every_clip_caption_can_be_read():
    for garment, colour, motion in itertools.product(GARMENTS, COLOURS, MOTIONS):
        clip = Clip(garment, colour, motion)
        assert read_caption(str(clip)) == clip


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a red hat on the left", "garment is 'hat'"),
        ("a pink bag", "colour is 'pink'"),
        ("a bag", "cannot read 'a bag'"),
        ("a red bag on the roof", "place is 'roof'"),
        ("a red bag on the left and a blue bag on the left", "different places"),
        ("", "cannot read"),
    ],
)
def test_what_is_not_of_this_world_is_refused(text, match):
    with pytest.raises(DitaError, match=match):
        read_caption(text)


def test_scenes_show_the_colours_where_they_were_asked(renderer):
    scene = Scene((Item("bag", "red", "right"), Item("coat", "green", "left")))
    image = (renderer.scenes([scene], generator())[0] + 1) / 2
    left, right = image[..., :32], image[..., 32:]
    assert left[1].mean() > 2 * left[0].mean()
    assert right[0].mean() > 2 * right[1].mean()


def test_an_empty_side_is_ground(renderer):
    image = (renderer.scenes([Scene((Item("bag", "white", "left"),))], generator())[0] + 1) / 2
    torch.testing.assert_close(image[..., 32:], torch.full((3, 32, 32), GROUND))
    assert image[..., :32].max() > 0.5


def test_an_open_place_is_drawn_on_either_side(renderer):
    scene = Scene((Item("bag", "white"),))
    images = renderer.scenes([scene] * 40, generator())
    on_the_left = (images[..., :32].amax((1, 2, 3)) > images[..., 32:].amax((1, 2, 3))).sum()
    assert 8 < on_the_left < 32


def centres(video: torch.Tensor) -> torch.Tensor:
    """Centre of brightness (x, y) of each frame of a clip [3, T, H, W]."""
    weight = (video + 1 - 2 * GROUND).clamp(min=0.05) - 0.05
    weight = weight.sum(0)
    axis = torch.arange(video.shape[-1]) + 0.5
    total = weight.sum((1, 2))
    return torch.stack([(weight.sum(1) * axis).sum(1) / total, (weight.sum(2) * axis).sum(1) / total], 1)


@pytest.mark.parametrize("motion", MOTIONS)
def test_clips_move_as_asked_and_evenly(renderer, motion):
    clips = [Clip(garment, "white", motion) for garment in GARMENTS]
    videos = renderer.clips(clips, generator())
    assert videos.shape == (10, 3, CLIP_FRAMES, 32, 32)
    assert videos.min() >= -1
    assert videos.max() <= 1
    direction = torch.tensor(MOTIONS[motion], dtype=torch.float32)
    for video in videos:
        path = centres(video)
        travel = path[-1] - path[0]
        if motion == "standing still":
            assert travel.abs().max() < 1e-3
            continue
        assert 5.5 < (travel @ direction) < 12.5
        assert (travel - (travel @ direction) * direction).abs().max() < 0.5
        steps = path.diff(dim=0) @ direction
        assert steps.min() > 0.2
        assert steps.max() < 1.5


def test_fewer_frames_are_the_beginning_of_the_same_path(renderer):
    clips = [Clip("bag", "red", "moving left"), Clip("coat", "blue", "moving down")]
    whole, start = (renderer.clips(clips, generator(), frames) for frames in (CLIP_FRAMES, 5))
    torch.testing.assert_close(whole[:, :, :5], start)


def test_lower_resolution_shows_the_same(renderer):
    clips = [Clip("bag", "red", "moving left")]
    fine, coarse = (renderer.clips(clips, generator(), 13, side) for side in (32, 16))
    assert coarse.shape == (1, 3, 13, 16, 16)
    pooled = torch.nn.functional.avg_pool2d(fine[0].transpose(0, 1), 2)
    assert (pooled - coarse[0].transpose(0, 1)).abs().mean() < 0.05
    assert (pooled + 1).mean() > 0.2


@pytest.mark.parametrize("stages", [(3,), (3, 12), (3, 12, 48)])
@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (2, 3, 5, 8, 16)], ids=["image", "video"])
def test_the_vae_loses_nothing(stages, shape):
    vae: Any = SpaceToDepthVAE(stages)
    pixels = torch.rand(shape)
    latents = vae.encode(pixels).latent_dist.sample()
    shrink = 2 ** (len(stages) - 1)
    assert latents.shape == (2, 3 * shrink**2, *shape[2:-2], shape[-2] // shrink, shape[-1] // shrink)
    assert torch.equal(vae.decode(latents, return_dict=False)[0], pixels)


def test_a_latent_channel_is_one_pixel_of_the_block():
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4)
    vae: Any = SpaceToDepthVAE()
    latents = vae.encode(pixels).latent_dist.mode()
    assert latents[0, :4, 0, 0].tolist() == [0, 1, 4, 5]
    assert latents[0, 3].tolist() == [[5, 7], [13, 15]]
