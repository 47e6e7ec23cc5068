"""FID, KID and LPIPS with random weights in the published files' formats: no network, no download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dita.errors import DitaError
from dita.eval.metrics import (
    InceptionDistance,
    KernelInceptionDistance,
    find_weights,
    frechet_inception_distance,
    kernel_distance,
    lpips,
)
from dita.eval.metrics.frechet import Gaussian, frechet_distance
from dita.eval.metrics.weights import ALEXNET, INCEPTION, SQUEEZENET, URLS, VGG16, load_weights


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


def backbone_file(path: Path, name: str = "alexnet") -> Path:
    import torchvision.models

    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = getattr(torchvision.models, name)(weights=None).features.state_dict()
    scales = {key: 1.4 / shape.shape[1:].numel() ** 0.5 for key, shape in shapes.items()}
    torch.save({f"features.{key}": scales[key] * torch.randn(shapes[key].shape) for key in shapes}, path)
    return path


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's extractor of 64 features with random weights, and the file of its weights."""
    import torch_fidelity.feature_extractor_inceptionv3 as home

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(home.FeatureExtractorInceptionV3, "load_state_dict", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        extractor = home.FeatureExtractorInceptionV3("random", ["64"])
    for module in extractor.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.mul_(3)  # else the features fade to nothing
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(extractor.state_dict(), path)
    return extractor, path


def levels(x: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1] as the bytes of three channels that a PNG would hold."""
    return (255 * x.expand(-1, 3, -1, -1)).round().byte()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        pytest.param(INCEPTION, lambda: frechet_inception_distance(images(2, 0), images(2, 1)), id="fid"),
        pytest.param(ALEXNET, lambda: lpips(images(2, 0), images(2, 1)), id="lpips-alex"),
        pytest.param(INCEPTION, lambda: KernelInceptionDistance(images(2, 0)), id="kid"),
        pytest.param(VGG16, lambda: lpips(images(2, 0), images(2, 1), net="vgg"), id="lpips-vgg"),
        pytest.param(SQUEEZENET, lambda: lpips(images(2, 0), images(2, 1), net="squeeze"), id="lpips-squeeze"),
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
    with pytest.raises(DitaError, match="squeeze weights: missing features.0.bias"):
        lpips(images(1, 0), images(1, 1), net="squeeze", weights=path)


def test_lpips_equals_its_definition(tmp_path):
    import torchmetrics.functional.image.lpips as home

    path = backbone_file(tmp_path / "weights.pth")
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


@pytest.mark.parametrize(
    ("net", "backbone", "taps"),
    [
        pytest.param("alex", "alexnet", (1, 4, 7, 9, 11), id="alex"),
        pytest.param("vgg", "vgg16", (3, 8, 15, 22, 29), id="vgg"),
        pytest.param("squeeze", "squeezenet1_1", (1, 4, 7, 9, 10, 11, 12), id="squeeze"),
    ],
)
def test_lpips_of_every_network_equals_torchvisions_layers(net, backbone, taps, tmp_path):
    import torchmetrics.functional.image.lpips as home
    import torchvision.models

    path = backbone_file(tmp_path / "weights.pth", backbone)
    with torch.device("meta"):
        layers = getattr(torchvision.models, backbone)(weights=None).features[: taps[-1] + 1].eval()
    state = {key.removeprefix("features."): value for key, value in torch.load(path).items()}
    layers.load_state_dict(state, strict=False, assign=True)
    heads = torch.load(Path(home.__file__).parent / "lpips_models" / f"{net}.pth", map_location="cpu")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    @torch.no_grad()
    def maps(x: torch.Tensor) -> list[torch.Tensor]:
        x, found = ((2 * x - 1).permute(0, 2, 3, 1) - shift).div(scale).permute(0, 3, 1, 2), []
        for index, layer in enumerate(layers):
            x = layer(x)
            if index in taps:
                found.append(torch.nn.functional.normalize(x, dim=1).clone())
        return found

    one, two = images(2, 0, channels=3, size=48), images(2, 1, channels=3, size=48)
    expected = torch.zeros(2)
    for number, (a, b) in enumerate(zip(maps(one), maps(two), strict=True)):
        weights = heads[f"lin{number}.model.1.weight"].reshape(1, -1, 1, 1)
        expected += ((a - b).square() * weights).sum(1).mean((1, 2))
    assert expected.min() > 0.01
    torch.testing.assert_close(lpips(one, two, net, path), expected, rtol=1e-3, atol=1e-6)


def test_fid_runs_on_a_given_file(inception):
    extractor, path = inception
    fake, real = images(6, 0), images(5, 1)
    distance = InceptionDistance(real, path, batch=4, features=64)
    found = [distance(fake), distance(1 - fake)]
    features = [extractor(levels(x))[0] for x in (real, fake, 1 - fake)]
    expected = [frechet_distance(Gaussian.fit(features[0]), Gaussian.fit(part)) for part in features[1:]]
    assert found == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 0


def test_fid_and_kid_equal_torch_fidelitys_own(inception):
    import torch_fidelity

    path = inception[1]
    fake, real = images(12, 0, channels=3) ** 2, images(12, 1, channels=3)

    class Bytes(torch.utils.data.Dataset):
        def __init__(self, x):
            self.levels = levels(x)

        def __len__(self):
            return len(self.levels)

        def __getitem__(self, index):
            return self.levels[index]

    theirs = torch_fidelity.calculate_metrics(
        input1=Bytes(fake),
        input2=Bytes(real),
        fid=True,
        kid=True,
        kid_subsets=2,
        kid_subset_size=12,
        feature_layer_fid="64",
        feature_layer_kid="64",
        feature_extractor_weights_path=str(path),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    fid = InceptionDistance(real, path, features=64)(fake)
    kid = KernelInceptionDistance(real, path, batch=5, features=64)(fake, subsets=2)
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert kid.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert fid > 0 and kid.mean > 0 and kid.subset_size == 12


def test_kid_is_the_kernel_distance_of_the_features(inception):
    extractor, path = inception
    fake, real = images(9, 2), images(7, 3)
    found = KernelInceptionDistance(real, path, batch=4, features=64)(fake, subsets=5, subset_size=4, seed=1)
    ours, data = (extractor(levels(x))[0] for x in (fake, real))
    expected = kernel_distance(ours, data, subsets=5, subset_size=4, seed=1)
    assert found.mean == pytest.approx(expected.mean, rel=1e-3, abs=1e-7)
    assert found.std == pytest.approx(expected.std, rel=1e-3)


class Pixels(torch.nn.Module):
    """In the place of the network: the features are the 64 bytes of an 8x8 image."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, x):
        assert x.dtype == torch.uint8
        return x[:, 0].flatten(1).double()


def signs(size: int) -> torch.Tensor:
    """Rows of -1 and 1, [2 * size, size], whose mean is 0 and whose second moments are exactly the identity."""
    rows = torch.ones(1, 1)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return torch.cat([rows, -rows])


def test_fid_in_closed_form_on_gaussians_of_known_moments(monkeypatch):
    import torchmetrics.image.fid as home

    monkeypatch.setattr("dita.eval.metrics.pretrained._inception_options", lambda *args: {})
    monkeypatch.setattr(home, "NoTrainInceptionV3", Pixels)

    def drawn(mean: int, spread: int) -> torch.Tensor:
        return (mean + spread * signs(64)).reshape(128, 1, 8, 8) / 255

    distance = InceptionDistance(drawn(100, 30), features=64)
    unbiased = 128 / 127
    assert distance(drawn(100, 30)) == pytest.approx(0, abs=1e-6)
    assert distance(drawn(110, 30)) == pytest.approx(64 * 10**2, rel=1e-6)
    assert distance(drawn(100, 70)) == pytest.approx(64 * (70 - 30) ** 2 * unbiased, rel=1e-6)
    assert distance(drawn(90, 10)) == pytest.approx(64 * (10**2 + 20**2 * unbiased), rel=1e-6)


def test_images_that_came_from_bytes_go_back_to_the_same_bytes(monkeypatch):
    import torchmetrics.image.fid as home

    seen = []

    class Watching(Pixels):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    monkeypatch.setattr("dita.eval.metrics.pretrained._inception_options", lambda *args: {})
    monkeypatch.setattr(home, "NoTrainInceptionV3", Watching)
    every = torch.arange(256).reshape(1, 1, 16, 16)
    KernelInceptionDistance((every / 127.5 - 1 + 1) / 2)
    assert torch.equal(seen[0], every.expand(-1, 3, -1, -1).byte())


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
    with pytest.raises(DitaError, match="2 channels"):
        KernelInceptionDistance(images(2, 0, channels=2))
    with pytest.raises(DitaError, match=r"\['alex', 'squeeze', 'vgg'\]"):
        lpips(images(1, 0), images(1, 1), net="resnet")
