"""The command line behind the entry points of `MLproject`.

    python -m signdigits --help
    python -m signdigits train --help

Options, defaults and limits come from `hyperparameters.py`. Modules that need MLflow or TensorFlow are imported
by the command that needs them, after its parameters were checked.
"""

import argparse
import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import Any, NoReturn

from signdigits import config as hp
from signdigits.errors import SignDigitsError, escape_undecodable

log = logging.getLogger("signdigits")

# Which groups of parameters each entry point takes. `Space` stands for the hyperparameters as a search takes them:
# a number, or LOW:HIGH.
ENTRY_POINTS: dict[str, tuple[type, ...]] = {
    "main": (hp.DataParameters, hp.Space, hp.StudyParameters, hp.RefitParameters, hp.RegistryParameters),
    "prepare": (hp.DataParameters,),
    "train": (hp.DataParameters, hp.Hyperparameters),
    "search": (hp.DataParameters, hp.Space, hp.StudyParameters),
    "evaluate": (hp.SourceParameters, hp.ModelParameters),
    "register": (hp.ModelParameters, hp.VersionParameters),
    "predict": (hp.PredictParameters,),
    "monitor": (hp.MonitorParameters,),
}

# Commands that make no run, and so are no entry points.
PARAMETERS = ENTRY_POINTS | {
    "show": (),
    "links": (hp.LinkParameters,),
    "serve": (hp.ServeParameters,),
}

# Commands that an interruption costs nothing but what was in the works.
RESUMED = ("main", "search", "predict")

