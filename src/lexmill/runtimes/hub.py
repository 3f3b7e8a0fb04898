"""Publishing a model on a hub that speaks Hugging Face's protocol, through its own client, `huggingface-hub`."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lexmill.errors import ConfigError, LexmillError, MissingPackageError
from lexmill.model.directory import ModelDirectory
from lexmill.progress import SILENT, Progress
from lexmill.runtimes.huggingface import export_huggingface


class HubError(LexmillError):
    """The hub refused, or could not be reached."""


def push(
    model: ModelDirectory | Path | str,
    repo: str,
    *,
    private: bool = False,
    revision: str = "main",
    message: str = "",
    progress: Progress = SILENT,
) -> str:
    """Upload a model: complete, checked, with its model card, in one commit.

    The address and the token are those of `huggingface-hub`: the variables HF_ENDPOINT and HF_TOKEN,
    or what `hf auth login` stored.

    Args:
        model: the model directory, or its path. It is exported first, so what is uploaded is whole.
        repo: "name" or "owner/name"; made if it is not there.
        private: make a new repository private. One that is there already stays as it is.
        revision: the branch; made if it is not there.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        MissingPackageError: huggingface-hub is not installed.
        ConfigError: a name that no repository can have.
        ModelError: files that contradict each other.
        HubError: no token, no permission, no connection.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingPackageError("huggingface-hub", "to upload models", "hub")
    from huggingface_hub import HfApi

    model = model if isinstance(model, ModelDirectory) else ModelDirectory.open(model)
    _check_names(repo, revision)
    with tempfile.TemporaryDirectory(prefix="lexmill-push-") as folder:
        published = export_huggingface(model, Path(folder) / "model")
        size = sum(path.stat().st_size for path in published.rglob("*") if path.is_file())
        with progress.task(f"uploading to {repo}", size, "bytes") as task, _explained(repo):
            api = HfApi()
            name = api.create_repo(repo, private=private, exist_ok=True).repo_id
            if revision != "main":
                api.create_branch(name, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=name,
                folder_path=str(published),
                revision=revision,
                commit_message=message or "Upload a model made with lexmill",
            )
            task.advance(size)
    return str(commit.commit_url)


def _check_names(repo: str, revision: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(
            f"{repo!r} is no name of a repository.",
            "Names are like 'model' or 'owner/model', of letters, digits, '-', '_' and '.'.",
        ) from error
    if not revision or revision != revision.strip() or any(letter in revision for letter in " ~^:?*[\\"):
        raise ConfigError(f"{revision!r} is no name of a branch.")


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the client raises into errors that say what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError("There is no token for the hub.", _LOGIN) from error
    except OfflineModeIsEnabled as error:
        raise HubError("The hub's client is set to work offline.", "Unset HF_HUB_OFFLINE.") from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = " ".join(str(getattr(error, "server_message", None) or error).split())[:300]
        hints = {
            401: _LOGIN,
            403: "The token may not write there: check its permissions and the owner's name.",
            404: "Check the owner's name and the branch.",
            413: "The hub takes no files of this size.",
            429: "The hub is busy; run the same command again later.",
        }
        raise HubError(f"The hub refuses {repo} ({status}): {said}", hints.get(status or 0, "")) from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise HubError(
            f"The hub cannot be reached: {type(error).__name__} {str(error)[:200]}.",
            "Check the connection and HF_ENDPOINT, then run the same command again: what arrived is not sent twice.",
        ) from error


_LOGIN = "Set HF_TOKEN, or log in with: hf auth login"
