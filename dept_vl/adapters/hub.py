"""Download and upload of adapters on the Hugging Face Hub.

A repository has the two files of an adapter and a model card in its root folder.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import one_line
from dept_vl._utils.run_files import BEST

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

TENSORS_FILE = "adapter.safetensors"
ADAPTER_FILE = "adapter.json"
PEFT_CONFIG_FILE = "adapter_config.json"
"""Configuration file of PEFT, which is downloaded to recognise adapters of PEFT for error messages."""


def adapter_folder(
    name_or_folder: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Return the folder with an adapter's files: a local folder, the `best/` of a run, or the Hub's cache.

    A local folder takes precedence over a repository of that name. See `Adapter.from_pretrained`.
    """
    folder = as_path(name_or_folder)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} was asked of {folder}, which is a folder and has none; leave the "
                "revision out, or name a repository of the Hub"
            )
        return folder / BEST if (folder / BEST / ADAPTER_FILE).is_file() else folder
    if isinstance(name_or_folder, Path) or not _is_repository_name(name_or_folder):
        raise FileNotFoundError(
            f"no adapter at {name_or_folder}: there is no such folder, and a repository of the Hub is named "
            "like user/adapter"
        )
    return _download(name_or_folder, revision, token)


def as_path(source: Any) -> Path:
    """Return a folder or a name on the Hub as a path; UsageError if it is neither."""
    if not isinstance(source, str | os.PathLike):
        raise UsageError(
            f"expected the folder of a run or an adapter, or its name on the Hub; found {source!r:.80}"
        )
    return Path(source)


def names_of(sources: Sequence[str]) -> dict[str, str]:
    """Return adapters by display names, the shortest ends of their paths that are all different.

    Raises:
        ValueError: If an adapter is given twice.
    """
    if len(set(sources)) != len(sources):
        raise ValueError(f"an adapter is named twice: {', '.join(sources)}")
    parts = {source: Path(source).parts for source in sources}
    longest = max((len(part) for part in parts.values()), default=1)
    for count in range(1, longest + 1):
        ends = ["/".join(parts[source][-count:]) for source in sources]
        if len(set(ends)) == len(ends):
            return dict(zip(ends, sources, strict=True))
    return {source: source for source in sources}


def push(
    repository: str,
    files: Mapping[str, bytes],
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str,
    token: str | bool | None = None,
) -> str:
    """Upload files, given by name, in one commit and return its URL; see `Adapter.push_to_hub`."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()],
            commit_message=message,
            revision=revision,
        )
    except OfflineModeIsEnabled as error:
        raise ConnectionError(
            f"nothing was uploaded to {repository}: HF_HUB_OFFLINE is set; unset it"
        ) from error
    except HfHubHTTPError as error:
        _raise_rejected(
            error,
            f"{repository} cannot be written with this token ({one_line(error)}); log in with one that may "
            "(hf auth login), or give it, and look at the name before the stroke",
        )
    return str(commit.commit_url)


def _raise_rejected(error: "HfHubHTTPError", message: str) -> NoReturn:
    """Raise a `PermissionError` if the Hub rejected the token, and `error` otherwise."""
    if error.response.status_code not in (401, 403):
        raise error
    raise PermissionError(message) from error


def _is_repository_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _download(name: str, revision: str | None, token: str | bool | None) -> Path:
    """Download the adapter's files of a repository and return their folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    which = name if revision is None else f"{name} (revision {revision})"
    wanted = [ADAPTER_FILE, TENSORS_FILE, PEFT_CONFIG_FILE]
    try:
        folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted))
    except GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: ask for access on its page of the Hub, then log in (hf auth login) or give "
            f"a token; the Hub says: {one_line(error)}"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no adapter at {name}: there is no such folder here, and no such repository on the Hub that "
            "may be read with this token; look at the spelling, and if it is private, log in (hf auth login) "
            "or give a token"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{name} has no revision {revision}; give a branch, a tag or a whole commit hash of it"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{which} is not a folder here, is not in the Hub's cache, and the Hub cannot be reached "
            f"({one_line(error.__cause__ or error)}); try again when it can (HF_HUB_OFFLINE unset), or give "
            "the folder of an adapter"
        ) from error
    except HfHubHTTPError as error:
        _raise_rejected(
            error,
            f"the Hub does not let {which} be read with this token ({one_line(error)}); log in again "
            "(hf auth login) or give another token",
        )
    missing = [file for file in (ADAPTER_FILE, TENSORS_FILE) if not (folder / file).is_file()]
    if missing:
        of_peft = (folder / PEFT_CONFIG_FILE).is_file()
        hint = "its files are PEFT's, which dept_vl.adapters.peft.files.from_peft reads from a folder"
        raise FileNotFoundError(
            f"no adapter of dept_vl in {which} on the Hub: {' and '.join(missing)} missing there"
            + (f"; {hint}" if of_peft else "")
        )
    return folder
