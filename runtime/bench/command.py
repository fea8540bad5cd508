"""`qtool bench`: how fast, measured so that a number can be repeated."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from qtool.runtime.bench.options import (
    MODEL_OPTIONS,
    OUTPUT_OPTIONS,
    Numbers,
    length_range,
    with_options,
)
from qtool.runtime.config import Device, Dtype


@click.group(name="bench")
def bench() -> None:
    """Measure speed: latency, throughput, a server under load, kernels, start-up.

    \b
    Examples:
      qtool bench latency ./Qwen3-0.6B-int4 --batch-sizes 1,4,8,16
      qtool bench serve --url http://localhost:8000 --request-rate 1,2,4,inf
      qtool bench startup ./Qwen3-0.6B-int4
    """


@bench.command()
@with_options(MODEL_OPTIONS)
@click.option(
    "--batch-sizes", type=Numbers(int), default="1,4,8,16", show_default=True, metavar="N,N,..."
)
@click.option("--input-len", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--output-len", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--num-runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--num-warmups", type=click.IntRange(min=0), default=1, show_default=True)
@with_options(OUTPUT_OPTIONS)
def latency(
    model: str,
    dtype: Dtype,
    device: Device,
    batch_sizes: tuple[int, ...],
    input_len: int,
    output_len: int,
    num_runs: int,
    num_warmups: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Batches of equal prompts, one at a time: TTFT, TPOT, tokens per second, MBU and MFU."""
    from contextlib import closing

    import torch

    from qtool.runtime.bench.machine import measure_roofs
    from qtool.runtime.bench.offline import latency as measure
    from qtool.runtime.bench.output import emit, latency_table, num_weights
    from qtool.runtime.llm import LLM

    with closing(LLM(model, dtype=dtype, device=device, max_num_seqs=max(batch_sizes))) as llm:
        roofs = measure_roofs(llm.loaded.dtype, torch.device(llm.info.device))
        rows = measure(
            llm,
            batch_sizes=batch_sizes,
            input_len=input_len,
            output_len=output_len,
            num_runs=num_runs,
            num_warmups=num_warmups,
            num_weights=num_weights(llm.loaded.source),
            roofs=roofs,
        )
        found = list(rows)
        emit(
            "latency",
            {
                "model": llm.info.name,
                "format": llm.info.format,
                "dtype": llm.info.dtype,
                "device": llm.info.device,
                "weight_bytes": llm.info.weight_bytes,
                "input_len": input_len,
                "output_len": output_len,
                "num_warmups": num_warmups,
                "roofs": roofs,
            },
            found,
            latency_table(found, roofs),
            as_json=as_json,
            out=out,
        )


