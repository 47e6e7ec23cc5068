from __future__ import annotations

import pytest
import torch
from torch import nn

from dita.errors import DitaError
from dita.eval.classifier import load_classifier
from dita.eval.metrics.semantic import semantics
from dita.eval.metrics.world import world_perceptual_distance
from dita.eval.training.worldnet import started
from dita.eval.world import COLOURS, GARMENTS, MOTIONS, Renderer, captions, read_caption
from dita.eval.worldnet import BUNDLED, WorldNet, load_worldnet, views_of

_COLOURS, _MOTIONS = tuple(COLOURS), tuple(MOTIONS)


class Told(WorldNet):
    """Reads what it is told: by side or frame (garment, colour) or None, and a motion."""

    def __init__(self, views: list[list[tuple[str, str] | None]], motions: list[str] | None = None) -> None:
        nn.Module.__init__(self)
        self.views, self.motions, self.at = views, motions, 0

    def embedding(self, media):
        return torch.zeros(len(media), len(self.views[0]), 1)

    def read(self, embedding):
        from dita.eval.worldnet import Reading

        garment = torch.zeros(*embedding.shape[:2], len(GARMENTS))
        colour = torch.zeros(*embedding.shape[:2], len(COLOURS))
        occupied = torch.full(embedding.shape[:2], -1.0)
        for row, sides in enumerate(self.views):
            for side, seen in enumerate(sides):
                if seen is not None:
                    garment[row, side, GARMENTS.index(seen[0])] = 5
                    colour[row, side, _COLOURS.index(seen[1])] = 5
                    occupied[row, side] = 1
        return Reading(garment, colour, occupied)

    def read_motion(self, embedding):
        assert self.motions is not None
        return torch.eye(5)[[_MOTIONS.index(motion) for motion in self.motions]]


BAG, BOOT = ("bag", "red"), ("boot", "blue")
PAIR = "a red bag on the left and a blue boot on the right"


@pytest.mark.parametrize(
    ("caption", "left", "right", "garment", "colour", "place"),
    [
        (PAIR, BAG, BOOT, 1, 1, 1),
        (PAIR, BOOT, BAG, 1, 1, 0),
        (PAIR, ("bag", "blue"), ("boot", "red"), 1, 0, 1),
        (PAIR, BAG, None, 0.5, 0.5, 0.5),
        (PAIR, None, BAG, 0.5, 0.5, 0),
        (PAIR, None, None, 0, 0, 0),
        (PAIR, ("coat", "red"), BOOT, 0.5, 1, 1),
        ("a red bag on the left", BAG, None, 1, 1, 1),
        ("a red bag on the left", None, BAG, 1, 1, 0),
        ("a red bag on the left", BAG, BOOT, 1, 1, 0),
        ("a red bag and a blue boot", BOOT, BAG, 1, 1, 1),
        ("a red bag on the left and a red bag on the right", BAG, BAG, 1, 1, 1),
    ],
)
def test_scenes_are_scored_by_the_best_match(caption, left, right, garment, colour, place):
    found = semantics(torch.zeros(1, 3, 32, 64), [caption], Told([[left, right]]))
    assert (found.garment.item(), found.colour.item()) == (garment, colour)
    assert found.place is not None
    assert found.place.item() == place
    assert found.motion is None
    assert found.whole.item() == (garment == colour == place == 1)


@pytest.mark.parametrize(
    ("frames", "motion", "expected"),
    [
        ([BAG] * 3, "moving left", (1, 1, 1, 1)),
        ([BAG] * 3, "moving right", (1, 1, 0, 0)),
        ([BAG, BAG, BOOT], "moving left", (1, 1, 1, 1)),
        ([BOOT, BAG, BOOT], "moving left", (0, 0, 1, 0)),
    ],
)
def test_clips_are_scored_over_their_frames(frames, motion, expected):
    found = semantics(torch.zeros(1, 3, 3, 32, 32), ["a red bag moving left"], Told([frames], [motion]))
    assert found.motion is not None
    assert (found.garment.item(), found.colour.item(), found.motion.item(), found.whole.item()) == expected
    assert found.place is None


