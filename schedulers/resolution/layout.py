"""How a model's latents and the positions of its tokens are brought to another height and width.

Latents come as images [B, C, H, W], films [B, C, F, H, W], or packed tokens [B, N, C]; in between all are [B, C, F, H,
W]. Models that read the size off the tensor need nothing else. Others are told it in an argument: ids of the tokens
(Flux), shapes (Qwen-Image), numbers (LTX-Video). Positions at a lower resolution are those of a picture of that size,
as the models were trained on, not a coarser grid over the full one. Frames stay.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange

from dita.errors import DitaError
from dita.grid import channel_axis, token_grid
from dita.loop import Request

Kind = Literal["tensor", "ids", "shapes", "sizes"]
_SIZELESS = (
    "hidden_states", "timestep", "guidance", "pooled_projections", "txt_ids", "txt_seq_lens", "class_labels",
    "rope_interpolation_scale", "img_ids", "img_shapes",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a model lie at full resolution, and how it is told.

    Attributes:
        kind: how the model is told: by the tensor alone, by `img_ids`, by `img_shapes`, or by `height` and `width`.
        frames, rows, columns: of tokens.
        patch: latent pixels along each side of a token.
        ndim: axes of the latents.

    Example:
        >>> layout = Layout("tensor", 1, 6, 8, 2, 4)
        >>> layout.grid(0.5), layout.grid(0.75), layout.tokens((3, 4))
        ((3, 4), (5, 6), 12)
    """

    kind: Kind
    frames: int
    rows: int
    columns: int
    patch: int
    ndim: int

    @classmethod
    def of(cls, request: Request, own: torch.Tensor | None = None) -> Layout:
        """Read it off a call at full resolution.

        Args:
            request: the call.
            own: the pipeline's latents; the transformer has to be called with as many channels and tokens.

        Raises:
            DitaError: the model does not tell how its tokens lie, or reads something else that depends on the size.
        """
        latents, model = request.latents, request.anatomy.model
        name = request.anatomy.name
        if own is not None and latents.shape[1:] != own.shape[1:]:
            raise DitaError(
                f"{name} is called with {list(latents.shape[1:])} a sample where the pipeline's latents have "
                f"{list(own.shape[1:])}: a condition of full size is joined to them, which cannot follow a change of "
                "resolution"
            )
        arguments = {**dict(zip(request.parameters, request.args, strict=False)), **request.kwargs}
        strange = [key for key, value in arguments.items() if _holds_tensors(value) and not _sizeless(key)]
        if strange:
            raise DitaError(
                f"{name} is called with {', '.join(strange)}, which may depend on the size of the picture and which "
                "dita cannot resize"
            )
        grid = token_grid(model, arguments, latents)
        if len(grid) != 3 or latents.ndim not in (3, 4, 5) or channel_axis(model, latents) not in (1, latents.ndim - 1):
            raise DitaError(
                f"{name} is called with latents {list(latents.shape)} and does not tell how their tokens lie in "
                "frames, rows and columns; expected [B, C, H, W], [B, C, F, H, W], or packed tokens with img_ids, "
                "img_shapes, or num_frames, height and width"
            )
        frames, rows, columns = grid
        if latents.ndim > 3:
            layout = cls("tensor", frames, rows, columns, latents.shape[-2] // rows, latents.ndim)
        elif arguments.get("img_ids") is not None:
            layout = cls("ids", frames, rows, columns, 2, 3)
            ids = arguments["img_ids"]
            if not torch.equal(ids, layout.ids(ids, (rows, columns))):
                raise DitaError(f"{name} is called with img_ids that do not count rows and columns from 0")
        elif arguments.get("img_shapes") is not None:
            layout = cls("shapes", frames, rows, columns, 2, 3)
        else:
            layout = cls("sizes", frames, rows, columns, int(getattr(model.config, "patch_size", 1)), 3)
        if latents.ndim == 3 and latents.shape[2] % layout.patch**2:
            raise DitaError(f"{name} packs {latents.shape[2]} numbers into a token; expected a multiple of 4")
        return layout

    @property
    def full(self) -> tuple[int, int]:
        """Rows and columns of tokens at full resolution."""
        return (self.rows, self.columns)

    def grid(self, scale: float) -> tuple[int, int]:
        """Rows and columns of tokens at a scale, the nearest whole ones."""
        return (max(1, math.floor(self.rows * scale + 0.5)), max(1, math.floor(self.columns * scale + 0.5)))

    def tokens(self, grid: tuple[int, int]) -> int:
        """Tokens of all frames."""
        return self.frames * grid[0] * grid[1]

    def fits(self, latents: torch.Tensor, grid: tuple[int, int]) -> bool:
        """Whether latents have this many rows and columns of tokens."""
        if self.ndim == 3:
            return latents.shape[1] == self.tokens(grid)
        return tuple(latents.shape[-2:]) == (grid[0] * self.patch, grid[1] * self.patch)

    def opened(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Latents of so many rows and columns of tokens as [B, C, F, H, W].

        Example:
            >>> Layout("ids", 1, 2, 2, 2, 3).opened(torch.arange(16.0).view(1, 4, 4), (2, 2))[0, 0, 0]
            tensor([[ 0.,  1.,  4.,  5.],
                    [ 2.,  3.,  6.,  7.],
                    [ 8.,  9., 12., 13.],
                    [10., 11., 14., 15.]])
        """
        if self.ndim == 5:
            return latents
        if self.ndim == 4:
            return latents[:, :, None]
        return rearrange(
            latents, "b (f h w) (c p q) -> b c f (h p) (w q)", h=grid[0], w=grid[1], p=self.patch, q=self.patch
        )

    def closed(self, opened: torch.Tensor) -> torch.Tensor:
        """The inverse of `opened`."""
        if self.ndim == 5:
            return opened
        if self.ndim == 4:
            return opened[:, :, 0]
        return rearrange(opened, "b c f (h p) (w q) -> b (f h w) (c p q)", p=self.patch, q=self.patch)

    def resized(self, latents: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
        """Latents of a clean picture at another resolution: area means downwards, bilinear upwards.

        Args:
            latents: of `old` rows and columns of tokens.
        """
        if old == new:
            return latents
        size = (new[0] * self.patch, new[1] * self.patch)
        opened = self.opened(latents, old)
        planes = rearrange(opened, "b c f h w -> (b f) c h w")
        down = new[0] <= old[0] and new[1] <= old[1]
        how: dict[str, Any] = {"mode": "area"} if down else {"mode": "bilinear", "align_corners": False}
        planes = F.interpolate(planes.float(), size=size, **how).to(latents.dtype)
        return self.closed(rearrange(planes, "(b f) c h w -> b c f h w", b=len(latents)))

    def shrunk_noise(self, latents: torch.Tensor, new: tuple[int, int]) -> torch.Tensor:
        """Standard normal noise of full size as standard normal noise of `new` rows and columns, exactly.

        Along each side the area means R, which are correlated unless the factor is whole, are whitened: (R R^T)^(-1/2)
        R has orthonormal rows. For a factor of 2 this is the mean of 2x2 times 2. What is coarse in the noise stays.
        """
        opened = self.opened(latents, self.full)
        down, across = (
            noise_weights(n * self.patch, m * self.patch).to(latents.device)
            for n, m in zip(self.full, new, strict=True)
        )
        small = torch.einsum("ip, jq, bcfpq -> bcfij", down, across, opened.float())
        return self.closed(small.to(latents.dtype))

    def ids(self, like: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Flux's ids of frames, rows and columns, [N, 3] or with the axes of `like` before it."""
        counts = [torch.arange(n) for n in (self.frames, *grid)]
        ids = torch.stack(torch.meshgrid(*counts, indexing="ij"), dim=-1).reshape(-1, 3).to(like)
        return ids.expand(*like.shape[:-2], *ids.shape)

    def request(self, request: Request, grid: tuple[int, int]) -> Request:
        """The call at another resolution: noise of full size is brought down, and the model is told the size.

        Raises:
            DitaError: the latents are of neither size, or tokens of one sample have different timesteps.
        """
        latents = self.brought(request.latents, grid)
        if not self.fits(latents, grid):
            raise DitaError(
                f"{request.anatomy.name} is called with latents {list(latents.shape)}; expected {grid[0]} x {grid[1]} "
                f"tokens a frame, or {self.rows} x {self.columns}"
            )
        changes: dict[str, Any] = {"hidden_states": latents}
        if self.kind == "ids":
            changes["img_ids"] = self.ids(request.get("img_ids"), grid)
        elif self.kind == "shapes":
            changes["img_shapes"] = _reshaped(request.get("img_shapes"), (self.frames, *grid))
        elif self.kind == "sizes":
            changes |= {"height": grid[0], "width": grid[1]}
        time = request.get("timestep")
        if isinstance(time, torch.Tensor) and time.ndim == 2 and time.shape[1] > 1:
            if not torch.equal(time, time[:, :1].expand_as(time)):
                raise DitaError("the tokens of a sample have different timesteps: it is conditioned on a picture")
            changes["timestep"] = time[:, :1].expand(-1, self.tokens(grid))
        return request.changed(**changes)

    def brought(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Noise of full size brought down; latents of any other size as they are."""
        return self.shrunk_noise(latents, grid) if grid != self.full and self.fits(latents, self.full) else latents


@functools.lru_cache(maxsize=64)
def noise_weights(old: int, new: int) -> torch.Tensor:
    """Orthonormal rows, float32 [new, old], that average as resizing by area does.

    Example:
        >>> noise_weights(4, 2)
        tensor([[0.7071, 0.7071, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.7071, 0.7071]])
    """
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    left, right = edges[:-1, None], edges[1:, None]
    start = torch.arange(old, dtype=torch.float64)
    weights = (torch.minimum(right, start + 1) - torch.maximum(left, start)).clamp(min=0)
    values, vectors = torch.linalg.eigh(weights @ weights.T)
    return (vectors @ torch.diag(values.rsqrt()) @ vectors.T @ weights).float()


def _sizeless(name: str) -> bool:
    return name in _SIZELESS or name.startswith("encoder_")


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


def _reshaped(shapes: Any, new: tuple[int, ...]) -> Any:
    if isinstance(shapes, (list, tuple)) and shapes and isinstance(shapes[0], int):
        return type(shapes)(new)
    return type(shapes)(_reshaped(entry, new) for entry in shapes)
