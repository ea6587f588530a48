"""Errors that the user can fix. The command line prints the message, without a traceback, and exits with the exit code."""


def escape_undecodable(text: str) -> str:
    """Return `text` with each byte that is not UTF-8 escaped, as in names of files from old archives."""
    return text.encode("utf-8", "backslashreplace").decode()


def install_hint(extra: str) -> str:
    """Return the remedy for a missing extra of pyproject.toml: the environments that `mlflow run` makes have them all."""
    return (
        f"run `uv pip install -e '.[{extra}]'` in the project's folder, or `mlflow run` with --env-manager uv or conda"
    )


class SignDigitsError(Exception):
    """Base of the errors; the message names the value at fault and the remedy."""

    exit_code = 1

    def __str__(self) -> str:
        return escape_undecodable(super().__str__())


class UsageError(SignDigitsError):
    """A parameter, a setting or a folder that the command was given cannot be used."""

    exit_code = 2


class DataError(UsageError):
    """A folder of photographs cannot be used as it is."""


class ModelError(UsageError):
    """A run, model or version does not exist or does not fit the request."""


class IncomparableError(ModelError):
    """Two versions cannot be compared on the same test images."""


class StorageError(SignDigitsError):
    """The study's database is unavailable."""


class DownloadError(SignDigitsError):
    """The photographs could not be downloaded; nothing was left behind."""


class TrainingDiverged(SignDigitsError):
    """The training loss became NaN or infinite."""


class DriftFound(SignDigitsError):
    """Recent predictions differ too much from those of the test images."""

    exit_code = 3


class TooFewPredictions(SignDigitsError):
    """The prediction log holds too few predictions to measure drift."""

    exit_code = 4
