"""The sweep: methods x strengths on one pipeline, measured, kept, resumed, reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dita.errors import DitaError
from dita.eval.bench import Bench
from dita.eval.calibrations import with_bundled
from dita.eval.environment import device_name
from dita.eval.group import join_group
from dita.eval.judge import make_judge
from dita.eval.pipelines import fingerprint, load_pipeline, pipeline_folder
from dita.eval.recipes import expand
from dita.eval.sampling import Sampling, check_pipeline
from dita.eval.settings import context, plan
from dita.eval.sweeping import Sweep
from dita.eval.task import task_of
from dita.eval.timing import pinned_threads

_PAIRS, _QUICK_PAIRS = 3, 2
_LEAST_BATCHES = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run_sweep(
    model: str = "fashion-dit",
    out: str | Path = "runs/sweep",
    quick: bool = False,
    methods: Sequence[str] | None = None,
    peers: bool = False,
    settings: Sequence[Any] | None = None,
    samples: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    threads: int = 0,
    batch: int | None = None,
    guidance: float | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    prompts: str | Path | Sequence[str] | None = None,
    call: Mapping[str, Any] | None = None,
    published_metrics: bool | None = None,
    clip: str | Path | None = None,
    pairs: int | None = None,
    strengths: int | None = None,
) -> Path:
    """Run every setting that is not yet in `out`, then write the table, the plot and the report of all of them.

    Processes started by `accelerate launch` share the samples; the numbers are those of a single process but for the
    times.

    Args:
        model: bundled pipeline by name, the folder of a diffusers pipeline, or its hub id.
        out: folder of results.jsonl, results.md, pareto.png, report.html and images/.
        quick: two settings for each method, few samples, FID and LPIPS left out.
        methods: registry names, peers' names, or "fewer steps"; if None all but the peers.
        peers: if no methods are named, the installed peers too.
        settings: recipes as in a sweep file instead of `methods`; see `dita.eval.recipes.expand`.
        samples: images or videos per setting; the pipeline's own default if None, as for the next three.
        steps: solver steps of the plain run.
        batch: samples in one call, lowered so that there are at least three calls.
        guidance: `guidance_scale`.
        seed: of the samples, and of the captions where they are drawn.
        threads: CPU threads; 0 keeps torch's number.
        device: "cpu" or "cuda".
        dtype: of the weights: "fp32", "bf16" or "fp16".
        prompts: file with a prompt a line, or the prompts; a bundled pipeline draws captions of its own.
        call: further arguments of the pipeline's call, such as {"height": 512}; over the pipeline's defaults. Samples
            of another size than a bundled pipeline's own are compared with the plain run only.
        published_metrics: see `make_judge`.
        clip: folder or hub id of a CLIP model for the CLIP score.
        pairs: timed batches per setting that are followed by the plain run of the same batch, at least 1; if None 2 in
            a quick sweep, else 3. One will do where a call takes a minute.
        strengths: settings of each method, spread over its ladder; if None all of them, or two in a quick sweep. Not
            with `settings`, which name their own.

    Returns:
        The path of report.html.

    Raises:
        DitaError: the pipeline or a method is unknown, or an argument makes no sense. A setting that fails does not
            raise: its row holds the error, and it is tried again by the next call.

    Example:
        >>> run_sweep(quick=True)  # doctest: +SKIP
        PosixPath('runs/sweep/report.html')
    """
    if dtype not in DTYPES:
        raise DitaError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if settings is not None and strengths is not None:
        raise DitaError("settings are listed one by one, so that strengths has nothing to choose from; leave it out")
    folder = pipeline_folder(model)
    task = task_of(folder)
    count = samples or (task.quick_samples if quick else task.samples)
    sampling = Sampling(
        samples=count,
        batch=min(batch or task.batch, max(1, count // _LEAST_BATCHES)),
        steps=steps or task.steps,
        guidance=task.guidance if guidance is None else guidance,
        seed=seed,
        prompts=task.prompts(count, seed) if prompts is None else read_prompts(prompts),
        call={**task.call, **(call or {})},
    )
    if settings is None:
        chosen = plan(sampling.steps, methods, quick, peers, strengths)
    else:
        chosen = expand(list(settings), sampling.steps)
    if sampling.guidance == task.guidance:
        chosen = with_bundled(chosen, folder)
    group, place = join_group(device)
    judge = make_judge(
        task.sized(sampling.call), False if quick and published_metrics is None else published_metrics, place, clip
    )
    pipe: Any = load_pipeline(folder, DTYPES[dtype], place)
    check_pipeline(pipe, sampling)
    with pinned_threads(threads) as used:
        surroundings = context(sampling, fingerprint(folder), judge.identity, used, device_name(place))
        surroundings |= {"task": Path(model).name, "dtype": dtype}
        bench = Bench(pipe, sampling, pairs or (_QUICK_PAIRS if quick else _PAIRS), group)
        sweep = Sweep(Path(out), bench, judge, surroundings)
        sweep.run(chosen)
        return sweep.write(chosen, Path(model).name)


def read_prompts(prompts: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Read prompts from a file, one a line, empty lines left out; a sequence is returned as it is.

    Raises:
        DitaError: the file cannot be read or holds none.

    Example:
        >>> read_prompts(["a red bag"])
        ('a red bag',)
    """
    if not isinstance(prompts, (str, Path)):
        lines = tuple(prompts)
    else:
        try:
            lines = tuple(line.strip() for line in Path(prompts).read_text(encoding="utf-8").splitlines())
        except OSError as error:
            raise DitaError(f"cannot read the prompts in {prompts}: {error}") from error
    kept = tuple(line for line in lines if line)
    if not kept:
        raise DitaError(f"there are no prompts in {prompts!r}")
    return kept
