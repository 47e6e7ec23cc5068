"""Weights that are elsewhere, in another precision or quantised while a pipeline is accelerated.

There is no second device here, so weights wait on disk or on the meta device and are loaded to the CPU: a module whose
weights were not loaded computes nonsense or fails, and every load is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import plain
from pipelines import TINY

import dita
from dita.caching import DBCache, EasyCache, TaylorSeer

FLUX = TINY["flux"]
STEPS = 4
ENDS = DBCache(fn=1, bn=1, warmup=0, threshold=1e9)  # runs the first and the last of six blocks
TAYLOR = TaylorSeer(interval=2, warmup=1)
MODEL = EasyCache.forced()


def attached(offload: Callable[[Any], Any], method: Any, ours_first: bool) -> tuple[Any, Any]:
    pipe = FLUX.build()
    if ours_first:
        dita.accelerate_pipeline(pipe, method)
    told = offload(pipe)
    if not ours_first:
        dita.accelerate_pipeline(pipe, method)
    return pipe, told


def check(pipe: Any, method: Any) -> None:
    """What it gives is what the method gives without offload, and after it is off what the plain pipeline gives."""
    expected = FLUX.call(dita.accelerate_pipeline(FLUX.build(), method), steps=STEPS)
    torch.testing.assert_close(FLUX.call(pipe, steps=STEPS), expected, rtol=1e-4, atol=1e-4)
    assert dita.report(pipe).last.reused > 0


def check_plain(pipe: Any) -> None:
    dita.restore_pipeline(pipe)
    assert not any("_compiled_call_impl" in vars(module) for module in pipe.transformer.modules())
    torch.testing.assert_close(FLUX.call(pipe, steps=STEPS), plain("flux", steps=STEPS), rtol=1e-4, atol=1e-4)


def grouped(pipe: Any, folder: Path, **options: Any) -> list[Any]:
    """Offload groups of blocks to disk; the list grows with every group that is loaded."""
    loads: list[Any] = []
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_to_disk_path=str(folder), **options
    )
    groups = {}
    for module in pipe.transformer.modules():
        registry = vars(module).get("_diffusers_hook")
        hook = registry.get_hook("group_offloading") if registry is not None else None
        if hook is not None:
            groups[id(hook.group)] = hook.group
    for group in groups.values():

        def onload(group: Any = group, original: Callable[[], None] = group.onload_) -> None:
            loads.append(group.group_id)
            original()

        group.onload_ = onload
    return loads


@pytest.mark.parametrize("ours_first", [True, False], ids=["attach-first", "offload-first"])
@pytest.mark.parametrize(
    ("per_group", "expected"),
    # One more group holds what is outside of the blocks. Step 0 loads all; the others that one and the two ends.
    [(1, (6 + 1) + 3 * (2 + 1)), (2, (4 + 1) + 3 * (2 + 1))],
    ids=["each-block", "two-blocks"],
)
def test_a_skipped_block_costs_no_transfer(ours_first: bool, per_group: int, expected: int, tmp_path: Path) -> None:
    """In groups of two, the last block runs without the one that would have loaded its weights."""
    options = {"offload_type": "block_level", "num_blocks_per_group": per_group}
    pipe, loads = attached(lambda pipe: grouped(pipe, tmp_path, **options), ENDS, ours_first)
    check(pipe, ENDS)
    assert len(loads) == expected
    loads.clear()
    check_plain(pipe)
    assert len(loads) == STEPS * (6 // per_group + 1 + (per_group == 2))


def test_a_skipped_module_costs_no_transfer_leaf_by_leaf(tmp_path: Path) -> None:
    pipe, loads = attached(lambda pipe: grouped(pipe, tmp_path, offload_type="leaf_level"), TAYLOR, True)
    check(pipe, TAYLOR)
    skipping = len(loads)
    loads.clear()
    check_plain(pipe)
    assert skipping < 0.75 * len(loads)


def counted(holder: Any, loads: list[Any]) -> None:
    """Count the calls of accelerate's hook on a module."""
    original = holder._hf_hook.pre_forward

    def pre_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        loads.append(module)
        return original(module, *args, **kwargs)

    holder._hf_hook.pre_forward = pre_forward


