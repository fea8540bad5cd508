"""Quantize a model: plan, go block by block, and let a folder appear when all of it is right.

    plan        what happens to each linear, from headers alone
    calibrate   tokens, and the hidden states at the first block
    each block  load, take statistics with all before it already quantized, solve, write the packed
                tensors, run on with the weights that were written
    assemble    shards, config, side files
    verify      decode what was written, compare with what was solved, reload it where that is small
    manifest    qtool.json, and the rename to the final name

Memory holds a block, its statistics and the hidden states of the calibration data (a file beyond a
budget), however many blocks the model has. A run that was killed goes on after its last finished
block and gives the same bytes: finished blocks are decoded and run, which is cheap beside solving.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qtool.artifact import LayerReport, Manifest, tool_versions, write_manifest
from qtool.calibration.dataset import CalibrationTokens
from qtool.calibration.ranks import DataRanks
from qtool.calibration.runner import CHUNK_TOKENS
from qtool.errors import QtoolError, UsageError
from qtool.output import OutputFolder
from qtool.progress import bar
from qtool.quantize.allocate import Target
from qtool.quantize.artifact_files import assemble, model_dtype
from qtool.quantize.block import solve_block
from qtool.quantize.devices import DeviceRequest, kinds
from qtool.quantize.group import BlockResult
from qtool.quantize.job import Job, prepare
from qtool.quantize.journal import FollowedJournal, Journal, Progress, digest
from qtool.quantize.model_card import write_card
from qtool.quantize.stream import CalibrationStream, in_bfloat16
from qtool.quantize.strict import require_no_fallback
from qtool.quantize.verify import Verification, is_finite, verify
from qtool.recipe import Gptq, Recipe
from qtool.source import Source


class Listener(Protocol):
    """Told what happens, as it happens."""

    def planned(self, job: Job) -> None: ...

    def block_done(self, index: int, reports: tuple[LayerReport, ...], seconds: float) -> None: ...

    def note(self, text: str) -> None: ...


class Silent:
    """For callers that show progress themselves."""

    def planned(self, job: Job) -> None:
        return

    def block_done(self, index: int, reports: tuple[LayerReport, ...], seconds: float) -> None:
        return

    def note(self, text: str) -> None:
        return


def quantize_model(
    model: str | Source,
    recipe: str | Recipe = "int4",
    *,
    format: str = "compressed-tensors",
    out: str | Path | None = None,
    force: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    target: Target | None = None,
    strict: bool = False,
    devices: DeviceRequest | None = None,
    listener: Listener | None = None,
) -> Manifest:
    """Quantize a model into a folder that Hugging Face loaders read; returns its manifest."""
    job = prepare(
        model,
        recipe,
        format=format,
        revision=revision,
        trust_remote_code=trust_remote_code,
        target=target,
        strict=strict,
        devices=devices,
    )
    return run(
        job, Path(out) if out is not None else job.default_out, force=force, listener=listener
    )


def run(
    job: Job,
    out: Path,
    *,
    force: bool = False,
    listener: Listener | None = None,
    ranks: DataRanks | None = None,
    card_name: str | None = None,
) -> Manifest:
    """Do what was planned.

    card_name  by which the model card shows loaders the artifact [model-recipe]
    ranks  that the calibration data is shared out among; this is rank 0, which alone writes, and
           the others call `follow`
    """
    listener = listener or Silent()
    if ranks is not None:
        require_shareable(job)
    output = OutputFolder(out, force=force, resumable=True, needed_bytes=job.plan.working_bytes)
    listener.planned(job)
    tokens = job.calibration_tokens() if job.recipe.needs_calibration else None
    for warning in tokens.warnings if tokens is not None else ():
        listener.note(f"warning: {warning}")
    threads = torch.get_num_threads()
    with output as stage:
        journal = Journal(stage.path, _fingerprint(job, tokens, ranks))
        if journal.restart_reason is not None:
            listener.note(
                f"an unfinished run was found but not continued: {journal.restart_reason}"
            )
        elif journal.blocks:
            listener.note(f"going on after block {len(journal.blocks)} of {job.num_blocks}")
        torch.set_num_threads(journal.threads)
        if ranks is not None:
            ranks.from_first(journal.progress)
        try:
            _quantize_blocks(job, tokens, journal, listener, ranks)
            if ranks is not None:
                ranks.leave()
            assemble(
                stage.path,
                job.skeleton,
                job.plan,
                job.layout,
                journal,
                copy_code=job.trust_remote_code,
            )
            verification = _verify(job, tokens, stage.path, journal)
            journal.close()
            manifest = _manifest(job, tokens, journal, verification)
            name = card_name or job.default_out.name
            write_card(stage.path, manifest, job.plan, job.source.path, name)
            return write_manifest(stage.path, manifest)
        except BaseException as error:
            if not journal.blocks:
                shutil.rmtree(stage.path, ignore_errors=True)
            elif not isinstance(error, QtoolError):
                listener.note(
                    f"stopped after {len(journal.blocks)} of {job.num_blocks} blocks; the same "
                    "command goes on from there"
                )
            raise
        finally:
            torch.set_num_threads(threads)


def follow(job: Job, ranks: DataRanks) -> None:
    """What ranks other than 0 do while that one runs: their part of the data, and the same blocks.
    Nothing is written but scratch files.
    """
    require_shareable(job)
    tokens = job.calibration_tokens()
    progress: Progress = ranks.from_first(Progress.none())
    torch.set_num_threads(progress.threads)
    with tempfile.TemporaryDirectory(prefix="qtool-quantize-") as folder:
        journal = FollowedJournal(progress, Path(folder))
        _quantize_blocks(job, tokens, journal, Silent(), ranks)


def require_shareable(job: Job) -> None:
    """Raise UsageError for recipes to which more ranks bring nothing, or which they cannot do."""
    method = job.recipe.method
    if not job.recipe.needs_calibration:
        raise UsageError(
            f"recipe {job.recipe.name} takes no calibration data that ranks could share",
            "start it once, without torchrun",
        )
    if isinstance(method, Gptq) and method.tuning_steps:
        raise UsageError(
            "gradient steps (--effort best) are not shared by ranks",
            "use --effort default, or start it once, without torchrun",
        )


def _fingerprint(
    job: Job, tokens: CalibrationTokens | None, ranks: DataRanks | None
) -> dict[str, Any]:
    """All that the packed bytes depend on."""
    files = sorted({info.file for info in job.skeleton.checkpoint.tensors.values()})
    return {
        "source": [
            [file.name, file.stat().st_size, file.stat().st_mtime_ns]
            for file in (job.source.path / "config.json", *files)
        ],
        "recipe": job.recipe.to_dict(),
        "format": job.layout.name,
        "schemes": {linear.name: str(scheme) for linear, scheme in job.plan.quantized.items()},
        "calibration": tokens.to_dict() if tokens is not None else None,
        "chunk_tokens": CHUNK_TOKENS,
        "ranks": 1 if ranks is None else ranks.size,
        "bfloat16": in_bfloat16(job),
        "devices": kinds(job.skeleton),
        "versions": tool_versions(),
    }


def _quantize_blocks(
    job: Job,
    tokens: CalibrationTokens | None,
    journal: Journal,
    listener: Listener,
    ranks: DataRanks | None = None,
) -> None:
    """Solve every block that the journal does not hold."""
    if job.strict:
        for block in journal.blocks:
            require_no_fallback(block.reports)
    if len(journal.blocks) == job.num_blocks:
        return
    calibrated = CalibrationStream(job, tokens, journal, ranks) if tokens is not None else None
    with bar("Quantizing", job.num_blocks) as progress:
        for index in range(job.num_blocks):
            progress.describe(f"Quantizing {job.skeleton.block_name(index)}")
            started = time.monotonic()
            capture = calibrated.open(index) if calibrated is not None else None
            if index >= len(journal.blocks):
                planned = {linear: job.plan.quantized[linear] for linear in job.plan.block(index)}
                originals = calibrated.originals if calibrated is not None else None
                result = solve_block(index, planned, job.recipe, job.skeleton, capture, originals)
                _record(job, result, journal, ranks)
            if calibrated is not None and capture is not None:
                calibrated.close(capture)
            reports = journal.blocks[index].reports
            listener.block_done(index, reports, time.monotonic() - started)
            if job.strict:
                require_no_fallback(reports)
            progress.advance()


def _record(
    job: Job, result: BlockResult, journal: Journal, ranks: DataRanks | None = None
) -> None:
    """Pack a solved block and put it on disk."""
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for linear, solved in result.weights.items():
        weight: Any = solved.weight  # of the one kind that this layout packs
        packed = job.layout.pack(weight, model_dtype(job.skeleton, linear.tensor))
        tensors |= {f"{linear.name}.{suffix}": tensor for suffix, tensor in packed.items()}
        digests[linear.name] = digest(solved.dequantized)
    if ranks is not None:
        ranks.require_same(digests)
    packed_tensors = {linear.tensor for linear in result.weights}
    changed = {
        name: tensor for name, tensor in result.changed.items() if name not in packed_tensors
    }
    for name, tensor in {**tensors, **changed}.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise QtoolError(f"{name} came out with values that are not finite")
    reports = tuple(result.reports[linear] for linear in result.weights)
    journal.add({**tensors, **changed}, reports, digests, tuple(changed))


def _verify(
    job: Job, tokens: CalibrationTokens | None, stage: Path, journal: Journal
) -> Verification:
    digests = {name: value for block in journal.blocks for name, value in block.digests.items()}
    changed = [name for block in journal.blocks for name in block.changed]
    sample = tokens.tokens[:2, :64] if tokens is not None else None
    return verify(
        Source(job.source.name, stage),
        job.skeleton,
        job.plan,
        job.layout,
        digests=digests,
        changed=changed,
        sample=sample,
        trust_remote_code=job.trust_remote_code,
    )


def _manifest(
    job: Job, tokens: CalibrationTokens | None, journal: Journal, verification: Verification
) -> Manifest:
    head = dict.fromkeys(job.plan.head, "outside the decoder blocks")
    warnings = (*job.warnings, *(tokens.warnings if tokens is not None else ()))
    return Manifest(
        format=job.layout.name,
        source=job.source.name,
        source_revision=job.source.revision,
        recipe=job.recipe.to_dict(),
        calibration=tokens.to_dict() if tokens is not None else None,
        layers=tuple(report for block in journal.blocks for report in block.reports),
        unquantized={**job.plan.left, **head},
        warnings=(*warnings, *verification.notes),
    )
