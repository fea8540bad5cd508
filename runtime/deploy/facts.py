"""What a deployment has to know of a model before any of its weights is read, or even downloaded.

Of a folder or a GGUF file on this machine: its config and the size of its files. Of a model on the
Hub: its config.json and the sizes that the Hub lists; the weights are downloaded where it will run.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qtool.builtin import PREFIX
from qtool.errors import QtoolError, UsageError
from qtool.json_files import read_json
from qtool.settings import settings
from qtool.source import resolve

Kind = Literal["builtin", "folder", "gguf", "hub"]
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """
    name          as the user named it
    kind          where it is
    path          its folder or file on this machine; None: on the Hub alone
    config        its config.json; of a GGUF file what its metadata say, in the same keys
    weight_bytes  of its weight files; None: unknown
    missing       why config or weight_bytes are not known; None: they are
    """

    name: str
    kind: Kind
    path: Path | None
    config: Mapping[str, Any]
    weight_bytes: int | None
    missing: str | None = None

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language model's part of the config of a multimodal one."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else self.config

    @property
    def quantization(self) -> Mapping[str, Any]:
        found = self.config.get("quantization_config")
        return found if isinstance(found, Mapping) else {}

    @property
    def quant_method(self) -> str:
        """ "gguf", "dense", or quantization_config's word, such as "compressed-tensors"."""
        if self.kind == "gguf":
            return "gguf"
        return str(self.quantization.get("quant_method", "dense"))

    @property
    def has_experts(self) -> bool:
        return any(self.size(key) or 0 for key in EXPERT_KEYS)

    def size(self, *keys: str) -> int | None:
        """A whole number of the config, under the first of the keys that is there."""
        for key in keys:
            value = self.text_config.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None


def look_at(model: str, revision: str | None = None) -> ModelFacts:
    """Facts of a model named as for `qtool serve`."""
    path = Path(model).expanduser()
    if model.startswith(PREFIX):
        return _folder(model, "builtin", resolve(model).path)
    if path.is_dir():
        return _folder(model, "folder", resolve(model).path)
    if path.is_file():
        from qtool.convert.formats import open_weights

        source = resolve(model)
        num_bytes = sum(part.stat().st_size for part in parts_of(source.path))
        return ModelFacts(model, "gguf", source.path, open_weights(source).config, num_bytes)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(
            f"no model at {model!r}",
            "name a folder, a .gguf file, a Hub id such as Qwen/Qwen3-0.6B, or builtin:books-7m",
        )
    return _hub(model, revision)


def parts_of(path: Path) -> list[Path]:
    """All files of a GGUF model that is split into several, NAME-00001-of-00003.gguf; else it."""
    found = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if found is None:
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(found[1])}-*-of-{found[2]}.gguf"))


def _folder(model: str, kind: Kind, folder: Path) -> ModelFacts:
    num_bytes = sum(
        file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES
    )
    return ModelFacts(model, kind, folder, read_json(folder / "config.json"), num_bytes)


def _hub(model: str, revision: str | None) -> ModelFacts:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    offline = settings().hub_offline
    try:
        config = read_json(
            Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=offline))
        )
    except GatedRepoError as error:
        raise QtoolError(
            f"{model} is gated: its owner wants you to accept a licence first",
            f"accept it at https://huggingface.co/{model}, then run `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"no model {model!r} on the Hub, nor a folder of that name here",
            "check the spelling; for a private model run `hf auth login` first",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return ModelFacts(model, "hub", None, {}, None, "the Hub cannot be reached from here")
    if offline:
        return ModelFacts(model, "hub", None, config, None, "HF_HUB_OFFLINE is set")
    try:
        listed = HfApi().model_info(model, revision=revision, files_metadata=True).siblings or []
    except (HfHubHTTPError, OSError):
        return ModelFacts(model, "hub", None, config, None, "the Hub cannot be reached from here")
    sizes = [file.size or 0 for file in listed if Path(file.rfilename).suffix == ".safetensors"]
    return ModelFacts(model, "hub", None, config, sum(sizes) or None)
