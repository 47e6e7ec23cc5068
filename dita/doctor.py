"""What dita can do on a stored pipeline, told from its configuration files alone: no weights are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dita.errors import DitaError

if TYPE_CHECKING:
    from dita import SupportReport

_CONFIG_FILES = ["model_index.json", "config.json", "*/config.json"]


@dataclass(frozen=True)
class Finding:
    """One transformer of a stored pipeline.

    Attributes:
        component: its attribute in the pipeline, such as "transformer_2"; "model" for a bare transformer folder.
        class_name: the class its configuration names.
        support: what `dita.supports` says; None if the model could not be built.
        problem: why it could not be built; "" if it was.
    """

    component: str
    class_name: str
    support: SupportReport | None
    problem: str = ""

    @property
    def usable(self) -> bool:
        """At least one method runs on this transformer."""
        return self.support is not None and any(ok for ok, _ in self.support.methods.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `dita doctor --json` prints them."""
        verdicts = {"seams": {}, "methods": {}}
        if self.support is not None:
            verdicts = {"seams": self.support.seams, "methods": self.support.methods}
        return {
            "component": self.component,
            "class": self.class_name,
            "problem": self.problem,
            **{
                kind: {name: {"ok": ok, "reason": reason} for name, (ok, reason) in of_kind.items()}
                for kind, of_kind in verdicts.items()
            },
        }


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found.

    Attributes:
        source: the folder or hub id asked for.
        pipeline: class of the pipeline, or of the bare model.
        findings: one per transformer.
        problem: why there is none; "" otherwise.
    """

    source: str
    pipeline: str
    findings: tuple[Finding, ...]
    problem: str = ""

    @property
    def usable(self) -> bool:
        """At least one method runs on at least one transformer."""
        return any(finding.usable for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `dita doctor --json` prints them."""
        return {
            "source": self.source,
            "pipeline": self.pipeline,
            "problem": self.problem,
            "transformers": [finding.to_dict() for finding in self.findings],
        }


def examine(source: str | Path) -> Diagnosis:
    """Build every transformer of a stored pipeline without weights and ask `dita.supports` about it.

    Args:
        source: folder of a pipeline (with model_index.json) or of one transformer (with config.json), or the id of a
            pipeline on the Hugging Face hub, of which only the configuration files are read.

    Raises:
        DitaError: the folder holds no diffusers configuration, or the hub cannot be reached or knows no such id.

    Example:
        >>> import tempfile
        >>> from diffusers import DiTTransformer2DModel
        >>> tiny = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, in_channels=1, num_layers=2,
        ...                              sample_size=8, num_embeds_ada_norm=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tiny.save_pretrained(folder)
        ...     examine(folder).findings[0].class_name
        'DiTTransformer2DModel'
    """
    folder = _locate(str(source))
    index_file, config_file = folder / "model_index.json", folder / "config.json"
    if index_file.is_file():
        index = _read_json(index_file)
        pipeline = str(index.get("_class_name", "unknown"))
        parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
        wanted = [name for name in parts if name.startswith("transformer") and parts[name][1] is not None]
        if not wanted:
            held = ", ".join(f"{name} ({value[1]})" for name, value in parts.items() if value[1] is not None)
            problem = f"{pipeline} has no transformer, which is all that dita accelerates; it has: {held or 'nothing'}"
            return Diagnosis(str(source), pipeline, (), problem)
        findings = tuple(_finding(name, parts[name][1], folder / name / "config.json") for name in wanted)
        return Diagnosis(str(source), pipeline, findings)
    if config_file.is_file():
        class_name = str(_read_json(config_file).get("_class_name", ""))
        if class_name:
            return Diagnosis(str(source), class_name, (_finding("model", class_name, config_file),))
    raise DitaError(
        f"{source} holds neither a model_index.json nor a diffusers config.json: give the folder of a pipeline saved "
        "with save_pretrained, or of one transformer"
    )


def _finding(component: str, class_name: str, config_file: Path) -> Finding:
    from accelerate import init_empty_weights

    import dita

    cls = _find_class(class_name)
    if cls is None:
        import diffusers

        problem = f"diffusers {diffusers.__version__} has no class of this name: update diffusers, or load the pipeline"
        return Finding(component, class_name, None, f"{problem} with its custom code and call dita.supports(pipe)")
    if not config_file.is_file():
        return Finding(component, class_name, None, f"its configuration {config_file.name} is missing in {component}/")
    config = _read_json(config_file)
    try:
        with init_empty_weights():
            model = cls.from_config(config)
    except Exception as error:
        return Finding(component, class_name, None, f"it cannot be built from its configuration: {error}")
    return Finding(component, class_name, dita.supports(model))


def _find_class(name: str) -> Any:
    import diffusers

    try:
        return getattr(diffusers, name, None)
    except (ImportError, RuntimeError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DitaError(f"{path} is not JSON ({error}): save or download the pipeline again") from None
    if not isinstance(value, dict):
        raise DitaError(f"{path} holds a {type(value).__name__}; expected a JSON object: save the pipeline again")
    return value


def _locate(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise DitaError(f"{source!r} is no folder, nor a hub id such as owner/name: check the spelling")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_CONFIG_FILES))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DitaError(
            f"{source!r} is no local folder and could not be read from the Hugging Face hub ({type(error).__name__}: "
            f"{reason}). Check the id and the connection, log in if it is gated, or give the folder of a local copy"
        ) from error
