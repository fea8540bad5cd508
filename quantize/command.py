"""`qtool quantize`: options to a request, a request to the pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import click

from qtool.errors import UsageError


def _group_size(context: click.Context, parameter: click.Parameter, value: str | None) -> object:
    if value is None or value in ("auto", "row"):
        return value
    if not value.isdigit() or int(value) < 1:
        raise UsageError(
            f"--group-size {value!r} is not a number of inputs", "give a number, auto, or row"
        )
    return int(value)


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", value.strip().upper())
    if match is None:
        raise UsageError(f"--target-size {value!r} is not a size", "for example 4.5GB or 900MB")
    return int(float(match[1]) * units[match[2]])


def _rotations(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    if value is None:
        return None
    return tuple(name.strip().upper() for name in value.split(",") if name.strip())


def _max_memory(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> Mapping[str, int] | None:
    from qtool.quantize.devices import parse_max_memory

    return None if value is None else parse_max_memory(value)


@click.command(short_help="Quantize a model to int4 or int8.")
@click.argument("model")
@click.option(
    "--recipe",
    default="int4",
    show_default=True,
    metavar="NAME|FILE",
    help="int4, int3, int2, gptq, awq, awq-gptq, rtn-int4, rtn-int8, smoothquant, w8a8, fp8, "
    "fp8-block, nvfp4, mxfp4, nf4, codebook, or a YAML file.",
)
@click.option(
    "--effort",
    type=click.Choice(["fast", "default", "best"]),
    help="fast: one solve. default: all that has a closed form. best: gradient steps as well.",
)
@click.option("--bits", type=click.IntRange(2, 8), help="Bits of a weight [the recipe's].")
@click.option(
    "--target-bits",
    type=click.FloatRange(2, 8.5),
    metavar="BITS",
    help="Mixed widths: this many stored bits a weight on average, scales included.",
)
@click.option(
    "--target-size",
    callback=_size,
    metavar="SIZE",
    help="Mixed widths: an artifact no larger than this, as 4.5GB or 900MB.",
)
@click.option(
    "--format",
    default="compressed-tensors",
    show_default=True,
    metavar="NAME",
    help="Layout of the files: compressed-tensors, gptq or awq.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to make [MODEL-RECIPE].")
@click.option(
    "--group-size",
    callback=_group_size,
    metavar="N|auto|row",
    help="Inputs that share a scale. auto: the largest of 128, 64, 32 that divides each layer.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN",
    help="Leave matching layers in 16 bit, as '*.down_proj'. May be repeated.",
)
@click.option(
    "--rotations",
    callback=_rotations,
    metavar="R1,R2",
    help="Turn the residual stream (R1), each head's values (R2) or both first: outliers are "
    "spread over channels, the function stays [the recipe's, or none].",
)
@click.option(
    "--calibration",
    metavar="DATA",
    help="A .txt, .jsonl or .parquet file, or a Hub dataset id [a text that ships with qtool].",
)
@click.option(
    "--device",
    metavar="NAME",
    help="auto, cpu, cuda or cuda:N [auto: a CUDA device where there is one].",
)
@click.option(
    "--device-map",
    type=click.Choice(["auto"]),
    help="auto: spread the blocks over all CUDA devices, as accelerate would.",
)
@click.option(
    "--max-memory",
    callback=_max_memory,
    metavar="0=SIZE,...",
    help="What may be used of each device, as 0=10GiB,1=10GiB,cpu=30GiB [what is free].",
)
@click.option("--num-samples", type=click.IntRange(1), help="Calibration sequences.")
@click.option("--sequence-length", type=click.IntRange(1), help="Tokens in each.")
@click.option("--seed", type=int, help="Chooses the sequences.")
@click.option(
    "--push-to-hub", metavar="REPO_ID", help="Upload the result, as `qtool push` does later."
)
@click.option("--private", is_flag=True, help="With --push-to-hub: make a new repository private.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option(
    "--strict", is_flag=True, help="A layer that falls back to a lesser solve is an error."
)
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a Hub model.")
def quantize(
    model: str,
    recipe: str,
    effort: str | None,
    bits: int | None,
    target_bits: float | None,
    target_size: int | None,
    format: str,
    out: Path | None,
    group_size: int | str | None,
    keep: tuple[str, ...],
    rotations: tuple[str, ...] | None,
    calibration: str | None,
    device: str | None,
    device_map: str | None,
    max_memory: Mapping[str, int] | None,
    num_samples: int | None,
    sequence_length: int | None,
    seed: int | None,
    push_to_hub: str | None,
    private: bool,
    force: bool,
    strict: bool,
    dry_run: bool,
    as_json: bool,
    trust_remote_code: bool,
    revision: str | None,
) -> None:
    """Quantize the decoder blocks of MODEL: a folder, a Hub id, or builtin:books-7m.

    The result is a model folder that Hugging Face loaders, vLLM and SGLang read. Embeddings and the
    output head stay as they are. Stopped runs go on where they were when the same command is given
    again.

    \b
    Examples:
      qtool quantize Qwen/Qwen3-0.6B
      qtool quantize ./my-model --recipe awq --format awq --out ./my-model-awq
      qtool quantize builtin:books-7m --calibration mine.jsonl --num-samples 256
      qtool quantize ./my-model --bits 3 --effort best
      qtool quantize ./my-model --recipe w8a8 --rotations R1,R2
      qtool quantize ./my-model --target-bits 4.25 --dry-run
      qtool quantize ./my-model --keep '*.down_proj' --dry-run
      qtool quantize ./my-model --push-to-hub me/my-model-int4 --private
      qtool quantize ./my-model --device cuda:1 --max-memory 1=6GB --dry-run
      qtool quantize ./my-model --device-map auto --max-memory 0=10GiB,1=20GiB
      torchrun --nproc-per-node 2 -m qtool quantize ./my-model --num-samples 1024
    """
    import json
    import time

    from qtool.calibration.ranks import joined_ranks
    from qtool.hub import open_repository
    from qtool.progress import console
    from qtool.quantize.allocate import Target
    from qtool.quantize.devices import DeviceRequest
    from qtool.quantize.job import prepare
    from qtool.quantize.pipeline import follow, run
    from qtool.quantize.report import (
        ConsoleListener,
        plan_to_dict,
        print_plan,
        print_result,
        quiet_libraries,
        result_to_dict,
        say,
    )
    from qtool.recipe import load_recipe
    from qtool.settings import launched

    wanted = load_recipe(recipe).with_options(
        effort=effort,
        bits=bits,
        group_size=group_size,  # type: ignore[arg-type]
        keep=keep,
        rotations=rotations,
        dataset=calibration,
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    quiet_libraries()
    started = time.monotonic()
    target = None
    if target_bits is not None or target_size is not None:
        target = Target(target_bits, target_size)
    launch = launched()
    others = launch is not None and launch.rank > 0
    console.quiet = others  # rank 0 speaks for all
    if private and push_to_hub is None:
        raise UsageError("--private is of --push-to-hub", "name the repository to make")
    repository = None
    if push_to_hub is not None and not (others or dry_run):
        repository = open_repository(push_to_hub, private=private)
    job = prepare(
        model,
        wanted,
        format=format,
        revision=revision,
        trust_remote_code=trust_remote_code,
        target=target,
        strict=strict,
        devices=DeviceRequest(
            device or "auto",
            device_map is not None,
            max_memory or {},
            launch.local_rank if launch is not None else None,
        ),
    )
    if dry_run and others:
        return
    if dry_run:
        print_plan(job)
        if as_json:
            click.echo(json.dumps(plan_to_dict(job), indent=2))
        return
    folder = out if out is not None else job.default_out
    with joined_ranks(launch) as ranks:
        if ranks is not None and others:
            follow(job, ranks)
            return
        manifest = run(
            job,
            folder,
            force=force,
            listener=ConsoleListener(),
            ranks=ranks,
            card_name=repository.name if repository is not None else None,
        )
    seconds = time.monotonic() - started
    print_result(job, manifest, folder, seconds)
    url = repository.push(folder) if repository is not None else None
    if url is not None:
        say(f"uploaded: {url}")
    if as_json:
        result = result_to_dict(manifest, folder, seconds)
        click.echo(json.dumps({**result, **({"url": url} if url is not None else {})}, indent=2))
