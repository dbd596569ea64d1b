# SPDX-License-Identifier: Apache-2.0
"""Raw files, plain or inside a .zip, .tar or .gz archive, as streams.

Archives are read and never unpacked, so no member can write anywhere. A member that points outside of the archive, a link,
or a name that is there twice is refused all the same: the publishers' archives hold none.
"""

from __future__ import annotations

import gzip
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from ctrbench.errors import DataError

_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError, NotImplementedError)
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class MissingFileError(DataError):
    """A raw file that is not where it was looked for."""


@dataclass(frozen=True)
class RawStream:
    """The bytes of one open raw file; a damaged archive is one clear line."""

    stream: IO[bytes]
    name: str
    again: str

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end.

        Raises:
            DataError: the file or the archive around it is truncated or damaged, or cannot be read.
        """
        try:
            return self.stream.read(size)
        except (*_DAMAGE, OSError) as error:
            raise _damaged(self.name, error, self.again) from None


@dataclass(frozen=True)
class RawMember:
    """A raw file that is there.

    Attributes:
        name: for messages: its path, and its name in the archive.
        again: what to do when it is not as it should be.
        path: where it lies as a plain file, None inside an archive.
    """

    name: str
    again: str
    _opener: Callable[[ExitStack], IO[bytes]]
    path: Path | None = None

    @contextmanager
    def open(self) -> Iterator[RawStream]:
        """Its bytes from the start; may be called again for another pass.

        Raises:
            DataError: it cannot be opened.
        """
        with ExitStack() as stack:
            try:
                stream = self._opener(stack)
                if _gzipped(self.name):
                    stream = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=stream)))
            except (*_DAMAGE, OSError, RuntimeError) as error:  # RuntimeError: encrypted
                raise _damaged(self.name, error, self.again) from None
            yield RawStream(stream, self.name, self.again)


def find(raw: Path, wanted: dict[str, Sequence[str]], again: str, archives: Sequence[str] = ()) -> dict[str, RawMember]:
    """The raw files of one dataset.

    Args:
        raw: a folder that holds the files (or an archive of them), an archive, or the file itself where one is wanted.
        wanted: the names under which each file may come, such as `{"train": ["train.csv", "train.gz"]}`.
        again: what to do when something is wrong, as `download it again from URL`.
        archives: names of the publisher's archives, looked for in the folder.

    Raises:
        DataError: a file is missing, twice in an archive, a link, or the archive is no archive.
    """
    if not raw.exists():
        raise DataError(f"{raw}: no such file or folder: {again}, and pass its path as --raw")
    if raw.is_dir():
        for folder in (raw, *(raw / name.partition(".")[0] for name in archives)):  # unpacked by hand
            found = {
                key: next((p for n in names if (p := folder / n).is_file()), None) for key, names in wanted.items()
            }
            if all(found.values()):
                return {key: _plain(path, again) for key, path in found.items() if path is not None}
        for path in (raw / name for name in archives):
            if path.is_file():
                return find(path, wanted, again)
        missing = [names[0] for key, names in wanted.items() if not any((raw / name).is_file() for name in names)]
        named = f" (nor {' or '.join(archives)})" if archives else ""
        raise MissingFileError(f"{raw}: {', '.join(missing)} is missing in this folder{named}: {again}")
    if raw.stat().st_size == 0:
        raise DataError(f"{raw}: the file is empty: {again}")
    name = raw.name.lower()
    if name.endswith(".zip"):
        return _in_zip(raw, wanted, again)
    if len(wanted) > 1:  # each member of a tar file would need a pass of its own, so these count as one file too
        names = ", ".join(names[0] for names in wanted.values())
        raise MissingFileError(f"{raw}: expected a folder or a zip archive with {names}, got one file: {again}")
    if name.endswith(_TARS):
        return {key: _in_tar(raw, names, again) for key, names in wanted.items()}
    return {key: _plain(raw, again) for key in wanted}


def copy_members(members: dict[str, RawMember], folder: Path) -> dict[str, Path]:
    """Files that need random access: where they are, or copied out of their archive to `folder` under the names given here."""
    paths = {}
    for name, member in members.items():
        paths[name] = member.path or folder / name
        if member.path is None:
            folder.mkdir(parents=True, exist_ok=True)
            with member.open() as source, paths[name].open("wb") as target:
                while chunk := source.read(1 << 22):
                    target.write(chunk)
    return paths


def _plain(path: Path, again: str) -> RawMember:
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty: {again}")
    return RawMember(str(path), again, lambda stack: stack.enter_context(path.open("rb")), path)


def _in_zip(raw: Path, wanted: dict[str, Sequence[str]], again: str) -> dict[str, RawMember]:
    try:
        with zipfile.ZipFile(raw) as archive:
            members = archive.infolist()
    except (*_DAMAGE, OSError) as error:
        raise DataError(f"{raw}: not a readable zip archive, or a truncated one ({error}): {again}") from None
    _check_names(raw, (member.filename for member in members), again)
    found = {}
    for key, names in wanted.items():
        chosen = [m for m in members if PurePosixPath(m.filename).name in names and not m.is_dir()]
        if not chosen:
            raise MissingFileError(f"{raw}: {names[0]} is missing in the archive: {again}")
        if len(chosen) > 1:
            raise DataError(
                f"{raw}: the archive holds {names[0]} twice ({', '.join(m.filename for m in chosen)}): {again}"
            )
        [member] = chosen
        if stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(f"{raw}: {member.filename} is a link: {again}")
        if member.file_size == 0:
            raise DataError(f"{raw}: {member.filename}: the file is empty: {again}")
        found[key] = RawMember(f"{raw}: {member.filename}", again, _zip_opener(raw, member))
    return found


def _zip_opener(raw: Path, member: zipfile.ZipInfo) -> Callable[[ExitStack], IO[bytes]]:
    def open_member(stack: ExitStack) -> IO[bytes]:
        return stack.enter_context(stack.enter_context(zipfile.ZipFile(raw)).open(member))

    return open_member


def _in_tar(raw: Path, names: Sequence[str], again: str) -> RawMember:
    """A member of a tar file, looked for when it is opened: a compressed one can only be read from its start."""

    def open_member(stack: ExitStack) -> IO[bytes]:
        archive = stack.enter_context(tarfile.open(raw, "r|*"))  # noqa: SIM115
        for member in archive:
            _check_names(raw, [member.name], again)
            if PurePosixPath(member.name).name not in names or member.isdir():
                continue
            if not member.isreg():
                raise DataError(f"{raw}: {member.name} is a link or not a plain file: {again}")
            if member.size == 0:
                raise DataError(f"{raw}: {member.name}: the file is empty: {again}")
            stream = archive.extractfile(member)
            assert stream is not None
            return stream
        raise DataError(f"{raw}: {names[0]} is missing in the archive: {again}")

    return RawMember(f"{raw}: {names[0]}", again, open_member)


def _check_names(raw: Path, names: Iterable[str], again: str) -> None:
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":"):
            raise DataError(f"{raw}: it holds '{name}', which points outside of the archive: not read: {again}")


def _gzipped(name: str) -> bool:
    return name.lower().endswith(".gz") and not name.lower().endswith(_TARS)


def _damaged(name: str, error: Exception, again: str) -> DataError:
    if isinstance(error, DataError):
        return error
    return DataError(f"{name}: truncated or damaged ({error}): {again}")
