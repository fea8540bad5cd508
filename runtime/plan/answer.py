"""The questions that `qtool plan` answers, as rows of data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from qtool.runtime.plan.costs import RooflineCosts, StepCosts
from qtool.runtime.plan.fit import Fit, Setting, check_room, fit, limits
from qtool.runtime.plan.fleet import Simulated, Targets, required_replicas, simulate
from qtool.runtime.plan.hardware import Gpu
from qtool.runtime.plan.paper import PaperModel
from qtool.runtime.plan.simulate import Limits, Workload
from qtool.runtime.plan.variants import Variant

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Facts:
    """A model in numbers; bytes."""

    name: str
    model_type: str
    num_weights: int
    num_active_weights: int
    num_layers: int
    max_position_embeddings: int
    kv_bytes_per_token: int
    kv_bytes_per_token_int8: int

    @classmethod
    def of(cls, model: PaperModel) -> Facts:
        return cls(
            name=model.name,
            model_type=model.config.model_type,
            num_weights=model.num_weights,
            num_active_weights=model.num_active_weights,
            num_layers=model.config.num_layers,
            max_position_embeddings=model.config.max_position_embeddings,
            kv_bytes_per_token=model.kv_bytes_per_token(),
            kv_bytes_per_token_int8=model.kv_bytes_per_token(int8=True),
        )


@dataclass(frozen=True, slots=True)
class Load:
    """A load on replicas, in seconds.

    on       GPUs of a replica, or the machine that was measured
    outcome  None where there is no answer: `problem` says why
    """

    on: str
    variant: str
    outcome: Simulated | None
    problem: str | None = None


def fits(
    model: PaperModel, forms: Sequence[Variant], gpus: Sequence[Gpu], setting: Setting, context: int
) -> Iterator[Fit]:
    for gpu in gpus:
        for form in forms:
            yield fit(model, form, gpu, setting, context)


def answer_load(
    costs: StepCosts,
    found: Limits,
    workload: Workload,
    targets: Targets,
    replicas: int | None,
    advance: Advance,
) -> Simulated:
    """replicas  None: as many as the targets need"""
    check_room(found, workload.input_lens[1] + workload.output_lens[1])
    if replicas is None:
        return required_replicas(workload, costs, found, targets, advance=advance)
    total = max(workload.num_requests, 32 * replicas)
    return simulate(
        replace(workload, num_requests=total),
        costs,
        found,
        num_replicas=replicas,
        advance=advance,
    )


def on_paper(
    model: PaperModel, form: Variant, gpu: Gpu, setting: Setting, context: int
) -> tuple[StepCosts, Limits]:
    """Raises UsageError where the form does not fit."""
    costs = RooflineCosts.of(model, form, gpu, kv_int8=setting.kv_int8, num_gpus=setting.num_gpus)
    return costs, limits(fit(model, form, gpu, setting, context), setting)