def sequential(pipe: Any) -> list[Any]:
    """What enable_sequential_cpu_offload does to a model: weights on the meta device, loaded module by module."""
    from accelerate import cpu_offload

    loads: list[Any] = []
    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    for module in pipe.transformer.modules():
        if hasattr(module, "_hf_hook") and any(True for _ in module.parameters(recurse=False)):
            counted(module, loads)
    return loads


def whole(pipe: Any) -> list[Any]:
    """What enable_model_cpu_offload does to a model: it is moved as a whole when it is called."""
    from accelerate import cpu_offload_with_hook

    loads: list[Any] = []
    cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    counted(pipe.transformer, loads)
    return loads


def mapped(pipe: Any, folder: Path) -> list[Any]:
    """A device_map that leaves half of the blocks on disk."""
    from accelerate import dispatch_model

    loads: list[Any] = []
    names = [name for name, _ in pipe.transformer.named_children() if "blocks" not in name]
    names += [f"{kind}transformer_blocks.{n}" for kind in ("", "single_") for n in range(3)]
    on_disk = {"single_transformer_blocks.0", "single_transformer_blocks.1"}
    device_map: dict[str, Any] = {name: "disk" if name in on_disk else "cpu" for name in names}
    dispatch_model(
        pipe.transformer, device_map, main_device=torch.device("cpu"), offload_dir=str(folder), force_hooks=True
    )
    for module in pipe.transformer.single_transformer_blocks[:2].modules():
        if hasattr(module, "_hf_hook") and any(True for _ in module.parameters(recurse=False)):
            counted(module, loads)
    return loads


@pytest.mark.parametrize("ours_first", [True, False], ids=["attach-first", "offload-first"])
@pytest.mark.parametrize(("how", "method"), [(sequential, ENDS), (whole, MODEL)], ids=["sequential", "model"])
def test_offload_of_accelerate(how: Any, method: Any, ours_first: bool) -> None:
    pipe, loads = attached(how, method, ours_first)
    check(pipe, method)
    skipping = len(loads)
    loads.clear()
    check_plain(pipe)
    assert 0 < skipping < len(loads)


def test_blocks_that_a_device_map_leaves_on_disk(tmp_path: Path) -> None:
    pipe, loads = attached(lambda pipe: mapped(pipe, tmp_path), ENDS, False)
    check(pipe, ENDS)
    skipping = len(loads)
    loads.clear()
    check_plain(pipe)
    assert len(loads) == STEPS * skipping, "computed once, at the first step"


@pytest.mark.parametrize("ours_first", [True, False], ids=["attach-first", "casting-first"])
def test_layerwise_casting(ours_first: bool) -> None:
    """Weights are stored as float8 and computed with as float32."""

    def cast(pipe: Any) -> Any:
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        return pipe

    expected = FLUX.call(cast(FLUX.build()), steps=STEPS)
    reference = FLUX.call(dita.accelerate_pipeline(cast(FLUX.build()), TAYLOR), steps=STEPS)
    pipe, _ = attached(cast, TAYLOR, ours_first)
    assert torch.equal(FLUX.call(pipe, steps=STEPS), reference) and dita.report(pipe).last.reused == 2
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype is torch.float8_e4m3fn
    dita.restore_pipeline(pipe)
    assert torch.equal(FLUX.call(pipe, steps=STEPS), expected)


@pytest.mark.filterwarnings("ignore")
def test_torchao_weights_of_eight_bits() -> None:
    quantise = pytest.importorskip("torchao.quantization", reason="torchao is an optional dependency")

    def eight_bits(pipe: Any) -> Any:
        quantise.quantize_(pipe.transformer, quantise.Int8WeightOnlyConfig())
        return pipe

    expected = FLUX.call(eight_bits(FLUX.build()), steps=STEPS)
    reference = FLUX.call(dita.accelerate_pipeline(eight_bits(FLUX.build()), TAYLOR), steps=STEPS)
    assert not torch.equal(expected, plain("flux", steps=STEPS))
    for ours_first in (True, False):
        pipe, _ = attached(eight_bits, TAYLOR, ours_first)
        assert torch.equal(FLUX.call(pipe, steps=STEPS), reference) and dita.report(pipe).last.reused == 2
        dita.restore_pipeline(pipe)
        assert torch.equal(FLUX.call(pipe, steps=STEPS), expected)
