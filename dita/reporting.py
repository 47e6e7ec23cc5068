"""What happened: per run, which steps were computed, reused or forecast, and why."""

from __future__ import annotations

import html
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dita.errors import DitaWarning

if TYPE_CHECKING:
    from dita.passage import Timer

_MARK = {"computed": "#", "low-bit": "=", "sparse": "%", "partial": "+", "reused": ".", "forecast": "~", "skipped": "-"}
_COLOUR = {
    "computed": "#1f77b4",
    "low-bit": "#9e9ac8",
    "sparse": "#74c476",
    "partial": "#9ecae1",
    "reused": "#d9d9d9",
    "forecast": "#ffbf66",
    "skipped": "#f7f7f7",
}
_WHOLE = ("computed", "low-bit", "sparse")  # actions of calls in which every site ran
KEPT_RUNS = 20


def in_bytes(count: int) -> str:
    """A number of bytes in words.

    Example:
        >>> in_bytes(1000), in_bytes(3 * 2**19), in_bytes(5 * 2**40)
        ('1000 B', '1.50 MiB', '5120.00 GiB')
    """
    if count < 2**10:
        return f"{count} B"
    scale, unit = (2**10, "KiB") if count < 2**20 else (2**20, "MiB") if count < 2**30 else (2**30, "GiB")
    return f"{count / scale:.2f} {unit}"


@dataclass
class StepRecord:
    """One transformer call.

    Attributes:
        step, stage: solver step from 0, and the model evaluation within it (1 is Heun's second).
        branch: "all", "cond", "uncond" or the pipeline's own name; "cond[2]" where samples run one by one.
        action: "computed", "reused" (the last value stands in), "forecast" (a weighted sum of past values does),
            "partial" (some sites ran, or all of them on fewer tokens), "sparse" (all ran, with a part of the
            attention), "low-bit" (all ran, with attention in fewer bits) or "skipped" (the transformer was not called:
            a guidance branch or a whole step was left out).
        value: the indicator behind the decision, None where a fixed schedule decided.
        reason: the decision in words.
        model: the pipeline's attribute holding the transformer.
        seconds: time of the call.
        density: share of the attention's pairs of tokens that were computed, over the layers that computed any.
        tokens: share of the image tokens that the call had, of those at full resolution.
    """

    step: int
    stage: int
    branch: str
    action: str
    value: float | None
    reason: str
    model: str = "transformer"
    seconds: float = 0.0
    density: float = 1.0
    tokens: float = 1.0


