"""Configs, registry, reports, support: what a user reads."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from helpers import METHODS
from pipelines import TINY
from torch import nn

import dita
from dita import registry
from dita.caching import BWCache, DBCache, FirstBlockCache, MagCache, MagnitudeTable, TaylorSeer
from dita.config import Method
from dita.errors import DitaError


def every_setting(name: str) -> list[Method]:
    cls = registry.get(name)
    return [cls(), cls.disabled(), cls.forced(), *cls.ladder()]


@pytest.mark.parametrize("name", METHODS)
def test_configs_are_frozen_hashable_and_round_trip(name: str) -> None:
    for config in every_setting(name):
        text = config.to_json()
        assert Method.from_json(text) == config and json.loads(text)["method"] == name
        assert hash(config) == hash(Method.from_json(text))
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.threshold = 1  # pyright: ignore[reportAttributeAccessIssue]
    labels = [config.label() for config in registry.get(name).ladder()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", METHODS)
def test_methods_say_what_they_are(name: str) -> None:
    cls = registry.get(name)
    assert (
        cls.name == name and cls.citation.startswith("@") and cls.axes and cls.confidence in ("high", "medium", "low")
    )
    assert cls.seams <= {"step", "model", "block", "module", "attention"}
    assert cls.__doc__ and "Attributes:" in cls.__doc__ or "Attributes" in (cls.__doc__ or "")
    for field in dataclasses.fields(cls):
        documented = any(field.name in (base.__doc__ or "") for base in cls.__mro__)
        assert documented, f"{name}.{field.name} is not documented"
    assert name in str(dita.methods()) and name in dita.methods()._repr_html_()


def test_magcache_table_round_trips() -> None:
    table = MagnitudeTable({"cond/0": (1.0, 0.98), "uncond/0": (1.0, 1.02)}, "M:1", "S:2", (4, 8, 8))
    config = MagCache(threshold=0.1, table=table)
    assert Method.from_json(config.to_json()) == config
    broken = config.to_json().replace('"values"', '"value"')
    with pytest.raises(DitaError, match="not a table"):
        Method.from_json(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected JSON"),
        ('{"method": "nope", "schema": 1, "settings": {}}', "no method 'nope'"),
        ('{"method": "taylorseer", "schema": 99, "settings": {}}', "schema 99"),
        ('{"method": "taylorseer", "schema": 1, "settings": {"x": 1}}', "has no setting x"),
        ('{"method": "taylorseer", "schema": 1, "settings": {"interval": 0}}', "interval is 0"),
    ],
)
def test_from_json_refuses(text: str, message: str) -> None:
    with pytest.raises(DitaError, match=message):
        Method.from_json(text)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (TaylorSeer, {"interval": 2.5}), (TaylorSeer, {"order": 6}), (TaylorSeer, {"warmup": 0}),
        (TaylorSeer, {"granularity": "blocks"}), (TaylorSeer, {"basis": "fourier"}), (TaylorSeer, {"interval": True}),
        (DBCache, {"fn": 0}), (DBCache, {"bn": -1}), (DBCache, {"threshold": -0.1}), (DBCache, {"max_consecutive": -2}),
        (FirstBlockCache, {"threshold": math.nan}), (FirstBlockCache, {"threshold": math.inf}),
        (FirstBlockCache, {"threshold": "0.1"}), (BWCache, {"reuse": 1.1}), (BWCache, {"threshold": -1}),
        (MagCache, {"max_skip": -1}), (MagCache, {"retention": 2}), (MagCache, {"always": (-1,)}),
    ],
)  # fmt: skip
def test_settings_out_of_range(cls: type[Method], settings: dict[str, object]) -> None:
    with pytest.raises(DitaError, match="expected"):
        cls(**settings)


def test_register_refuses() -> None:
    def make(**attributes: object) -> type[Method]:
        return type("Sample", (TaylorSeer,), attributes)

    with pytest.raises(DitaError, match="is taken by TaylorSeer"):
        registry.register(make())
    with pytest.raises(DitaError, match="lower-case words"):
        registry.register(make(name="Sample Method"))
    with pytest.raises(DitaError, match="lacks citation"):
        registry.register(make(name="sample", citation=""))
    assert "sample" not in registry.names()


def test_supports_names_reasons() -> None:
    pipe = TINY["flux"].build()
    found = dita.supports(pipe)
    assert set(found.methods) == set(METHODS) and found.seams["block"] == (True, "6 blocks in 1 span(s)")
    assert found.methods["taylorseer"] == (True, "12 sites") and not found.methods["dbcache"][0]
    assert "ask for fewer" in found.methods["dbcache"][1] and not found
    assert dita.supports(pipe, "taylorseer") and dita.supports(pipe, DBCache(fn=2))
    unknown = dita.supports(nn.Sequential(nn.Linear(2, 2)))
    outside = {name for name in METHODS if registry.get(name).seams <= {"model", "step"}}
    supported = {name for name, (ok, _) in unknown.methods.items() if ok}
    assert supported - outside == {"autodiffusion"}, "without blocks to leave out it searches timesteps alone"
    refused = {name: unknown.methods[name][1] for name in outside - supported}
    assert set(refused) == {"ralu", "timestep-aligner"} and all("Sequential" in why for why in refused.values())
    assert "loops over no list of blocks" in str(unknown)


def test_unknown_models_are_refused_with_the_reason() -> None:
    pipe = TINY["dit"].build()

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, hidden_states: object) -> object:
            return hidden_states

    pipe.register_modules(transformer=Odd())
    with pytest.raises(
        DitaError, match="needs the block seam, which Odd does not offer: its forward loops over no list"
    ):
        dita.accelerate_pipeline(pipe, "fbcache")


def test_report_is_readable() -> None:
    tiny = TINY["wan"]
    pipe = dita.accelerate_pipeline(tiny.build(), TaylorSeer(interval=4, warmup=2))
    assert "no run yet" in str(dita.report(pipe)) and dita.report(pipe).last.records == []
    tiny.call(pipe)
    report = dita.report(pipe)
    run = report.last
    assert run.computed_steps == (0, 1, 5) and run.reused == 10 and run.computed_fraction == pytest.approx(3 / 8)
    assert "##~~~#~~" in str(report) and "10 of 16 transformer calls skipped" in str(report)
    assert all(record.seconds > 0 for record in run.records) and run.seconds > 0 and run.peak_cache_bytes > 0
    details = run.details().splitlines()
    assert len(details) == 17 and "forecast" in details[5] and details[5].endswith("interval 4")
    page = report._repr_html_()
    assert page.count("<td") == 16 and "interval 4" in page and "cond" in page
    for _ in range(25):
        pipe.scheduler.set_timesteps(4)
    assert len(dita.report(pipe).runs) <= 20


def test_report_shows_the_indicator() -> None:
    tiny = TINY["dit"]
    pipe = dita.accelerate_pipeline(tiny.build(), FirstBlockCache(threshold=1e9, max_consecutive=1))
    tiny.call(pipe)
    values = [r.value for r in dita.report(pipe).last.records]
    assert values[0] is None and values[1] is not None and values[1] > 0
