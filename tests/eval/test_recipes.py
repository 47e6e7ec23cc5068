from __future__ import annotations

import pytest

from dita.errors import DitaError
from dita.eval.composition import Composition
from dita.eval.recipes import expand, read_recipes
from dita.eval.settings import plan
from dita.eval.sweep import read_prompts
from dita.eval.task import Task, task_of
from dita.schedulers.resolution import ProgressiveResolution


def test_recipes_make_grids():
    settings = expand(
        [
            {"fewer steps": [14, 9]},
            {"taylorseer": {"interval": [3, 4], "order": [1, 2]}},
            {"fbcache": {"threshold": 0.2}},
            {"taylorseer": {"interval": 3, "order": 1}},
        ],
        28,
    )
    labels = [(setting.method, setting.label) for setting in settings]
    assert labels[:3] == [("plain", "28 steps"), ("fewer steps", "14 steps"), ("fewer steps", "9 steps")]
    assert labels[3:7] == [
        ("taylorseer", f"interval={interval} order={order}") for interval in (3, 4) for order in (1, 2)
    ]
    assert labels[7:] == [("fbcache", "threshold=0.2")], "the repeated setting appears once"
    assert [setting.steps for setting in settings] == [28, 14, 9, 28, 28, 28, 28, 28]
    assert settings[4].config is not None
    assert settings[4].config.to_dict()["settings"]["order"] == 2


def test_a_list_within_a_list_is_one_value():
    recipe = {"progressive-resolution": {"scales": [[0.5, 1.0], [0.75, 1.0]]}}
    configs = [setting.config for setting in expand([recipe], 28)[1:]]
    assert configs == [ProgressiveResolution(scales=(0.5, 1.0)), ProgressiveResolution(scales=(0.75, 1.0))]


def test_recipes_compose_methods():
    given = {"adaspa": {"density": [0.2, 0.3]}, "taylorseer": {"interval": 3}}
    settings = expand([{"adaspa + taylorseer": given}, "adaspa + fbcache"], 28)[1:]
    assert [setting.label for setting in settings] == [
        "adaspa default, taylorseer interval=3",
        "adaspa density=0.3, taylorseer interval=3",
        "adaspa default, fbcache default",
    ]
    config = settings[1].config
    assert isinstance(config, Composition) and [part.name for part in config.parts] == ["adaspa", "taylorseer"]
    assert config.to_dict()["settings"]["adaspa"]["density"] == 0.3 and settings[1].origin == "dita"
    assert len({setting.key({}) for setting in settings}) == 3
    for recipe, match in [
        ({"adaspa + taylorseer": {"density": 0.3}}, "expected a mapping of adaspa, taylorseer"),
        ("adaspa + nothing", "unknown method nothing"),
        ("adaspa + fewer steps", "expected whole numbers from 1 to 27"),
    ]:
        with pytest.raises(DitaError, match=match):
            expand([recipe], 28)


def test_methods_on_shorter_runs():
    given = {"fewer steps": [7, 14], "fbcache": {"threshold": [0.1, 0.2]}}
    settings = expand([{"fewer steps + fbcache": given}, {"fewer steps + adaspa + fbcache": {"fewer steps": 9}}], 28)[
        1:
    ]
    assert [(s.steps, s.label) for s in settings] == [
        (7, "7 steps, threshold=0.1"),
        (7, "7 steps, threshold=0.2"),
        (14, "14 steps, threshold=0.1"),
        (14, "14 steps, threshold=0.2"),
        (9, "9 steps, adaspa default, fbcache default"),
    ]
    assert isinstance(settings[-1].config, Composition) and {s.origin for s in settings} == {"dita"}


def test_a_bare_name_is_the_methods_own_ladder():
    assert expand(["magcache"], 50)[1:] == plan(50, ["magcache"])[1:]
    assert expand(["fewer steps"], 50) == plan(50, ["fewer steps"])


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ({"fewer steps": [28]}, "whole numbers from 1 to 27"),
        ({"fewer steps": ["many"]}, "whole numbers"),
        ({"nonsense": {"a": 1}}, "unknown method nonsense"),
        ("nonsense", "unknown methods nonsense"),
        ({"taylorseer": {"gap": 3}}, "settings of taylorseer do not fit.*gap"),
        ({"taylorseer": [3, 4]}, "expected a mapping"),
        ({"taylorseer": {"interval": 0}}, "interval"),
        (3, "neither a name"),
        ({"a": 1, "b": 2}, "neither a name"),
    ],
)
def test_unfit_recipes_are_refused(recipe, match):
    with pytest.raises(DitaError, match=match):
        expand([recipe], 28)


def test_sweep_files(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("model: fashion-flux\nsettings:\n  - taylorseer: {interval: [3, 4]}\n")
    assert read_recipes(path) == {"model": "fashion-flux", "settings": [{"taylorseer": {"interval": [3, 4]}}]}
    for text, match in (("settings: [", "not YAML"), ("model: x", "list named settings"), ("- a", "must be a mapping")):
        path.write_text(text)
        with pytest.raises(DitaError, match=match):
            read_recipes(path)
    with pytest.raises(DitaError, match="cannot read"):
        read_recipes(tmp_path / "none.yaml")


def test_prompts_come_from_a_file_or_a_list(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red bag\n\n  a blue boot \n")
    assert read_prompts(path) == ("a red bag", "a blue boot")
    assert read_prompts(["a", ""]) == ("a",)
    path.write_text("\n")
    with pytest.raises(DitaError, match="no prompts"):
        read_prompts(path)
    with pytest.raises(DitaError, match="cannot read the prompts"):
        read_prompts(tmp_path / "none.txt")


def test_tasks_come_with_the_folder(tmp_path):
    assert task_of(tmp_path) == Task()
    assert Task().prompts(3) == ()
    (tmp_path / "sampling.json").write_text('{"judge": "clip", "steps": 25, "call": {"num_frames": 12}}')
    task = task_of(tmp_path)
    assert (task.judge, task.steps, task.call) == ("clip", 25, {"num_frames": 12})
    assert len(task.prompts(3)) == 3
    assert task.prompts(3, seed=1) != task.prompts(3)
    for text in ('{"judge": "clip", "stride": 2}', "{", '{"judge": "me"}'):
        (tmp_path / "sampling.json").write_text(text)
        with pytest.raises(DitaError, match="sampling.json does not fit|judge is 'me'"):
            task_of(tmp_path)