@dataclass(repr=False)
class RunReport:
    """One run of the pipeline.

    Attributes:
        methods: what was attached, with settings.
        steps: solver steps executed.
        records: one per transformer call, in order.
        peak_cache_bytes: most bytes of tensors kept between calls, over all transformers.
        finished: the last step returned.
        note: why calls were left alone, if some were.
        memory: transformer -> what a memory budget made of the method, with the bytes needed.
    """

    methods: tuple[str, ...]
    steps: int = 0
    records: list[StepRecord] = field(default_factory=list)
    peak_cache_bytes: int = 0
    finished: bool = False
    note: str = ""
    memory: dict[str, str] = field(default_factory=dict)
    _timers: list[tuple[Timer, float]] = field(default_factory=list, repr=False)
    _held: dict[str, int] = field(default_factory=dict, repr=False)

    def add(self, record: StepRecord, timer: Timer, cache_bytes: int, memory: str = "", share: float = 1.0) -> None:
        """Append one call, after which its transformer's methods hold `cache_bytes`.

        Branches that were computed in one call share its time evenly.
        """
        self.records.append(record)
        self._timers.append((timer, share))
        self._held[record.model] = cache_bytes
        self.peak_cache_bytes = max(self.peak_cache_bytes, sum(self._held.values()))
        if memory:
            self.memory[record.model] = memory

    def settle(self) -> RunReport:
        """Read the timers and give unnamed branches their names; safe to call at any time, more than once."""
        for record, (timer, share) in zip(self.records, self._timers, strict=True):
            record.seconds = timer.seconds() * share
        unnamed = sorted({r.branch.partition("[")[0] for r in self.records if r.branch.startswith("call ")})
        names = ["all"] if len(unnamed) == 1 else ["cond", "uncond", "third", "fourth"]
        renamed = dict(zip(unnamed, names, strict=False))
        for record in self.records:
            name, bracket, sample = record.branch.partition("[")
            record.branch = renamed.get(name, name) + bracket + sample
        return self

    @property
    def reused(self) -> int:
        """Transformer calls of which at least a part was reused, forecast, left out or computed in fewer bits."""
        return sum(record.action != "computed" for record in self.records)

    @property
    def computed_fraction(self) -> float:
        """Transformer calls in which every site ran, sparsely or not, on all tokens, of all; 1.0 when there was none.

        A call whose samples ran one by one is one call, whatever the batch.
        """
        weights = self._weights()
        whole = sum(w for r, w in zip(self.records, weights, strict=True) if r.action in _WHOLE)
        return whole / sum(weights) if weights else 1.0

    @property
    def length(self) -> float:
        """Transformer calls of a run along its longest branch, all transformers together; counted as above."""
        calls: dict[str, dict[tuple[str, int], float]] = {}
        for record, weight in zip(self.records, self._weights(), strict=True):
            own = calls.setdefault(record.model, {})
            branch = (record.branch.partition("[")[0], record.stage)
            own[branch] = own.get(branch, 0.0) + weight
        return sum(max(own.values()) for own in calls.values())

    def _weights(self) -> list[float]:
        """The share of a call that each record stands for: less than 1 where samples ran one by one."""
        calls = [(r.model, r.step, r.stage, *r.branch.partition("[")[:2]) for r in self.records]
        counts = Counter(call for call in calls if call[-1])
        return [1 / counts.get(call, 1) for call in calls]

    @property
    def density(self) -> float:
        """Mean share of the attention's pairs of tokens that were computed; 1.0 when nothing was left out."""
        return sum(record.density for record in self.records) / len(self.records) if self.records else 1.0

    @property
    def computed_steps(self) -> tuple[int, ...]:
        """Solver steps of which at least one call was computed, sparsely or not."""
        return tuple(sorted({record.step for record in self.records if record.action in _WHOLE}))

    @property
    def seconds(self) -> float:
        """Seconds inside the transformer."""
        return sum(record.seconds for record in self.records)

    def streams(self) -> dict[tuple[str, str, int], list[StepRecord]]:
        """Records by (model, branch, stage)."""
        groups: dict[tuple[str, str, int], list[StepRecord]] = {}
        for record in self.records:
            groups.setdefault((record.model, record.branch, record.stage), []).append(record)
        return groups

    def warn_if_idle(self, disabled: bool) -> None:
        """Tell the user when acceleration did nothing."""
        if disabled or self.reused:
            return
        why = self.note or "no transformer call belonged to the sampling loop"
        if self.records and not self.note:
            reasons: dict[str, int] = {}
            for record in self.records:
                reasons[record.reason] = reasons.get(record.reason, 0) + 1
            why = ", ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda p: -p[1])[:3])
        message = f"0 of {self.steps} steps were reused by {', '.join(self.methods)}: {why}"
        warnings.warn(message, DitaWarning, stacklevel=2)

    def __str__(self) -> str:
        lines = [self._headline()]
        for (model, branch, stage), records in self.streams().items():
            label = branch if model == "transformer" else f"{model} {branch}"
            label = f"{label} (stage {stage})" if stage else label
            marks = "".join(_MARK[r.action] for r in records)
            lines.append(f"  {label:<12} {marks}  {sum(r.action == 'computed' for r in records)} of {len(records)}")
        lines += [f"  {line}" for line in self._budgets()]
        return "\n".join(lines)

    __repr__ = __str__

    def _budgets(self) -> list[str]:
        return [f"{model}: {what}" if len(self.memory) > 1 else what for model, what in self.memory.items()]

    def details(self) -> str:
        """One line per transformer call: step, branch, action, indicator, milliseconds and the reason.

        Example:
            >>> print(RunReport(("m",), records=[StepRecord(0, 0, "all", "computed", None, "first step")]).details())
            step  branch       action    indicator      ms  reason
               0  all          computed          -     0.0  first step
        """
        lines = ["step  branch       action    indicator      ms  reason"]
        for r in self.records:
            branch = f"{r.branch}/{r.stage}" if r.stage else r.branch
            branch = branch if r.model == "transformer" else f"{r.model} {branch}"
            value = "-" if r.value is None else f"{r.value:.4g}"
            lines.append(f"{r.step:4d}  {branch:<12} {r.action:<8}  {value:>9}  {1000 * r.seconds:6.1f}  {r.reason}")
        return "\n".join(lines)

    def _headline(self) -> str:
        state = "" if self.finished else ", not finished"
        times: dict[str, list[float]] = {"computed": [], "sparse": [], "low-bit": [], "fewer tokens": [], "skipped": []}
        fewer = [record for record in self.records if record.action == "partial" and record.tokens < 1]
        for record in self.records:
            kind = "fewer tokens" if record.action == "partial" and record.tokens < 1 else record.action
            times[kind if kind in times else "skipped"].append(record.seconds)
        means = ", ".join(f"{kind} {1000 * sum(v) / len(v):.1f} ms" for kind, v in times.items() if v)
        sparse, low = (sum(record.action == kind for record in self.records) for kind in ("sparse", "low-bit"))
        thinned = f"{sparse} sparse (mean density {self.density:.2f}), " if sparse else ""
        thinned += f"{low} low-bit, " if low else ""
        if fewer:
            thinned += f"{len(fewer)} on fewer tokens (mean {sum(r.tokens for r in fewer) / len(fewer):.0%}), "
        return (
            f"{', '.join(self.methods)}: {self.steps} steps{state}, "
            f"{self.reused - sparse - low - len(fewer)} of {len(self.records)} transformer calls skipped, {thinned}"
            f"{self.peak_cache_bytes / 2**20:.2f} MiB kept; mean call: {means or 'none'}"
        )

    def _repr_html_(self) -> str:
        rows = []
        for (model, branch, stage), records in self.streams().items():
            cells = "".join(
                f'<td title="step {r.step}: {html.escape(r.action)}, {html.escape(r.reason)}'
                f'{"" if r.value is None else f", {r.value:.4g}"}, {1000 * r.seconds:.1f} ms" '
                f'style="background:{_COLOUR[r.action]};width:10px;height:14px;padding:0;border:1px solid #fff"></td>'
                for r in records
            )
            name = html.escape(f"{model} {branch}" + (f" stage {stage}" if stage else ""))
            rows.append(f'<tr><th style="text-align:right;font-weight:normal">{name}</th>{cells}</tr>')
        legend = " ".join(f'<span style="background:{c};padding:0 6px">{a}</span>' for a, c in _COLOUR.items())
        head = "<br>".join(map(html.escape, (self._headline(), *self._budgets())))
        return f"<div><p>{head}</p><table>{''.join(rows)}</table><p>{legend}</p></div>"


@dataclass(repr=False)
class Report:
    """The last runs of an accelerated pipeline, newest last, and what is attached.

    Attributes:
        methods: the methods with their settings, as text.
        models: per transformer, what was found in it.
        runs: the last 20 runs.
    """

    methods: tuple[str, ...]
    models: tuple[str, ...]
    runs: list[RunReport]

    @property
    def last(self) -> RunReport:
        """The newest run; an empty one if there was none."""
        return self.runs[-1] if self.runs else RunReport(self.methods)

    def __str__(self) -> str:
        head = [f"dita: {', '.join(self.methods)}", *(f"  {line}" for line in self.models)]
        body = [str(self.last)] if self.runs else ["no run yet"]
        legend = "  # computed   = low-bit   % sparse   + partial   ~ forecast   . reused   - skipped"
        return "\n".join([*head, *body, legend])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        body = self.last._repr_html_() if self.runs else "<p>no run yet</p>"
        return f"<b>dita</b> {html.escape('; '.join(self.models))}{body}"
