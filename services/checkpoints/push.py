"""`vcot push`: a run's pairs, or a registered checkpoint, to the Hugging Face hub (or what HF_ENDPOINT names).

What is sent is a folder of the run as it lies there, its card (`README.md`) included, which was written when the folder was
made. A repository is made private, and one that exists and is public is refused unless that is asked for. What is on the hub
already is not sent again, so that the same command goes on after a stop. What an earlier push left there and a loader would
read with the new files goes in the same commit: an adapter beside merged weights would be added to them twice, and a split
that the pairs no longer have would be trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from vcot.pipeline.errors import InputError, MachineError, ServerError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

TOKEN_ENV = "HF_TOKEN"  # noqa: S105 - the variable's name
CARD = "README.md"
_LOADED = {
    "dataset": ["*.parquet"],
    "model": ["*.safetensors", "*.safetensors.index.json", "adapter_config.json", "chat_template*"],
}
"""Files that loaders read wherever they find them."""


@dataclass(frozen=True)
class Parcel:
    """A folder that is to be sent."""

    folder: Path
    kind: Literal["dataset", "model"]
    message: str
    """The commit's."""

    @property
    def files(self) -> list[tuple[str, int]]:
        """Each file's path in the repository and its size in bytes; hidden ones are not sent."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = [(path.relative_to(self.folder), path.stat().st_size) for path in paths]
        return [(name.as_posix(), size) for name, size in names if not any(part.startswith(".") for part in name.parts)]


@dataclass(frozen=True)
class Destination:
    """Where it goes."""

    repo: str
    """USER/NAME."""
    revision: str | None
    """A branch, made where it does not exist; None is the main one."""
    is_public: bool

    def __str__(self) -> str:
        return f"{self.repo}, branch {self.revision or 'main'}, {'public' if self.is_public else 'private'}"


def pack(folder: Path, kind: Literal["dataset", "model"], message: str) -> Parcel:
    """A folder with its card. Raises InputError where the card is missing: nothing is published undescribed."""
    if not (folder / CARD).is_file():
        raise InputError(f"{folder} has no {CARD}, the card that says what it is; write one, then push again")
    return Parcel(folder, kind, message)


def render_parcel(parcel: Parcel) -> Table:
    """What is sent."""
    files = parcel.files
    table = Table("file")
    table.add_column("bytes", justify="right")
    for name, size in files:
        table.add_row(name, f"{size:,}")
    table.add_row(f"{len(files)} files", f"{sum(size for _, size in files):,}")
    return table


def push(parcel: Parcel, place: Destination) -> str:
    """Send the parcel; the address of the commit.

    Raises MachineError without a token, or with one that may not write there; InputError for a name that the hub refuses or
    a repository that others can see; ServerError where the hub fails.
    """
    import httpx2  # the hub's client stands on it
    from huggingface_hub import HfApi, get_token  # half a second, and this command's only
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if get_token() is None:
        raise MachineError(
            f"{TOKEN_ENV} is not set; make a token that may write at https://huggingface.co/settings/tokens"
        )
    api = HfApi()
    try:
        _open_repository(api, parcel, place)
        commit = api.upload_folder(
            repo_id=place.repo,
            repo_type=parcel.kind,
            folder_path=parcel.folder,
            revision=place.revision,
            commit_message=parcel.message,
            allow_patterns=[name for name, _ in parcel.files],
            delete_patterns=_LOADED[parcel.kind],  # but for those that are sent
        )
    except HFValidationError as error:
        raise InputError(f"{place.repo!r} is no name of a repository ({error}); give USER/NAME") from None
    except HfHubHTTPError as error:
        raise _explain(error, place) from None
    except (httpx2.HTTPError, OSError) as error:
        raise ServerError(
            f"the hub at {api.endpoint} cannot be reached ({error}); the same command tries again"
        ) from None
    return str(commit.commit_url)


def _open_repository(api: HfApi, parcel: Parcel, place: Destination) -> None:
    """Make repository and branch where they do not exist yet."""
    api.create_repo(place.repo, repo_type=parcel.kind, private=not place.is_public, exist_ok=True)
    if not place.is_public and not api.repo_info(place.repo, repo_type=parcel.kind).private:
        raise InputError(
            f"{place.repo} exists and is public; add --public to publish there, or name another repository"
        )
    if place.revision is not None:
        api.create_branch(place.repo, branch=place.revision, repo_type=parcel.kind, exist_ok=True)


def _explain(error: HfHubHTTPError, place: Destination) -> MachineError | ServerError:
    """The hub's answer in one sentence."""
    status = error.response.status_code
    said = str(error.server_message or error).strip().splitlines()[0]
    if status in (401, 403):
        return MachineError(
            f"the hub refuses {place.repo} ({status}: {said}); set {TOKEN_ENV} to a token that may write there"
        )
    return ServerError(f"the hub answered {status} for {place.repo} ({said}); the same command goes on")
