"""Calibration tables: the guidance they were measured under, files from before it was kept, and what does not fit."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from helpers import configured
from pipelines import TINY

import dita
from dita.caching.table import row_of
from dita.config import Method
from dita.errors import DitaError, DitaWarning
from dita.seams import Position


def run(tiny: str, method: Method) -> torch.Tensor:
    return TINY[tiny].call(dita.accelerate_pipeline(TINY[tiny].build(), method))


@pytest.mark.parametrize(("tiny", "guidance"), [("dit", "batched"), ("flux", "cond"), ("wan", "cond,uncond")])
def test_a_table_knows_the_guidance_it_was_measured_under(tiny: str, guidance: str) -> None:
    method: Any = configured("magcache", "forced", tiny)
    assert method.table.guidance == guidance
    if tiny == "dit":
        router: Any = configured("harmonica", "forced", tiny)
        assert router.table.guidance == guidance, "trained by a handler of its own"
    assert Method.from_json(method.to_json()) == method
    with warnings.catch_warnings():
        warnings.simplefilter("error", DitaWarning)
        expected = run(tiny, method)
    old = method.to_dict()
    del old["settings"]["table"]["guidance"]
    read: Any = Method.from_json(json.dumps(old))
    assert read.table.guidance == "" and read.table.values == method.table.values
    with warnings.catch_warnings():
        warnings.simplefilter("error", DitaWarning)
        assert torch.equal(run(tiny, read), expected)


def altered(method: Any, **changes: Any) -> Any:
    data = method.to_dict()
    data["settings"]["table"].update(changes)
    return Method.from_json(json.dumps(data))


def test_a_table_of_another_guidance_warns() -> None:
    with pytest.warns(DitaWarning, match=r"guidance uncond .now cond"):
        run("flux", altered(configured("magcache", "forced", "flux"), guidance="uncond"))
    with warnings.catch_warnings():  # what both branches had in one batch serves each of them
        warnings.simplefilter("error", DitaWarning)
        run("flux", altered(configured("magcache", "forced", "flux"), guidance="batched"))


def test_a_branch_without_corrections_says_so() -> None:
    method: Any = configured("cachequant", "forced", "wan")
    kept = {name: rows for name, rows in method.table.values.items() if "uncond" not in name}
    with pytest.warns(DitaWarning, match="none of uncond/0, which is reused as it is"):
        output = run("wan", altered(method, values=kept, guidance=""))
    assert not torch.equal(output, run("wan", method)), "the other branch was corrected"
    # The schedule alone has nothing to say about branches.
    with warnings.catch_warnings():
        warnings.simplefilter("error", DitaWarning)
        run("wan", altered(method, values=kept, guidance="").replace(affine=False))


def test_corrections_of_another_width_are_refused() -> None:
    method: Any = configured("cachequant", "forced", "dit")
    narrow = {
        name: tuple(tuple(channels[:-1] for channels in row) for row in rows) if ", " in name else rows
        for name, rows in method.table.values.items()
    }
    with pytest.raises(DitaError, match="corrects .* channels of .* which has"):
        run("dit", altered(method, values=narrow))


def test_a_stream_is_found_by_the_names_that_it_goes_by() -> None:
    def at(branch: str, stage: int = 0) -> Position:
        return Position(0, 9, stage, branch, 0, 9, 0)

    values = {"a site, call 0/0": 1, "a site, call 1/0": 2, "other, cond/1": 3}
    assert [row_of(values, at(name), "a site, ") for name in ("call 0", "cond", "pred_uncond", "neg")] == [1, 1, 2, 2]
    assert row_of(values, at("third"), "a site, ") is None and row_of(values, at("cond", 1), "a site, ") is None
    assert row_of(values, at("call 0", 1), "other, ") == 3
