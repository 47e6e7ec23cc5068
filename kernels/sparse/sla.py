"""SLA: a few blocks in full, and all keys once more by linear attention behind a trained projection.

Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention", 2025,
arXiv 2509.24006.

Score: products of means of blocks of queries and of keys (the paper takes the mean of all keys off, which changes no
order). Selection: every row of
blocks keeps equally many, and all text. Second branch, for image tokens: with phi the softmax over the head dim and
sums over all keys j, L_i = sum_j phi(q_i) phi(k_j) v_j / (1e-5 + sum_j phi(q_i) phi(k_j)); the answer is
O_sparse + L W^T + b with one projection W [D, D], b [D] per layer, shared by its heads.

Projections start at zero: untrained, this is plain top-k. The authors train them together with the whole model for 2000
steps. `dita.kernels.sparse.sla_training.train_sla` trains the projections alone, against the model's own dense output,
so that the model stays as it is and less is won; published checkpoints do not fit, for their models differ too.

Differs from the paper: blocks on the diagonal are always kept, and the first steps are dense by default, of which a
model trained with SLA needs none (`dense_steps=0`). As in the authors' code the linear branch runs over all
keys; the paper leaves out those that are kept and those of least score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from dita.anatomy import Anatomy
from dita.config import check_number, check_whole
from dita.errors import DitaError
from dita.files import read_tensors
from dita.fingerprint import fingerprint
from dita.kernels.plan import BlockPlan
from dita.kernels.pooled_scores import pooled_topk
from dita.kernels.sparse.base import SparseMethod
from dita.kernels.sparse.layout import Cut
from dita.kernels.sparse.policy import Asked, Policy
from dita.registry import register

Projection = tuple[torch.Tensor, torch.Tensor]
"""W [D, D] and b [D] of one layer, float32."""


def linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention with the product of softmaxes over the head dim in place of the exponential.

    Args:
        q: [B, H, N, D].
        k, v: [B, Hk, M, D] with Hk dividing H.
        key_mask: bool [B, M], False for keys that do not count.

    Returns:
        float32 [B, H, N, D].

    Example:
        >>> q = torch.zeros(1, 1, 1, 2)
        >>> linear_attention(q, q, torch.ones_like(q)).flatten().round(decimals=4)
        tensor([1., 1.])
    """
    features, keys = q.float().softmax(-1), k.float().softmax(-1)
    if key_mask is not None:
        keys = keys * key_mask[:, None, :, None]
    products, sums = keys.transpose(-2, -1) @ v.float(), keys.sum(2)[..., None]
    repeat = q.shape[1] // k.shape[1]
    products, sums = (x.repeat_interleave(repeat, 1) for x in (products, sums))
    return (features @ products) / (1e-5 + features @ sums)


