"""Accelerating a transformer that is in no diffusers pipeline: a robot's policy, a loop of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from dita.anatomy import describe
from dita.config import Method
from dita.errors import DitaError
from dita.models import BLOCKS, MODELS, BlockEntry, ModelEntry
from dita.session import accelerate_pipeline


class Denoiser:
    """A transformer and the scheduler that its sampling loop uses: all that dita needs of a pipeline.

    `dita.report`, `dita.restore_pipeline`, `dita.accelerated` and `dita.calibrate` take it where they take a pipeline.

    Args:
        transformer: the model that the loop calls.
        scheduler: with `set_timesteps`, `timesteps` and `step`, as diffusers has them; it tells dita where in a run a
            call is.

    Raises:
        DitaError: something that is no module or no scheduler.
    """

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        if not isinstance(transformer, nn.Module):
            raise DitaError(f"expected the transformer as a torch module, got {type(transformer).__name__}")
        missing = [name for name in ("set_timesteps", "step") if not callable(getattr(scheduler, name, None))]
        if missing:
            raise DitaError(
                f"{type(scheduler).__name__} has no {' and no '.join(missing)}; expected a scheduler as diffusers has "
                "them, by which dita tells the steps of a run"
            )
        self.transformer, self.scheduler = transformer, scheduler

    @property
    def components(self) -> dict[str, Any]:
        """What a diffusers pipeline shows of itself."""
        return {"transformer": self.transformer, "scheduler": self.scheduler}


def accelerate_model(
    model: nn.Module,
    scheduler: Any,
    *methods: str | Method | type[Method],
    blocks: str | Sequence[str] = (),
    returns: Sequence[str] = (),
    hidden: str = "",
    encoder: str = "encoder_hidden_states",
    text: str = "",
    **options: Any,
) -> Denoiser:
    """Make a transformer faster that a loop of one's own calls; the loop stays as it is.

    What dita cannot read off the source of the model is declared here, for all models of these classes. A loop that
    runs without gradients, calls `scheduler.set_timesteps` once a run and `scheduler.step` once a step is all it takes.

    Args:
        model: the transformer that the loop calls.
        scheduler: the one of the loop.
        methods: names or configs, as in `dita.accelerate_pipeline`.
        blocks: paths of its lists of blocks, in the order they run; by default those that its `forward` loops over.
        returns: what a block returns, in order: "hidden" alone, or with "encoder", a second stream such as text; by
            default what its return statement says.
        hidden, encoder: names of a block's arguments that hold these; by default `hidden` is its first one.
        text: where the second stream's tokens lie in attention over both: "first" or "last".
        options: settings of the one method given.

    Returns:
        what stands for a pipeline in `dita.report` and `dita.restore_pipeline`.

    Raises:
        DitaError: a path without blocks, a block without such an argument, or what `dita.accelerate_pipeline` raises.

    Example:
        >>> policy = accelerate_model(model, scheduler, "efficientvla", interval=3, blocks="layers")  # doctest: +SKIP
        >>> print(dita.report(policy))  # doctest: +SKIP
    """
    denoiser = Denoiser(model, scheduler)
    paths = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    lists = [_list_at(model, path) for path in paths]
    held = [block for found in lists for block in found] or [block.module for block in describe(model).blocks]
    entries: dict[str, BlockEntry] = {}
    if returns or hidden:
        kinds = {type(block): block for block in held}
        entries = {_key(b): _entry(k, tuple(returns) or ("hidden",), hidden, encoder, text) for k, b in kinds.items()}
    before = dict(MODELS), dict(BLOCKS)
    try:
        if paths:
            MODELS[_key(model)] = ModelEntry("", paths, text_used_after=True)
        BLOCKS.update(entries)
        return accelerate_pipeline(denoiser, *methods, **options)
    except BaseException:
        MODELS.clear()
        BLOCKS.clear()
        MODELS.update(before[0])
        BLOCKS.update(before[1])
        raise


def _key(module: nn.Module) -> str:
    """Declared classes are told from diffusers' of the same name."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _list_at(model: nn.Module, path: str) -> list[nn.Module]:
    try:
        found = list(model.get_submodule(path).children())
    except AttributeError:
        found = []
    if not found:
        lists = [name for name, child in model.named_modules() if isinstance(child, nn.ModuleList)]
        raise DitaError(
            f"{type(model).__name__} has no blocks at {path!r}; module lists it holds: {', '.join(lists) or 'none'}"
        )
    return found


def _entry(kind: type, returns: tuple[str, ...], hidden: str, encoder: str, text: str) -> BlockEntry:
    parameters = list(inspect.signature(kind.forward).parameters)[1:]  # pyright: ignore[reportAttributeAccessIssue]
    hidden = hidden or parameters[0]
    if not set(returns) <= {"hidden", "encoder"} or "hidden" not in returns or len(set(returns)) != len(returns):
        raise DitaError(f'returns is {returns}; expected "hidden", alone or with "encoder", each once')
    wanted = [hidden, *([encoder] if "encoder" in returns else [])]
    missing = [name for name in wanted if name not in parameters]
    if missing:
        raise DitaError(f"{kind.__name__} takes no {' and no '.join(missing)}; it takes {', '.join(parameters)}")
    if text not in ("", "first", "last"):
        raise DitaError(f'text is {text!r}; expected "first", "last" or ""')
    return BlockEntry(returns, hidden=hidden, encoder=encoder, text=text)
