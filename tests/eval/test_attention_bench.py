"""`dita bench attention`: the gate catches wrong backends, and what it says of methods is what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import TINY
from typer.testing import CliRunner

from dita import registry
from dita.cli import app
from dita.errors import DitaError
from dita.eval import attention_timing
from dita.eval.attention_recall import capture, judge, recall
from dita.eval.attention_report import sparse_methods
from dita.eval.attention_timing import random_plan, time_attention
from dita.kernels.block_sparse import block_sparse_attention
from dita.kernels.plan import BlockPlan
from dita.kernels.sparse import AdaSpa
from dita.kernels.sparse.re_ttention import ReTtention
from dita.kernels.sparse.vmoba import VMoBA


def test_rows_have_their_density_and_a_ratio_of_one_run() -> None:
    rows = time_attention([256, 300], [0.5, 0.2], ["fp32"], ["gather", "naive"], 64, 2, 16, repeats=2)
    assert [(row["backend"], row["tokens"]) for row in rows[:4]] == [("gather", 256), ("naive", 256)] * 2
    assert [row["density"] for row in rows[:4]] == [0.5, 0.5, 0.25, 0.25], "at least one block of four"
    assert all(row["slowest"] <= row["speedup"] <= row["fastest"] and row["error"] < 2e-5 for row in rows)
    assert rows[0]["target"] == 1.5 and rows[4]["density"] < 0.6, "a ragged last block counts by its tokens"


def test_a_wrong_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention_timing.block_sparse_attention

    def broken(*args: Any, **kwargs: Any) -> Any:
        out, lse = original(*args, **kwargs)
        return out * 1.001, lse

    monkeypatch.setattr(attention_timing, "block_sparse_attention", broken)
    with pytest.raises(DitaError, match="gather backend in fp32 is .* off the oracle"):
        time_attention([256], [0.5], backends=["gather"], block=64)
    with pytest.raises(DitaError, match="unknown dtypes int8"):
        time_attention([256], [0.5], ["int8"])


def test_random_plans_keep_the_diagonal_and_differ_by_head() -> None:
    mask = random_plan(512, 3, 64, 0.25).mask(8)
    assert mask.sum(-1).unique().tolist() == [2] and mask.diagonal(dim1=-2, dim2=-1).all()
    assert not torch.equal(mask[:, 0], mask[:, 1])


def test_capture_sees_what_the_model_attends_to() -> None:
    tiny = TINY["wan"]
    pipe = tiny.build()
    plain = tiny.call(pipe)
    outputs: list[torch.Tensor] = []
    captured = capture(pipe, lambda p: outputs.append(tiny.call(p)), [3, 4], [0, 2])
    assert torch.equal(outputs[0], plain) and torch.equal(tiny.call(pipe), plain), "nothing changes, nothing stays"
    assert sorted(captured) == [(0, 3), (0, 4), (2, 3), (2, 4)]
    calls: list[int] = []
    again = capture(pipe, lambda p: calls.append(len(tiny.call(p))), [3, 4], [0, 2], stop=True)
    assert not calls and all(torch.equal(again[key].seen.q, captured[key].seen.q) for key in captured)
    assert torch.equal(tiny.call(pipe), plain)
    one = captured[2, 3]
    assert one.layout.tokens == one.seen.q.shape[2] == one.layout.visual and one.layers == 4 and one.steps == 8
    with pytest.raises(DitaError, match="ask for others"):
        capture(pipe, tiny.call, [50], [0])
    with pytest.raises(DitaError, match="two steps that follow"):
        judge(AdaSpa(), pipe, {key: value for key, value in captured.items() if key[1] == 3})
    everything = judge(AdaSpa(density=1.0), pipe, captured)
    assert everything == {"density": 1.0, "recall": 1.0, "error": 0.0}
    half, less = (judge(AdaSpa(density=density, block=4), pipe, captured) for density in (0.5, 0.2))
    assert 0.2 <= less["density"] < half["density"] < 1 and 0 < less["recall"] < half["recall"] < 1  # pyright: ignore
    assert less["error"] > half["error"] > 0  # pyright: ignore
    # The mass of a plan, from the attention map itself.
    tokens = one.layout.tokens
    mask = torch.rand(1, 1, -(-tokens // 4), -(-tokens // 4), generator=torch.Generator().manual_seed(0)) < 0.5
    seen = mask.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., :tokens, :tokens]
    attention = (one.seen.q @ one.seen.k.mT / one.seen.q.shape[-1] ** 0.5).softmax(-1)
    expected = float((attention * seen).sum(-1).mean())
    _, lse = block_sparse_attention(one.seen.q, one.seen.k, one.seen.v, BlockPlan.of_mask(mask, 4, 4))
    assert recall(one, lse) == pytest.approx(expected, rel=1e-4)
    for method in (VMoBA(threshold=0.2, parts=2, columns=(2, 2), boxes=(2, 2, 2), block=4), ReTtention(0.3, block=4)):
        found = judge(method, pipe, captured)
        assert 0 < found["density"] < found["recall"] < 1, method  # pyright: ignore


@pytest.mark.parametrize("family", ["hunyuan", "cogvideox"])
def test_every_policy_is_judged_where_text_is_among_the_tokens(family: str) -> None:
    tiny = TINY[family]
    pipe = tiny.build()
    captured = capture(pipe, tiny.call, [2, 3], [1], stop=True)
    layout = captured[1, 3].layout
    assert 0 < layout.visual < layout.tokens == captured[1, 3].seen.q.shape[2]
    thinned = 0
    for name in sparse_methods():
        config = registry.get(name)()
        if config.needs_calibration:
            continue
        if name not in ("blade", "xattention"):  # whose blocks must hold more tokens than this
            config = config.replace(**{k: 4 for k in ("block", "block_q", "block_k") if hasattr(config, k)})
        found = judge(config, pipe, captured)  # pyright: ignore[reportArgumentType]
        density, kept, error = found["density"], found["recall"], found["error"]
        assert density is not None and 0 < density <= 1 and error is not None, name
        if density == 1:
            assert error < 1e-5, f"{name} keeps all and is not dense attention"
        else:
            thinned += 1
            assert 0 < error < 1, name
            assert kept is not None and density < kept < 1, f"{name} keeps less of the mass than blocks at random would"
    assert thinned >= 8


def test_only_sparse_methods_are_judged() -> None:
    assert "adaspa" in sparse_methods() and "taylorseer" not in sparse_methods()
    with pytest.raises(DitaError, match="taylorseer computes no part of the attention"):
        sparse_methods(["taylorseer"])


def test_the_command_writes_numbers_table_and_picture(tmp_path: Path) -> None:
    options = "--tokens 256 --densities 0.5,0.25 --dtypes fp32 --backends gather --model none --repeats 1 --threads 1"
    result = CliRunner().invoke(app, ["bench", "attention", "--out", str(tmp_path), "--block", "64", *options.split()])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "attention.json").read_text())
    assert [row["density"] for row in found["timing"]] == [0.5, 0.25] and found["threads"] == 1
    assert "| fp32 | 256 | 64 | 0.250 | gather |" in (tmp_path / "attention.md").read_text()
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    wrong = CliRunner().invoke(app, ["bench", "attention", "--tokens", "many"])
    assert wrong.exit_code == 2
