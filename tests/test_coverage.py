"""Every transformer class of diffusers offers the seams that docs/coverage.md says, and how the odd ones are read."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import dita
from dita.anatomy import describe
from dita.attention_view import Attended, AttentionTaken
from dita.caching import EasyCache
from dita.discovery import block_entry
from dita.grid import token_grid
from dita.passage import flatten
from dita.session import transformers_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
coverage: Any = import_module("model_coverage")
Sampler: Any = import_module("tiny_models.sampling").Sampler
TINY_MODELS: dict[str, Any] = coverage.TINY_MODELS
PAGE = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
SAME = f"diffusers {diffusers.__version__} " in PAGE


def built(name: str) -> nn.Module:
    return getattr(diffusers, name)(**TINY_MODELS[name].config)


def test_no_class_is_unclassified() -> None:
    assert not coverage.unclassified(coverage.classes()), "add a tiny instance of it to benchmarks/tiny_models"


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_page_says_what_is_so(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    found = coverage.check(TINY_MODELS[name])
    # The page speaks of one version; what dita says of a class is tried on any.
    assert not SAME or coverage.row(found) in PAGE.splitlines(), f"run {coverage.COMMAND}"


def test_the_page_counts_its_rows() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| class")]
    counts = {seam: sum(r[3 + n] == "yes" for r in rows) for n, seam in enumerate(coverage.SEAMS)}
    assert f"defines {len(rows)} transformer classes" in PAGE
    assert ", ".join(f"{seam} on {count}" for seam, count in counts.items()) in PAGE
    assert min(counts["trunk"], counts["block"], counts["attention"]) >= 70 and len(rows) == len(TINY_MODELS)


def test_a_new_class_stops_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["model_coverage.py", "--write", str(tmp_path / "page.md")])
    monkeypatch.delitem(TINY_MODELS, "DiTTransformer2DModel")
    with pytest.raises(SystemExit, match="add a tiny instance .*: DiTTransformer2DModel"):
        coverage.main()
    assert not list(tmp_path.iterdir())


def test_what_is_no_denoiser_is_refused() -> None:
    sampler = Sampler(TINY_MODELS["MiniMaxMusic3RVQDepthDecoder"])
    before = dict(vars(sampler.transformer))
    with pytest.raises(dita.DitaError, match="transformer .MiniMaxMusic3RVQDepthDecoder. cannot .* no denoiser"):
        dita.accelerate_pipeline(sampler)
    assert vars(sampler.transformer) == before
    seams = dita.supports(sampler.transformer, "taylorseer").seams
    assert [seam for seam, (there, _) in seams.items() if there] == ["step"]


def test_priors_are_found_by_their_class() -> None:
    prior, scheduler = built("PriorTransformer"), object()
    pipe = SimpleNamespace(components={"prior": prior, "text_encoder": nn.Linear(1, 1)}, scheduler=scheduler)
    assert transformers_of(pipe) == {"prior": prior}
    with pytest.raises(dita.DitaError, match="no component named transformer; it holds prior"):
        transformers_of(SimpleNamespace(components={"prior": nn.Linear(1, 1)}, scheduler=scheduler))


@pytest.mark.parametrize(
    ("name", "lists", "spans"),
    [
        ("LatteTransformer3DModel", ["transformer_blocks", "temporal_transformer_blocks"] * 2, [1, 1, 1, 1]),
        ("HunyuanDiT2DModel", ["blocks"] * 4, [1, 1, 1, 1]),
        ("MotifVideoTransformer3DModel", ["transformer_blocks"] * 2 + ["single_transformer_blocks"] * 3, [4, 1]),
        ("Flux3Transformer2DModel", ["mode_blocks.image"] * 2 + ["single_transformer_blocks"] * 2, [2, 2]),
        ("Flux2Transformer2DModel", ["transformer_blocks"] * 2 + ["single_transformer_blocks"] * 2, [2, 2]),
        ("ZImageTransformer2DModel", ["layers"] * 3, [3]),
        ("Kandinsky5Transformer3DModel", ["visual_transformer_blocks"] * 3, [3]),
        ("Cosmos3OmniTransformer", ["layers"] * 3, [3]),
    ],
)
def test_blocks_are_cut_where_their_streams_change(name: str, lists: list[str], spans: list[int]) -> None:
    """As the forward of each runs them: in turn, with skips from block to block, with streams that begin again, ..."""
    anatomy = describe(built(name))
    assert [block.path.rpartition(".")[0] for block in anatomy.blocks] == lists
    assert [span.last - span.first + 1 for span in anatomy.segments] == spans


def test_roles_of_attention_are_read_off_names_and_arguments() -> None:
    def roles(name: str) -> dict[str, str]:
        first = [part.site for part in describe(built(name)).modules if part.site.block == 0]
        return {s.name.split(".", 2)[2]: ("text " if s.text else "") + s.role for s in first}

    assert roles("LTX2VideoTransformer3DModel") == {
        "attn1": "attention", "audio_attn1": "text attention", "attn2": "cross-attention",
        "audio_attn2": "text cross-attention", "audio_to_video_attn": "cross-attention",
        "video_to_audio_attn": "cross-attention", "ff": "mlp", "audio_ff": "text mlp",
    }  # fmt: skip
    assert roles("OmniGenTransformer2DModel") == {"self_attn": "attention", "mlp": "mlp"}
    assert roles("T5FilmDecoder") == {
        "layer.0.attention": "attention", "layer.1.attention": "cross-attention", "layer.2.DenseReluDense": "mlp",
    }  # fmt: skip
    assert roles("HiDreamImageTransformer2DModel") == {
        "block.attn1": "attention", "block.ff_i": "mlp", "block.ff_t": "text mlp",
    }  # fmt: skip


class Inner(nn.Module):
    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        return encoder_hidden_states, hidden_states


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        return self.inner(hidden_states, encoder_hidden_states)


class Wrapped(nn.Module):
    def forward(self, y: torch.Tensor) -> Any:
        return (y + 1,)


def test_blocks_that_hand_on_or_wrap_what_they_return() -> None:
    assert block_entry(Outer())[0] == block_entry(Inner())[0]
    entry = block_entry(Wrapped())[0]
    assert entry is not None and entry.wrapped and entry.hidden == "y"


def test_every_tensor_of_an_output_is_forecast() -> None:
    whole = AudioVisualModelOutput(sample=torch.ones(1), audio_sample=torch.zeros(2))
    features, rebuild = flatten(whole)
    again = rebuild(tuple(2 * t for t in features if t is not None))
    assert len(features) == 2 and type(again) is type(whole) and again.sample.item() == 2
    nested, rebuild = flatten(([torch.ones(1), torch.ones(2)], "kept"))
    assert rebuild(nested)[1] == "kept" and [t.shape[0] for t in rebuild(nested)[0]] == [1, 2]
    batch, rebuild = flatten(Transformer2DModelOutput(sample=[torch.ones(3), torch.zeros(3)]))  # pyright: ignore
    assert [tuple(t.shape) for t in batch if t is not None] == [(2, 3)]
    assert [t.tolist() for t in rebuild(batch).sample] == [[1.0] * 3, [0.0] * 3]
    with pytest.raises(dita.DitaError, match="returned dict"):
        flatten({"sample": 1})


@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "LTX2VideoTransformer3DModel", "ZImageTransformer2DModel"])
def test_the_change_of_the_latents_is_reused_whatever_the_output_holds(name: str) -> None:
    """One with an empty field, one with sound beside the film, one with a list of samples in place of a batch."""
    sampler = Sampler(TINY_MODELS[name])
    plain = sampler(5)
    with dita.accelerated(sampler, EasyCache.forced()):
        output, run = sampler(5), dita.report(sampler).last
    assert 0 < run.reused < 5 and output.isfinite().all() and not torch.equal(output, plain)


def test_grid_of_numbered_tokens() -> None:
    ids = torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0), torch.arange(4.0), torch.zeros(1))
    assert token_grid(None, {"img_ids": ids}, torch.zeros(1, 24, 8)) == (2, 3, 4)


def test_a_module_that_needs_more_than_its_tokens_is_not_row_wise() -> None:
    parts = {part.site.name: part for part in describe(built("RFD4ProteinaTransformer")).modules}
    assert not parts["transformer_layers.0.transition"].row_wise
    parts = {part.site.name: part for part in describe(built("WanTransformer3DModel")).modules}
    assert parts["blocks.0.ffn"].row_wise


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention_is_answered_too(masked: bool) -> None:
    q, k, v = (torch.randn(2, 2, 128, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu") if masked else None
    seen: list[Attended] = []

    def look(given: Attended, plain: Any) -> torch.Tensor:
        seen.append(given)
        return plain(given)

    with torch.no_grad():
        expected = flex_attention(q, k, v, block_mask=causal)
    with torch.no_grad(), AttentionTaken(look, flex=True):
        output = flex_attention(q, k, v, block_mask=causal)
    assert torch.equal(output, expected) and len(seen) == 1
    torch.testing.assert_close(seen[0].attend(), expected)
    assert (seen[0].mask is not None) == masked and seen[0].key_mask is None


def test_masks_that_are_the_same_for_all_queries() -> None:
    q, keys = torch.zeros(2, 3, 4, 8), torch.tensor([[True, True, False, True], [True, False, False, False]])
    row = keys[:, None, None]
    assert torch.equal(Attended(q, q, q, row.expand(2, 3, 4, 4)).key_mask, keys)  # pyright: ignore
    both = row & keys[:, None, :, None]  # padding queries see nothing
    assert torch.equal(Attended(q, q, q, both).key_mask, keys)  # pyright: ignore
    assert Attended(q, q, q, torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4)).key_mask is None
    assert Attended(q, q, q, row * 1.0).key_mask is None
