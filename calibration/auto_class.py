"""Which of transformers' classes a model is, and which part of it is the language model.

Many models that read images are no causal language models by transformers' table, though they
write text. Their text model is quantized, and their towers are copied: text alone goes through
them here, which the classes take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def auto_class(config: Any) -> Any:
    """AutoModelForCausalLM, or AutoModelForImageTextToText where only that knows the config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = type(config) in AutoModelForImageTextToText._model_mapping
    if known and type(config) not in AutoModelForCausalLM._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def auto_class_name(config: Mapping[str, Any]) -> str:
    """Of a config.json, whose family transformers may not know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        found = auto_class(AutoConfig.for_model(str(config.get("model_type"))))
    except ValueError:  # code of the model's own
        found = AutoModelForCausalLM
    return str(found.__name__)


def language_model(model: Any) -> str | None:
    """The name of a multimodal model's text decoder in it; None where all of it is text."""
    if model.config.get_text_config() is model.config or not hasattr(model, "get_decoder"):
        return None
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), None)


def tower_parameters(model: Any) -> frozenset[str]:
    """Parameters that text does not go through: all but those of the text decoder, of the
    embeddings and of the head.
    """
    name = language_model(model)
    if not name:
        return frozenset()
    text: set[int] = set()
    parts: tuple[nn.Module | None, ...] = (
        model.get_submodule(name),
        model.get_input_embeddings(),
        model.get_output_embeddings(),
    )
    for part in parts:
        text |= {id(parameter) for parameter in part.parameters()} if part is not None else set()
    return frozenset(
        parameter_name
        for parameter_name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in text
    )
