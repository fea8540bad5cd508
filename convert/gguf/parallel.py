"""Run slabs of work on all of torch's threads and hand the results back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def run_in_order(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The jobs' results, in the jobs' order; few jobs are ahead, so memory stays that of a few.

    A job's operations are too small to share out among threads one by one, so each job runs on one
    thread and several jobs at once: torch releases Python's lock while it computes. Threads of the
    pool tell torch to use no further threads of its own.
    """
    workers = torch.get_num_threads()
    if workers == 1:
        for job in jobs:
            yield job()
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[T]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(workers)
