"""Whether a cluster's nodes have the API key that is set here.

A key never stands in an application's configuration, which Ray's dashboard shows. It comes from
QTOOL_API_KEY, and a replica has the environment in which its node was started: a key that is set
here alone would guard nothing. So each node is asked for the digest of its own before the
application starts there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from qtool.errors import UsageError
from qtool.settings import settings


def digest_of_key() -> str | None:
    """Of the key in this process's environment; None: there is none."""
    key = settings().api_key
    return None if key is None else hashlib.sha256(key.encode()).hexdigest()


def digests_there() -> dict[str, str | None]:
    """Of every node of the cluster that this process is connected to, by its address."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(digest_of_key)
    asked = {
        node["NodeManagerAddress"]: ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in ray.nodes()
        if node["Alive"]
    }
    return dict(zip(asked, ray.get(list(asked.values())), strict=True))


def check_keys(here: str | None, there: Mapping[str, str | None]) -> None:
    """Raise UsageError where a node would let in whom this machine's key is to keep out."""
    if here is None:
        return
    without = [address for address, digest in there.items() if digest is None]
    other = [address for address, digest in there.items() if digest not in (None, here)]
    hint = (
        "start `ray start` on every node with the same QTOOL_API_KEY, or unset it here to take "
        "what the cluster has"
    )
    if without:
        raise UsageError(
            "QTOOL_API_KEY is set here and not on the cluster, which would answer without a key: "
            f"{', '.join(without)}",
            hint,
        )
    if other:
        raise UsageError(
            f"QTOOL_API_KEY is another key on the cluster than here: {', '.join(other)}", hint
        )
