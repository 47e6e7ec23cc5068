"""FID and LPIPS with random weights in the published files' formats: no network, no download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dita.errors import DitaError
from dita.eval.metrics import InceptionDistance, find_weights, frechet_inception_distance, lpips
from dita.eval.metrics.frechet import Gaussian, frechet_distance
from dita.eval.metrics.weights import ALEXNET, INCEPTION, URLS, VGG16, load_weights


def images(count: int, seed: int, channels: int = 1, size: int = 32) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch, tmp_path):
    """An empty torch hub cache, and no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.delenv("DITA_WEIGHTS", raising=False)

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def alexnet_file(path: Path) -> Path:
    from torchvision.models import alexnet

    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = alexnet(weights=None).features.state_dict()
    torch.save({f"features.{key}": 0.05 * torch.randn(value.shape) for key, value in shapes.items()}, path)
    return path


@pytest.mark.parametrize(
    ("name", "call"),
    [
        pytest.param(INCEPTION, lambda: frechet_inception_distance(images(2, 0), images(2, 1)), id="fid"),
        pytest.param(ALEXNET, lambda: lpips(images(2, 0), images(2, 1)), id="lpips-alex"),
        pytest.param(VGG16, lambda: lpips(images(2, 0), images(2, 1), net="vgg"), id="lpips-vgg"),
    ],
)
def test_missing_weights_say_which_file_and_where_to_put_it(name, call, tmp_path):
    with pytest.raises(DitaError) as caught:
        call()
    message = str(caught.value)
    assert name in message
    assert URLS[name] in message
    assert str(tmp_path / "hub" / "checkpoints" / name) in message
    assert "no network" in message
    assert "DITA_WEIGHTS" in message


def test_weights_are_found_by_path_folder_environment_and_cache(tmp_path, monkeypatch):
    named, folder = tmp_path / "mine.pth", tmp_path / "folder"
    folder.mkdir()
    named.touch()
    (folder / ALEXNET).touch()
    assert find_weights(ALEXNET, named) == named
    assert find_weights(ALEXNET, folder) == folder / ALEXNET
    cached = tmp_path / "hub" / "checkpoints" / ALEXNET
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert find_weights(ALEXNET) == cached
    monkeypatch.setenv("DITA_WEIGHTS", str(folder))
    assert find_weights(ALEXNET) == folder / ALEXNET
    with pytest.raises(DitaError, match="nowhere else was looked"):
        find_weights(ALEXNET, tmp_path / "absent.pth")
    with pytest.raises(DitaError, match="unknown weights"):
        find_weights("resnet.pth")


def test_a_download_lands_in_the_cache_under_its_checked_name(tmp_path, monkeypatch):
    asked = []

    def download(url, target, hash_prefix, progress):
        asked.append((url, hash_prefix))
        Path(target).touch()

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    found = find_weights(VGG16)
    assert found == tmp_path / "hub" / "checkpoints" / VGG16
    assert asked == [(URLS[VGG16], "397923af")]


def test_weights_that_are_not_tensors_are_refused(tmp_path):
    path = tmp_path / "text.pth"
    path.write_text("not a checkpoint")
    with pytest.raises(DitaError, match="state dict"):
        load_weights(path)
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(DitaError, match="does not hold torchvision's alex"):
        lpips(images(1, 0), images(1, 1), weights=path)


def test_lpips_equals_its_definition(tmp_path):
    import torchmetrics.functional.image.lpips as home

    path = alexnet_file(tmp_path / "weights.pth")
    state = torch.load(path)
    heads = torch.load(Path(home.__file__).parent / "lpips_models" / "alex.pth", map_location="cpu")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    convolutions = [(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]

    def unit_maps(x: torch.Tensor) -> list[torch.Tensor]:
        x, maps = ((2 * x.expand(-1, 3, -1, -1) - 1).permute(0, 2, 3, 1) - shift) / scale, []
        x = x.permute(0, 3, 1, 2)
        for position, (index, stride, padding) in enumerate(convolutions):
            if position in (1, 2):
                x = torch.nn.functional.max_pool2d(x, 3, 2)
            weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
            x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, stride, padding))
            maps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-8))
        return maps

    one, two = images(3, 0, size=64), images(3, 1, size=64)
    expected = torch.zeros(3)
    for number, (a, b) in enumerate(zip(unit_maps(one), unit_maps(two), strict=True)):
        head = heads[f"lin{number}.model.1.weight"]
        expected += torch.nn.functional.conv2d((a - b).square(), head).mean((1, 2, 3))
    torch.testing.assert_close(lpips(one, two, weights=path, batch=2), expected, rtol=1e-3, atol=1e-6)
    assert lpips(one, one, weights=path).abs().max() == 0


def test_fid_runs_on_a_given_file(tmp_path, monkeypatch):
    import torch_fidelity.feature_extractor_inceptionv3 as home

    with monkeypatch.context() as patch:
        patch.setattr(home, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(home.FeatureExtractorInceptionV3, "load_state_dict", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        extractor = home.FeatureExtractorInceptionV3("random", ["64"])
    for module in extractor.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.mul_(3)  # else the features fade to nothing
    path = tmp_path / "inception.pth"
    torch.save(extractor.state_dict(), path)
    fake, real = images(6, 0), images(5, 1)
    distance = InceptionDistance(real, path, batch=4, features=64)
    found = [distance(fake), distance(1 - fake)]
    features = [extractor((255 * x.expand(-1, 3, -1, -1)).byte())[0] for x in (real, fake, 1 - fake)]
    expected = [frechet_distance(Gaussian.fit(features[0]), Gaussian.fit(part)) for part in features[1:]]
    assert found == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 0


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("dita.eval.metrics.pretrained.find_spec", lambda name: None)
    with pytest.raises(DitaError, match=r"torch_fidelity.*pip install 'dita\[eval\]'"):
        InceptionDistance(images(2, 1))
    with pytest.raises(DitaError, match="torchvision"):
        lpips(images(2, 0), images(2, 1))


def test_unfit_images_are_refused():
    with pytest.raises(DitaError, match="2 channels"):
        InceptionDistance(images(2, 0, channels=2))
    with pytest.raises(DitaError, match="at least 32x32"):
        lpips(images(1, 0, size=16), images(1, 1, size=16))
    with pytest.raises(DitaError, match=r"\['alex', 'vgg'\]"):
        lpips(images(1, 0), images(1, 1), net="squeeze")
