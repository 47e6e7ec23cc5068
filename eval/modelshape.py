"""The sizes of a diffusion transformer that decide how many floating-point operations a call of it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dita.errors import DitaError

KINDS = ("dit", "cross", "joint")
_TIME = 256  # sinusoids of the timestep; only Wan's configuration has its own number
_GATED = ("geglu", "swiglu", "geglu-approximate", "linear-silu")

Patch = tuple[int, int, int]


@dataclass(frozen=True)
class ModelShape:
    """What `step_flops` needs to know of a model.

    Attributes:
        kind: "dit": self-attention and an MLP on the image tokens (DiT). "cross": besides them, attention to the text
            (Wan, PixArt). "joint": one attention over text and image tokens, which both pass through projections and
            MLP of the same size, in one stream or in two (Flux, Stable Diffusion 3).
        layers: blocks of any sort.
        width: features per token inside the model, that is heads times the size of a head.
        heads: attention heads; their number does not change the count.
        ffn_width: hidden features of the MLP.
        in_features: numbers per image token that enter: channels times the patch's volume.
        out_features: numbers per image token that leave.
        patch: frames, rows and columns of the latent in one token.
        text_width: features per text token that enter; 0 without text.
        text_layers: matrices in the text's embedder, the first from `text_width` to `width`.
        vector_weights: weights of all matrices that see one vector per sample instead of tokens: embedders of
            timestep, guidance, label and pooled text, and modulation.
        dual_layers: joint blocks with a second self-attention of the image tokens (Stable Diffusion 3.5).
        text_ends: whether the last joint block drops its text output (Stable Diffusion 3).

    Raises:
        DitaError: the kind is unknown, or the sizes do not fit together.

    Example:
        >>> ModelShape("dit", layers=28, width=1152, heads=16, ffn_width=4608, in_features=16, out_features=32).layers
        28
    """

    kind: str
    layers: int
    width: int
    heads: int
    ffn_width: int
    in_features: int
    out_features: int
    patch: Patch = (1, 2, 2)
    text_width: int = 0
    text_layers: int = 1
    vector_weights: int = 0
    dual_layers: int = 0
    text_ends: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DitaError(f"kind is {self.kind!r}; expected one of {KINDS}")
        positive = ("layers", "width", "heads", "ffn_width", "in_features", "out_features")
        wrong = {name: getattr(self, name) for name in positive if getattr(self, name) < 1}
        if wrong or self.width % self.heads or min(self.patch) < 1 or self.vector_weights < 0:
            raise DitaError(f"{self} makes no sense: sizes must be positive, and width a multiple of heads")
        if (self.kind == "dit") != (self.text_width == 0):
            raise DitaError(f"text_width is {self.text_width} for kind {self.kind!r}; expected 0 for dit, else above 0")

    @classmethod
    def of(cls, transformer: Any) -> ModelShape:
        """Read the shape off a diffusers transformer's configuration; its weights may be on the meta device.

        Args:
            transformer: a DiTTransformer2DModel, PixArtTransformer2DModel, WanTransformer3DModel (text to video),
                FluxTransformer2DModel or SD3Transformer2DModel.

        Raises:
            DitaError: the class or one of its options is not modelled; the message says which.

        Example:
            >>> from diffusers import DiTTransformer2DModel
            >>> tiny = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=3, sample_size=8)
            >>> ModelShape.of(tiny).kind, ModelShape.of(tiny).width
            ('dit', 16)
        """
        name = type(transformer).__name__
        if name not in _READERS:
            raise DitaError(
                f"the operations of a {name} are not modelled; expected one of {', '.join(_READERS)}. Describe the "
                "model with ModelShape(...), or count a real call with dita.eval.count_flops."
            )
        config = transformer.config
        refused = {key: config[key] for key, fits in _REFUSED.items() if key in config and not fits(config[key])}
        if refused:
            raise DitaError(
                f"this {name} has {refused}, which is not modelled; count a call with dita.eval.count_flops"
            )
        heads = config["num_attention_heads"]
        width = heads * config["attention_head_dim"]
        sizes = {"layers": config["num_layers"], "width": width, "heads": heads, "ffn_width": 4 * width}
        return cls(**{**sizes, **_READERS[name](config, width)})


_REFUSED: dict[str, Callable[[Any], bool]] = {
    "activation_fn": lambda value: value not in _GATED,
    "added_kv_proj_dim": lambda value: value is None,
    "attention_type": lambda value: value in (None, "default"),
    "image_dim": lambda value: value is None,
}


def _embedder(entering: int, width: int) -> int:
    return entering * width + width * width


def _square(config: Mapping[str, Any], patch: int) -> dict[str, Any]:
    leaving = config["out_channels"] or config["in_channels"]
    volume = patch * patch
    return {
        "patch": (1, patch, patch),
        "in_features": config["in_channels"] * volume,
        "out_features": leaving * volume,
    }


def _dit(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    # Every block embeds timestep and label for itself, and the output layer does so once more.
    layers = config["num_layers"]
    vector = (layers + 1) * _embedder(_TIME, width) + (6 * layers + 2) * width**2
    return {"kind": "dit", "vector_weights": vector, **_square(config, config["patch_size"])}


def _pixart(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    captions, crossed = config["caption_channels"], config["cross_attention_dim"]
    if captions is None or crossed != width:
        raise DitaError(
            f"this PixArt has caption_channels={captions} and cross_attention_dim={crossed}; expected captions that "
            f"are projected to the width of {width}"
        )
    vector = _embedder(_TIME, width) + 6 * width**2
    extra = config["use_additional_conditions"]
    if config["sample_size"] == 128 if extra is None else extra:
        vector += 3 * _embedder(_TIME, width // 3)  # height, width and aspect ratio
    return {
        "kind": "cross",
        "text_width": captions,
        "text_layers": 2,
        "vector_weights": vector,
        **_square(config, config["patch_size"]),
    }


def _wan(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    patch = tuple(config["patch_size"])
    volume = patch[0] * patch[1] * patch[2]
    return {
        "kind": "cross",
        "ffn_width": config["ffn_dim"],
        "patch": patch,
        "in_features": config["in_channels"] * volume,
        "out_features": (config["out_channels"] or config["in_channels"]) * volume,
        "text_width": config["text_dim"],
        "text_layers": 2,
        "vector_weights": _embedder(config["freq_dim"], width) + 6 * width**2,
    }


def _flux(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    double, single = config["num_layers"], config["num_single_layers"]
    embedders = (2 if config["guidance_embeds"] else 1) * _embedder(_TIME, width)
    embedders += _embedder(config["pooled_projection_dim"], width)
    return {
        "kind": "joint",
        "layers": double + single,
        **_square(config, config["patch_size"]),
        "patch": (1, 2, 2),  # the pipeline folds 2x2 pixels of the latent into the channels
        "text_width": config["joint_attention_dim"],
        "vector_weights": embedders + (12 * double + 3 * single + 2) * width**2,
    }


def _sd3(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    layers, dual = config["num_layers"], len(config["dual_attention_layers"])
    embedders = _embedder(_TIME, width) + _embedder(config["pooled_projection_dim"], width)
    return {
        "kind": "joint",
        **_square(config, config["patch_size"]),
        "text_width": config["joint_attention_dim"],
        "vector_weights": embedders + (12 * layers - 4 + 3 * dual + 2) * width**2,
        "dual_layers": dual,
        "text_ends": True,
    }


_READERS: dict[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "WanTransformer3DModel": _wan,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
}
