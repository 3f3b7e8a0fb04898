"""The errors that a user can mend. Everything else is a bug and shows a traceback."""

from __future__ import annotations


class LexmillError(Exception):
    """Something that the user can mend.

    Args:
        message: what is wrong and where (file, line, row, key), as one or two sentences.
        hint: what to do about it, as a sentence. May be empty.

    The command line prints both and exits with `exit_code`, without a traceback.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class ConfigError(LexmillError):
    """A recipe, an option or an override that cannot be used."""


class DataError(LexmillError):
    """Raw data, documents or token shards that cannot be read or make no sense."""


class FileError(LexmillError):
    """The file system refused: no space, no permission, a path that is missing or in the way."""


class FormatError(LexmillError):
    """A file of a known format (GGUF, safetensors, tokenizer, template) that is damaged or hostile."""


class ModelError(LexmillError):
    """A model directory that is incomplete, or a model that cannot do what was asked of it."""


class TrainingError(LexmillError):
    """Training that cannot start or go on: no targets, a loss that is not finite."""


class MissingPackageError(LexmillError):
    """An optional package that the request needs is not installed."""

    def __init__(self, package: str, needed_for: str, extra: str) -> None:
        super().__init__(
            f"The package '{package}' is not installed; it is needed {needed_for}.",
            f'Install it with: pip install "lexmill[{extra}]"',
        )
