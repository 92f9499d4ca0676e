"""Storage that all machines reach, by its fsspec URL: the shards of a run, and the images that they show.

Limits: a file system on which a file is replaced in one step: a local or shared one, or an object store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from vcot.pipeline.errors import MachineError, StageError
from vcot.pipeline.files import replace_file
from vcot.pipeline.images import ImageStore
from vcot.pipeline.records import ImageRef

if TYPE_CHECKING:
    import fsspec

_ASKED, _ANSWERED = ".json", ".parquet"


@dataclass(frozen=True)
class Storage:
    """Files that all machines reach: `images/` below the URL, and the shards of one run in a folder there."""

    url: str
    folder: str

    @cached_property
    def _place(self) -> tuple[fsspec.AbstractFileSystem, PurePosixPath]:
        import fsspec.core  # 40 ms that only a command with shards need pay

        try:
            found, path = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:  # of the package for this protocol
            found, path = self._place_by_arrow(error)
        except ValueError as error:
            raise self._explain(error) from None
        return found, PurePosixPath(path)

    def _place_by_arrow(self, lack: ImportError) -> tuple[fsspec.AbstractFileSystem, str]:
        """Pyarrow speaks to S3, GCS, Azure and HDFS without a package of its own."""
        import pyarrow as pa
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow import fs

        try:
            files, path = fs.FileSystem.from_uri(self.url)
        except (pa.ArrowException, OSError, ValueError):
            raise self._explain(lack) from None
        return ArrowFSWrapper(files), str(path)

    def _explain(self, error: Exception) -> MachineError:
        return MachineError(f"--shards {self.url} cannot be used here ({error}); install that, or give another URL")

    @contextmanager
    def _using(self, *, may_lack: bool = True) -> Iterator[fsspec.AbstractFileSystem]:
        """The file system. Raises FileNotFoundError, where a file `may_lack`, and StageError for all else it cannot do."""
        found = self._place[0]
        try:
            yield found
        except Exception as error:  # each file system has errors of its own
            if may_lack and isinstance(error, FileNotFoundError):
                raise
            raise StageError(
                f"the storage {self.url} cannot be used ({str(error)[:200]}); see that it is there, that it may be read and "
                "written, and that this machine has its keys, and what was answered before is kept"
            ) from error

    def path(self, name: str) -> str:
        """Where a file of that name is, on its file system."""
        return str(self._place[1] / name)

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError, and StageError as all that is done here."""
        with self._using() as files:
            return bytes(files.cat_file(self.path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Put a file there whole, or not at all."""
        path = self.path(name)
        with self._using(may_lack=False) as files:
            if "file" in files.protocol:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                replace_file(Path(path), data)
            else:
                files.pipe_file(path, data)

    def list_files(self, folder: str) -> set[str]:
        """Names of the files in a folder; none where there is no folder."""
        try:
            with self._using() as files:
                found = files.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return set()
        return {PurePosixPath(path).name for path in found}

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""
        with suppress(FileNotFoundError), self._using() as files:
            files.rm_file(self.path(name))

    def asked(self, name: str) -> str:
        """The file that says what a shard asks."""
        return f"{self.folder}/{name}{_ASKED}"

    def answered(self, name: str) -> str:
        """The file of a shard that is done."""
        return f"{self.folder}/{name}{_ANSWERED}"

    def list_shards(self) -> tuple[list[str], list[str]]:
        """Names of the shards that were put there, and of those that are done."""
        found = sorted(self.list_files(self.folder))
        asked, answered = [
            [name.removesuffix(end) for name in found if name.endswith(end)] for end in (_ASKED, _ANSWERED)
        ]
        return asked, answered

    def clear(self, name: str) -> None:
        """Take a shard's files away: what it asks first, so that nobody asks what is merged."""
        self.remove(self.asked(name))
        self.remove(self.answered(name))


class SharedImages(ImageStore):
    """The run's images as they lie in storage; they are only read."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(Path(storage.url))
        self._storage = storage

    def fetch(self, ref: ImageRef) -> bytes:
        """The bytes as they lie there. Raises OSError."""
        return self._storage.read(ref.path)