class SparseLinear(Policy):
    """Keep the blocks of highest mean score; add a projected linear attention where a layer has a projection.

    Args:
        density: share of the blocks of image tokens that each row keeps.
        block: tokens of a block.
        projections: by layer.
    """

    def __init__(self, density: float, block: int, projections: Mapping[int, Projection]) -> None:
        self.density, self.block, self.projections = density, block, projections

    def plan(self, asked: Asked) -> BlockPlan | None:
        """The blocks of highest score of each row."""
        if self.density >= 1:
            return None
        cut, image = Cut(asked.layout, self.block, self.block, device=asked.q.device), asked.layout.visual_slice
        q, k = asked.q[:, :, image], asked.k[:, :, image]
        valid = None if asked.key_mask is None else asked.key_mask[:, None, image]
        keep = max(1, int(self.density * cut.columns))
        counts, indices = pooled_topk(q, k, self.block, self.block, keep, asked.scale, valid)
        return cut.plan(BlockPlan(counts, indices, self.block, self.block).mask(cut.columns))

    def finish(self, asked: Asked, plan: BlockPlan, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Add the linear branch to the image tokens."""
        projection = self.projections.get(asked.layer)
        if projection is None:
            return out
        weight, bias = (x.to(out.device) for x in projection)
        if weight.shape[0] != out.shape[-1]:
            raise DitaError(
                f"SLA's projections are for heads of {weight.shape[0]} channels, those of layer {asked.layer} have "
                f"{out.shape[-1]}: train them on this model"
            )
        text, first = asked.layout.text, asked.layout.text_first
        image = asked.layout.visual_slice
        seen = linear_attention(asked.q[:, :, image], asked.k, asked.v, asked.key_mask)
        added = torch.nn.functional.linear(seen, weight, bias)
        # Text is computed in full and gets nothing.
        added = torch.nn.functional.pad(added, (0, 0, text, 0) if first else (0, 0, 0, text))
        return (out.float() + added).to(out.dtype)


def load_projections(path: str | Path, layers: int | None = None, model: str = "") -> dict[int, Projection]:
    """Read what `dita.kernels.sparse.sla_training.save_projections` wrote.

    Args:
        path: a safetensors file with "weight" [L, D, D] and "bias" [L, D].
        layers: L, how many there must be; None for any number.
        model: fingerprint of the transformer that they are for; "" for any. A file that names none fits any.

    Raises:
        DitaError: no such file, trained on another model, or not for so many layers.

    Example:
        >>> load_projections("sla.safetensors", 30)  # doctest: +SKIP
    """
    tensors, texts = read_tensors(path, "SLA's projections", "train_sla")
    if not {"weight", "bias"} <= tensors.keys():
        raise DitaError(f"cannot read SLA's projections {path}: it holds {', '.join(tensors)}; train_sla writes it")
    trained_on = texts.get("model", "")
    if model and trained_on not in ("", model):
        raise DitaError(f"the projections in {path} were trained on {trained_on}, not on {model}: train others")
    weight, bias = tensors["weight"].float(), tensors["bias"].float()
    count = len(weight) if layers is None else layers
    if bias.ndim != 2 or weight.shape != (count, bias.shape[1], bias.shape[1]) or len(bias) != count:
        raise DitaError(
            f"{path} holds projections {tuple(weight.shape)} and {tuple(bias.shape)}; expected [L, D, D] and [L, D] "
            f"for L = {count} layers"
        )
    return dict(enumerate(zip(weight, bias, strict=True)))


@register
@dataclass(frozen=True)
class SLA(SparseMethod):
    """SLA's settings.

    Attributes:
        density: share of the blocks of image tokens that each row keeps; published between 0.05 and 0.2.
        block: tokens of a block.
        weights: file of the projections; "" for none, which is plain top-k.

    Raises:
        DitaError: a setting out of range; on attaching, no such file, or one of another model.

    Example:
        >>> SLA(density=0.2).label()
        'density=0.2'
    """

    density: float = 0.1
    block: int = 64
    weights: str = ""

    name: ClassVar[str] = "sla"
    title: ClassVar[str] = "SLA"
    arxiv: ClassVar[str] = "2509.24006"
    axes: ClassVar[str] = "scores of block means; top-k per row; linear attention behind a trained projection"
    confidence: ClassVar[str] = "medium"
    citation: ClassVar[str] = """@article{zhang2025sla,
  title={SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention},
  author={Zhang, Jintao and Wang, Haoxu and Jiang, Kai and Yang, Shuo and Zheng, Kaiwen and Xi, Haocheng and
    Wang, Ziteng and Zhu, Hongzhou and Zhao, Min and Stoica, Ion and Gonzalez, Joseph E. and Zhu, Jun and
    Chen, Jianfei},
  journal={arXiv preprint arXiv:2509.24006},
  year={2025}
}"""

    def validate(self) -> None:
        """Check ranges."""
        check_number("density", self.density, 0, 1)
        check_whole("block", self.block, 1)

    def policy(self, anatomy: Anatomy) -> Policy:
        """See `SparseMethod.policy`."""
        projections: dict[int, Projection] = {}
        if self.weights:
            projections = load_projections(self.weights, len(anatomy.attention_sites), fingerprint(anatomy.model))
        return SparseLinear(self.density, self.block, projections)

    @classmethod
    def forced(cls) -> SLA:
        """Small blocks, so that few tokens suffice."""
        return cls(density=0.3, block=4, cutoff=1.0)

    @classmethod
    def ladder(cls) -> tuple[SLA, ...]:
        """Densities around the published ones."""
        return tuple(cls(density=density) for density in (0.3, 0.2, 0.1, 0.05))
