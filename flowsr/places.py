"""Folders of any filesystem that pyarrow or fsspec know, and the reading of files from there.

Nothing here imports torch, so that processes that read alone begin at once.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import fs

WHOLE_OBJECTS = ("s3", "gcs", "abfs")  # stores whose objects appear when they are whole


@dataclass
class Place:
    """A folder of a filesystem."""

    filesystem: fs.FileSystem
    folder: str

    @classmethod
    def of(cls, place: str, filesystem: Any = None) -> Place:
        """A folder by its path or URI; a `filesystem` of fsspec becomes one of pyarrow."""
        try:
            if isinstance(filesystem, fs.FileSystem):
                return cls(filesystem, place)
            if filesystem is not None:
                return cls(fs.PyFileSystem(fs.FSSpecHandler(filesystem)), place)
            if "://" not in place:
                return cls(fs.LocalFileSystem(), str(Path(place).resolve()))
            return cls(*fs.FileSystem.from_uri(place))
        except (ValueError, OSError) as error:  # of pyarrow, which does not know the kind of place
            return cls.by_fsspec(place, error)

    @classmethod
    def by_fsspec(cls, place: str, reason: Exception) -> Place:
        try:
            from fsspec.core import url_to_fs

            found, path = url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{place} cannot be reached: {error} ({reason})") from None
        return cls(fs.PyFileSystem(fs.FSSpecHandler(found)), path)

    def path(self, name: str) -> str:
        return posixpath.join(self.folder, name)

    def files(self) -> Iterator[tuple[str, list]]:
        """The files below, by their paths from here, each with what changes whenever it is replaced."""
        selector = fs.FileSelector(self.folder, recursive=True, allow_not_found=True)
        for info in self.filesystem.get_file_info(selector):
            if info.type == fs.FileType.File:
                yield posixpath.relpath(info.path, self.folder), [info.size, info.mtime_ns]

    def exists(self, name: str) -> bool:
        return self.filesystem.get_file_info(self.path(name)).type == fs.FileType.File

    def holds(self, place: Place, name: str) -> bool:
        """Whether a file of another place lies in this folder."""
        inside = PurePosixPath(place.path(name)).is_relative_to(self.folder)
        return inside and self.filesystem.equals(place.filesystem)

    def read(self, name: str) -> bytes:
        with self.filesystem.open_input_file(self.path(name)) as file:
            return file.read()

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, which has its name when it is whole."""
        path = self.path(name)
        stores = self.filesystem.type_name in WHOLE_OBJECTS
        partial = path if stores else f"{posixpath.dirname(path)}/.{posixpath.basename(path)}.partial"
        if not stores:
            self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
        with self.filesystem.open_output_stream(partial) as file:
            file.write(content)
        if not stores:
            self.filesystem.move(partial, path)


@dataclass
class Fetch:
    """Reads the file of a row, or says why it cannot be read."""

    place: Place

    def __call__(self, row: dict) -> dict:
        try:
            content, error = self.place.read(row["name"]), ""
        except OSError as found:
            content, error = b"", " ".join(str(found).split())
        return {**row, "path": self.place.path(row["name"]), "content": content, "error": error}
