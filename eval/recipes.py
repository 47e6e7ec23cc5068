"""Sweeps written down: a YAML file that lists methods with settings, single or as grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from dita.config import Method
from dita.errors import DitaError
from dita.eval.composition import JOINT, Composition
from dita.eval.labels import words
from dita.eval.settings import FEWER_STEPS, PLAIN, Setting, varying


def read_recipes(path: str | Path) -> dict[str, Any]:
    """Read a sweep file.

    Its `settings` list what is compared; every other key is an argument of `run_sweep`:

        model: fashion-flux
        samples: 32
        settings:
          - fewer steps: [14, 9]
          - taylorseer                       # its own ladder
          - taylorseer: {interval: [3, 4, 5], order: [1, 2]}   # a grid of six
          - cache-dit dbcache: {threshold: 0.2}
          - adaspa + taylorseer: {adaspa: {density: [0.2, 0.3]}, taylorseer: {interval: 3}}   # both at once
          - fewer steps + dualfast: {fewer steps: [10, 20]}    # a method on shorter runs than the plain one
          - progressive-resolution: {scales: [[0.5, 1.0]]}     # one value, which is a list itself

    Args:
        path: of the file.

    Returns:
        Arguments of `run_sweep`; "settings" is the list as it was written, for `expand`.

    Raises:
        DitaError: the file is missing, is not YAML, or has no settings.

    Example:
        >>> read_recipes("sweep.yaml")["settings"]  # doctest: +SKIP
    """
    import yaml

    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DitaError(f"cannot read the sweep file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise DitaError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("settings"), list):
        raise DitaError(f"{path} must be a mapping with a list named settings; see `dita sweep --help`")
    return content


def expand(recipes: list[Any], steps: int) -> list[Setting]:
    """Turn a list of recipes into settings, the plain run first.

    Args:
        recipes: names, or mappings of one name to settings, each a value or a list of values to try; several names
            joined by " + " are composed, each with a mapping of its own; for "fewer steps" a list of step counts.
        steps: solver steps of the plain run.

    Raises:
        DitaError: a name is unknown, or the settings do not fit the method.

    Example:
        >>> [setting.label for setting in expand([{"fewer steps": [25]}, {"fbcache": {"threshold": [0.1, 0.2]}}], 50)]
        ['50 steps', '25 steps', 'threshold=0.1', 'threshold=0.2']
    """
    settings = [Setting(PLAIN, f"{steps} steps", steps)]
    for recipe in recipes:
        name, given = next(iter(recipe.items())) if isinstance(recipe, Mapping) and len(recipe) == 1 else (recipe, None)
        if not isinstance(name, str):
            raise DitaError(f"recipe {recipe!r} is neither a name nor one name with its settings")
        if name == FEWER_STEPS and given is not None:
            settings += [Setting(name, f"{count} steps", count) for count in _counts(given, steps)]
        elif JOINT in name:
            settings += _compositions(name, given or {}, steps)
        elif given is None:
            from dita.eval.settings import plan

            settings += plan(steps, [name])[1:]
        else:
            settings += _grid(name, given, steps)
    return list({setting.key({}): setting for setting in settings}.values())


def _compositions(name: str, given: Any, steps: int) -> list[Setting]:
    """Every combination of the parts' settings; a part of which nothing is said has its defaults."""
    names = name.split(JOINT)
    if not isinstance(given, Mapping) or set(given) - set(names):
        raise DitaError(f"settings of {name} are {given!r}; expected a mapping of {', '.join(names)} to theirs")
    if FEWER_STEPS in names:
        rest = JOINT.join(part for part in names if part != FEWER_STEPS)
        others = {part: value for part, value in given.items() if part != FEWER_STEPS}
        shorter = []
        for count in _counts(given.get(FEWER_STEPS), steps):
            alone = _compositions(rest, others, count) if JOINT in rest else _grid(rest, others.get(rest, {}), count)
            shorter += [replace(own, method=name, label=f"{count} steps, {own.label}") for own in alone]
        return shorter
    parts = [[setting.config for setting in _grid(part, given.get(part, {}), steps)] for part in names]
    if not all(isinstance(config, Method) for configs in parts for config in configs):
        raise DitaError(f"{name} names other projects' accelerators; only methods of dita can be composed")
    compositions = [Composition(chosen) for chosen in product(*parts)]  # pyright: ignore[reportArgumentType]
    return [Setting(name, composition.label(), steps, composition) for composition in compositions]


def _counts(given: Any, steps: int) -> list[int]:
    counts = given if isinstance(given, list) else [given]
    wrong = [count for count in counts if not isinstance(count, int) or not 1 <= count < steps]
    if wrong:
        raise DitaError(f"fewer steps has {wrong}; expected whole numbers from 1 to {steps - 1}")
    return counts


def _grid(name: str, given: Any, steps: int) -> list[Setting]:
    from dita import registry
    from dita.eval.peers import peers

    if not isinstance(given, Mapping):
        raise DitaError(f"settings of {name} are {given!r}; expected a mapping such as {{threshold: [0.1, 0.2]}}")
    others = {peer.name: peer for peer in peers()}
    if name not in others and name not in registry.names():
        raise DitaError(f"unknown method {name}; known are {', '.join((FEWER_STEPS, *registry.names(), *others))}")
    kind: Any = others.get(name) or registry.get(name)
    lists = [
        [tuple(each) if isinstance(each, list) else each for each in (value if isinstance(value, list) else [value])]
        for value in given.values()
    ]
    try:
        configs = [kind(**dict(zip(given, values, strict=True))) for values in product(*lists)]
    except TypeError as error:
        raise DitaError(f"settings of {name} do not fit: {error}") from error
    labels = varying(configs) if len(configs) > 1 else [words(kind, configs[0].to_dict()["settings"], tuple(given))]
    return [Setting(name, label, steps, config) for label, config in zip(labels, configs, strict=True)]
