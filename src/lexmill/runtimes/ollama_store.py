"""An Ollama store on disk: models installed, listed and removed without a running server.

A store is a folder of blobs named by their SHA-256 and of small manifests that name blobs. Nothing in it is
trusted: names and digests are checked before they become paths, links are not followed, sizes and hashes are
compared with what the manifest says. Layout: Ollama, manifest/*.go.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from lexmill.errors import ConfigError, FileError, FormatError, LexmillError
from lexmill.files import PARTIAL_SUFFIX, exclusive_lock, explain_os_errors, partial_name, require_space
from lexmill.progress import SILENT, Progress
from lexmill.runtimes.ollama_manifest import (
    CONFIG,
    MAX_MANIFEST_BYTES,
    MODEL,
    Layer,
    Manifest,
    parse_manifest,
)
from lexmill.runtimes.ollama_names import ModelName, as_spelled

MAX_TEXT_BYTES = 16 << 20  # of a blob that is read whole: template, licence, parameters
_LINKS = "Links inside a store are not followed. Let OLLAMA_MODELS or --store name the real folder."
_REINSTALL = "Install the model again."


def default_store() -> Path:
    """Where Ollama keeps its models: OLLAMA_MODELS, or `~/.ollama/models`."""
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")


@dataclass(frozen=True)
class Removed:
    """What `Store.remove` did. `kept` says why blobs without a model were left where they are; mostly empty."""

    blobs: int
    bytes: int
    kept: str = ""


class Store:
    """The folder that holds `blobs` and `manifests`; it need not exist before something is installed."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.blobs, self.manifests = self.root / "blobs", self.root / "manifests"

    # Reading

    def names(self) -> list[ModelName]:
        """The models that have a manifest, sorted. What is no name is not one: Ollama passes it over too."""
        self._refuse_links(self.manifests)
        found = []
        for path in _files_below(self.manifests, 4):
            with contextlib.suppress(ConfigError):
                found.append(ModelName.from_path(PurePosixPath(*path.relative_to(self.manifests).parts)))
        return sorted(found)

    def find(self, name: ModelName) -> ModelName:
        """`name` as the store spells it.

        Raises:
            FileError: the store has no such model.
        """
        for known in self.names():
            if known.folded == name.folded:
                return known
        raise FileError(
            f"{self.root} has no model '{name}'.",
            "See what is there: lexmill ollama list --store " + str(self.root),
        )

    def manifest_path(self, name: ModelName) -> Path:
        """Where a model's manifest lies."""
        return self.manifests.joinpath(*name.path.parts)

    def read(self, name: ModelName) -> Manifest:
        """A model's manifest.

        Raises:
            FileError: there is none.
            FormatError: it is damaged or hostile.
        """
        path = self.manifest_path(self.find(name))
        with self._open(path) as file:
            return parse_manifest(file.read(MAX_MANIFEST_BYTES + 1), str(path))

    def blob_path(self, layer: Layer) -> Path:
        """Where a layer's blob lies, once it is known that it is a file of the right size and no link.

        Raises:
            FormatError: it is missing, is something else, or has another size.
        """
        path = self.blobs / f"sha256-{layer.sha256}"
        try:
            self._refuse_links(path)
            found = path.lstat()
        except FileNotFoundError as error:
            raise FormatError(f"{path}: this blob of the model is missing.", _REINSTALL) from error
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{path}: this blob is not a file.", _LINKS)
        if found.st_size != layer.size:
            raise FormatError(
                f"{path} has {found.st_size:,} bytes; the manifest says {layer.size:,}.", _REINSTALL
            )
        return path

    def read_blob(self, layer: Layer) -> bytes:
        """A small blob whole, its hash compared with its name.

        Raises:
            FormatError: as `blob_path`; or it is longer than a text may be, or holds something else.
        """
        if layer.size > MAX_TEXT_BYTES:
            raise FormatError(
                f"{self.root}: a {layer.media_type} of {layer.size:,} bytes is not plausible.", _REINSTALL
            )
        path = self.blob_path(layer)
        with self._open(path) as file:
            data = file.read(layer.size + 1)
        if len(data) != layer.size or hashlib.sha256(data).hexdigest() != layer.sha256:
            raise FormatError(f"{path} does not hold what its name says.", _REINSTALL)
        return data

    def problems(self, manifest: Manifest, hashes: bool = False, progress: Progress = SILENT) -> list[str]:
        """What is wrong with a model's blobs: one text a blob; `hashes` reads them whole."""
        found = []
        with progress.task("reading blobs", manifest.size, "bytes") as task:
            for layer in dict.fromkeys(manifest.blobs):
                try:
                    path = self.blob_path(layer)
                    if hashes and _hash_file(path, task.advance) != layer.sha256:
                        found.append(f"{path} does not hold what its name says.")
                except LexmillError as error:
                    found.append(error.message)
        return found

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[IO[bytes]]:
        """A file of the store for reading, no link among the folders on its way."""
        with explain_os_errors(path, "read"):
            self._refuse_links(path)
            if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would never end
                raise FormatError(f"{path} is not a file.", _LINKS)
            with open(path, "rb") as file:
                yield file

    def _refuse_links(self, path: Path) -> None:
        step = self.root
        for part in path.relative_to(self.root).parts:
            step = step / part
            if step.is_symlink():
                raise FormatError(f"{step} is a link.", _LINKS)

    # Writing

    def install(
        self,
        name: ModelName,
        model: Path | Callable[[Path], object],
        texts: Sequence[tuple[str, bytes | Path]],
        config: Callable[[Path], bytes],
        progress: Progress = SILENT,
    ) -> ModelName:
        """Write a model's blobs, then its manifest; a model of the same name is replaced.

        Killed at any instant it leaves the store's models as they were. What it leaves behind then are blobs
        that no manifest names, and hidden names, which the next install clears away.

        Args:
            model: the GGUF file, which is copied; or what writes it to a path that it is given.
            texts: media type and bytes, or file, of the other layers, in their order.
            config: makes the config blob, given the path of the model's blob.

        Returns:
            The name as it was spelled: as names that are there, where only the case differs.

        Raises:
            FileError: no space or permission, or another process is writing.
            FormatError: a link stands where a folder should.
        """
        with self.locked(), explain_os_errors(self.root, "write"):
            self._clear_partials()
            if isinstance(model, Path):
                require_space(self.root, model.stat().st_size + (1 << 20), f"The model {name}")
            name = as_spelled(name, self.names())
            with progress.task(f"installing {name}", None, "bytes") as task:
                layers = [self._add(MODEL, model, task.advance)]
                layers += [self._add(media_type, text, task.advance) for media_type, text in texts]
                config_layer = self._add(CONFIG, config(self.blob_path(layers[0])), task.advance)
            old = self._manifest_or_none(name)
            self._write_manifest(name, Manifest(config_layer, tuple(layers)))
            if old is not None:
                self._drop(old.blobs)
        return name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other lexmill processes from writing to the store.

        Ollama itself knows nothing of the lock; but it removes no blobs younger than an hour.
        """
        self._make_folders()
        with exclusive_lock(self.root / ".lexmill.lock", f"the Ollama store {self.root}"):
            yield

    def remove(self, name: ModelName) -> Removed:
        """Remove a model and the blobs that no other model uses.

        Raises:
            FileError: there is no such model.
        """
        name = self.find(name)
        with self.locked(), explain_os_errors(self.manifest_path(name), "remove"):
            path = self.manifest_path(name)
            self._refuse_links(path.parent)
            manifest = self._manifest_or_none(name)
            path.unlink()
            for folder in list(path.parents)[:3]:
                with contextlib.suppress(OSError):  # not empty: others live there
                    folder.rmdir()
            if manifest is None:
                return Removed(0, 0, "its manifest cannot be read, so its blobs are not known")
            return self._drop(manifest.blobs)

    def _make_folders(self) -> None:
        with explain_os_errors(self.root, "write"):
            for folder in (self.root, self.blobs, self.manifests):
                if folder != self.root:
                    self._refuse_links(folder)
                folder.mkdir(parents=True, exist_ok=True)

    def _clear_partials(self) -> None:
        for folder in (self.root, self.blobs):
            for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _manifest_or_none(self, name: ModelName) -> Manifest | None:
        try:
            return self.read(name)
        except (FormatError, FileError):
            return None

    def _add(
        self,
        media_type: str,
        content: bytes | Path | Callable[[Path], object],
        advance: Callable[[float], object],
    ) -> Layer:
        """Put a blob where it belongs, hashed while it is written."""
        partial = partial_name(self.blobs / "blob")
        try:
            if callable(content):
                content(partial)
                return self._take(media_type, partial, _hash_file(partial, advance))
            digest = hashlib.sha256()
            with open(partial, "wb") as file:
                for chunk in [content] if isinstance(content, bytes) else _chunks(content):
                    digest.update(chunk)
                    file.write(chunk)
                    advance(len(chunk))
                file.flush()
                os.fsync(file.fileno())
            return self._take(media_type, partial, digest.hexdigest())
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _take(self, media_type: str, partial: Path, sha256: str) -> Layer:
        """Give a finished file its name, unless an equal blob has it already."""
        layer = Layer(media_type, sha256, partial.stat().st_size)
        path = self.blobs / f"sha256-{sha256}"
        try:
            equal = _hash_file(self.blob_path(layer)) == sha256
        except FormatError:  # missing, cut off, or no file
            equal = False
        if equal:
            os.utime(path)  # so that a server does not take it for forgotten before the manifest stands
            partial.unlink()
        else:
            os.chmod(partial, 0o644)  # a server often runs as a user of its own
            os.replace(partial, path)
        return layer

    def _write_manifest(self, name: ModelName, manifest: Manifest) -> None:
        path = self.manifest_path(name)
        self._refuse_links(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # not beside its final name: Ollama would take the hidden file for a damaged manifest
        partial = partial_name(self.root / "manifest")
        try:
            with open(partial, "wb") as file:
                file.write(manifest.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _drop(self, blobs: Sequence[Layer]) -> Removed:
        """Delete those of `blobs` that no manifest names; all stay while one manifest cannot be read."""
        used: set[str] = set()
        for name in self.names():
            try:
                used |= {layer.sha256 for layer in self.read(name).blobs}
            except LexmillError as error:
                return Removed(
                    0, 0, f"the manifest of {name} cannot be read, and may need them ({error.message})"
                )
        count = total = 0
        for sha256 in {layer.sha256 for layer in blobs} - used:
            path = self.blobs / f"sha256-{sha256}"
            with contextlib.suppress(FileNotFoundError):
                found = path.lstat()
                if not stat.S_ISDIR(found.st_mode):
                    path.unlink()  # of a link the link, never what it names
                    count, total = count + 1, total + found.st_size
        return Removed(count, total)


def _hash_file(path: Path, advance: Callable[[float], object] = lambda _: None) -> str:
    digest = hashlib.sha256()
    with explain_os_errors(path, "read"):
        for chunk in _chunks(path):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _files_below(folder: Path, depth: int) -> Iterator[Path]:
    """Files exactly `depth` levels down; links are passed over."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for entry in os.scandir(folder):
            if depth == 1 and entry.is_file(follow_symlinks=False):
                yield Path(entry.path)
            elif depth > 1 and entry.is_dir(follow_symlinks=False):
                yield from _files_below(Path(entry.path), depth - 1)
