from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dita.errors import DitaError
from dita.eval.chart import chart_data
from dita.eval.columns import METRICS
from dita.eval.films import animation, film, shrink
from dita.eval.gallery import MOST_ANIMATIONS, MOST_PICTURES, gallery, picture_uri, spread_over_methods
from dita.eval.looks import COLOURS, GREY, looks
from dita.eval.plots import pareto, plot_sweep, strip
from dita.eval.timeline import lanes, ranges


def row(method: str = "a", **values):
    base = {"key": f"{method}{values.get('label', '')}", "method": method, "label": "x", "samples": 4, "identical": 0}
    return {**base, "speedup": 2.0, "psnr": 31.0, **values}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_pareto_front():
    assert pareto([(1, 1), (2, 2), (3, 0), (2, 1), (0, 3)]) == [4, 1, 2]
    assert pareto([]) == []


@pytest.mark.parametrize("rows", [[], [row(error="no")], [row(), row(label="y", psnr=None), row("fewer steps")]])
def test_plot_is_a_png_whatever_the_rows(rows, tmp_path):
    data = plot_sweep(rows, tmp_path / "pareto.png", "title")
    assert (tmp_path / "pareto.png").read_bytes() == data
    assert data.startswith(b"\x89PNG")


def test_plot_has_a_panel_for_captions_and_room_for_many_methods(tmp_path):
    many = [row(f"method {number}", speedup=1 + number / 9, fd_world=5.0 + number) for number in range(25)]
    two = pixels(plot_sweep(many, tmp_path / "two.png"))
    three = pixels(plot_sweep([{**each, "semantic_accuracy": 0.9} for each in many], tmp_path / "three.png"))
    assert three.shape[1] == pytest.approx(1.5 * two.shape[1], rel=0.01)
    for colour in COLOURS:
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        close = np.abs(three - wanted).max(axis=2) < 16
        assert close.sum() > 50, f"{colour} is drawn"


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_colours_can_be_seen_on_light_and_dark_ground():
    for colour in (*COLOURS, GREY):
        one = luminance(colour) + 0.05
        assert min(1.05 / one, one / (luminance("#14181c") + 0.05)) >= 3, colour


def test_every_method_has_a_look_of_its_own():
    ours = [row(f"m{number}") for number in range(14)] + [row("taylorseer"), row("fbcache")]
    theirs = ["lib taylorseer", "other taylorseer", "diffusers firstblock", *(f"lib n{number}" for number in range(8))]
    rows = [row("plain"), *ours, *(row(name, origin="peer") for name in theirs), row("fewer steps"), row("data")]
    found = looks(rows)
    assert list(found) == [each["method"] for each in rows[1:-1]]
    assert len(set(found.values())) == len(found)
    assert found["taylorseer"].colour == found["lib taylorseer"].colour == found["other taylorseer"].colour
    assert found["fbcache"].colour == found["diffusers firstblock"].colour
    assert (found["fewer steps"].colour, found["fewer steps"].line) == (GREY, "--")


def test_chart_holds_what_was_measured_and_nothing_else():
    rows = [
        row("plain", psnr=None, fd_world=3.0, task="t"),
        row("a", label="same", psnr=None, identical=4, task="t"),
        row("a", label="bad", error="no", task="t"),
        row("b", fd_world=4.0, task="u", intervals={"psnr": [30, 32]}),
    ]
    data = chart_data(rows)
    assert data["tasks"] == ["t", "u"]
    assert [(point["row"], point["values"]) for point in data["points"]] == [
        (1, {"psnr": "identical"}),
        (3, {"psnr": 31.0, "fd_world": 4.0}),
    ]
    assert data["points"][1]["spreads"] == {"psnr": [30.0, 32.0]}
    assert [(level["metric"], level["value"]) for level in data["levels"]] == [("psnr", 30.0), ("fd_world", 3.0)]
    assert chart_data([])["points"] == []


def test_every_measure_can_be_charted():
    data = chart_data([row("a", **{metric.name: 0.5 for metric in METRICS})])
    assert [each["name"] for each in data["metrics"]] == [metric.name for metric in METRICS]
    written = [f"{0.5:.{each['digits']}{'%' if each['share'] else 'f'}}" for each in data["metrics"]]
    assert written == [metric.text({metric.name: 0.5}).lstrip("+") for metric in METRICS]


