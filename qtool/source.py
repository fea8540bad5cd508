"""A model as the user names it, and where it is on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qtool.builtin import PREFIX, builtin_model
from qtool.errors import QtoolError, UsageError
from qtool.settings import settings


@dataclass(frozen=True, slots=True)
class Source:
    """A model as the user named it, and where it is on this machine."""

    name: str
    path: Path
    revision: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    @property
    def short_name(self) -> str:
        """For naming outputs: ``Qwen/Qwen3-0.6B`` and ``./Qwen3-0.6B/`` are both Qwen3-0.6B."""
        if self.is_gguf:
            return self.path.stem
        name = self.name.removeprefix(PREFIX).rstrip("/")
        return Path(name).name or self.path.name


def resolve(model: str, revision: str | None = None, *, config_only: bool = False) -> Source:
    """Find a model: a folder, a .gguf file, ``builtin:NAME``, or a Hub id (the local cache alone
    when offline).

    config_only  of a model on the Hub, take config.json and no weights
    """
    if model.startswith(PREFIX):
        return Source(model, builtin_model(model.removeprefix(PREFIX)))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"{path} has no config.json, so it is not a Hugging Face model folder",
                "name the folder that holds config.json and the .safetensors files",
            )
        return Source(model, path.resolve())
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(
                f"{path} is a file, and the only model files read are .gguf",
                "name the model's folder instead",
            )
        return Source(model, path.resolve())
    return _resolve_hub(model, revision, config_only=config_only)


def _resolve_hub(model: str, revision: str | None, *, config_only: bool) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(
            f"no model at {model!r}",
            "name a folder, a .gguf file, a Hub id such as Qwen/Qwen3-0.6B, or builtin:books-7m",
        )

    def download(*patterns: str) -> Path:
        offline = settings().hub_offline
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=[*patterns], local_files_only=offline
            )
        )

    try:
        if config_only:
            path = download("config.json")
        else:
            # The card is small, and says the licence.
            sides = ("*.model", "*.txt", "*.jinja", "LICENSE*", "README.md")
            path = download("*.json", "*.safetensors", *sides)
            if not any(path.glob("*.safetensors")):
                path = download("*.json", "pytorch_model*.bin")
    except HFValidationError as error:
        raise UsageError(f"{model!r} is neither a path nor a Hub id", str(error)) from error
    except GatedRepoError as error:
        raise QtoolError(
            f"{model} is gated: its owner wants you to accept a licence first",
            f"accept it at https://huggingface.co/{model}, then run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{model} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"no model {model!r} on the Hub, nor a folder of that name here",
            "check the spelling; for a private model run `hf auth login` first",
        ) from error
    except LocalEntryNotFoundError as error:
        offline = settings().hub_offline
        raise QtoolError(
            f"{model} is not in the local Hub cache"
            + (" and HF_HUB_OFFLINE is set" if offline else ", and the Hub cannot be reached"),
            "unset HF_HUB_OFFLINE to download it"
            if offline
            else "check the network, or name a local folder",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise QtoolError(
            f"{model} could not be taken from the Hub: {error}",
            "check the network, or name a local folder",
        ) from error
    if not (path / "config.json").is_file():
        raise UsageError(f"{model} has no config.json, so it is not a transformers model")
    # In the Hub cache a snapshot's folder is named after its commit.
    return Source(model, path, revision=path.name)
