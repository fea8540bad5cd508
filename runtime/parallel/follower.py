"""A rank other than 0: loads its part of the model, and runs what rank 0 tells it until it stops.

Started by `runtime.parallel.team`, with the number of a socket that is connected to rank 0. When
that closes, rank 0 has ended and so does this process, whatever it is doing. Signals that a
terminal or a service manager sends to all processes of a group are rank 0's to answer: it lets
running answers finish first, for which it needs this one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path

import torch

from qtool.convert.formats import open_weights
from qtool.runtime.engine.adapters import Adapters, Selected
from qtool.runtime.engine.batch import Batch
from qtool.runtime.engine.blocks import Copy
from qtool.runtime.engine.runner import ModelRunner
from qtool.runtime.layers import PackingRules
from qtool.runtime.models.load import plan_decoder
from qtool.runtime.models.model import Model, causal_hidden, causal_logits
from qtool.runtime.parallel.heartbeat import beat, sum_seconds
from qtool.runtime.parallel.layers import Ranks
from qtool.runtime.parallel.members import Errand
from qtool.runtime.parallel.message import (
    Channel,
    ClearBlocks,
    Close,
    CopyBlocks,
    Open,
    Pass,
    Step,
    Stop,
    Text,
    encode,
)
from qtool.runtime.parallel.process_group import CutOff, ProcessGroup
from qtool.runtime.parallel.shard import Shard
from qtool.source import resolve


def main(arguments: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(arguments[0])))
    threading.Thread(target=_end_with_rank_0, args=(channel.socket,), daemon=True).start()
    try:
        _follow(channel)
    except BaseException as error:
        word = "cut off" if isinstance(error, CutOff) else "failed"
        try:
            channel.send(encode(Text(json.dumps({word: str(error) or type(error).__name__}))))
        finally:
            _leave(1)
    _leave(0)


def _follow(channel: Channel) -> None:
    errand_text = channel.receive()
    assert isinstance(errand_text, Text)
    errand = Errand.parse(errand_text.text)
    beat(lambda: channel.send(encode(Text('{"alive": 1}'))), errand.timeout_seconds)
    model = _load(errand, channel)
    source = resolve(errand.model)
    runners: dict[int, ModelRunner] = {}
    adapters: dict[int, Adapters] = {}
    while True:
        match channel.receive():
            case Step() as step:
                if step.runner in adapters:
                    _select(adapters[step.runner], step)
                runners[step.runner].run(_batch(step, model.device))
            case CopyBlocks(runner, copies):
                runners[runner].copy([Copy(*copy) for copy in copies])
            case ClearBlocks(runner, block_ids):
                runners[runner].clear(block_ids)
            case Pass() as wanted:
                tokens = torch.tensor(wanted.token_ids).view(wanted.batch, -1)
                (causal_logits if wanted.logits else causal_hidden)(model, tokens)
            case Open() as wanted_runner:
                decoder = model.for_context(wanted_runner.context)
                if wanted_runner.lora:
                    own = adapters[wanted_runner.runner] = Adapters(decoder, source)
                    decoder = own.model
                runners[wanted_runner.runner] = _open(wanted_runner, decoder)
            case Text(text):
                runner, name, folder = json.loads(text)["adapter"]
                adapters[runner].load(name, Path(folder))
            case Close(runner):
                del runners[runner]
                adapters.pop(runner, None)
            case Stop() | None:
                return
            case other:
                raise AssertionError(other)


def _load(errand: Errand, channel: Channel) -> Model:
    torch.set_num_threads(errand.num_threads)
    device = torch.device(errand.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    plan = plan_decoder(open_weights(resolve(errand.model)))
    shards = plan.shard(Shard(errand.rank, errand.size))
    channel.send(encode(Text('{"arrived": 1}')))
    group = ProcessGroup(
        errand.rank,
        errand.size,
        Path(errand.meeting),
        errand.backend,
        timeout_seconds=sum_seconds(errand.timeout_seconds),
    )
    rules = PackingRules(errand.activations, errand.lm_head)  # type: ignore[arg-type]
    with torch.inference_mode():
        loaded = plan.load(getattr(torch, errand.dtype), device, rules, Ranks(shards, group))
    channel.send(encode(Text(json.dumps({"loaded": loaded.nbytes}))))
    return loaded.model


def _open(wanted: Open, model: Model) -> ModelRunner:
    return ModelRunner(
        model,
        num_blocks=wanted.num_blocks,
        block_size=wanted.block_size,
        kv_cache_dtype="int8" if wanted.int8 else "auto",
        max_model_len=wanted.context,
        max_num_seqs=wanted.max_num_seqs,
        enforce_eager=wanted.eager,
    )


def _select(adapters: Adapters, step: Step) -> None:
    names = adapters.names
    adapters.use([Selected(names[number], *rows) for number, *rows in step.adapter_rows])


def _batch(step: Step, device: torch.device) -> Batch:
    positions = [
        position
        for span in step.spans
        for position in range(span.length - span.num_queries, span.length)
    ]
    return Batch(
        token_ids=torch.tensor(step.token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        spans=tuple(step.spans),
        sampled_rows=torch.tensor(step.sampled_rows, dtype=torch.int64, device=device),
        row_ranges=(),
    )


def _end_with_rank_0(end: socket.socket) -> None:
    """A step may be waiting for a sum that will never come."""
    poll = select.poll()
    poll.register(end, select.POLLRDHUP)
    poll.poll()
    threading.Event().wait(LAST_WORD_SECONDS)
    _leave(1)


# What rank 0 said last, such as to stop, is acted upon first.
LAST_WORD_SECONDS = 2.0


def _leave(status: int) -> None:
    """Without the destructors of a process group whose other ends are gone: gloo's abort."""
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
