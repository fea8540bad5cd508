"""The options of `qtool convert --to gguf`, as click has them: each is a field of GgufOptions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from qtool.convert.gguf.options import GgufOptions, parse_size
from qtool.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--imatrix",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="With gguf: an importance matrix, of `qtool imatrix` or llama-imatrix.",
    ),
    click.option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        metavar="REGEX=TYPE",
        help="With gguf: the type of tensors whose name matches; the first that fits decides.",
    ),
    click.option(
        "--output-tensor-type", "output_type", metavar="TYPE", help="With gguf: the head's."
    ),
    click.option(
        "--token-embedding-type",
        "embedding_type",
        metavar="TYPE",
        help="With gguf: the embedding's.",
    ),
    click.option("--pure", is_flag=True, help="With gguf: one type for all, no mix."),
    click.option("--leave-output-tensor", is_flag=True, help="With gguf: the head stays as it is."),
    click.option(
        "--target-bits",
        type=float,
        metavar="X",
        help="With gguf: at most X bits a weight, spent where they remove most error.",
    ),
    click.option(
        "--pre",
        metavar="NAME",
        help="With gguf: tokenizer.ggml.pre, where the tokenizer's is not recognized.",
    ),
    click.option(
        "--split-max-size",
        "split_max_bytes",
        metavar="N(M|G)",
        help="With gguf: several files, each of tensors of at most that size (2G, 500M).",
    ),
    click.option(
        "--split-max-tensors",
        type=int,
        metavar="N",
        help="With gguf: several files of at most N tensors.",
    ),
    click.option(
        "--no-tensor-first-split",
        is_flag=True,
        help="With several files: the first has the metadata alone.",
    ),
    click.option(
        "--search",
        metavar="plain|best",
        default="plain",
        help="With gguf: best runs calibration data and chooses codes by the outputs' error.",
    ),
    click.option(
        "--calibration",
        metavar="DATA",
        help="With --search best: a .txt, .jsonl or .parquet file, or a Hub dataset id.",
    ),
    click.option(
        "--num-samples",
        type=click.IntRange(1),
        help="With --search best: calibration sequences. Default: 128.",
    ),
    click.option(
        "--sequence-length",
        type=click.IntRange(1),
        help="With --search best: tokens in each. Default: 512.",
    ),
    click.option("--seed", type=int, help="With --search best: chooses the sequences."),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="With --search best: run Python files of the model's own.",
    ),
)
# Options under other names than the fields that hold them.
_NAMES = {
    "tensor_types": "--tensor-type",
    "output_type": "--output-tensor-type",
    "embedding_type": "--token-embedding-type",
    "split_max_bytes": "--split-max-size",
}


def gguf_options(command: Command) -> Command:
    """Add the options to a click command, which takes them as keywords."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def options_for(target: str, values: Mapping[str, Any]) -> GgufOptions:
    """What click parsed, as a value; refuses options that the target has no use for."""
    for field in dataclasses.fields(GgufOptions):
        if target != "gguf" and values.get(field.name, field.default) != field.default:
            option = _NAMES.get(field.name, "--" + field.name.replace("_", "-"))
            raise UsageError(f"{option} is for --to gguf, not for --to {target}")
    size = values.get("split_max_bytes")
    return GgufOptions(**{**values, "split_max_bytes": None if size is None else parse_size(size)})
