"""Adaptors on the Hugging Face hub: a repository holds one under its usual name, with its card."""

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from lemoe.adaptor.header import ADAPTOR_NAME, adaptor_path, check_adaptor
from lemoe.errors import AdaptorError, InputError, OutputError

CARD_NAME = "README.md"
SUFFIX = Path(ADAPTOR_NAME).suffix  # which names of repositories do not have
# The HTTP library beneath raises its own errors where nothing answers; which library depends on the hub's version.
_FAILURES: tuple[type[Exception], ...] = (
    OSError,
    HFValidationError,
    *(kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind.__name__ == "HTTPError"),
)
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


def parse_hub_id(name: str) -> tuple[str, str | None] | None:
    """The repository and revision of `org/name[@revision]`; None for what is, or may be meant as, a local path."""
    found = _HUB_ID.fullmatch(name)
    if not found or name.startswith(".") or Path(found[1]).suffix == SUFFIX:
        return None
    if Path(name).exists() or Path(found[1]).parent.exists():
        return None
    return found[1], found[2]


def fetch_adaptor(repository: str, revision: str | None = None) -> Path:
    """The adaptor of a repository, downloaded unless the hub's cache has it.

    Raises:
        AdaptorError: if there is none, or it cannot be had.
    """
    where = f"{repository}@{revision}" if revision else repository
    try:
        return Path(hf_hub_download(repository, ADAPTOR_NAME, revision=revision))
    except RepositoryNotFoundError:
        raise AdaptorError(f"{where}: no such file or folder here, and no such repository on the hub") from None
    except LocalEntryNotFoundError:
        raise AdaptorError(f"{where}: no such file or folder here, and the hub cannot be reached") from None
    except EntryNotFoundError:
        raise AdaptorError(f"{where}: this repository of the hub holds no {ADAPTOR_NAME}") from None
    except _FAILURES as error:
        reason = str(error).strip().partition("\n")[0]
        raise AdaptorError(f"{where}: no such file or folder here, and the hub gives nothing: {reason}") from None


def push_adaptor(path: Path | str, repository: str, *, private: bool = False) -> str:
    """Upload an adaptor, and the card beside it, to a repository of the hub, which is made if there is none.

    Returns:
        the address of the commit.

    Raises:
        AdaptorError: if the file is no adaptor.
        InputError: if `repository` is no name of one.
        OutputError: if the hub refuses it, or cannot be reached.
    """
    file = adaptor_path(path)
    check_adaptor(file)
    card = file.parent / CARD_NAME
    uploads = {ADAPTOR_NAME: file, **({CARD_NAME: card} if card.is_file() else {})}
    operations = [CommitOperationAdd(name, source) for name, source in uploads.items()]
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Upload an adaptor of lemoe")
    except HFValidationError as error:
        raise InputError(f"{repository}: no name of a repository: {error}") from None
    except _FAILURES as error:
        reason = str(error).strip().partition("\n")[0]
        raise OutputError(f"{repository}: cannot be uploaded: {reason}") from None
    return str(commit.commit_url)
