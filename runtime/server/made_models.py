"""Names made from a model that is served (`qtool create`, `/api/create`), behind the same engine.

A name is a system prompt, examples, sampling values, a template and an adapter: none of it needs
the weights a second time. Asked for such a name, a server answers as a view of itself: the same
engine, queue and counters under another configuration. Names are looked up when they are asked
for, so one made a moment ago is there without a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Generic, TypeVar

from qtool.errors import FormatError
from qtool.runtime.config import EngineConfig
from qtool.runtime.modelfile import Modelfile
from qtool.runtime.server.config import SamplingDefaults, ServerConfig
from qtool.runtime.store import Store

logger = logging.getLogger("qtool.server")

View = TypeVar("View")


@dataclass(frozen=True, slots=True)
class Kept(Generic[View]):
    made: Modelfile
    view: View


@dataclass(frozen=True, slots=True)
class MadeModels(Generic[View]):
    """
    store   where names are kept
    bases   what the model that is served may be called in FROM
    views   of names that have been asked for, until what they are made of changes
    """

    store: Store
    bases: tuple[str, ...]
    views: dict[str, Kept[View]]

    def find(self, name: str) -> Modelfile | None:
        """What a name is made of, if it is made from this model."""
        made = self.store.find(name)
        return made if made is not None and self._is_base(made.base) else None

    def all(self) -> Iterator[tuple[str, Modelfile]]:
        for name in self.store.names():
            try:
                made = self.find(name)
            except FormatError as error:
                # Whoever asks for it is told; nobody else's list ends on it.
                logger.warning("%s", error.message)
                continue
            if made is not None:
                yield name, made

    def _is_base(self, base: str) -> bool:
        if base in self.bases:
            return True
        path = Path(base).expanduser()
        return path.exists() and any(path.resolve() == Path(own).resolve() for own in self.bases)


def as_made(config: ServerConfig, name: str, made: Modelfile) -> ServerConfig:
    """The configuration under which a server answers to a name."""
    return replace(
        config,
        served_model_names=(name,),
        also_served=(),
        sampling=with_values(config.sampling, made),
        system=made.system,
        examples=made.messages,
        stop=made.stop,
        adapter=made.adapter,
    )


def with_adapter(config: EngineConfig, made: Modelfile | None) -> EngineConfig:
    """The engine that can run a name: its adapter is loaded at the start."""
    if made is None or made.adapter is None:
        return config
    module = (made.adapter, made.adapter)
    return replace(config, lora_modules=(*config.lora_modules, module))


def with_values(defaults: SamplingDefaults, made: Modelfile) -> SamplingDefaults:
    known = {field.name for field in fields(SamplingDefaults)}
    given = {name: value for name, value in made.sampling.items() if name in known}
    if (given.get("max_new_tokens") or 0) < 1:  # Ollama's words for no limit
        given.pop("max_new_tokens", None)
    return replace(defaults, **given)
