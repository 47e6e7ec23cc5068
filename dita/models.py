"""What dita knows about model classes: the one table. Everything else is read off structure and signatures.

Keys are class names as diffusers spells them; a subclass inherits its parent's entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelEntry:
    """A transformer class.

    Attributes:
        family: the short name that defaults are chosen by.
        block_lists: attributes holding the blocks, in execution order.
        text_used_after: the text stream leaving the last block still matters to the output.
        text_at: where text tokens stand among the queries of joint attention: "first", "last", or "" if there are none.
    """

    family: str
    block_lists: tuple[str, ...]
    text_used_after: bool = False
    text_at: str = ""


@dataclass(frozen=True)
class BlockEntry:
    """A block class: `returns` lists its outputs in order, "hidden" and "encoder" (the text stream)."""

    returns: tuple[str, ...]
    hidden: str = "hidden_states"
    encoder: str = "encoder_hidden_states"


MODELS: dict[str, ModelEntry] = {
    "DiTTransformer2DModel": ModelEntry("dit", ("transformer_blocks",)),
    "PixArtTransformer2DModel": ModelEntry("pixart", ("transformer_blocks",)),
    "SD3Transformer2DModel": ModelEntry("sd3", ("transformer_blocks",), text_at="last"),
    "FluxTransformer2DModel": ModelEntry("flux", ("transformer_blocks", "single_transformer_blocks"), text_at="first"),
    "QwenImageTransformer2DModel": ModelEntry("qwen-image", ("transformer_blocks",), text_at="first"),
    "WanTransformer3DModel": ModelEntry("wan", ("blocks",)),
    "CogVideoXTransformer3DModel": ModelEntry("cogvideox", ("transformer_blocks",), text_at="first"),
    "HunyuanVideoTransformer3DModel": ModelEntry(
        "hunyuan-video", ("transformer_blocks", "single_transformer_blocks"), text_at="last"
    ),
    "LTXVideoTransformer3DModel": ModelEntry("ltx-video", ("transformer_blocks",)),
    "MochiTransformer3DModel": ModelEntry("mochi", ("transformer_blocks",), text_at="last"),
}

_TEXT_FIRST = BlockEntry(returns=("encoder", "hidden"))
_TEXT_LAST = BlockEntry(returns=("hidden", "encoder"))
_NO_TEXT = BlockEntry(returns=("hidden",))

BLOCKS: dict[str, BlockEntry] = {
    "BasicTransformerBlock": _NO_TEXT,
    "JointTransformerBlock": _TEXT_FIRST,
    "SD3SingleTransformerBlock": _NO_TEXT,
    "FluxTransformerBlock": _TEXT_FIRST,
    "FluxSingleTransformerBlock": _TEXT_FIRST,
    "QwenImageTransformerBlock": _TEXT_FIRST,
    "WanTransformerBlock": _NO_TEXT,
    "CogVideoXBlock": _TEXT_LAST,
    "HunyuanVideoTransformerBlock": _TEXT_LAST,
    "HunyuanVideoSingleTransformerBlock": _TEXT_LAST,
    "HunyuanVideoTokenReplaceTransformerBlock": _TEXT_LAST,
    "HunyuanVideoTokenReplaceSingleTransformerBlock": _TEXT_LAST,
    "LTXVideoTransformerBlock": _NO_TEXT,
    "MochiTransformerBlock": _TEXT_LAST,
}

PARALLEL_PROJECTION = "proj_out"
"""In single-stream blocks with attention and MLP side by side, the projection whose output joins both."""

PARALLEL_PARTS: tuple[str, ...] = ("attn", "proj_mlp", "act_mlp")
"""What feeds that projection and need not run when its output is forecast."""
