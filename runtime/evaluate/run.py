"""`evaluate`: models and a text in, a report out, and its files if a folder is named.

    find the models -> load -> stream the text -> time generation -> report -> files

Models are loaded together and scored in one pass beside the original where memory allows it, else
one after another. The files appear under their name only when complete.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from qtool.errors import UnknownName, UsageError
from qtool.json_files import write_json
from qtool.output import OutputFolder
from qtool.progress import bar
from qtool.runtime.bench.conditions import environment
from qtool.runtime.config import Device
from qtool.runtime.evaluate.agreement import Agreement, agreement
from qtool.runtime.evaluate.divergence import summarize
from qtool.runtime.evaluate.markdown import to_markdown
from qtool.runtime.evaluate.outcomes import (
    Questions,
    Scoring,
    Spoken,
    let_speak,
    score_models,
    tokenizer_notes,
)
from qtool.runtime.evaluate.page import to_html
from qtool.runtime.evaluate.perplexity import (
    perplexity,
)
from qtool.runtime.evaluate.report import EvaluationReport, ModelReport, TextUsed, to_json
from qtool.runtime.evaluate.scorer import (
    DTYPES,
)
from qtool.runtime.evaluate.sizes import weight_hashes
from qtool.runtime.evaluate.stored import (
    Recorder,
    StoredReference,
    is_stored_reference,
    open_stored,
)
from qtool.runtime.evaluate.subject import Reference, Subject, find_reference, open_subjects
from qtool.runtime.evaluate.tasks.tasks import open_task, require_different_names
from qtool.runtime.evaluate.text import (
    DEFAULT_MAX_TOKENS,
    EvaluationText,
    ScoringDtype,
    read_text,
)
from qtool.settings import Rounding
from qtool.source import Source


def evaluate(
    models: str | Source | Sequence[str | Source],
    against: str | Source | None = None,
    *,
    text: Path | None = None,
    out: Path | None = None,
    max_tokens: int | None = DEFAULT_MAX_TOKENS,
    dtype: ScoringDtype = "float32",
    device: Device = "auto",
    activations: Rounding | None = None,
    papers: bool = True,
    force: bool = False,
    speed: bool = True,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    task_limit: int | None = None,
    lm_eval: Sequence[str] = (),
    lm_eval_include: Path | None = None,
    save_reference: Path | None = None,
    command: str | None = None,
) -> EvaluationReport:
    """Perplexity of each model, and its divergence from the original.

    models      one or several: folders, .gguf files, Hub ids or builtin:NAME
    against     the original, or a file of its predictions (`stored`), whose text is then scored;
                None: what qtool.json names as the source, if it is on this machine
    text        a UTF-8 file; None: the text that ships, disjoint from the calibration text
    out         a folder for report.json, report.md and report.html; None: no files
    max_tokens  of the text; None: all of it
    activations of quantized layers: "int8", rounded as they are served; "bf16": not rounded;
                "llama.cpp": GGUF files' as that program rounds them on a CPU, in float32; None:
                what QTOOL_ACTIVATIONS says, or else int8
    papers      perplexity by the papers' protocol too, a second run over the text
    tasks       names of `tasks.TASKS`, or files of questions
    task_data   a folder that holds the files of named tasks; None: the Hub
    task_limit  questions of each task; None: all
    lm_eval     tasks of lm-evaluation-harness
    lm_eval_include  a folder of task files for it
    save_reference   a file to keep the original's predictions in, or the first model's where
                there is no original
    command     what the report names as the way to repeat it; by default `qtool eval ...`
    """
    wanted = [models] if isinstance(models, str | Source) else list(models)
    _check(wanted, dtype, max_tokens, activations)
    stage = nullcontext() if out is None else OutputFolder(out, force=force)
    opened = tuple(open_task(task, folder=task_data, limit=task_limit) for task in tasks)
    require_different_names(opened)
    recorder = None if save_reference is None else Recorder(save_reference)
    stored = _stored(against, text)
    content = read_text(text) if stored is None else as_text(stored)
    subjects = open_subjects(wanted)
    if activations == "llama.cpp":
        _require_gguf(subjects)
    if stored is None:
        reference, note = find_reference(against, subjects)
    else:
        _require_room(stored, subjects)
        max_tokens = None
        reference, note = Reference(None, f"Compared with the predictions in {stored.name}.")
    scoring = score_models(
        subjects,
        reference,
        content,
        max_tokens,
        Questions(opened, tuple(lm_eval), lm_eval_include, task_limit),
        stored=stored,
        recorder=recorder,
        dtype=dtype,
        device=device,
        activations=activations,
        papers=papers,
    )
    originals = [] if reference is None else [reference]
    speeds = let_speak([*originals, *subjects], scoring, device) if speed else {}
    reports = {
        subject.name: _model_report(subject, reference, scoring, speeds)
        for subject in [*originals, *subjects]
    }
    report = EvaluationReport(
        text=TextUsed(
            name=content.name,
            sha256=content.sha256,
            num_characters=len(content.content),
            num_tokens=scoring.num_tokens,
            num_tokens_used=scoring.read.tokens.numel(),
            overlap=content.overlap,
        ),
        reference=None if reference is None else reports[reference.name],
        models=tuple(reports[subject.name] for subject in subjects),
        command=command
        or as_command(
            wanted,
            against,
            text,
            max_tokens,
            dtype,
            activations=activations,
            papers=papers,
            tasks=tasks,
            task_data=task_data,
            task_limit=task_limit,
            lm_eval=lm_eval,
            lm_eval_include=lm_eval_include,
        ),
        environment=environment(),
        notes=(*(() if note is None else (note,)), *tokenizer_notes(scoring)),
    )
    with stage as folder:
        if folder is not None:
            write_report(report, folder.path)
    return report


def _stored(against: str | Source | None, text: Path | None) -> StoredReference | None:
    if not isinstance(against, str) or not is_stored_reference(Path(against)):
        return None
    if text is not None:
        raise UsageError(
            f"{against} holds the tokens that were scored, so --text cannot choose others"
        )
    return open_stored(Path(against))


def _require_room(stored: StoredReference, subjects: Sequence[Subject]) -> None:
    for subject in subjects:
        if subject.context < stored.window:
            raise UsageError(
                f"{stored.name} has windows of {stored.window} tokens, the context of "
                f"{subject.name} is {subject.context}"
            )


def as_text(stored: StoredReference) -> EvaluationText:
    """What a report says of the text, of which a file has the tokens alone."""
    digest = hashlib.sha256(stored.tokens.numpy().tobytes()).hexdigest()
    return EvaluationText(f"the tokens in {stored.name}", "", digest, None)


def write_report(report: EvaluationReport, folder: Path) -> None:
    """report.json, report.md and report.html."""
    write_json(folder / "report.json", to_json(report))
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(to_html(report), encoding="utf-8")


def as_command(
    models: Sequence[str | Source],
    against: str | Source | None,
    text: Path | None,
    max_tokens: int | None,
    dtype: str,
    *,
    activations: str | None = None,
    papers: bool = True,
    tasks: Sequence[str] = (),
    task_data: Path | None = None,
    task_limit: int | None = None,
    lm_eval: Sequence[str] = (),
    lm_eval_include: Path | None = None,
) -> str:
    """The command line that repeats an evaluation."""
    words = ["qtool", "eval", *map(_as_given, models)]
    words += [] if against is None else ["--against", _as_given(against)]
    words += [] if text is None else ["--text", str(text)]
    if max_tokens != DEFAULT_MAX_TOKENS:
        words += ["--max-tokens", str(max_tokens or 0)]
    words += [] if dtype == "float32" else ["--dtype", dtype]
    words += [] if activations is None else ["--activations", activations]
    words += [] if papers else ["--no-papers"]
    words += ["--tasks", ",".join(tasks)] if tasks else []
    words += [] if task_data is None else ["--task-data", str(task_data)]
    words += [] if task_limit is None else ["--task-limit", str(task_limit)]
    words += ["--lm-eval", ",".join(lm_eval)] if lm_eval else []
    words += [] if lm_eval_include is None else ["--lm-eval-include", str(lm_eval_include)]
    return shlex.join(words)


def _as_given(model: str | Source) -> str:
    return model if isinstance(model, str) else model.name


def _check(
    models: Sequence[str | Source],
    dtype: str,
    max_tokens: int | None,
    activations: Rounding | None,
) -> None:
    if not models:
        raise UsageError("no model to evaluate", "name one: qtool eval ./Qwen3-0.6B-int4")
    if dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}, must be at least 1, or None for all")
    if activations == "llama.cpp" and dtype != "float32":
        raise UsageError(
            f"--activations llama.cpp with --dtype {dtype}: llama.cpp computes in float32 on CPUs",
            "leave --dtype away",
        )


def _require_gguf(subjects: Sequence[Subject]) -> None:
    for subject in subjects:
        if subject.reader.format not in ("gguf", "dense"):
            raise UsageError(
                f"--activations llama.cpp: {subject.name} is {subject.reader.format}, and "
                "llama.cpp runs GGUF files",
                f"qtool convert {subject.source.name} --to gguf, then evaluate that file",
            )


def _agreement(
    model: str, reference: Subject | None, speeds: Mapping[str, Spoken]
) -> Agreement | None:
    if reference is None or model == reference.name:
        return None
    if model not in speeds or reference.name not in speeds:
        return None
    return agreement(speeds[model].texts, speeds[reference.name].texts)


def _model_report(
    subject: Subject,
    reference: Subject | None,
    scoring: Scoring,
    speeds: Mapping[str, Spoken],
) -> ModelReport:
    outcome = scoring.outcomes[subject.name]
    manifest = subject.manifest
    spoken = speeds.get(subject.name)
    with bar(f"hashing {subject.name}"):
        hashes = weight_hashes(subject.source)
    return ModelReport(
        name=subject.name,
        model=subject.source.name,
        format=subject.reader.format,
        scored_by=outcome.scored_by,
        dtype=outcome.dtype,
        size_bytes=subject.size.file_bytes,
        num_weights=subject.size.num_weights,
        bits_per_weight=subject.size.bits_per_weight,
        quantized_bits_per_weight=subject.size.quantized_bits_per_weight,
        sha256=hashes,
        perplexity=tuple(
            perplexity(outcome.scored.nll[protocol.name], protocol)
            for protocol in outcome.read.protocols
        ),
        bits_per_byte=outcome.bits_per_byte,
        divergence=(
            None if outcome.scored.divergence is None else summarize(outcome.scored.divergence)
        ),
        tasks=outcome.tasks,
        harness=outcome.harness,
        worst=outcome.worst,
        agreement=_agreement(subject.name, reference, speeds),
        speed=None if spoken is None else spoken.speed,
        layers=manifest.layers if manifest else (),
        unquantized=dict(manifest.unquantized) if manifest else {},
    )
