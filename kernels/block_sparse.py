"""Block-sparse attention: one contract, several backends.

`block_sparse_attention` puts the tokens in the plan's order, lets a backend compute what the plan keeps, and puts the
output back. On a CUDA device that is the Triton kernel. On a CPU the kept keys are gathered, or FlexAttention is
compiled; `dita bench attention` measures both. None forms the whole attention map; only the oracle "naive" does.
"""

from __future__ import annotations

import math

import torch

from dita.errors import DitaError
from dita.kernels.masked_attention import naive_block_sparse
from dita.kernels.plan import BlockPlan, arrange, block_count, key_validity, put_back

BACKENDS = ("auto", "triton", "gather", "flex", "int8", "naive")


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
    need_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the blocks of keys that a plan keeps.

    Args:
        q: [B, H, N, D], float32, float16 or bfloat16.
        k, v: [B, Hk, M, D] with Hk dividing H: each serves H / Hk query heads.
        plan: what each block of queries sees.
        scale: of the logits, 1 / sqrt(D) by default.
        key_mask: bool [B, M], False for keys that no query sees, such as padded text.
        backend: one of `BACKENDS`; "int8" rounds queries and keys to 8 bits, as SpargeAttn does.
        need_lse: the log-sum-exp is read; "flex", which has none, is then refused, and otherwise returns NaN for it.

    Returns:
        output [B, H, N, D] in the dtype of q, and the natural log of the sum of exponentials, float32 [B, H, N]. A
        query that sees no key, or that the plan leaves out, has output 0 and -inf.

    Raises:
        DitaError: shapes that do not fit each other or the plan, or a backend that this device or plan cannot use.

    Example:
        >>> q = torch.randn(1, 2, 256, 16)
        >>> plan = BlockPlan.of_mask(torch.eye(4, dtype=torch.bool)[None, None], 64, 64)
        >>> out, lse = block_sparse_attention(q, q, q, plan)
        >>> alone = torch.nn.functional.scaled_dot_product_attention(q[:, :, :64], q[:, :, :64], q[:, :, :64])
        >>> torch.allclose(out[:, :, :64], alone, atol=1e-5), lse.shape
        (True, torch.Size([1, 2, 256]))
    """
    check_fit(q, k, v, plan, key_mask)
    if backend not in BACKENDS:
        raise DitaError(f"there is no backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "flex" and need_lse:
        raise DitaError(
            "FlexAttention returns no log-sum-exp on a CPU, which whoever merges or rescales the output reads; use the "
            '"gather" backend, or say need_lse=False'
        )
    if backend == "auto":
        backend = "triton" if q.is_cuda else "gather"
    if backend == "naive":
        out, lse = naive_block_sparse(q, k, v, plan, scale, key_mask)
        return out, lse.float()
    if plan.order_k is not None and plan.order_k.ndim == 3 and plan.order_k.shape[1] > 1 and k.shape[1] < q.shape[1]:
        # With an order for every query head, a key head looks different to each of those it serves.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    queries = arrange(q, plan.order_q)
    keys, values = arrange(k, plan.order_k), arrange(v, plan.order_k)
    valid = key_validity(plan, key_mask)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if backend == "triton":
        from dita.kernels.block_sparse_triton import triton_block_sparse

        out, lse = triton_block_sparse(
            queries, keys, values, plan.counts, plan.indices, plan.block_q, plan.block_k, scale, valid
        )
    elif backend == "gather":
        from dita.kernels.block_sparse_cpu import gather_attention

        out, lse = gather_attention(queries, keys, values, plan, scale, valid)
    elif backend == "int8":
        from dita.kernels.int8_attention import int8_attention

        out, lse = int8_attention(
            queries, keys, values, plan.counts, plan.indices, plan.block_q, plan.block_k, scale, valid
        )
    else:
        from dita.kernels.block_sparse_cpu import flex_attention

        out = flex_attention(queries, keys, values, plan, scale, valid)
        lse = out.new_full(out.shape[:3], math.nan, dtype=torch.float32)
    tokens = q.shape[2]
    return put_back(out, plan.order_q, tokens), put_back(lse, plan.order_q, tokens, -math.inf)


def check_fit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, key_mask: torch.Tensor | None = None
) -> None:
    """Raise `DitaError` unless queries, keys, values and plan belong together.

    Example:
        >>> plan = BlockPlan.of_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64)
        >>> check_fit(torch.zeros(1, 2, 128, 8), torch.zeros(1, 2, 128, 8), torch.zeros(1, 2, 128, 8), plan)
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise DitaError(f"expected q [B, H, N, D] and k, v [B, Hk, M, D], got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise DitaError(f"the number of key heads must divide that of query heads, got {shapes}")
    batch, heads, rows = plan.counts.shape
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
        raise DitaError(f"a plan for batch {batch} and {heads} heads does not fit {shapes}")
    ordered = q.shape[2] if plan.order_q is None else plan.order_q.shape[-1]
    if rows != block_count(ordered, plan.block_q):
        raise DitaError(f"a plan of {rows} blocks of {plan.block_q} queries does not fit {ordered} queries")
    ordered = k.shape[2] if plan.order_k is None else plan.order_k.shape[-1]
    if plan.indices.shape[3] > block_count(ordered, plan.block_k):
        raise DitaError(
            f"a plan that names up to {plan.indices.shape[3]} blocks of {plan.block_k} keys does not fit {ordered} keys"
        )
    if key_mask is not None and (key_mask.shape != (k.shape[0], k.shape[2]) or key_mask.dtype != torch.bool):
        raise DitaError(f"expected a bool key mask {(k.shape[0], k.shape[2])}, got {tuple(key_mask.shape)}")


def merge(
    outputs: tuple[torch.Tensor, torch.Tensor], others: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Args:
        outputs, others: output [B, H, N, D] and log-sum-exp [B, H, N] of each.

    Returns:
        output, in the dtype of the first, and log-sum-exp; 0 and -inf where both are empty.

    Example:
        >>> one, two = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
        >>> merge((one, torch.zeros(1, 1, 1)), (two, torch.zeros(1, 1, 1)))[0].flatten()
        tensor([0.5000, 0.5000])
    """
    (a, lse_a), (b, lse_b) = outputs, others
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == -math.inf, 0)
    share_a, share_b = ((x - safe).exp()[..., None] for x in (lse_a, lse_b))
    return (share_a * a.float() + share_b * b.float()).to(a.dtype), lse


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None, key_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys with its log-sum-exp, by torch's own flash attention where that returns it.

    Args, returns: as of `block_sparse_attention`.

    Example:
        >>> q = torch.zeros(1, 1, 3, 4)
        >>> dense_attention(q, q, q)[1].exp().flatten()
        tensor([3., 3., 3.])
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.is_cuda:
        blocks = [block_count(x.shape[2], 128) for x in (q, k)]
        plan = BlockPlan.of_mask(torch.ones(1, 1, *blocks, dtype=torch.bool, device=q.device), 128, 128)
        return block_sparse_attention(q, k, v, plan, scale, key_mask, "triton")
    from dita.kernels.block_sparse_cpu import flash_with_lse

    repeat = q.shape[1] // k.shape[1]
    k, v = (x if repeat == 1 else x.repeat_interleave(repeat, 1) for x in (k, v))
    return flash_with_lse(q, k, v, scale, None if key_mask is None else key_mask[:, None, None])
