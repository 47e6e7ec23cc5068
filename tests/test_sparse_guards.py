"""Dense first steps and layers, which every sparse method shares, and when AdaSpa searches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import Setting, build

from dita import registry
from dita.anatomy import Anatomy, describe
from dita.kernels.guards import steps_of
from dita.kernels.sparse.adaspa import AdaSpa
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Layout
from dita.kernels.sparse.policy import Asked, Policy

SPARSE = tuple(name for name in registry.names() if issubclass(registry.get(name), SparseMethod))
LAYOUT, HEADS, LAYERS, STEPS = Layout((3, 4, 4)), 2, 3, 10


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return describe(build("wan").transformer)


def ask(step: int, layer: int, state: dict[str, Any], dense: list[int]) -> Asked:
    """Random queries, keys and values; dense attention is noted in the list."""
    make = torch.Generator().manual_seed(step)
    q, k, v = (torch.randn(1, HEADS, LAYOUT.tokens, 12, generator=make) for _ in range(3))

    def plain() -> torch.Tensor:
        dense.append(step)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return Asked(q, k, v, 12**-0.5, None, LAYOUT, layer, LAYERS, step, STEPS, state, plain)


def policy_of(method: Any, anatomy: Anatomy) -> Policy:
    return method.handler(anatomy).policy


@pytest.mark.parametrize("name", SPARSE)
def test_first_steps_and_layers_are_dense(name: str, anatomy: Anatomy) -> None:
    policy = policy_of(Setting(name).config("wan").replace(dense_steps=0.15, dense_layers=1), anatomy)
    for layer in (0, 1):
        state: dict[str, Any] = {}
        for step in range(5):
            dense: list[int] = []
            asked = ask(step, layer, state, dense)
            out = policy.attend(asked)
            assert out.shape == asked.q.shape and out.isfinite().all()
            if step < 2 or layer == 0:
                exact = torch.nn.functional.scaled_dot_product_attention(asked.q, asked.k, asked.v)
                torch.testing.assert_close(out, exact)
                assert asked.density == 1 and asked.reason == (
                    "dense warm-up step" if step < 2 else "dense first layers"
                )
        assert (asked.density < 1) == bool(layer), "step 4"  # pyright: ignore[reportPossiblyUnbound]


@pytest.mark.parametrize(
    ("search", "dense", "found"),
    [((0.2, 0.6), 0.2, [2, 6]), ((0.1, 0.6), 0.2, [2, 6]), ((0.4, 0.6), 0.2, [2, 4, 6]), ((), 0.5, [5])],
)
def test_adaspa_searches_first_where_the_dense_steps_end(
    search: tuple[float, ...], dense: float, found: list[int], anatomy: Anatomy
) -> None:
    policy = policy_of(AdaSpa(density=0.4, block=8, search=search, dense_steps=dense, cutoff=1.0), anatomy)
    state: dict[str, Any] = {}
    plans: list[tuple[int, Any]] = []
    for step in range(STEPS):
        asked = ask(step, 1, state, [])
        policy.attend(asked)
        assert (asked.density < 1) == (step > found[0])
        plan = state.get("plan", (0, None))[1]
        if plan is not None and (not plans or plan is not plans[-1][1]):
            plans.append((step, plan))
    assert [step for step, _ in plans] == found


def test_a_part_of_a_run_counts_a_step_that_is_cut() -> None:
    assert [steps_of(part, 10) for part in (0, 0.1, 0.11, 0.3, 1)] == [0, 1, 2, 3, 10]
