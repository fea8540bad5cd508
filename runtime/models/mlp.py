"""The MLP of a block: gated, plain, or a choice of experts for every token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.decoder_config import ExpertsConfig
from qtool.kernels.cuda.experts import Experts
from qtool.runtime.layers import Linear, Linears


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """down(activate(up(x))); `up` has gates and values side by side where `activate` is gated."""

    up: Linear | Linears
    activate: Callable[[Tensor], Tensor]
    down: Linear | Linears

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.up(x)))


@dataclass(frozen=True, slots=True, eq=False)
class SparseMlp:
    """Every token goes through a few of the experts, and through the shared one where there is one.

    Tokens are sorted by expert, so that each expert multiplies once, by all of its tokens; a
    token's outputs are then summed in the order of its choices, whatever else is in the step.

    router        [experts, hidden] float32
    router_bias   [experts] float32, added to scores for the choice alone
    experts       None: another rank has it, and adds what it computes
    shared_gate   [1, hidden]: the shared expert's output is weighted by sigmoid of it
    batched       computes all experts at once, where kernels can; None: one after the other
    reduce        adds up what the ranks computed; None: all of it is computed here
    """

    config: ExpertsConfig
    router: Tensor
    router_bias: Tensor | None
    experts: tuple[Mlp | None, ...]
    shared: Mlp | None
    shared_gate: Tensor | None
    reduce: Callable[[Tensor], Tensor] | None = None
    batched: Experts | None = None

    def __call__(self, x: Tensor) -> Tensor:
        logits = F.linear(x.float(), self.router)
        chosen, weights = route(logits, self.config, self.router_bias)
        if self.batched is None:
            output = self._one_by_one(x, chosen, weights)
        else:
            output = self.batched(x, chosen, weights)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = shared * F.linear(x, self.shared_gate).sigmoid()
            output = output.add_(shared)
        return output if self.reduce is None else self.reduce(output)

    def _one_by_one(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        tokens = x.index_select(0, order // chosen.shape[1])
        outputs, start = [], 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:  # of 128 experts, a token goes to 8
                own = tokens[start : start + count]
                outputs.append(torch.zeros_like(own) if expert is None else expert(own))
                start += count
        by_choice = torch.empty_like(tokens)
        by_choice[order] = torch.cat(outputs)
        weighted = by_choice.view(*chosen.shape, -1).mul_(weights.to(x.dtype)[..., None])
        return weighted.sum(1)


def route(logits: Tensor, config: ExpertsConfig, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The experts of every token and what their outputs are weighted by.

    logits [rows, experts] float32 -> int64 and float32, [rows, per_token]. With groups, the experts
    are chosen within the best of them: a group is as good as its best expert, or as its best two
    together where a bias balances the choice (DeepSeek-V3, https://arxiv.org/abs/2412.19437).
    """
    scores = logits.sigmoid() if config.scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if config.groups > 1:
        rows = choice.shape[0]
        grouped = choice.view(rows, config.groups, -1)
        best = grouped.topk(1 if bias is None else 2, dim=-1).values.sum(-1)
        dropped = torch.ones_like(best, dtype=torch.bool)
        dropped.scatter_(1, best.topk(config.used_groups, dim=-1).indices, False)
        choice = grouped.masked_fill(dropped[..., None], float("-inf")).view(rows, -1)
    chosen = choice.topk(config.per_token, dim=-1).indices
    weights = scores.gather(1, chosen)
    if config.normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return chosen, weights * config.scaling
