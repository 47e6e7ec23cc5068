"""What dita knows about model classes: the one table. Everything else is read off structure and signatures.

Keys are class names as diffusers spells them, and for classes that a user declares also their modules; a subclass
inherits its parent's entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelEntry:
    """A transformer class.

    Attributes:
        family: the short name that defaults are chosen by.
        block_lists: paths of the lists holding the blocks, in execution order.
        text_used_after: the text stream leaving the last block still matters to the output.
        in_turn: the lists take turns: first block of each, second block of each, and so on.
        alone: other parts of the model read what each block puts out, so that no span may leave some of them out.
        tail: attribute that counts how many of the last blocks begin again with streams of their own; "" for none.
        refused: why the model cannot be accelerated at all; "" if it can.
    """

    family: str
    block_lists: tuple[str, ...]
    text_used_after: bool = False
    in_turn: bool = False
    alone: bool = False
    tail: str = ""
    refused: str = ""


@dataclass(frozen=True)
class BlockEntry:
    """A block class.

    Attributes:
        returns: its outputs in order, "hidden" and "encoder" (the text stream; sound, where a model makes that too).
        hidden, encoder: names of its arguments.
        text: where text tokens lie in joint attention, or in the one sequence of a block that returns only "hidden":
            "first" or "last" (not the order of `returns`); "" unknown, or there are none.
        wrapped: it returns a tuple of one.
    """

    returns: tuple[str, ...]
    hidden: str = "hidden_states"
    encoder: str = "encoder_hidden_states"
    text: str = ""
    wrapped: bool = False


MODELS: dict[str, ModelEntry] = {
    "DiTTransformer2DModel": ModelEntry("dit", ("transformer_blocks",)),
    "PixArtTransformer2DModel": ModelEntry("pixart", ("transformer_blocks",)),
    "SD3Transformer2DModel": ModelEntry("sd3", ("transformer_blocks",)),
    "FluxTransformer2DModel": ModelEntry("flux", ("transformer_blocks", "single_transformer_blocks")),
    "QwenImageTransformer2DModel": ModelEntry("qwen-image", ("transformer_blocks",)),
    "WanTransformer3DModel": ModelEntry("wan", ("blocks",)),
    "CogVideoXTransformer3DModel": ModelEntry("cogvideox", ("transformer_blocks",)),
    "HunyuanVideoTransformer3DModel": ModelEntry("hunyuan-video", ("transformer_blocks", "single_transformer_blocks")),
    "LTXVideoTransformer3DModel": ModelEntry("ltx-video", ("transformer_blocks",)),
    "MochiTransformer3DModel": ModelEntry("mochi", ("transformer_blocks",)),
    "HunyuanDiT2DModel": ModelEntry("hunyuan-dit", ("blocks",), alone=True),
    "MotifVideoTransformer3DModel": ModelEntry(
        "motif-video", ("transformer_blocks", "single_transformer_blocks"), tail="num_decoder_layers"
    ),
    "MiniMaxMusic3RVQDepthDecoder": ModelEntry(
        "",
        (),
        refused="it is no denoiser: it predicts the codes of one frame of sound, one after the other, and no step of a "
        "scheduler calls it",
    ),
}

_TEXT_FIRST = BlockEntry(returns=("encoder", "hidden"), text="first")
_TEXT_FIRST_SWAPPED = BlockEntry(returns=("hidden", "encoder"), text="first")
_TEXT_LAST = BlockEntry(returns=("hidden", "encoder"), text="last")
_NO_TEXT = BlockEntry(returns=("hidden",))
_JOINED_FIRST = BlockEntry(returns=("hidden",), text="first")
_JOINED_LAST = BlockEntry(returns=("hidden",), text="last")

BLOCKS: dict[str, BlockEntry] = {
    "AnyFlowTransformerBlock": _NO_TEXT,
    "AuraFlowJointTransformerBlock": _TEXT_FIRST,
    "AuraFlowSingleTransformerBlock": _JOINED_FIRST,
    "BasicTransformerBlock": _NO_TEXT,
    "BriaFiboSingleTransformerBlock": _JOINED_FIRST,
    "BriaFiboTransformerBlock": _TEXT_FIRST,
    "BriaSingleTransformerBlock": _TEXT_FIRST,
    "BriaTransformerBlock": _TEXT_FIRST,
    "ChromaSingleTransformerBlock": _JOINED_FIRST,
    "ChromaTransformerBlock": _TEXT_FIRST,
    "CogVideoXBlock": _TEXT_FIRST_SWAPPED,
    "CogView3PlusTransformerBlock": _TEXT_FIRST_SWAPPED,
    "CogView4TransformerBlock": _TEXT_FIRST_SWAPPED,
    "ConsisIDBlock": _TEXT_FIRST_SWAPPED,
    "Cosmos3VLTextMoTDecoderLayer": BlockEntry(("encoder", "hidden"), hidden="gen_seq", encoder="und_seq"),
    "CosmosTransformerBlock": _NO_TEXT,
    "EasyAnimateTransformerBlock": _TEXT_FIRST_SWAPPED,
    "ErnieImageSharedAdaLNBlock": BlockEntry(returns=("hidden",), hidden="x", text="last"),
    "Flux2SingleTransformerBlock": _JOINED_FIRST,
    "Flux2TransformerBlock": _TEXT_FIRST,
    "Flux3SingleTransformerBlock": _TEXT_FIRST,
    "FluxSingleTransformerBlock": _TEXT_FIRST,
    "FluxTransformerBlock": _TEXT_FIRST,
    "GlmImageTransformerBlock": _TEXT_FIRST_SWAPPED,
    "HiDreamImageSingleTransformerBlock": _JOINED_LAST,
    "HiDreamImageTransformerBlock": _TEXT_LAST,
    "HunyuanImageSingleTransformerBlock": _TEXT_LAST,
    "HunyuanImageTransformerBlock": _TEXT_LAST,
    "HunyuanVideo15TransformerBlock": _TEXT_LAST,
    "HunyuanVideoSingleTransformerBlock": _TEXT_LAST,
    "HunyuanVideoTokenReplaceSingleTransformerBlock": _TEXT_LAST,
    "HunyuanVideoTokenReplaceTransformerBlock": _TEXT_LAST,
    "HunyuanVideoTransformerBlock": _TEXT_LAST,
    "JointTransformerBlock": BlockEntry(returns=("encoder", "hidden"), text="last"),
    "JoyImageEditPlusTransformerBlock": _TEXT_LAST,
    "JoyImageTransformerBlock": _TEXT_LAST,
    "Krea2TransformerBlock": _JOINED_FIRST,
    "LTXVideoTransformerBlock": _NO_TEXT,
    "LongCatImageSingleTransformerBlock": _TEXT_FIRST,
    "LongCatImageTransformerBlock": _TEXT_FIRST,
    "Lumina2TransformerBlock": _JOINED_FIRST,
    "MochiTransformerBlock": _TEXT_LAST,
    "MotifVideoSingleTransformerBlock": _TEXT_LAST,
    "MotifVideoTransformerBlock": _TEXT_LAST,
    "OmniGenBlock": _JOINED_FIRST,
    "OvisImageSingleTransformerBlock": _TEXT_FIRST,
    "OvisImageTransformerBlock": _TEXT_FIRST,
    "QwenImageTransformerBlock": _TEXT_FIRST,
    "SD3SingleTransformerBlock": _NO_TEXT,
    "WanTransformerBlock": _NO_TEXT,
    "ZImageTransformerBlock": BlockEntry(returns=("hidden",), hidden="x", text="last"),
}

_OWN_STEPS = (
    "it steps every frame with a copy of the scheduler of its own, so that frames may stand at different timesteps and "
    "no step belongs to a call of the transformer"
)
_OWN_LOOP = (
    "its transformer makes an embedding in a loop of its own, with the scheduler named prior_scheduler; the loop that "
    "makes the image has a UNet"
)
REFUSED_PIPELINES: dict[str, str] = {
    "SkyReelsV2DiffusionForcingPipeline": _OWN_STEPS,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _OWN_STEPS,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _OWN_STEPS,
    "StableUnCLIPPipeline": _OWN_LOOP,
    "UnCLIPPipeline": _OWN_LOOP,
}
"""Pipelines that cannot be followed, and why."""

ENDED_TIMESTEPS: frozenset[str] = frozenset({"SCMScheduler"})
"""Schedulers whose list of timesteps ends with the one at which the last step arrives; no step starts there."""

PARALLEL_PROJECTION = "proj_out"
"""In single-stream blocks with attention and MLP side by side, the projection whose output joins both."""

PARALLEL_PARTS: tuple[str, ...] = ("attn", "proj_mlp", "act_mlp")
"""What feeds that projection and need not run when its output is forecast."""

TEMPORAL_PARTS: frozenset[str] = frozenset({"temporal_transformer_blocks"})
"""Lists of blocks whose self-attention is over time alone; that of all others is over space, or over both at once."""

_LINEAR = "their self-attention is linear: it makes no map of queries and keys"
_PRODUCTS = "their self-attention multiplies matrices itself, in place of calling scaled dot-product attention"

OTHER_ATTENTION: dict[str, str] = {
    "AttnProcessor": _PRODUCTS,
    "SanaLinearAttnProcessor2_0": _LINEAR,
    "SanaLinearAttnProcessor3_0": _LINEAR,
    "SanaWMBidirectionalGDNAttention": _LINEAR,
    "SlicedAttnProcessor": _PRODUCTS,
}
"""Attention in which nobody can take part, by the class of its processor or of a module inside it."""

FLEX_ATTENTION: frozenset[str] = frozenset(
    {
        "AnyFlowCausalAttnProcessor",
        "Kandinsky6SRAttnProcessor",
        "QwenImage21FlexAttnProcessor",
        "WanAnimate2AttnProcessor",
    }
)
"""Processors that call flex_attention, mostly with a block mask, in place of scaled dot-product attention."""
