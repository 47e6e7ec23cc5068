"""The benchmarks' own logic: what they compare with must be what they say."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import TINY

from dita.anatomy import describe
from dita.kernels import block_sparse_cpu
from dita.kernels.block_sparse import block_sparse_attention
from dita.kernels.plan import BlockPlan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
ideal = import_module("step_ideal").ideal
backends = import_module("backend_table")


def arguments(tiny: str) -> tuple[Any, Any, Any]:
    """A transformer and the arguments of one call of it."""
    pipe = TINY[tiny].build()
    calls: list[Any] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    TINY[tiny].call(pipe, steps=2)
    hook.remove()
    return pipe.transformer, *calls[-1]


@pytest.mark.parametrize("tiny", ["dit", "flux", "wan"])
@torch.no_grad()
def test_the_ideal_runs_what_is_left_and_nothing_else(tiny: str) -> None:
    model, args, kwargs = arguments(tiny)
    anatomy = describe(model)
    whole = model(*args, **kwargs)[0]
    assert torch.equal(ideal(model, (), args, kwargs)(*args, **kwargs)[0], whole)
    last = len(anatomy.blocks) - 1
    for skipped, left in (((anatomy.span(1, last),), 1), ((anatomy.span(0, last),), 0)):
        slim = ideal(model, skipped, args, kwargs)
        ran: list[int] = []
        for block in describe(slim).blocks:
            if type(block.module) is type(anatomy.blocks[block.number].module):
                block.module.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        output = slim(*args, **kwargs)[0]
        assert output.shape == whole.shape and not torch.equal(output, whole) and len(ran) == left
    sites = [part.site for part in anatomy.modules]
    slim = ideal(model, sites, args, kwargs)
    assert sum(p.numel() for p in slim.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    # What lies ready are the outputs of this very call, so that nothing is lost.
    torch.testing.assert_close(slim(*args, **kwargs)[0], whole)


def test_what_auto_takes_on_a_cpu_is_what_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    found = backends.cells()
    page = (backends.ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    assert len(found) >= 6 and backends.written(page, backends.table(found)) == page
    taken: list[str] = []
    for name in ("gather", "flex"):
        attend = getattr(block_sparse_cpu, f"{name}_attention")
        noted = lambda *given, name=name, attend=attend: taken.append(name) or attend(*given)  # noqa: E731
        monkeypatch.setattr(block_sparse_cpu, f"{name}_attention", noted)
    q = torch.zeros(1, 1, 32, 16)
    plan = BlockPlan.of_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, 16)
    block_sparse_attention(q, q, q, plan, need_lse=False)
    assert taken == [max(backends.means(found).items(), key=lambda mean: mean[1])[0]]


def test_runs_of_the_fitted_benchmark_are_put_together(tmp_path: Path) -> None:
    fitted = import_module("fitted")
    head = {"model": "m", "samples": 1, "calibration": 1, "steps": 9, "device": "d", "code": "c"}

    def row(full: int, psnr: float) -> dict[str, Any]:
        return {"variant": "v", "full": full, "computed": full, "psnr": psnr, "low": psnr, "high": psnr}

    fitted.write(tmp_path / "a", head, {"budgets": [row(4, 30.0), row(5, 31.0)]})
    fitted.write(tmp_path / "b", {**head, "device": "e"}, {"budgets": [row(5, 32.0)], "gate": [row(4, 33.0)]})
    fitted.join([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    written = (tmp_path / "c" / "results.md").read_text()
    assert (
        "| v | 30.0 (30.0 to 30.0) | 32.0 (32.0 to 32.0) |" in written and "33.0" in written and "31.0" not in written
    )
    assert '"device": "d; e"' in (tmp_path / "c" / "results.json").read_text()
    fitted.write(tmp_path / "a", {**head, "steps": 8}, {})
    with pytest.raises(SystemExit, match="different"):
        fitted.join([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
