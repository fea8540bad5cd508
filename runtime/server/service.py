"""What one running server is made of. Routes get this value; there is no state outside it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qtool.errors import closest
from qtool.runtime.engine.client import EngineClient
from qtool.runtime.engine.sequence import LoRARequest
from qtool.runtime.server.chat_templates import find_chat_template
from qtool.runtime.server.config import PLACEHOLDER_NAMES, ServerConfig
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.generation import TextEngine
from qtool.runtime.server.limits import Admission
from qtool.runtime.server.made_models import Kept, MadeModels, as_made
from qtool.runtime.server.metrics import Metrics
from qtool.runtime.server.response_template import usable_template
from qtool.runtime.server.token_texts import TokenTexts
from qtool.runtime.store import Store, store
from qtool.runtime.tokenizer import Tokenizer

logger = logging.getLogger("qtool.server")


@dataclass(frozen=True, slots=True)
class Service:
    config: ServerConfig
    client: EngineClient
    tokenizer: Tokenizer
    metrics: Metrics
    admission: Admission
    engine: TextEngine
    texts: TokenTexts
    made: MadeModels[Service]
    response_template: Mapping[str, Any] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def build(
        cls,
        client: EngineClient,
        tokenizer: Tokenizer,
        config: ServerConfig,
        names: Store | None = None,
    ) -> Service:
        """names: made from models; None: this user's own."""
        metrics = Metrics(client.info, config.served_model_names[0], client.stats)
        admission = Admission(
            max_running=config.max_running,
            max_queued=config.max_queued,
            max_per_client=config.max_per_client,
        )
        engine = TextEngine(client, tokenizer, metrics, admission)
        bases = tuple(name for name in (config.model_root, *config.accepted_model_names) if name)
        made: MadeModels[Service] = MadeModels(names or store(), bases, {})
        texts = TokenTexts(tokenizer)
        return cls(
            config,
            client,
            tokenizer,
            metrics,
            admission,
            engine,
            texts,
            made,
            usable_template(tokenizer.response_template),
        )

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Adapters that clients call by their names, as models."""
        own = self.config.adapter
        return tuple(name for name in self.client.info.lora_names if name != own)

    def adapter(self, model: str) -> LoRARequest | None:
        """What a model name asks for beyond the model: adapters go by names like models."""
        if model in self.adapter_names:
            return LoRARequest(model)
        own = self.config.adapter
        return None if own is None else LoRARequest(own, lora_path=own)

    def answers_to(self, name: str) -> bool:
        """Whether a name is the model's or an adapter's, and not one made from it."""
        return name in self._own_names

    def named(self, asked: str | None) -> Service:
        """This server as it answers to a name made from its model; itself for all other names."""
        if not asked or asked in PLACEHOLDER_NAMES or self.answers_to(asked):
            return self
        made = self.made.find(asked)
        if made is None:
            return self
        kept = self.made.views.get(asked)
        if kept is None or kept.made != made:
            tokenizer = self.tokenizer
            if made.template is not None:
                tokenizer = tokenizer.with_chat_template(find_chat_template(made.template))
            view = replace(self, config=as_made(self.config, asked, made), tokenizer=tokenizer)
            kept = self.made.views[asked] = Kept(made, view)
        return kept.view

    def parent_of(self, name: str) -> str | None:
        """The model that an adapter or a made name stands on."""
        if name in self.adapter_names:
            return self.config.served_model_names[0]
        return self.config.model_root if self.made.find(name) is not None else None

    @property
    def _own_names(self) -> tuple[str, ...]:
        return (*self.config.accepted_model_names, *self.adapter_names)

    def model_name(self, asked: str | None) -> str:
        """The name to answer under: the client's own word for the model, which must be ours."""
        if not asked or asked in PLACEHOLDER_NAMES:
            return self.config.served_model_names[0]
        if self.answers_to(asked):
            return asked
        known = (*self._own_names, *(name for name, _ in self.made.all()))
        guess = closest(asked, known)
        cure = f"did you mean `{guess}`?" if guess else "here are: " + ", ".join(known)
        raise ApiError(
            404,
            f"The model `{asked:.200}` does not exist; {cure}",
            type="not_found_error",
            param="model",
            code="model_not_found",
        )
