"""What a sweep compares: the plain run, the plain sampler with fewer steps, and every method along its ladder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dita.errors import DitaError
from dita.eval.labels import words
from dita.eval.sampling import Sampling

if TYPE_CHECKING:
    from dita.config import Method
    from dita.eval.composition import Composition
    from dita.eval.peers import Peer

FEWER_STEPS = "fewer steps"
PLAIN = "plain"
QUICK = ("fitted", "taylorseer", "ab-cache", "magcache", "fbcache")
"""What a quick sweep takes: forecasts fitted to the pipeline, of modules and of the model's output, a table, probes."""

_FEWER_STEPS_LADDER = (0.8, 0.5, 0.4, 0.3, 0.24, 0.2, 0.16)  # of the plain run's steps
_ROOMS = ("caching", "kernels", "schedulers", "eval/metrics", "eval/peers")
_MEASURING = (
    "bench", "classifier", "composition", "data", "flops", "judge", "memory", "sampling", "timing", "worldnet"
)  # fmt: skip
_EVAL_FILES = tuple(f"{name}.py" for name in _MEASURING)


@dataclass(frozen=True)
class Setting:
    """One row to be.

    Attributes:
        method: registry name, several joined by " + ", a peer's name, "fewer steps" or "plain".
        label: the setting in words.
        steps: solver steps of the pipeline's call.
        config: the method or peer with its settings; None for the other two.
    """

    method: str
    label: str
    steps: int
    config: Method | Composition | Peer | None = None

    @property
    def origin(self) -> str:
        """Whose it is: "dita", "peer" or "baseline"."""
        from dita.config import Method
        from dita.eval.composition import Composition

        if self.config is None:
            return "baseline"
        return "dita" if isinstance(self.config, (Method, Composition)) else "peer"

    def key(self, context: dict[str, Any]) -> str:
        """Digest of this setting and everything else its numbers depend on, 16 hex digits."""
        own = {"method": self.method, "steps": self.steps, "config": self.config.to_dict() if self.config else None}
        return digest({**context, **own})


def digest(value: Any) -> str:
    """Digest of a JSON value, 16 hex digits.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def plan(
    steps: int,
    methods: Sequence[str] | None = None,
    quick: bool = False,
    peers: bool = False,
    strengths: int | None = None,
) -> list[Setting]:
    """List the settings of a sweep: plain first, then fewer steps, the methods in the registry's order, the peers.

    Args:
        steps: solver steps of the plain run.
        methods: registry names, peers' names, or "fewer steps"; if None all but the peers.
        quick: two settings for each method and for fewer steps, at a fifth and a half of its ladder; if no methods are
            named, those in QUICK.
        peers: if no methods are named, the installed peers too.
        strengths: so many settings of each, from a fifth of its ladder on; if None, all but in a quick plan.

    Returns:
        The settings, without repetitions.

    Raises:
        DitaError: a method is unknown.

    Example:
        >>> [setting.label for setting in plan(50, ["fewer steps"], quick=True)]
        ['50 steps', '25 steps', '15 steps']
    """
    from dita import registry
    from dita.eval.peers import peers as installed

    others = {peer.name: peer for peer in installed()}
    ours = (FEWER_STEPS, *registry.names())
    known = (*ours, *others)
    if methods is None and quick:
        methods = (FEWER_STEPS, *QUICK, *(others if peers else ()))
    wanted = list(dict.fromkeys((known if peers else ours) if methods is None else methods))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise DitaError(f"unknown methods {', '.join(unknown)}; known are {', '.join(known)}")
    settings = [Setting(PLAIN, f"{steps} steps", steps)]
    for name in wanted:
        if name == FEWER_STEPS:
            counts = dict.fromkeys(max(1, round(steps * part)) for part in _FEWER_STEPS_LADDER)
            ladder = [Setting(name, f"{count} steps", count) for count in counts if count < steps]
        else:
            configs = (others[name] if name in others else registry.get(name)).ladder()
            labels = varying(configs)
            ladder = [Setting(name, label, steps, config) for label, config in zip(labels, configs, strict=True)]
        if strengths is not None or quick:
            ladder = thin(ladder, strengths or 2)
        settings += ladder
    return settings


def varying(configs: Sequence[Method | Composition | Peer]) -> list[str]:
    """Name each config of a ladder by the settings that are not the same all along it, and those not at their default.

    Example:
        >>> from dita.caching import FirstBlockCache, TaylorSeer
        >>> varying([FirstBlockCache(threshold=0.05), FirstBlockCache(threshold=0.1)])
        ['threshold=0.05', 'threshold=0.1']
        >>> varying([TaylorSeer(interval=3, warmup=5), TaylorSeer(interval=6, warmup=5)])
        ['interval=3 warmup=5', 'interval=6 warmup=5']
    """
    from dita.eval.composition import Composition

    values = [config.to_dict()["settings"] for config in configs]
    names = [name for name in (values[0] if values else {}) if any(v[name] != values[0][name] for v in values)]
    return [
        config.label() if isinstance(config, Composition) else words(type(config), v, names)
        for v, config in zip(values, configs, strict=True)
    ]


def thin(ladder: Sequence[Any], count: int = 2) -> list[Any]:
    """Keep some settings of a ladder, from a fifth of its length on: two end at its half, more at its last fifth.

    Example:
        >>> thin("abcdefg"), thin("abcdefg", 3), thin("ab", 3)
        (['b', 'd'], ['b', 'd', 'f'], ['a', 'b'])
    """
    last = len(ladder) - 1
    if last < count:
        return list(ladder)
    stretch = 0.6 if count > 2 else 0.3
    places = [round(last * (0.2 + stretch * number / max(1, count - 1))) for number in range(count)]
    for number, place in enumerate(places[1:], 1):
        places[number] = max(place, places[number - 1] + 1)
    return [ladder[place] for place in places]


def source_digest() -> str:
    """Digest of the code that decides what a run computes and how it is judged; plots and reports may change freely."""
    import dita

    root = Path(dita.__file__).resolve().parent
    paths = [*root.glob("*.py"), *(root / "eval" / name for name in _EVAL_FILES)]
    for room in _ROOMS:
        paths += (root / room).rglob("*.py")
    content = hashlib.sha256()
    for path in sorted(paths):
        content.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def context(sampling: Sampling, weights: str, judge: str, threads: int, device: str) -> dict[str, Any]:
    """Everything besides the setting itself that a row's numbers depend on, as JSON values.

    Args:
        sampling: what is drawn.
        weights: the pipeline's fingerprint.
        judge: the judge's identity.
        threads: CPU threads.
        device: name of the machine's processor.
    """
    return {
        **{name: value for name, value in asdict(sampling).items() if name not in ("steps", "prompts", "call")},
        "prompts": digest(sampling.prompts) if sampling.prompts else None,
        "call": dict(sampling.call),
        "plain_steps": sampling.steps,
        "weights": weights,
        "judge": judge,
        "threads": threads,
        "device": device,
        "source": source_digest(),
        "torch": torch.__version__,
    }
