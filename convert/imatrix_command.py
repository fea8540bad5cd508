"""`qtool imatrix`: a calibration pass over a model, and a file that its quantizers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qtool.errors import UnknownName

if TYPE_CHECKING:
    from qtool.calibration.skeleton import Skeleton
    from qtool.convert.gguf.imatrix import ImportanceMatrix
    from qtool.recipe import Calibration
    from qtool.source import Source

EPILOG = """\b
Examples:
  qtool imatrix Qwen/Qwen3-0.6B --out qwen3.imatrix.gguf
  qtool imatrix ./model --out imatrix.dat --calibration corpus.txt
  qtool convert ./model --to gguf --type Q3_K_M --imatrix qwen3.imatrix.gguf"""

FORMATS = ("gguf", "dat")


@click.command(epilog=EPILOG, short_help="Measure what matters to a model, for GGUF quantizers.")
@click.argument("model")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file to write; .dat means the old format unless --format says otherwise.",
)
@click.option("--format", "format_", metavar="gguf|dat", help="Which of llama.cpp's two formats.")
@click.option(
    "--calibration",
    metavar="DATA",
    help="A .txt, .jsonl or .parquet file, or a Hub dataset id [a text that ships with qtool].",
)
@click.option("--num-samples", type=click.IntRange(1), default=128, show_default=True)
@click.option("--sequence-length", type=click.IntRange(1), default=512, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the sequences.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a Hub model.")
def imatrix(
    model: str,
    out: Path,
    format_: str | None,
    calibration: str | None,
    num_samples: int,
    sequence_length: int,
    seed: int,
    force: bool,
    as_json: bool,
    trust_remote_code: bool,
    revision: str | None,
) -> None:
    """Write the importance matrix of MODEL: the mean squared input of each linear, over calibration
    data. `qtool convert --imatrix` and llama-quantize read it.

    Windows of --sequence-length tokens are cut from the text end to end and drawn by --seed; all of
    a window's tokens count.
    """
    from qtool.convert.gguf.imatrix import default_format, write_imatrix
    from qtool.errors import OutputExists
    from qtool.progress import console
    from qtool.recipe import Calibration
    from qtool.source import resolve

    if format_ is not None and format_ not in FORMATS:
        raise UnknownName("imatrix format", format_, FORMATS)
    if out.exists() and not force:
        raise OutputExists(out)
    wanted = Calibration(calibration, num_samples, sequence_length, seed)
    matrix, notes = measure(resolve(model, revision), wanted, trust_remote_code=trust_remote_code)
    for note in notes:
        console.print(f"warning: {note}", highlight=False, markup=False, soft_wrap=True)
    as_dat = default_format(out) == "dat" if format_ is None else format_ == "dat"
    write_imatrix(matrix, out, "dat" if as_dat else "gguf", force=force)
    entries = matrix.entries
    if as_json:
        facts = {"out": str(out), "entries": len(entries), "chunks": matrix.chunk_count}
        click.echo(json.dumps({**facts, "chunk_size": matrix.chunk_size, "warnings": [*notes]}))
        return
    click.echo(
        f"{out}: importance of {len(entries)} weights over {matrix.chunk_count} windows of "
        f"{matrix.chunk_size} tokens"
    )


def measure(
    source: Source, wanted: Calibration, *, trust_remote_code: bool = False
) -> tuple[ImportanceMatrix, tuple[str, ...]]:
    """The matrix of a Hugging Face model, and what is to be told about it."""
    import dataclasses

    import torch

    from qtool.arch import find_family
    from qtool.calibration.dataset import load_calibration, load_tokenizer
    from qtool.calibration.importance import input_squares
    from qtool.calibration.skeleton import Skeleton
    from qtool.checkpoint import Checkpoint
    from qtool.convert.gguf.imatrix import Importance, ImportanceMatrix
    from qtool.convert.gguf.names import NameMap
    from qtool.convert.gguf.sizes import Sizes
    from qtool.errors import UnsupportedModel

    if source.is_gguf:
        raise UnsupportedModel(
            f"{source.name} is a GGUF file", "give the Hugging Face model that it was made from"
        )
    checkpoint = Checkpoint.open(source.path)
    architecture = find_family(checkpoint.config)
    names = NameMap.of(architecture, Sizes.of(checkpoint.config))
    skeleton = Skeleton.build(checkpoint, trust_remote_code=trust_remote_code)
    length = _within_context(skeleton, wanted.sequence_length)
    notes: list[str] = []
    if length != wanted.sequence_length:
        notes.append(
            f"windows cut from {wanted.sequence_length} to the model's context of {length}"
        )
        wanted = dataclasses.replace(wanted, sequence_length=length)
    tokenizer = load_tokenizer(source.path, trust_remote_code=trust_remote_code)
    vocab_size = skeleton.model.get_input_embeddings().weight.shape[0]
    tokens = load_calibration(wanted, tokenizer, vocab_size=vocab_size)
    parts: dict[str, list[Importance]] = {}
    for module, squares in input_squares(skeleton, tokens.tokens).items():
        name = names.to_gguf(f"{module}.weight")
        if name is not None:
            count = torch.tensor([float(squares.count)])
            parts.setdefault(name, []).append(Importance(squares.sums[None], count))
    entries = {
        name: Importance(torch.cat([p.sums for p in some]), torch.cat([p.counts for p in some]))
        for name, some in parts.items()  # the experts of one tensor, in their order
    }
    notes += tokens.warnings
    idle = [name for name, entry in entries.items() if bool((entry.counts == 0).any())]
    if idle:
        notes.append(f"no token reached some experts of {', '.join(idle)}")
    chunks, size = tokens.tokens.shape
    return ImportanceMatrix(entries, (tokens.dataset,), chunks, size), tuple(notes)


def _within_context(skeleton: Skeleton, length: int) -> int:
    context = getattr(skeleton.model.config, "max_position_embeddings", None)
    return min(length, context) if isinstance(context, int) else length
