"""What users do to a pipeline while it is accelerated: callbacks, moving, copying, saving, exchanging its parts."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from helpers import plain
from pipelines import TINY

import dita
from dita.caching import EasyCache, FirstBlockCache, TaylorSeer
from dita.errors import DitaError
from dita.kernels.sparse import AdaSpa

FLUX, DIT, SD3 = TINY["flux"], TINY["dit"], TINY["sd3"]
TAYLOR = TaylorSeer(interval=2, warmup=1)


def actions(pipe: Any) -> list[str]:
    return [record.action for record in dita.report(pipe).last.records]


def test_a_gate_sees_latents_that_a_callback_changes() -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": tensors["latents"].flip(-1) * 3} if step == 3 else tensors

    pipe = dita.accelerate_pipeline(SD3.build(), FirstBlockCache.disabled())
    assert torch.equal(SD3.call(pipe, callback_on_step_end=change), SD3.call(SD3.build(), callback_on_step_end=change))
    dita.accelerate_pipeline(pipe, FirstBlockCache(threshold=0.5))
    quiet = SD3.call(pipe)
    before = actions(pipe)
    changed = SD3.call(pipe, callback_on_step_end=change)
    assert before[4] == "reused" and actions(pipe)[:5] == [*before[:4], "computed"]
    assert not torch.equal(changed, quiet) and torch.equal(SD3.call(pipe), quiet)


def test_interrupts_and_errors_in_a_callback_leave_the_next_run_clean() -> None:
    pipe = dita.accelerate_pipeline(FLUX.build(), TAYLOR)
    first = FLUX.call(pipe)

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return tensors

    def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            raise KeyError("the preview server is down")
        return tensors

    FLUX.call(pipe, seed=3, callback_on_step_end=interrupt)
    assert len(dita.report(pipe).last.records) == 3 and not dita.report(pipe).last.finished
    assert torch.equal(FLUX.call(pipe), first)
    with pytest.raises(KeyError, match="preview"):
        FLUX.call(pipe, seed=3, callback_on_step_end=fail)
    assert torch.equal(FLUX.call(pipe), first)
    assert [run.finished for run in dita.report(pipe).runs] == [True, False, True, False, True]
    dita.restore_pipeline(pipe)
    assert torch.equal(FLUX.call(pipe), plain("flux"))


def test_moved_to_another_precision_and_back() -> None:
    pipe, reference = dita.accelerate_pipeline(DIT.build(), TAYLOR), DIT.build()
    DIT.call(pipe)
    for dtype in (torch.bfloat16, torch.float32):
        pipe.to(dtype)
        reference.to(dtype)
        with dita.accelerated(reference, TAYLOR):
            assert torch.equal(DIT.call(pipe), DIT.call(reference)) and dita.report(pipe).last.reused == 4
    dita.restore_pipeline(pipe)
    assert torch.equal(DIT.call(pipe), DIT.call(reference)) and pipe.dtype is torch.float32


def test_saved_files_are_those_of_the_plain_pipeline(tmp_path: Path) -> None:
    def saved(pipe: Any, name: str) -> dict[str, str]:
        pipe.save_pretrained(tmp_path / name)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        return {str(p.relative_to(tmp_path / name)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    pipe = DIT.build()
    before = saved(pipe, "plain")
    DIT.call(dita.accelerate_pipeline(pipe, TAYLOR))
    assert saved(pipe, "accelerated") == before and len(before) >= 5
    DIT.call(pipe)
    assert dita.report(pipe).last.reused == 4
    assert torch.equal(DIT.call(type(pipe).from_pretrained(tmp_path / "accelerated")), plain("dit"))


def test_a_pickled_pipeline_is_plain() -> None:
    pipe = dita.accelerate_pipeline(DIT.build(), TAYLOR)
    fast = DIT.call(pipe)
    twin = pickle.loads(pickle.dumps(pipe))
    assert torch.equal(DIT.call(twin), plain("dit"))
    with pytest.raises(DitaError, match="not accelerated"):
        dita.report(twin)
    assert torch.equal(DIT.call(dita.accelerate_pipeline(twin, TAYLOR)), fast) and torch.equal(DIT.call(pipe), fast)
    assert torch.equal(DIT.call(dita.restore_pipeline(twin)), plain("dit"))


def test_a_pipeline_made_of_an_accelerated_one_shares_what_is_attached() -> None:
    pipe = dita.accelerate_pipeline(FLUX.build(), TAYLOR)
    first = FLUX.call(pipe)
    other: Any = FluxImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    call = TINY["flux-img2img"].call
    expected = dita.accelerate_pipeline(TINY["flux-img2img"].build(), TAYLOR)
    assert torch.equal(call(other), call(expected)) and dita.report(pipe).last.steps == 6
    with pytest.raises(DitaError, match="shared with a FluxPipeline that is already accelerated"):
        dita.accelerate_pipeline(other, EasyCache())
    assert torch.equal(FLUX.call(pipe), first)
    dita.restore_pipeline(pipe)
    assert torch.equal(call(other), plain("flux-img2img")) and torch.equal(FLUX.call(pipe), plain("flux"))


def test_an_exchanged_transformer_is_followed() -> None:
    pipe = dita.accelerate_pipeline(FLUX.build(), TAYLOR)
    first, old = FLUX.call(pipe), pipe.transformer
    keys = {name: set(vars(module)) for name, module in FLUX.build().transformer.named_modules()}
    pipe.transformer = FLUX.build().transformer
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(2)
    second = FLUX.call(pipe)
    assert not torch.equal(second, first) and dita.report(pipe).last.reused == 4
    assert all(set(vars(m)) - {"_diffusers_hook"} <= keys[name] for name, m in old.named_modules()), "nothing stays"
    pipe.transformer = TINY["wan"].build().transformer.blocks  # no transformer at all
    with pytest.raises(DitaError, match="ModuleList"):
        pipe.scheduler.set_timesteps(4)
    pipe.transformer = old
    assert torch.equal(FLUX.call(pipe), first)
    dita.restore_pipeline(pipe)
    assert torch.equal(FLUX.call(pipe), plain("flux")) and "_dita_owner" not in vars(old)


@pytest.mark.parametrize("method", [TAYLOR, AdaSpa.forced()], ids=lambda method: method.name)
def test_projections_fused_and_taken_apart_again(method: Any) -> None:
    fused = FLUX.build()
    fused.transformer.fuse_qkv_projections()
    expected = FLUX.call(fused, steps=4)
    accelerated = FLUX.call(dita.accelerate_pipeline(fused, method), steps=4)
    pipe = dita.accelerate_pipeline(FLUX.build(), method)
    FLUX.call(pipe, steps=4)
    pipe.transformer.fuse_qkv_projections()
    assert torch.equal(FLUX.call(pipe, steps=4), accelerated) and dita.report(pipe).last.reused > 0
    dita.restore_pipeline(pipe)
    assert torch.equal(FLUX.call(pipe, steps=4), expected)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(FLUX.call(pipe, steps=4), plain("flux", steps=4))


@pytest.fixture
def backend() -> Any:
    """The module that holds the backends of attention, whose choice is a global one."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield registry
    registry._active_backend = before


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", ["_native_math", "flex"])
def test_methods_on_attention_work_with_backends_that_can_be_seen(name: str, backend: Any) -> None:
    expected = FLUX.call(dita.accelerate_pipeline(FLUX.build(), AdaSpa.forced()), steps=3)
    pipe = dita.accelerate_pipeline(FLUX.build(), AdaSpa.forced())
    pipe.transformer.set_attention_backend(name)
    torch.testing.assert_close(FLUX.call(pipe, steps=3), expected, rtol=1e-3, atol=1e-3)
    assert any(record.density < 1 for record in dita.report(pipe).last.records)
    dita.restore_pipeline(pipe)
    pipe.transformer.reset_attention_backend()


def test_a_backend_that_hides_attention_is_refused(backend: Any) -> None:
    pipe = FLUX.build()
    for module in pipe.transformer.modules():  # its library is not installed here
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = "sage"
    with pytest.raises(DitaError, match="attends by the backend 'sage', whose kernel nobody can stand in for"):
        dita.accelerate_pipeline(pipe, AdaSpa())
    assert "_dita_session" not in vars(pipe)
    dita.accelerate_pipeline(pipe, TAYLOR)
