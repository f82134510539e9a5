"""Sending files to the Hugging Face Hub, with its own client."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mlx_starflow.errors import StarflowError, one_line
from mlx_starflow.model_dir.hub import is_repository

LOGIN = "log in with: hf auth login, or set HF_TOKEN, with a token that may write"

HIDDEN = "[token]"
"""What stands in messages where a token stood."""


def check_repository(name: str) -> None:
    """Raise StarflowError unless it could be a repository's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if not is_repository(name):
            raise HFValidationError("it must be USER/NAME")
    except HFValidationError:
        raise StarflowError(f"{name!r} is no repository: give USER/NAME, of letters, digits, -, _ and .") from None


def check_token() -> None:
    """Raise StarflowError if nobody is logged in on this machine."""
    from huggingface_hub import get_token

    if not get_token():
        raise StarflowError(f"nobody is logged in to the Hub here: {LOGIN}")


def send(
    repository: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool = False,
    replace: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Make a repository of models on the Hub and send it files, in one commit.

    Args:
        repository: owner/name.
        files: by name: a file, or what it holds.
        private: only its owner sees it. One that is there already must be private then.
        replace: the repository may be there already; its files of the same names are replaced, others stay.
        report: is told, in a line, what goes on.

    Returns:
        Its address.

    Raises:
        StarflowError: nobody is logged in, the token is not known or may not write there, the repository is there
            already, or the connection breaks.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    check_repository(repository)
    check_token()
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="mlx-starflow")
    made = False
    with _refusals(repository, lambda: made):
        address = str(api.create_repo(repository, private=private or None, exist_ok=replace))
        if private and not api.repo_info(repository).private:
            raise StarflowError(f"{repository} is there already, and public: give another name, or leave out --private")
        made = True
        report(f"sending {len(files)} files to {address}")
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repository, additions, commit_message="Upload with mlx-starflow")
    return address


@contextmanager
def _refusals(repository: str, made: Callable[[], bool]) -> Iterator[None]:
    """What the Hub, or the way to it, refuses, in a line that holds no token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
        return
    except StarflowError:
        raise
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set: unset it"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = {
            401: f"the Hub does not know this token: {LOGIN}",
            403: f"the token may not write there: {LOGIN}, and give your own name or an organization's that you are in",
            409: "there is a repository of that name already: give another name, or --overwrite to replace its files",
        }.get(status or 0) or f"the Hub refused it: {one_line(error, first=True)}"
    except Exception as error:  # the HTTP library's own exceptions, which differ between versions
        reason = f"the connection to the Hub broke ({one_line(error, first=True)}): check it, and try again"
        if made():
            reason += " with --overwrite, since the repository is there now"
    if token := get_token():
        reason = reason.replace(token, HIDDEN)
    raise StarflowError(f"cannot upload to {repository}: {reason}")