SUMMARIES = {
    "main": "prepare, search, refit, evaluate and register: the whole job",
    "prepare": "report on a folder of photographs",
    "train": "train the network once",
    "search": "search the hyperparameters, every trial a nested run",
    "evaluate": "score a model on the test images",
    "register": "register a model, or move its alias to another version",
    "predict": "read a folder of photographs, or a table of paths, with the champion",
    "monitor": "say whether what the endpoint is sent, and answers, is still like the test images",
    "show": "say which version is the champion",
    "links": "print the addresses in the MLflow UI that matter",
    "serve": "serve the champion, and every one that follows it, without a gap",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a failure, 2 for a misuse, 130 when interrupted.

    `monitor` also has 3 for drift, and 4 for too few answers.
    """
    logging.basicConfig(format="%(message)s", handlers=[StdoutHandler()])
    log.setLevel(logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, raise_interrupt)
    parsed = vars(make_parser().parse_args(arguments))
    command = parsed.pop("command")
    try:
        run_command(command, parsed)
    except SignDigitsError as error:
        if "MLFLOW_RUN_ID" in os.environ:
            record_failure(error)
        print(f"signdigits {command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where it was" if command in RESUMED else ""
        print(f"signdigits {command}: interrupted{goes_on}", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"signdigits {command}: {describe_unexpected(error)}", file=sys.stderr)
        return 1
    return 0


class StdoutHandler(logging.StreamHandler):
    """Standard output for people: a name that is not UTF-8 is escaped, and a reader that stops, as `| head` does, is let go."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        super().__init__(sys.stdout)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        if isinstance(sys.exception(), BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            super().handleError(record)


def describe_unexpected(error: Exception) -> str:
    """One line for an error that nobody foresaw: what it is, the run that it ended, and where its traceback is."""
    with tempfile.NamedTemporaryFile("w", prefix="signdigits-", suffix=".txt", delete=False) as file:
        file.write(escape_undecodable("".join(traceback.format_exception(error))))
    first = (str(error).splitlines() or [""])[0][:300]
    run = ""
    with contextlib.suppress(Exception):  # the store itself may be what failed
        from signdigits import links

        run = f"; its run: {links.failed_run_url()}"
    return escape_undecodable(f"{type(error).__name__}: {first}; the traceback is in {file.name}{run}")


def record_failure(error: SignDigitsError) -> None:
    """Write the reason on the run that `mlflow run` made, which is closed as FAILED by it alone."""
    from signdigits import tracking

    with contextlib.suppress(Exception):  # the store itself may be what failed; the message is printed either way
        tracking.note_failure(error)


def raise_interrupt(signum: int, frame: object) -> NoReturn:
    """A polite kill ends a run as Ctrl-C does; further ones, such as `mlflow run` sends, leave it time to do so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="signdigits", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in SUMMARIES.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        for group in PARAMETERS[name]:
            for declared in fields(hp.Hyperparameters if group is hp.Space else group):
                add_option(command, declared, searched=group is hp.Space)
    return parser


def add_option(command: argparse.ArgumentParser, declared: Field[Any], *, searched: bool) -> None:
    """The option that a declared parameter becomes."""
    number = READERS[hp.type_name(declared)]
    defaults = {space: hp.search_default(declared, space) for space in hp.SPACES} if searched else {}
    default = searched_default(declared) if searched else declared.default
    differing = ", ".join(f"{space} {value}" for space, value in defaults.items()) if default == hp.AUTO else ""
    command.add_argument(
        f"--{declared.name}",
        type=range_reader(number, hp.is_searched_in_logarithm(declared)) if searched else number,
        default=default,
        metavar="LOW:HIGH" if searched and number is not str else hp.type_name(declared).upper(),
        help=f"{declared.metadata['help']} (default: {differing or default})".replace("%", "%%"),
    )


def searched_default(declared: Field[Any]) -> Any:
    """What stands for a hyperparameter of a search until the space is known: its value, or auto where spaces differ."""
    values = {hp.search_default(declared, space) for space in hp.SPACES}
    return values.pop() if len(values) == 1 else hp.AUTO


def range_reader(number: Callable[[str], Any], log: bool) -> Callable[[str], Any]:
    """A reader of `LOW:HIGH`, of a single number, which the search then keeps, or of `auto`, what the space says."""

    def read(text: str) -> Any:
        if text == hp.AUTO or number is str:
            return text
        low, colon, high = text.partition(":")
        return hp.Range(number(low), number(high), log) if colon else number(low)

    read.__name__ = f"{number.__name__} or LOW:HIGH"  # what argparse calls it in its message
    return read


def parse_boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: write true or false")
    return text.lower() == "true"


READERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": parse_boolean}


def run_command(command: str, values: dict[str, Any]) -> None:
    """Check the parameters, group by group, and hand them to the command."""
    if "space" in values:
        hp.check_value(hp.StudyParameters.__dataclass_fields__["space"], values["space"])
    groups = [make_group(group, values) for group in PARAMETERS[command]]
    from signdigits import startup

    startup.configure_mlflow()
    from signdigits import tracking

    if command in ENTRY_POINTS:
        tracking.open_experiment(command)
    else:
        tracking.connect_store()
    COMMANDS[command](*groups)


def make_group(group: type, values: dict[str, Any]) -> Any:
    """One group of checked parameters out of all that were given."""
    names = [declared.name for declared in fields(hp.Hyperparameters if group is hp.Space else group)]
    chosen = {name: values[name] for name in names}
    return hp.Space.of(values["space"], **chosen) if group is hp.Space else group(**chosen)


def run_main(
    source: hp.DataParameters,
    space: hp.Space,
    study: hp.StudyParameters,
    refit: hp.RefitParameters,
    registry: hp.RegistryParameters,
) -> None:
    data = load(source)
    from signdigits import main

    main.main(data, space, study, refit, registry)


def run_prepare(source: hp.DataParameters) -> None:
    data = load(source, tensors=False)
    from signdigits import prepare

    prepare.prepare(data)


def run_train(source: hp.DataParameters, hyperparameters: hp.Hyperparameters) -> None:
    data = load(source)
    from signdigits import train

    train.train(data, hyperparameters)


def run_search(source: hp.DataParameters, space: hp.Space, study: hp.StudyParameters) -> None:
    data = load(source)
    from signdigits import links, search, tracking

    opened = search.search(data, space, study)
    log.info(
        "compare its trials: scripts/ui, then %s", links.compare_url(links.ui_url(), tracking.find_run(opened.run_id))
    )


def load(source: hp.DataParameters, *, tensors: bool = True) -> Any:
    """Read the photographs first, so that bad ones are told of at once, and only then wait for TensorFlow."""
    from signdigits import startup
    from signdigits.data import loading

    loaded = loading.load_data(source)
    if tensors:
        startup.import_tensorflow()
    return loaded


def run_evaluate(source: hp.SourceParameters, which: hp.ModelParameters) -> None:
    from signdigits import evaluate, tracking

    evaluate.evaluate(tracking.find_model(which.run_id, which.model_uri), source)


def run_register(which: hp.ModelParameters, version: hp.VersionParameters) -> None:
    from signdigits import register

    register.register(which, version)


def run_predict(parameters: hp.PredictParameters) -> None:
    from signdigits import predict

    predict.predict(parameters)


def run_monitor(parameters: hp.MonitorParameters) -> None:
    from signdigits import monitor

    monitor.monitor(parameters)


def run_show() -> None:
    from signdigits import register

    log.info("%s", register.describe_champion())


def run_links(parameters: hp.LinkParameters) -> None:
    from signdigits import links

    for line in links.list_links(parameters):
        log.info("%s", line)


def run_serve(parameters: hp.ServeParameters) -> None:
    from signdigits import serve

    serve.serve(parameters)


COMMANDS: dict[str, Callable[..., None]] = {
    "main": run_main,
    "prepare": run_prepare,
    "train": run_train,
    "search": run_search,
    "evaluate": run_evaluate,
    "register": run_register,
    "predict": run_predict,
    "monitor": run_monitor,
    "show": run_show,
    "links": run_links,
    "serve": run_serve,
}
