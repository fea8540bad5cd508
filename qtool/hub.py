"""Publish an artifact on the Hugging Face Hub.

Whether it can be published is asked before any work: a token, the network, a name that may be. Only
what qtool.json lists is uploaded, after its checksums were compared, so that neither a cache beside
the weights (model.packed) nor a half-written file goes along. Weight files of an earlier upload
that the artifact no longer has are removed in the same commit: loaders would read them too.
"""

from __future__ import annotations

import dataclasses
import glob
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.artifact import CARD_NAME, MANIFEST_NAME, Manifest, sha256, verify_checksums
from qtool.errors import QtoolError, UsageError
from qtool.json_files import write_json
from qtool.settings import settings

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Of an earlier upload, what is removed where it is not replaced.
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository that may be written to.

    name     owner/name
    private  None for the owner's own default
    """

    name: str
    private: bool | None
    api: HfApi

    def push(self, folder: Path) -> str:
        """Upload a folder that holds qtool.json; returns the address of its page.

        Raises VerificationFailed where a file is not what was written, QtoolError where the Hub
        refuses.
        """
        manifest = verify_checksums(folder)
        names = [*manifest.files, MANIFEST_NAME]
        try:
            made = self.api.create_repo(self.name, private=self.private, exist_ok=True)
            self.api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message=f"{manifest.format}, made by qtool from {manifest.source}",
                allow_patterns=[glob.escape(name) for name in names],
                delete_patterns=_WEIGHT_FILES,
            )
        except Exception as error:  # the kinds follow the client's HTTP library
            raise QtoolError(
                f"{folder} could not be uploaded to {self.name}: {_first_line(error)}",
                f"the folder is whole: `qtool push {folder} {self.name}` tries again",
            ) from error
        return str(made)


def open_repository(repo_id: str, *, private: bool) -> Repository:
    """The repository by what the environment says: HF_HUB_OFFLINE, HF_ENDPOINT, and the token of
    HF_TOKEN or `hf auth login`.
    """
    from huggingface_hub import HfApi, get_token

    found = settings()
    api = HfApi(endpoint=found.hub_endpoint, token=get_token() or False)
    return check_repository(repo_id, private=private, offline=found.hub_offline, api=api)


def check_repository(repo_id: str, *, private: bool, offline: bool, api: HfApi) -> Repository:
    """A repository that this user may write to, as far as that can be known without writing.

    repo_id  owner/name, or a name of the user's own
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id!r} cannot be the name of a repository", "name it as owner/name"
        ) from error
    if offline:
        raise UsageError(
            f"HF_HUB_OFFLINE is set, so nothing can be pushed to {repo_id}",
            "unset it, or leave --push-to-hub out and run `qtool push FOLDER REPO_ID` later",
        )
    if not api.token:
        raise QtoolError(
            f"there is no token of the Hub, which pushing to {repo_id} takes",
            "run `hf auth login`, or set HF_TOKEN to a token that may write",
        )
    user = _user(api)
    if _role(user) == "read":
        raise QtoolError(
            f"the token of {user['name']} may only read, so nothing can be pushed to {repo_id}",
            "make one that may write at https://huggingface.co/settings/tokens",
        )
    name = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    return Repository(name, True if private else None, api)


def accept_edited_card(folder: Path) -> bool:
    """Put the checksum of a card that was edited into qtool.json; whether there was one.

    The card is there to be edited; of every other file a difference is a fault.
    """
    if not (folder / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{folder} has no {MANIFEST_NAME}, so it cannot be checked before it is published",
            "push what `qtool quantize` or `qtool convert` has made",
        )
    manifest = Manifest.load(folder)
    card = folder / CARD_NAME
    if CARD_NAME not in manifest.files or not card.is_file():
        return False
    now = sha256(card)
    if manifest.files[CARD_NAME] == now:
        return False
    edited = dataclasses.replace(manifest, files={**manifest.files, CARD_NAME: now})
    write_json(folder / MANIFEST_NAME, edited.to_dict())
    return True


def _user(api: HfApi) -> dict[str, Any]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found: dict[str, Any] = api.whoami()
    except HfHubHTTPError as error:
        raise QtoolError(
            f"the Hub does not take the token: {_first_line(error)}",
            "run `hf auth login`, or set HF_TOKEN to a token that may write",
        ) from error
    except Exception as error:  # the kinds follow the client's HTTP library
        raise QtoolError(
            f"the Hub at {api.endpoint} cannot be reached: {_first_line(error)}",
            "check the network, or leave --push-to-hub out and run `qtool push` later",
        ) from error
    return found


def _role(user: dict[str, Any]) -> str | None:
    """read, write or fineGrained; None where the Hub does not say."""
    token = user.get("auth", {}).get("accessToken")
    role = token.get("role") if isinstance(token, dict) else None
    return role if isinstance(role, str) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