def test_unfit_captions_are_refused():
    net = Told([[BAG, None]])
    with pytest.raises(DitaError, match="2 captions for 1 samples"):
        semantics(torch.zeros(1, 3, 32, 64), [PAIR, PAIR], net)
    with pytest.raises(DitaError, match="not the caption of a scene"):
        semantics(torch.zeros(1, 3, 32, 64), ["a red bag moving left"], net)
    with pytest.raises(DitaError, match="not the caption of a clip"):
        semantics(torch.zeros(1, 3, 3, 32, 32), [PAIR], net)


@pytest.mark.parametrize("kind", ["scene", "clip"])
def test_the_bundled_network_reads_unseen_renders(kind):
    net, texts = load_worldnet(), captions(kind, 400, seed=99)
    renderer, generator = Renderer("test"), torch.Generator().manual_seed(99)
    asked = [read_caption(text) for text in texts]
    render = renderer.scenes if kind == "scene" else lambda *args: renderer.clips(*args).transpose(1, 2)
    media = render(asked, generator)  # pyright: ignore[reportArgumentType]
    found = semantics((media + 1) / 2, texts, net)
    accuracies = {name: values.mean().item() for name, values in found.parts.items()}
    assert min(accuracies.values()) > 0.85, accuracies
    shuffled = semantics((media[1:101] + 1) / 2, texts[:100], net)
    assert shuffled.whole.mean() < 0.1


def test_saved_networks_load_and_others_are_refused(tmp_path):
    torch.manual_seed(0)
    net = WorldNet(widths=(4, 8, 8), features=16, track=4).eval()
    net.half().float().save(tmp_path)
    scenes = torch.rand(2, 3, 32, 64)
    assert torch.equal(load_worldnet(tmp_path).features(scenes), net.features(scenes))
    (tmp_path / "config.json").write_text('{"widths": [4, 8, 8], "features": 16, "track": 5}')
    with pytest.raises(DitaError, match="does not fit.*"):
        load_worldnet(tmp_path)
    (tmp_path / "worldnet.safetensors").unlink()
    with pytest.raises(DitaError, match="worldnet.safetensors is missing"):
        load_worldnet(tmp_path)


def test_the_network_does_not_mix_samples():
    net = load_worldnet()
    clips = torch.rand(3, 6, 3, 32, 32)
    torch.testing.assert_close(net.features(clips)[1:2], net.features(clips[1:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 32, 64), (1, 4, 3, 16, 16), (3, 32, 64)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(DitaError, match="world network reads scenes"):
        views_of(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4, 3, 32, 64), (4, 5, 3, 32, 32)], ids=["scene", "clip"])
def test_perceptual_distance(shape):
    net, generator = load_worldnet(), torch.Generator().manual_seed(0)
    media = torch.rand(shape, generator=generator)
    assert world_perceptual_distance(media, media, net).abs().max() == 0
    near = (media + 0.02 * torch.randn(shape, generator=generator)).clamp(0, 1)
    far = (media + 0.2 * torch.randn(shape, generator=generator)).clamp(0, 1)
    small, large = (world_perceptual_distance(other, media, net) for other in (near, far))
    assert small.shape == (4,)
    assert (small > 0).all()
    assert (4 * small < large).all()
    alone = world_perceptual_distance(near[2:3], media[2:3], net)
    torch.testing.assert_close(alone, small[2:3], rtol=1e-4, atol=1e-6)


def test_the_reference_belongs_to_the_network():
    import json

    measured = json.loads((BUNDLED / "accuracy.json").read_text())
    for kind in ("scene", "clip"):
        parts = {name: value for name, value in measured[kind].items() if name != "all"}
        assert min(parts.values()) > 0.88, parts


def test_a_wider_network_starts_from_what_the_classifier_sees():
    net, classifier = started(WorldNet((20, 40, 72))).eval(), load_classifier()
    grey = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for mine, theirs in zip(net.maps(grey.expand(-1, 3, -1, -1)), classifier.maps(grey), strict=True):
        torch.testing.assert_close(mine[:, : theirs.shape[1]], theirs)
    reading = net.read(net.embedding(torch.cat([grey.expand(-1, 3, -1, -1)] * 2, -1)))
    torch.testing.assert_close(reading.garment[:, 0], classifier(grey))
