"""`qtool plan`: what a model takes, before anything is downloaded or bought."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.errors import UsageError
from qtool.runtime.bench.options import OUTPUT_OPTIONS, Numbers, length_range, with_options

if TYPE_CHECKING:
    from qtool.runtime.plan.answer import Load
    from qtool.runtime.plan.costs import StepCosts
    from qtool.runtime.plan.fit import Setting
    from qtool.runtime.plan.fleet import Targets
    from qtool.runtime.plan.hardware import Gpu
    from qtool.runtime.plan.measure import Measurement
    from qtool.runtime.plan.paper import PaperModel
    from qtool.runtime.plan.simulate import Limits, Workload
    from qtool.runtime.plan.variants import Variant

# What is shown on GPUs when no form is named.
DEFAULT_FORMS = ("bf16", "fp8", "int4")

# What a load runs on: name, form, and how to know costs and limits (raises where it cannot run).
Place = tuple[str, str, "Callable[[], tuple[StepCosts, Limits]]"]


@click.command(name="plan")
@click.argument("model")
@click.option(
    "--as",
    "forms",
    multiple=True,
    metavar="FORM",
    help="Only this form: bf16, fp8, w8a8, int4, nvfp4, 'GGUF Q4_K_M', ...; may be repeated.",
)
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="Only this; may be repeated.")
@click.option("--tensor-parallel-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--context",
    type=click.IntRange(min=2),
    help="Tokens of a sequence.  [default: 4096, or the model's]",
)
@click.option("--max-num-seqs", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--gpu-memory-utilization", type=float, default=0.9, show_default=True)
@click.option("--kv-cache-dtype", type=click.Choice(["auto", "int8"]), default="auto")
@click.option("--rate", type=float, help="Requests a second: how many replicas answer them?")
@click.option("--replicas", type=click.IntRange(min=1), help="Of --rate: what do so many reach?")
@click.option("--input-len", type=Numbers(int), default="512", show_default=True)
@click.option("--output-len", type=Numbers(int), default="128", show_default=True)
@click.option("--shared-prefix-len", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--ttft-ms", type=float, help="95 of 100 requests have their first token by then.")
@click.option("--tpot-ms", type=float, help="95 of 100 requests get their tokens this often.")
@click.option("--num-requests", type=click.IntRange(min=30), default=600, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--measure", is_flag=True, help="Measure MODEL's steps on this machine.")
@click.option(
    "--costs",
    "costs_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Measured before, by --measure --save-costs.",
)
@click.option("--save-costs", type=click.Path(path_type=Path, dir_okay=False))
@with_options(OUTPUT_OPTIONS)
def plan(
    model: str,
    forms: tuple[str, ...],
    gpus: tuple[str, ...],
    tensor_parallel_size: int,
    context: int | None,
    max_num_seqs: int,
    gpu_memory_utilization: float,
    kv_cache_dtype: str,
    rate: float | None,
    replicas: int | None,
    input_len: tuple[int, ...],
    output_len: tuple[int, ...],
    shared_prefix_len: int,
    ttft_ms: float | None,
    tpot_ms: float | None,
    num_requests: int,
    seed: int,
    measure: bool,
    costs_file: Path | None,
    save_costs: Path | None,
    as_json: bool,
    out: Path | None,
) -> None:
    """What MODEL takes: the size of each form, the GPUs it fits on, tokens per second, and how many
    replicas answer a rate of requests within targets.

    Needs config.json alone (MODEL may be one). Speeds come from data sheets, at assumed shares of
    them, or from this machine with --measure; queues come from a simulation of qtool's own
    scheduler.

    \b
    Examples:
      qtool plan Qwen/Qwen3-8B
      qtool plan Qwen/Qwen3-8B --as int4 --gpu L4 --context 16384
      qtool plan Qwen/Qwen3-8B --as int4 --gpu H100 --rate 200 --ttft-ms 500 --tpot-ms 30
      qtool plan ./Qwen3-0.6B-int4 --measure --rate 2
    """
    from qtool.runtime.bench.output import emit
    from qtool.runtime.plan.answer import Facts, fits
    from qtool.runtime.plan.fit import Setting, choose_context
    from qtool.runtime.plan.fleet import Targets
    from qtool.runtime.plan.hardware import GPUS, find_gpu
    from qtool.runtime.plan.output import pages
    from qtool.runtime.plan.paper import PaperModel, read_config
    from qtool.runtime.plan.simulate import Workload
    from qtool.runtime.plan.variants import find_variant, variants

    if replicas is not None and rate is None:
        raise UsageError("--replicas says nothing without --rate", "add --rate REQUESTS_A_SECOND")
    for option, value in (("--rate", rate), ("--ttft-ms", ttft_ms), ("--tpot-ms", tpot_ms)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{option} is {value:g}, must be above 0 and finite")
    if measure and costs_file is not None:
        raise UsageError("--measure and --costs both say what steps cost", "leave one of them out")
    if save_costs is not None and not measure:
        raise UsageError("--save-costs keeps what --measure finds", "add --measure")
    paper = PaperModel.of(*read_config(model))
    setting = Setting(
        max_num_seqs, gpu_memory_utilization, kv_cache_dtype == "int8", tensor_parallel_size
    )
    longest = paper.config.max_position_embeddings
    context = choose_context(longest, context)
    devices = [find_gpu(name) for name in gpus] or list(GPUS.values())
    chosen = [find_variant(paper, form) for form in forms or DEFAULT_FORMS]
    measured = None
    if measure or costs_file is not None:
        measured = _measured(model, costs_file, max_num_seqs, kv_cache_dtype)
        if save_costs is not None:
            measured.save(save_costs)
    result: dict[str, Any] = {
        "model": Facts.of(paper),
        "setting": setting,
        "context": context,
        "forms": list(variants(paper)),
        "fits": [] if measured else list(fits(paper, chosen, devices, setting, context)),
        "measured": measured,
    }
    rows: list[Load] = []
    if rate is not None:
        workload = Workload(
            rate,
            num_requests,
            length_range("input-len", input_len),
            length_range("output-len", output_len),
            shared_prefix_len,
            seed,
        )
        choose_context(longest, workload.input_lens[1] + workload.output_lens[1])
        targets = Targets.in_milliseconds(ttft_ms, tpot_ms)
        places: Iterable[Place] = _on_paper(paper, chosen, devices, setting, context)
        if measured is not None:
            costs, limits = measured.costs, measured.limits
            places = [("this machine", measured.model, lambda: (costs, limits))]
        rows = list(_loads(places, workload, targets, replicas))
        result["workload"] = workload
        result["targets"] = {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms}
    emit("plan", result, rows, pages(result, rows), as_json=as_json, out=out)


def _measured(
    model: str, costs_file: Path | None, max_num_seqs: int, kv_cache_dtype: str
) -> Measurement:
    from qtool.runtime.plan.measure import Measurement, measure

    if costs_file is not None:
        return Measurement.load(costs_file)
    return measure(model, max_num_seqs=max_num_seqs, kv_cache_dtype=kv_cache_dtype)


def _on_paper(
    model: PaperModel,
    forms: Iterable[Variant],
    gpus: Iterable[Gpu],
    setting: Setting,
    context: int,
) -> Iterator[Place]:
    from functools import partial

    from qtool.runtime.plan.answer import on_paper

    forms = list(forms)
    for gpu in gpus:
        name = gpu.name if setting.num_gpus == 1 else f"{setting.num_gpus} x {gpu.name}"
        for form in forms:
            yield name, form.name, partial(on_paper, model, form, gpu, setting, context)


def _loads(
    places: Iterable[Place], workload: Workload, targets: Targets, replicas: int | None
) -> Iterator[Load]:
    """Raises UsageError where there is one place only, and it cannot."""
    from qtool.progress import bar
    from qtool.runtime.plan.answer import Load, answer_load

    places = list(places)
    for on, form, known in places:
        try:
            costs, limits = known()
            with bar(f"simulating {form} on {on}") as shown:
                outcome = answer_load(costs, limits, workload, targets, replicas, shown.advance)
        except UsageError as error:
            if len(places) == 1:
                raise
            yield Load(on, form, None, error.message)
        else:
            yield Load(on, form, outcome)
