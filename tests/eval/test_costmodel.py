from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dita.errors import DitaError
from dita.eval.costmodel import CostModel, ModelShape, flop_parts, step_flops, tokens
from dita.eval.flops import count_flops

TEXT, TEXT_WIDTH, POOLED = 7, 24, 20
ROOT = Path(__file__).resolve().parents[2]

# Tokens and seconds of a pass of the Wan of benchmarks/cost_model.py, with 64 text tokens: processor time in float32,
# one thread on a 2.5 GHz Xeon, torch 2.14.1, least of ten.
MEASURED = {64: 0.0197, 128: 0.0278, 288: 0.0500, 432: 0.0728, 768: 0.1317, 1280: 0.2420, 2000: 0.4430, 4032: 1.3424}


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def build_dit(**options: Any) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        **options,
    )


def build_pixart(extra: bool) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_size=8,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=extra,
    )


def build_wan(**options: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=40,
        ffn_dim=72,
        num_layers=3,
        rope_max_seq_len=32,
        **options,
    )


def build_flux(guidance: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )


def build_sd3(dual: tuple[int, ...]) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=16,
        dual_attention_layers=dual,
    )


def call(model: Any, batch: int, frames: int, height: int, width: int) -> dict[str, Any]:
    """Arguments of one forward on a latent of `frames` x `height` x `width`."""
    square, text, step = zeros(batch, 4, height, width), zeros(batch, TEXT, TEXT_WIDTH), zeros(batch)
    if isinstance(model, DiTTransformer2DModel):
        return {"hidden_states": square, "timestep": step.long(), "class_labels": step.long()}
    if isinstance(model, WanTransformer3DModel):
        return {
            "hidden_states": zeros(batch, 4, frames, height, width),
            "timestep": step,
            "encoder_hidden_states": text,
        }
    if isinstance(model, PixArtTransformer2DModel):
        sizes = {"resolution": zeros(batch, 2), "aspect_ratio": zeros(batch, 1)}
        conditions = sizes if model.use_additional_conditions else {"resolution": None, "aspect_ratio": None}
        return {
            "hidden_states": square,
            "timestep": step,
            "encoder_hidden_states": text,
            "added_cond_kwargs": conditions,
        }
    arguments = {"encoder_hidden_states": text, "pooled_projections": zeros(batch, POOLED), "timestep": step}
    if isinstance(model, SD3Transformer2DModel):
        return {"hidden_states": square, **arguments}
    count = height * width // 4
    ids = {"img_ids": zeros(count, 3), "txt_ids": zeros(TEXT, 3)}
    guidance = step if model.config["guidance_embeds"] else None
    return {"hidden_states": zeros(batch, count, 16), "guidance": guidance, **ids, **arguments}


MODELS = [
    pytest.param(build_dit, id="dit"),
    pytest.param(lambda: build_flux(True), id="flux-guidance"),
    pytest.param(lambda: build_flux(False), id="flux"),
    pytest.param(build_wan, id="wan"),
    pytest.param(lambda: build_pixart(True), id="pixart-sizes"),
    pytest.param(lambda: build_pixart(False), id="pixart"),
    pytest.param(lambda: build_sd3(()), id="sd3"),
    pytest.param(lambda: build_sd3((0, 1)), id="sd35"),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(1, 8, 8), (2, 12, 12)], ids=["small", "large"])
@pytest.mark.parametrize("build", MODELS)
def test_count_equals_torchs_counter_exactly(build, size, batch):
    model = build().eval()
    arguments = call(model, batch, *size)
    shape = ModelShape.of(model)
    frames, height, width = size if isinstance(model, WanTransformer3DModel) else (1, *size[1:])
    count = tokens(8 * height, 8 * width, 4 * (frames - 1) + 1, shape.patch)
    text = 0 if shape.kind == "dit" else TEXT
    # Attention as plain matrix products, which torch's counter knows on a CPU too.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**arguments)
    assert step_flops(shape, count, text, guidance_calls=1, batch=batch) == counter.get_total_flops()


def test_count_equals_what_dita_counts_in_the_fused_kernel():
    model = build_wan().eval()
    arguments = call(model, 2, 3, 8, 8)
    with torch.no_grad():
        counted = count_flops(lambda: model(**arguments))[0]
    assert step_flops(ModelShape.of(model), 48, TEXT, guidance_calls=1, batch=2) == counted


def test_shape_is_read_off_a_model_without_weights():
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    shape = ModelShape.of(model)
    assert (shape.layers, shape.width, shape.heads, shape.ffn_width) == (57, 3072, 24, 12288)
    parts = flop_parts(shape, tokens(1024, 1024, patch=shape.patch), 512, guidance_calls=1)
    assert parts["projections"] + parts["mlp"] == 24 * 57 * (4096 + 512) * 3072**2
    assert parts["attention"] == 4 * 57 * (4096 + 512) ** 2 * 3072
    # Two streams of 19 blocks and one of 38, and all that sees vectors, embeds or unembeds, are all of its 12 billion.
    weights = 12 * (38 + 2 * 19) * 3072**2 + shape.vector_weights + 3072 * (64 + 64 + shape.text_width)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize("kind", ["dit", "cross", "joint"])
