"""What one running server is made of. Routes get this value; there is no state outside it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from qtool.errors import closest
from qtool.runtime.engine.client import EngineClient
from qtool.runtime.engine.sequence import LoRARequest
from qtool.runtime.server.config import PLACEHOLDER_NAMES, ServerConfig
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.generation import TextEngine
from qtool.runtime.server.limits import Admission
from qtool.runtime.server.metrics import Metrics
from qtool.runtime.server.token_texts import TokenTexts
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
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def build(cls, client: EngineClient, tokenizer: Tokenizer, config: ServerConfig) -> Service:
        metrics = Metrics(client.info, config.served_model_names[0], client.stats)
        admission = Admission(
            max_running=config.max_running,
            max_queued=config.max_queued,
            max_per_client=config.max_per_client,
        )
        engine = TextEngine(client, tokenizer, metrics, admission)
        return cls(config, client, tokenizer, metrics, admission, engine, TokenTexts(tokenizer))

    def adapter(self, model: str) -> LoRARequest | None:
        """What a model name asks for beyond the model: adapters go by names like models."""
        return LoRARequest(model) if model in self.client.info.lora_names else None

    def model_name(self, asked: str | None) -> str:
        """The name to answer under: the client's own word for the model, which must be ours."""
        if not asked or asked in PLACEHOLDER_NAMES:
            return self.config.served_model_names[0]
        known = (*self.config.accepted_model_names, *self.client.info.lora_names)
        if asked in known:
            return asked
        guess = closest(asked, known)
        cure = f"did you mean `{guess}`?" if guess else "here are: " + ", ".join(known)
        raise ApiError(
            404,
            f"The model `{asked:.200}` does not exist; {cure}",
            type="not_found_error",
            param="model",
            code="model_not_found",
        )
