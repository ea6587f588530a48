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


class ParameterError(SignDigitsError):
    """A parameter has a wrong type, lies outside its range, or contradicts another."""

    exit_code = 2


class DataError(SignDigitsError):
    """A folder of photographs cannot be used as it is."""

    exit_code = 2


class StudyError(SignDigitsError):
    """A study cannot be started or continued under the given settings."""

    exit_code = 2


class ClusterError(SignDigitsError):
    """The worker processes cannot be started."""

    exit_code = 2


class StorageError(SignDigitsError):
    """The study's database is unavailable."""


class ModelError(SignDigitsError):
    """A run, model or version does not exist or does not fit the request."""

    exit_code = 2


class IncomparableError(ModelError):
    """Two versions cannot be compared on the same test images."""


class TrackingError(SignDigitsError):
    """The tracking store cannot be used, or lacks a run that it should hold."""

    exit_code = 2


class DownloadError(SignDigitsError):
    """The photographs could not be downloaded; nothing was left behind."""


class TrainingDiverged(SignDigitsError):
    """The training loss became NaN or infinite."""


class ServingError(SignDigitsError):
    """The model cannot be served under the given settings."""

    exit_code = 2


class OutputError(SignDigitsError):
    """An output folder cannot be used: it belongs to another prediction, or is not writable."""

    exit_code = 2


class DriftFound(SignDigitsError):
    """Recent predictions differ too much from those of the test images."""

    exit_code = 3


class TooFewPredictions(SignDigitsError):
    """The prediction log holds too few predictions to measure drift."""

    exit_code = 4