def test_parts_by_hand(kind):
    text = 0 if kind == "dit" else 5
    shape = ModelShape(kind, 2, 8, 2, 24, 3, 4, text_width=10 if text else 0, vector_weights=100)
    parts = flop_parts(shape, 6, text, guidance_calls=1)
    count = 11 if kind == "joint" else 6
    assert parts["projections"] == 2 * 4 * 2 * count * 8 * 8
    assert parts["attention"] == 2 * 2 * 2 * count * count * 8
    assert parts["mlp"] == 2 * 2 * 2 * count * 8 * 24
    cross = 2 * (2 * 6 * 8 * 8 * 2 + 2 * 5 * 8 * 8 * 2 + 2 * 2 * 6 * 5 * 8)
    assert parts["cross"] == (cross if kind == "cross" else 0)
    assert parts["embedding"] == 2 * (6 * 3 * 8 + 6 * 8 * 4 + text * 10 * 8 + 100)


def test_density_thins_only_the_products_of_self_attention():
    shape = ModelShape.of(build_wan())
    whole, sparse = (flop_parts(shape, 4096, TEXT, density) for density in (1.0, 0.25))
    assert sparse["attention"] == whole["attention"] / 4
    assert {**sparse, "attention": 0} == {**whole, "attention": 0}


def test_attention_takes_over_as_tokens_grow():
    shape = ModelShape.of(build_wan())
    per_token = [step_flops(shape, count, TEXT) / count for count in (64, 256, 1024, 4096)]
    assert per_token[-1] > 10 * per_token[0]
    dense = [sum(v for k, v in flop_parts(shape, n, TEXT).items() if k != "attention") / n for n in (256, 4096)]
    assert dense[1] < dense[0]


def test_guidance_and_batch_multiply():
    shape = ModelShape.of(build_dit())
    one = step_flops(shape, 16, guidance_calls=1)
    assert step_flops(shape, 16) == 2 * one
    assert step_flops(shape, 16, guidance_calls=1, batch=5) == 5 * one


def test_tokens_of_published_sizes():
    assert tokens(256, 256) == 256
    assert tokens(1024, 1024, vae=(1, 16), patch=(1, 1, 1)) == 4096
    assert tokens(720, 1280, 81) == 75_600
    assert tokens(64, 64, 5, patch=(2, 2, 2)) == 16
    for size in ((500, 832, 81), (480, 832, 80), (480, 832, 0), (480, 840, 81)):
        with pytest.raises(DitaError, match="whole tokens"):
            tokens(*size)
    with pytest.raises(DitaError, match="whole tokens"):
        tokens(64, 64, 9, patch=(2, 2, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(lambda: build_dit(activation_fn="geglu"), "activation_fn.*geglu", id="gated"),
        pytest.param(lambda: build_wan(image_dim=8, added_kv_proj_dim=32), "added_kv_proj_dim", id="image-to-video"),
        pytest.param(
            lambda: QwenImageTransformer2DModel(
                in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=1, axes_dims_rope=(4, 6, 6)
            ),
            "QwenImageTransformer2DModel are not modelled",
            id="class",
        ),
        pytest.param(lambda: torch.nn.Linear(2, 2), "Linear are not modelled", id="no-transformer"),
    ],
)
def test_what_is_not_modelled_is_refused_with_the_reason(build, message):
    with pytest.raises(DitaError, match=message):
        ModelShape.of(build())


def test_senseless_shapes_and_sizes_are_refused():
    shape = ModelShape.of(build_wan())
    for changes in ({"kind": "unet"}, {"layers": 0}, {"heads": 5}, {"text_width": 0}, {"patch": (0, 1, 1)}):
        with pytest.raises(DitaError):
            replace(shape, **changes)
    unfit: list[Any] = [(16, 0), (0, 5), (16, -1), (16, 5, 0.0), (16, 5, 1.5), (16, 5, 1.0, 0)]
    for arguments in unfit:
        with pytest.raises(DitaError, match="expected"):
            step_flops(shape, *arguments)
    with pytest.raises(DitaError, match="expected 0 for dit"):
        step_flops(ModelShape.of(build_dit()), 16, 5)


def test_fit_recovers_rate_and_overhead():
    flops = [1e9, 3e9, 1e10, 5e10]
    model = CostModel.fit([(f, f / 2.5e10 + 0.02) for f in flops], peak=1e11)
    assert (model.rate, model.overhead) == pytest.approx((2.5e10, 0.02), rel=1e-6)
    assert model.utilisation == pytest.approx(0.25)
    assert model.errors == pytest.approx((0, 0, 0, 0), abs=1e-9)
    assert model.seconds(2e10, calls=2) == pytest.approx(0.84)
    assert model.energy(2e10, power=100, calls=2) == pytest.approx(84)


