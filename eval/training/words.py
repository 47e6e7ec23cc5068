"""The word-level tokenizer and the small text encoders of the bundled text pipelines."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from dita.eval.world import vocabulary

LENGTH = 16  # tokens of the longest caption (13 words and the end) and a little room
_SPECIAL = ("[pad]", "[unk]", "[bos]", "[eos]")
_SMALL: dict[str, Any] = {"d_model": 128, "d_kv": 32, "num_heads": 4, "num_layers": 2, "d_ff": 256}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a word, the end marked by [eos], padded with [pad].

    Example:
        >>> build_tokenizer()("a red bag").input_ids[-1]
        3
    """
    words = (*_SPECIAL, *vocabulary())
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[unk]"))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="$A [eos]", special_tokens=[("[eos]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[pad]",
        unk_token="[unk]",
        bos_token="[bos]",
        eos_token="[eos]",
        model_max_length=LENGTH,
    )


def build_t5() -> T5EncoderModel:
    """Build an untrained T5 encoder: 2 layers of width 128.

    Its heads prefer different distances from the start. With the small biases that the library draws, all words look
    alike from everywhere, and as biases learn by small steps the encoder stays a bag of words.
    """
    model = T5EncoderModel(T5Config(vocab_size=_words(), pad_token_id=0, eos_token_id=3, dropout_rate=0.0, **_SMALL))
    for name, parameter in model.named_parameters():
        if name.endswith("relative_attention_bias.weight"):
            torch.nn.init.normal_(parameter, std=1.5)
    return model


def build_umt5() -> UMT5EncoderModel:
    """Build an untrained UMT5 encoder: 2 layers of width 128."""
    return UMT5EncoderModel(UMT5Config(vocab_size=_words(), pad_token_id=0, eos_token_id=3, dropout_rate=0.0, **_SMALL))


def build_clip() -> CLIPTextModel:
    """Build an untrained CLIP text model: 2 layers of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=_words(),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=128,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    )


def _words() -> int:
    return len(_SPECIAL) + len(vocabulary())