def test_strip_keeps_the_pixels_of_small_images():
    images = torch.linspace(0, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    shown = pixels(strip(images, gap=1))
    assert shown.shape == (8, 17, 3)
    assert (shown[:, 8] == 255).all()
    second = torch.from_numpy(shown[:, 9:]).permute(2, 0, 1)
    assert torch.equal(second, (images[1] * 255).round().long())
    assert pixels(strip(torch.rand(2, 3, 64, 128), gap=1, limit=32)).shape == (16, 65, 3)


def test_shrinking_averages():
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(4, 4)[None, None]
    assert torch.equal(shrink(board, 4), torch.full((1, 1, 4, 4), 0.5))


def clips() -> torch.Tensor:
    level = torch.arange(13) / 12
    return torch.stack([level, 1 - level])[:, :, None, None, None].expand(2, 13, 3, 8, 8)


def test_film_has_a_row_for_each_clip_and_every_kth_frame():
    shown = pixels(film(clips(), frames=5, gap=1))
    assert shown.shape == (17, 44, 3)
    assert [int(shown[3, 9 * place + 4, 0]) for place in range(5)] == [0, 64, 128, 191, 255]
    assert [int(shown[12, 9 * place + 4, 0]) for place in range(5)] == [255, 191, 128, 64, 0]
    assert pixels(film(clips()[:, :1, :1], frames=5)).shape == (18, 8, 3)


def test_animation_plays_the_plain_run_next_to_the_accelerated():
    picture = Image.open(io.BytesIO(animation(clips(), torch.zeros(2, 13, 3, 8, 8), fps=10, gap=2)))
    assert (picture.n_frames, picture.size) == (13, (2 * 18 + 8, 8))  # pyright: ignore[reportAttributeAccessIssue]
    assert picture.info["loop"] == 0
    picture.seek(12)
    picture.load()
    assert picture.info["duration"] == 100
    last = np.asarray(picture.convert("RGB"))[4, :, 0]
    assert last[4] < 12 and last[14] > 243, "plain, then accelerated"
    assert last[30] < 12 and last[40] < 12, "the second clip has gone dark"
    alone = Image.open(io.BytesIO(animation(clips())))
    assert alone.size == (8 + 8 + 8, 8)


def test_unfit_videos_are_refused():
    for bad in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 13, 8, 8), torch.zeros(0, 13, 3, 8, 8)):
        with pytest.raises(DitaError, match="expected \\[N, T"):
            film(bad)
    with pytest.raises(DitaError, match="reference has shape"):
        animation(clips(), clips()[:1])
    with pytest.raises(DitaError, match="fps is 0"):
        animation(clips(), fps=0)


def test_lanes_share_a_picture_where_branches_did_the_same():
    found = lanes({"cond": "CCFR", "uncond": "CCFR", "cond/1": "RRRR"})
    assert [lane.name for lane in found] == ["cond, uncond", "cond stage 1"]
    assert found[0].text == "2 of 4 computed (0-1), 1 forecast, 1 reused"
    assert found[1].text == "0 of 4 computed, 4 reused"
    for letter, count in (("C", 2), ("F", 1), ("R", 1)):
        path = found[0].svg.split(f'class="{letter}"')[1].split("/>")[0]
        assert path.count("M") == count
    assert 'viewBox="0 0 4 12"' in found[0].svg
    assert "&lt;x&gt;" in lanes({"<x>": "C"})[0].svg
    assert lanes({"cond": ""}) == []
    with pytest.raises(DitaError, match="timeline of cond holds x"):
        lanes({"cond": "CxR"})


def test_ranges_of_steps():
    assert ranges([]) == ""
    assert ranges([3]) == "3"
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"


def test_a_page_holds_few_pictures_from_every_method():
    rows = [row(method, label=str(rung)) for method in "abcdefgh" for rung in range(12)]
    data = {each["key"]: strip(torch.zeros(1, 1, 2, 2)) for each in rows}
    found = gallery(rows, data, data)
    shots = [shot for _, group in found["groups"] for shot in group]
    assert len(shots) == MOST_PICTURES
    assert {len(group) for _, group in found["groups"]} == {5}
    assert sum(bool(shot["moving"]) for shot in shots) == MOST_ANIMATIONS
    assert "40 of 96" in found["words"]
    assert [each["label"] for each in spread_over_methods(rows[:12], 3)] == ["0", "6", "11"]
    assert spread_over_methods(rows[:3], 9) == rows[:3]


def test_dita_comes_first_and_failures_have_no_picture():
    rows = [row("plain"), row("fewer steps"), row("lib x", origin="peer"), row("a"), row("b", error="no")]
    data = {each["key"]: strip(torch.zeros(1, 1, 2, 2)) for each in rows}
    found = gallery(rows, data, {})
    assert [name for name, _ in found["groups"]] == ["a", "lib x", "fewer steps"]
    assert found["groups"][0][1][0]["caption"] == "x: 2.00\u00d7, 31.0 dB"
    assert found["plain"][""].startswith("data:image/png")


def test_only_large_pictures_lose_pixels():
    small = strip(torch.rand(1, 3, 16, 16))
    assert picture_uri(small).startswith("data:image/png")
    assert picture_uri(strip(torch.rand(4, 3, 128, 128))).startswith("data:image/jpeg")
    assert picture_uri(animation(clips())).startswith("data:image/webp")
