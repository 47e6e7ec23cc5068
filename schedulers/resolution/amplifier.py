"""Jenga's text amplifier: what the image attends to of the text, where there are fewer image tokens than at full size.

Zhang et al., "Training-Free Efficient Video Generation via Dynamic Token Carving", NeurIPS 2025, arXiv 2505.16864.

In joint attention image and text keys share one softmax. With n of N image tokens left, b = -log2(sqrt(n / N)) is added
to the scores of text keys, which the authors hold in powers of 2: in those of e it is ln(N / n) / 2. That is what the
text's weight is multiplied by, sqrt(N / n) against the image's 1, for queries of both kinds. It goes into the mask of
scaled dot-product attention, where it is exact; a GPU then runs a kernel that takes masks, which is slower than the one
that takes none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dita.anatomy import Anatomy
from dita.attention_view import Attended
from dita.errors import DitaError
from dita.seams import Call, Handler, Site


class TextAmplifier(Handler):
    """Adds the bias at every self- or joint attention of a call on fewer tokens; others run as they are.

    Args:
        method: its name, for messages.
        anatomy: of the transformer.

    Raises:
        DitaError: no attention, or none in which text and image stand together.
    """

    def __init__(self, method: str, anatomy: Anatomy) -> None:
        anatomy.require("attention", method)
        if not anatomy.text_at:
            raise DitaError(
                f"{method} with amplify raises text against the image in one softmax, but {anatomy.name} attends to "
                "text apart from the image, or it is not known where its text stands: leave amplify out"
            )
        self.sites = anatomy.attention_sites
        self._first = anatomy.text_at == "first"

    def attend(
        self, site: Site, occurrence: int, call: Call, seen: Attended, plain: Callable[[Attended], torch.Tensor]
    ) -> torch.Tensor:
        """See `Handler.attend`; tokens beyond those of the image are text."""
        keys = seen.k.shape[2]
        image, full = call.tokens or (keys, keys)
        text = keys - image
        if image == full or text <= 0 or seen.q.shape[2] != keys:
            return plain(seen)
        bias = seen.q.new_zeros(keys)
        bias[slice(0, text) if self._first else slice(image, None)] = amplification(image, full)
        return plain(seen.biased(bias[None, None, None]))


def amplification(image: int, full: int) -> float:
    """What is added to the scores of text, before the exponential function.

    Args:
        image: image tokens there are.
        full: image tokens at full resolution.

    Example:
        >>> round(math.exp(amplification(4, 16)), 3)
        2.0
    """
    return 0.5 * math.log(full / image)
