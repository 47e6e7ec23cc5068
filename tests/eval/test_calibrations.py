from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pipelines import TINY

from dita import registry
from dita.anatomy import describe
from dita.caching import HarmoniCa
from dita.eval.bench import Bench
from dita.eval.calibrations import bundled, with_bundled
from dita.eval.pipelines import load_pipeline
from dita.eval.sampling import Sampling
from dita.eval.settings import PLAIN, Setting, plan
from dita.eval.task import task_of
from dita.fingerprint import fingerprint


def router() -> Any:
    return bundled("fashion-dit", "harmonica")


def test_the_shipped_router_is_of_the_shipped_pipeline():
    pipe: Any = load_pipeline("fashion-dit")
    kept = router()
    assert isinstance(kept, HarmoniCa) and kept.table is not None
    assert kept.table.model == fingerprint(pipe.transformer) and kept.table.scheduler == fingerprint(pipe.scheduler)
    assert kept.table.steps == 50 and kept.table.shape == (1, 32, 32)
    assert set(kept.table.values) == {part.site.name for part in describe(pipe.transformer).modules}
    rows = torch.tensor(list(kept.table.values.values()))
    shares = [(rows > config.threshold).float().mean().item() for config in HarmoniCa.ladder()]
    assert shares == sorted(shares, reverse=True) and 0.1 < shares[-1] < shares[0] < 0.9
    assert (rows[:, 0] > 0.99).all() and "fashion-dit" not in fingerprint(pipe.transformer)


def test_settings_take_the_table_that_they_would_train():
    kept = router()
    settings: Any = plan(50, ["harmonica", "taylorseer"])
    changed: Any = with_bundled(settings, "fashion-dit")
    assert [s.key({}) for s in changed[6:]] == [s.key({}) for s in settings[6:]]
    assert all(s.config.table == kept.table for s in changed[1:6])
    assert [s.config.threshold for s in changed[1:6]] == [s.config.threshold for s in settings[1:6]]
    assert with_bundled(plan(20, ["harmonica"]), "fashion-dit") == plan(20, ["harmonica"])
    assert with_bundled(settings, "fashion-flux") == settings
    others = [replace(s, config=replace(s.config, beta=1.0)) for s in settings[1:6]]
    assert with_bundled(others, "fashion-dit") == others


def test_what_is_trained_is_trained_once_on_samples_of_chance(tiny, monkeypatch):
    bench = Bench(tiny, Sampling(samples=2, batch=2, steps=4, guidance=3.0, seed=0))
    seen = []
    monkeypatch.setattr(
        "dita.eval.bench.draw", lambda pipe, sampling, indices, steps: seen.append((sampling.seed, indices))
    )
    trained = []

    def calibrated(self, pipe, call):
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            call(pipe)
        trained.append(self)
        return replace(self, table=router().table)

    monkeypatch.setattr(HarmoniCa, "calibrated", calibrated)
    mild: Any
    strong: Any
    mild, strong = (Setting("harmonica", "", 4, HarmoniCa(threshold=t)) for t in (0.1, 0.5))
    with torch.random.fork_rng():
        calibrated_by: Any = bench._calibrated
        first, taken = calibrated_by(mild)
        second, same = calibrated_by(strong)
        other, again = calibrated_by(Setting("harmonica", "", 4, HarmoniCa(beta=1.0)))
    assert taken == same is not None and again is not None
    assert trained == [mild.config, other.config.replace(table=None)]
    assert second.config == strong.config.replace(table=first.config.table)
    assert seen[0] == seen[2] != seen[1] and {seed for seed, _ in seen} == {1}
    assert bench._calibrated(first) == (first, None) and bench._calibrated(Setting(PLAIN, "", 4))[1] is None


@pytest.mark.parametrize("folder", ["fashion-dit", "anywhere/fashion-dit"])
def test_defaults_are_those_of_the_shipped_training(folder):
    kept: Any = bundled(folder, "harmonica")
    assert all(getattr(kept, name) == getattr(HarmoniCa(), name) for name in HarmoniCa.shaping)
    assert task_of("eval/models/fashion-dit").guidance == 3.0


def alike(cls: Any) -> list[Any]:
    """Settings of a ladder whose numbers are those of its first one."""
    ladder = cls.ladder()
    return [config for config in ladder if all(getattr(config, n) == getattr(ladder[0], n) for n in cls.shaping)]


SHARED = [
    name
    for name in registry.names()
    if getattr(registry.get(name), "shaping", None) is not None
    and not getattr(registry.get(name), "trained", False)
    and len(alike(registry.get(name))) > 1
]


@pytest.mark.parametrize("name", SHARED)
def test_settings_that_say_so_share_their_numbers(name):
    pipe = TINY["dit"].build()
    cls: Any = registry.get(name)
    first, *_, last = alike(cls)
    tables = [config.calibrated(pipe, lambda p: TINY["dit"].call(p, steps=6)).table for config in (first, last)]
    first, second = ({name: v for name, v in table.values.items() if name != "seconds"} for table in tables)
    assert first == second and first
    assert replace(tables[0], values={}) == replace(tables[1], values={})