def test_fit_recovers_them_from_noisy_timings():
    generator = torch.Generator().manual_seed(0)
    flops = torch.logspace(9, 11, 40, dtype=torch.float64)
    noise = 1 + 0.03 * torch.randn(40, generator=generator, dtype=torch.float64)
    measured = list(zip(flops.tolist(), ((flops / 2e10 + 0.05) * noise).tolist(), strict=True))
    model = CostModel.fit(measured)
    assert model.rate == pytest.approx(2e10, rel=0.03)
    assert model.overhead == pytest.approx(0.05, rel=0.1)
    predicted = [model.seconds(f) / s - 1 for f, s in measured]
    assert model.errors == pytest.approx(predicted, abs=1e-9)
    assert max(map(abs, model.errors)) < 0.12


def test_an_overhead_is_never_negative():
    model = CostModel.fit([(1e9, 0.04), (2e9, 0.1), (4e9, 0.22)])
    assert model.overhead == 0
    through_origin = [1e9 / 0.04, 2e9 / 0.1, 4e9 / 0.22]
    assert min(through_origin) < model.rate < max(through_origin)


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("cost_model", ROOT / "benchmarks" / "cost_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_tokens(measured: dict[int, float]) -> float:
    """Seconds per token by least squares of the relative errors."""
    shares = [count / seconds for count, seconds in measured.items()]
    return sum(shares) / sum(share**2 for share in shares)


@pytest.mark.parametrize("held", [(768, 1280, 2000, 4032), (64, 288, 1280), (128, 432, 2000), (4032,)], ids=str)
def test_measured_times_held_out_are_predicted_better_than_by_tokens(held, benchmark):
    with torch.device("meta"):
        shape = ModelShape.of(benchmark.build(384, 2, "meta", torch.float32))
    flops = {count: step_flops(shape, count, benchmark.TEXT_TOKENS, guidance_calls=1) for count in MEASURED}
    kept = {count: seconds for count, seconds in MEASURED.items() if count not in held}
    model, per_token = CostModel.fit([(flops[count], seconds) for count, seconds in kept.items()]), by_tokens(kept)
    ours = [abs(model.seconds(flops[count]) / MEASURED[count] - 1) for count in held]
    theirs = [abs(per_token * count / MEASURED[count] - 1) for count in held]
    assert max(ours) < 0.13
    assert max(ours) < max(theirs) / 2
    assert sum(ours) < sum(theirs) / 2


def test_benchmark_fits_and_prints_what_its_clock_says(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "SIZES", ((1, 32), (5, 32), (5, 64)))
    monkeypatch.setattr(benchmark, "FITTED", (0, 1))
    model = benchmark.build(32, 1, "cpu", torch.float32)
    flops = [step_flops(ModelShape.of(model), count, 64, guidance_calls=1) for count in (4, 8, 32)]
    durations = cycle([each for count in flops for each in (5.0, count / 1e9 + 0.01)])
    ticks = accumulate(durations)
    found = benchmark.bench(model, 2, lambda: next(ticks))
    assert [row["tokens"] for row in found["rows"]] == [4, 8, 32]
    assert [row["flops"] for row in found["rows"]] == flops
    assert found["model"].rate == pytest.approx(1e9, rel=1e-6)
    assert found["rows"][2]["predicted"] == pytest.approx(flops[2] / 1e9 + 0.01)
    lines = benchmark.table(found["rows"], 50.0, found["model"]).split("\n")
    assert len(lines) == 5
    assert "held out" in lines[4] and "+0%" in lines[4] and f"{50 * (flops[2] / 1e9 + 0.01):.2f} |" in lines[4]


@pytest.mark.parametrize(
    ("measured", "peak", "message"),
    [
        pytest.param([(1e9, 0.1)], None, "at least two", id="one"),
        pytest.param([(1e9, 0.1), (1e9, 0.2)], None, "two different", id="same"),
        pytest.param([(1e9, 0.1), (2e9, 0.0)], None, "all positive", id="zero"),
        pytest.param([(1e9, 0.2), (2e9, 0.1)], None, "do not grow", id="falling"),
        pytest.param([(1e9, 0.1), (2e9, 0.2)], 1e9, "above the given peak", id="peak"),
    ],
)
def test_senseless_measurements_are_refused(measured, peak, message):
    with pytest.raises(DitaError, match=message):
        CostModel.fit(measured, peak)


def test_utilisation_needs_a_peak_and_energy_a_power():
    with pytest.raises(DitaError, match="no peak"):
        _ = CostModel(1e9).utilisation
    with pytest.raises(DitaError, match="0 W"):
        CostModel(1e9).energy(1e9, power=0)


def test_densities_of_the_committed_breakdown_predict_their_time_as_far_as_is_said():
    path = Path(__file__).resolve().parents[2] / "eval" / "results" / "attention" / "breakdown.json"
    rows = [row for row in json.loads(path.read_text())["rows"] if row["method"] == "sliding-tile"]
    assert len({round(row["density"], 2) for row in rows}) == 3
    for row in rows:
        predicted = row["density"] * row["dense"]
        assert 1 < row["attend"] / predicted < 1.2, "torch's attention on the kept blocks"
        assert 1.25 < row["ms"] / predicted < 1.45, "all that the method does"