@bench.command()
@with_options(MODEL_OPTIONS)
@click.option("--num-prompts", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--input-len", type=Numbers(int), default="64,256", show_default=True)
@click.option("--output-len", type=Numbers(int), default="32,128", show_default=True)
@click.option("--max-num-seqs", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@with_options(OUTPUT_OPTIONS)
def throughput(
    model: str,
    dtype: Dtype,
    device: Device,
    num_prompts: int,
    input_len: tuple[int, ...],
    output_len: tuple[int, ...],
    max_num_seqs: int,
    seed: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Many requests at once, lengths drawn from ranges: tokens per second until the last is out.

    --input-len and --output-len take one length, or the two ends of a range.
    """
    from contextlib import closing

    from qtool.runtime.bench.offline import throughput as measure
    from qtool.runtime.bench.output import emit, load_table
    from qtool.runtime.llm import LLM

    with closing(LLM(model, dtype=dtype, device=device, max_num_seqs=max_num_seqs)) as llm:
        load = measure(
            llm,
            num_prompts=num_prompts,
            input_lens=length_range("input-len", input_len),
            output_lens=length_range("output-len", output_len),
            seed=seed,
        )
        conditions = {
            "model": llm.info.name,
            "format": llm.info.format,
            "dtype": llm.info.dtype,
            "device": llm.info.device,
            "input_len": input_len,
            "output_len": output_len,
            "max_num_seqs": max_num_seqs,
            "seed": seed,
        }
        emit(
            "throughput", conditions, [load], load_table([("all", load)]), as_json=as_json, out=out
        )


@bench.command()
@click.option("--url", default="http://localhost:8000", show_default=True)
@click.option("--model", help="Default: the first that the server has.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Also read from OPENAI_API_KEY.")
@click.option("--num-prompts", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--request-rate",
    type=Numbers(float),
    default="inf",
    show_default=True,
    help="Requests a second, arriving at random (Poisson); several make a sweep; inf: all at once.",
)
@click.option("--max-concurrency", type=click.IntRange(min=1), help="Requests at once at most.")
@click.option("--input-len", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--output-len", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--shared-prefix-len",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens that prompts begin with alike, before those of --input-len.",
)
@click.option("--num-prefixes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds.")
@click.option("--seed", type=int, default=0, show_default=True)
@with_options(OUTPUT_OPTIONS)
def serve(
    url: str,
    model: str | None,
    api_key: str | None,
    num_prompts: int,
    request_rate: tuple[float, ...],
    max_concurrency: int | None,
    input_len: int,
    output_len: int,
    shared_prefix_len: int,
    num_prefixes: int,
    timeout: float,
    seed: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Load on any OpenAI server, ours or another's: a pure HTTP client."""
    import asyncio

    from qtool.progress import bar
    from qtool.runtime.bench.client import Work, arrivals, prompts, send_all, served_model
    from qtool.runtime.bench.output import emit, load_table
    from qtool.runtime.bench.timing import load_of

    url = url.rstrip("/").removesuffix("/v1")
    name = model or served_model(url, api_key)
    loads = []
    for number, rate in enumerate(request_rate):
        texts = prompts(
            num_prompts,
            input_len,
            # Another text at each rate: what one rate left in a prefix cache helps no other.
            seed + number,
            prefix_len=shared_prefix_len,
            num_prefixes=num_prefixes,
        )
        times = arrivals(rate, num_prompts, seed)
        work = [Work(at, text, output_len) for at, text in zip(times, texts, strict=True)]
        with bar(f"{rate:g} requests a second", total=num_prompts) as shown:
            answers = asyncio.run(
                send_all(
                    url,
                    name,
                    work,
                    api_key=api_key,
                    max_concurrency=max_concurrency,
                    timeout=timeout,
                    advance=shown.advance,
                )
            )
        loads.append((rate, load_of(answers)))
    conditions = {
        "url": url,
        "model": name,
        "num_prompts": num_prompts,
        "max_concurrency": max_concurrency,
        "input_len": input_len,
        "output_len": output_len,
        "shared_prefix_len": shared_prefix_len,
        "num_prefixes": num_prefixes,
        "seed": seed,
    }
    rows = [{"request_rate": f"{rate:g}", "load": load} for rate, load in loads]
    table = load_table([(f"{rate:g} / s", load) for rate, load in loads])
    emit("serve", conditions, rows, table, as_json=as_json, out=out)


@bench.command()
@with_options(MODEL_OPTIONS)
@click.option("--tokens", type=Numbers(int), default="1,16,256", show_default=True)
@click.option(
    "--tune", is_flag=True, help="On a GPU: find the fastest tile for each linear, and keep it."
)
@with_options(OUTPUT_OPTIONS)
def kernels(
    model: str,
    dtype: Dtype,
    device: Device,
    tokens: tuple[int, ...],
    tune: bool,
    as_json: bool,
    out: Path | None,
) -> None:
    """Every kind of linear in a model, by the kernel that runs it: time, bandwidth, operations.

    \b
    Examples:
      qtool bench kernels ./Qwen3-0.6B-int4 --tokens 1,8,64
      qtool bench kernels ./Qwen3-0.6B-int4 --device cuda --tune
    """
    from qtool.runtime.bench.kernels import measure
    from qtool.runtime.bench.output import emit, kernel_table
    from qtool.source import resolve

    if tune:
        from qtool.runtime.bench.tune_model import tune_model

        click.echo(f"kept in {tune_model(model, dtype, device)}", err=True)
    rows = list(measure(resolve(model), dtype=dtype, device=device, tokens=tokens))
    emit("kernels", {"model": model}, rows, kernel_table(rows), as_json=as_json, out=out)


@bench.command()
@click.argument("model")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="auto", show_default=True)
@click.option("--num-runs", type=click.IntRange(min=1), default=3, show_default=True)
@with_options(OUTPUT_OPTIONS)
def startup(model: str, dtype: Dtype, num_runs: int, as_json: bool, out: Path | None) -> None:
    """From the start of a process to its first token, and where the time goes."""
    from qtool.progress import bar
    from qtool.runtime.bench.output import emit, startup_table
    from qtool.runtime.bench.startup import startups

    rows = []
    with bar("processes", total=num_runs) as shown:
        for row in startups(model, dtype, num_runs):
            rows.append(row)
            shown.advance()
    emit("startup", {"model": model}, rows, startup_table(rows), as_json=as_json, out=out)
