"""The adapters of one transformer: the layers they add to, and their file.

See `dita.schedulers.guidance.agd`. An adapter belongs to the layer that projects an attention module's output, and adds
to what this layer puts out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dita.anatomy import Anatomy, ModulePart
from dita.errors import DitaError
from dita.files import read_tensors
from dita.fingerprint import fingerprint
from dita.schedulers.guidance.agd_adapters import Adapter, Conditions

_OUTPUT = re.compile(r"\.(to_out|to_out\.0)$")


def output_layers(anatomy: Anatomy) -> tuple[ModulePart, ...]:
    """The layers that adapters act on: the output projections of cross-attention, else of self- and joint attention.

    In blocks with one projection for attention and MLP it is this one.

    Raises:
        DitaError: no such layer was found.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> from dita.anatomy import describe
        >>> model = DiTTransformer2DModel(num_layers=2, num_attention_heads=1, attention_head_dim=8)
        >>> [part.site.name for part in output_layers(describe(model))]
        ['transformer_blocks.0.attn1.to_out.0', 'transformer_blocks.1.attn1.to_out.0']
    """
    anatomy.require("module", "agd")
    attentions = [part.site for part in anatomy.attentions() if not part.site.text]
    crossing = [site for site in attentions if site.role == "cross-attention"]
    names = {site.name for site in crossing or attentions}
    joining = {part.site.name for part in anatomy.modules if part.site.role == "parallel"}
    found = tuple(
        part
        for part in anatomy.linears
        if part.site.name in joining or (_OUTPUT.search(part.site.name) and _OUTPUT.split(part.site.name)[0] in names)
    )
    if not found:
        raise DitaError(
            f"agd adds to the output projection of attention modules, named to_out; {anatomy.name} has none in "
            f"{', '.join(sorted(names)[:3]) or 'any attention module'}"
        )
    return found


def class_embedding(anatomy: Anatomy, block: int) -> nn.Embedding | None:
    """The embedding that a block, or else the model, has of its classes; None without any."""
    for module in (anatomy.blocks[block].module, anatomy.model):
        found = next((m for m in module.modules() if isinstance(m, nn.Embedding)), None)
        if found is not None:
            return found
    return None


class AdapterSet(nn.Module):
    """The adapters of one transformer, untrained; parameters are float32.

    Args:
        anatomy: of the transformer, which stays as it is.
        kind: see `Adapter`.
        width: of the embeddings, even.
        sources: see `Adapter`.
        scales: the least and the largest guidance scale of the training.
        model: fingerprint of the transformer.

    Raises:
        DitaError: the transformer has no layers for them, or no embeddings of its classes.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        kind: str,
        width: int,
        sources: Mapping[str, int],
        scales: Sequence[float] = (1.0, 6.0),
    ) -> None:
        super().__init__()
        self.kind, self.width, self.sources, self.scales = kind, width, dict(sources), (scales[0], scales[1])
        self.model = fingerprint(anatomy.model)
        parts = output_layers(anatomy)
        self.sites = tuple(part.site for part in parts)
        self.layers: list[Any] = [part.module for part in parts]
        # Their weights are read anew at each call, because a pipeline may be moved to another device.
        self._classes = [class_embedding(anatomy, site.block) if "labels" in sources else None for site in self.sites]
        if "labels" in sources and None in self._classes:
            raise DitaError(f"{anatomy.name} takes class labels and holds no embedding of them, which agd reads")
        self.adapters = nn.ModuleList(Adapter(kind, width, layer.out_features, sources) for layer in self.layers)

    @classmethod
    def for_call(cls, anatomy: Anatomy, arguments: Mapping[str, Any], kind: str = "auto", width: int = 32, **options):
        """Untrained adapters that read all that such a call of the transformer says.

        Args:
            anatomy: of the transformer.
            arguments: of a call, by name.
            kind: as of `Adapter`; "auto" is "cross" where there are tokens of text and "offset" elsewhere.
            width, options: see the class.

        Raises:
            DitaError: see the class.
        """
        batch = arguments["hidden_states"].shape[0]
        given = Conditions.of(arguments, torch.zeros(batch), torch.zeros(batch))
        sources: dict[str, int] = {}
        if given.labels is not None:
            classes = class_embedding(anatomy, 0)
            sources["labels"] = 0 if classes is None else classes.embedding_dim
        for name in ("pooled", "text"):
            value = getattr(given, name)
            if value is not None:
                sources[name] = value.shape[-1]
        if kind == "auto":
            kind = "cross" if given.text is not None else "offset"
        return cls(anatomy, kind, width, sources, **options)

    def add(self, number: int, output: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The output of a layer with its adapter's share.

        Args:
            number: of the layer.
            output: [B, N, C], or [k B, N, C] where the model puts k rows of each sample side by side.
            conditions: of the call.

        Raises:
            DitaError: the output is of another shape.
        """
        batch = len(conditions.scale)
        if output.shape[0] % batch or output.ndim < 3:
            raise DitaError(
                f"{self.sites[number].name} puts out {tuple(output.shape)} for {batch} samples; agd expects a multiple "
                "of the batch first and the channels last"
            )
        tokens = output.reshape(batch, -1, output.shape[-1]).float()
        classes = self._classes[number]
        added = self.adapters[number](tokens, conditions, None if classes is None else classes.weight.detach())
        return output + added.expand_as(tokens).reshape(output.shape).to(output.dtype)

    def save(self, path: str | Path) -> None:
        """Write the parameters as safetensors, with what they were trained for.

        Args:
            path: of the file.
        """
        from safetensors.torch import save_file

        about = {"kind": self.kind, "width": self.width, "sources": self.sources, "scales": self.scales}
        about |= {"model": self.model, "sites": [site.name for site in self.sites]}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, path, {"agd": json.dumps(about)})


def load_adapters(path: str | Path, anatomy: Anatomy) -> AdapterSet:
    """Read adapters that `AdapterSet.save` wrote, for the transformer that they were trained on.

    Args:
        path: a safetensors file.
        anatomy: of the transformer.

    Raises:
        DitaError: no such file, or adapters of another model.

    Example:
        >>> load_adapters("agd.safetensors", describe(pipe.transformer))  # doctest: +SKIP
    """
    tensors, texts = read_tensors(path, "AGD's adapters", "train_agd")
    try:
        about = json.loads(texts["agd"])
        model, sites = about["model"], about["sites"]
        kind, width, sources, scales = (about[name] for name in ("kind", "width", "sources", "scales"))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DitaError(f"cannot read AGD's adapters {path} ({error!r}); train_agd writes it") from None
    own = fingerprint(anatomy.model)
    if model != own:
        raise DitaError(f"the adapters in {path} were trained on {model}, not on {own}: train others")
    adapters = AdapterSet(anatomy, kind, width, sources, scales)
    if sites != [site.name for site in adapters.sites]:
        raise DitaError(f"the adapters in {path} are for {', '.join(sites[:3])}, ..., which {anatomy.name} lacks")
    try:
        adapters.load_state_dict(tensors)
    except RuntimeError as error:
        raise DitaError(f"the adapters in {path} do not fit {anatomy.name}: {error}") from None
    return adapters.requires_grad_(False)
