"""What can go wrong in a way that the user can mend.

The command line prints such an error as one message, without a traceback, and exits with its code.
"""


def escape_undecodable(text: str) -> str:
    """`text` with an escape in place of each byte that is not UTF-8, which a file's name may hold."""
    return text.encode("utf-8", "backslashreplace").decode()


class SignDigitsError(Exception):
    """An error whose message names the value at fault and the remedy."""

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
    """The processes that should share the work cannot be had."""

    exit_code = 2


class StorageError(SignDigitsError):
    """The study's database went away, and stayed away."""


class ModelError(SignDigitsError):
    """A run, model or version does not exist or does not fit the request."""

    exit_code = 2


class TrackingError(SignDigitsError):
    """The tracking store does not hold what it should."""

    exit_code = 2


class DownloadError(SignDigitsError):
    """The photographs could not be fetched; nothing was left behind."""


class TrainingDiverged(SignDigitsError):
    """The training loss is no longer a number."""


class ServingError(SignDigitsError):
    """The model cannot be served under the given settings."""

    exit_code = 2


class OutputError(SignDigitsError):
    """A folder cannot take the tables of a prediction: it holds another's, or cannot be written."""

    exit_code = 2


class DriftFound(SignDigitsError):
    """What is sent to the endpoint, or what it answers, is no longer like the test images."""

    exit_code = 3


class TooFewPredictions(SignDigitsError):
    """There are not enough answers in the log to say whether they have drifted."""

    exit_code = 4
