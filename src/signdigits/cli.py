"""The command line behind the entry points of `MLproject`.

    python -m signdigits --help
    python -m signdigits train --help

Options, defaults and limits come from `config.py` and `serving/options.py`. A command's module, and with it MLflow and
TensorFlow, is imported after its parameters have been checked.
"""

import argparse
import contextlib
import difflib
import importlib
import io
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import signdigits
from signdigits import config
from signdigits.errors import SignDigitsError, UsageError, escape_undecodable
from signdigits.serving.options import RecordParameters, ServeParameters
from signdigits.tuning import space
from signdigits.tuning.space import Space

log = logging.getLogger("signdigits")


@dataclass(frozen=True)
class Command:
    """A command: the function NAME of the module NAME takes one group of parameters each, or the loaded photographs."""

    summary: str
    parameters: tuple[type, ...]
    function: str = ""  # as module:name, where it has another name than the command
    is_entry_point: bool = True  # of MLproject; it opens a run
    needs_tensorflow: bool = False
    is_resumable: bool = False
    needs_mlflow: bool = True
    is_checked: bool = False  # by the function `check` of its module, before MLflow is imported, which takes seconds


COMMANDS = {
    "main": Command(
        "prepare, search, refit, evaluate and register: the whole job",
        (config.DataParameters, Space, config.StudyParameters, config.RefitParameters, config.RegistryParameters),
        needs_tensorflow=True,
        is_resumable=True,
    ),
    "prepare": Command("report on a folder of photographs", (config.DataParameters, config.ReportParameters)),
    "train": Command("train the network once", (config.DataParameters, config.Hyperparameters), needs_tensorflow=True),
    "search": Command(
        "search the hyperparameters, every trial a nested run",
        (config.DataParameters, Space, config.StudyParameters),
        needs_tensorflow=True,
        is_resumable=True,
    ),
    "evaluate": Command(
        "score a model on the test images, or on other labelled photographs",
        (config.SourceParameters, config.ModelParameters),
    ),
    "register": Command(
        "register a model, or assign its alias to another version", (config.ModelParameters, config.VersionParameters)
    ),
    "predict": Command(
        "predict a folder of photographs, or a table of paths, with the champion",
        (config.PredictParameters,),
        is_resumable=True,
    ),
    "monitor": Command("check recent predictions for drift", (config.MonitorParameters,)),
    "review": Command("accept or drop the corrections that visitors sent", (config.ReviewParameters,)),
    "export": Command(
        "write the network as a file for use without MLflow", (config.ExportParameters,), needs_tensorflow=True
    ),
    "show": Command("show the champion", (config.NameParameters,), "register:show_champion", is_entry_point=False),
    "links": Command(
        "print links to the MLflow UI", (config.LinkParameters,), "links:print_links", is_entry_point=False
    ),
    "serve": Command(
        "serve the champion, and follow its alias without downtime",
        (ServeParameters,),
        is_entry_point=False,
        is_checked=True,
    ),
    "record": Command(
        "record photographs of your own classes with the camera of this machine",
        (RecordParameters,),
        is_entry_point=False,
        needs_mlflow=False,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a failure, 2 for misuse, 130 when interrupted.

    `monitor` also has 3 for drift, and 4 for too few predictions.
    """
    logging.basicConfig(format="%(message)s", handlers=[StdoutHandler()])
    log.setLevel(logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_interrupt)
    arguments = sys.argv[1:] if arguments is None else arguments
    program = " ".join(["signdigits", *arguments[:1]])
    try:
        _run_command(**parse_arguments(arguments))
    except SignDigitsError as error:
        if "MLFLOW_RUN_ID" in os.environ:  # MLflow itself only marks the run FAILED
            with contextlib.suppress(Exception):  # the store itself may be what failed
                from signdigits.tracking import runs

                runs.note_failure(error)
        print(f"{program}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        resume = "; run the same command again to continue" if COMMANDS[arguments[0]].is_resumable else ""
        print(f"{program}: interrupted{resume}", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"{program}: {_describe_unexpected(error)}", file=sys.stderr)
        return 1
    return 0


class StdoutHandler(logging.StreamHandler):
    """Writes log lines to standard output; escapes names that are not UTF-8, and ignores a closed pipe, as of `| head`."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        super().__init__(sys.stdout)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        if isinstance(sys.exception(), BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            super().handleError(record)


def _describe_unexpected(error: Exception) -> str:
    """Return one line for an unexpected error: its type and message, its traceback file and the run that it ended."""
    with tempfile.NamedTemporaryFile("w", prefix="signdigits-", suffix=".txt", delete=False) as file:
        file.write(escape_undecodable("".join(traceback.format_exception(error))))
    first = (str(error).splitlines() or [""])[0][:300]
    run = ""
    with contextlib.suppress(Exception):  # the store itself may be what failed
        from signdigits.tracking import urls

        run = f"; its run: {urls.last_run_url()}"
    return escape_undecodable(f"{type(error).__name__}: {first}; the traceback is in {file.name}{run}")


def _raise_interrupt(signum: int, frame: object) -> NoReturn:
    """Turn a first SIGTERM or SIGINT into KeyboardInterrupt; ignore later ones, such as those that `mlflow run` sends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


class Parser(argparse.ArgumentParser):
    """A parser whose errors are raised as UsageError, to be recorded on the run that `mlflow run` created."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m {self.prog} --help")


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the command's name, as `command`, and its parameters. Raises UsageError, with the nearest right name, for a wrong one."""
    parsed, unknown = make_parser().parse_known_args(arguments)
    values = vars(parsed)
    if unknown:
        name = unknown[0].partition("=")[0].removeprefix("--")
        nearest = difflib.get_close_matches(name, values.keys() - {"command"}, n=1)
        remedy = f"did you mean {nearest[0]}?" if nearest else "docs/parameters.md lists all"
        raise UsageError(f"{name}: no such parameter; {remedy}")
    return values


def make_parser() -> Parser:
    parser = Parser(prog="signdigits", description=signdigits.__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        options = subparsers.add_parser(name, help=command.summary, description=command.summary, allow_abbrev=False)
        for group in command.parameters:
            for declared in _list_fields(group):
                _add_option(options, declared, searched=group is Space)
    return parser


def _list_fields(group: type) -> tuple[Field[Any], ...]:
    """Return the parameters of a group; a search space has a range or a value of each hyperparameter."""
    return fields(config.Hyperparameters if group is Space else group)


def _add_option(parser: Parser, declared: Field[Any], *, searched: bool) -> None:
    kind = type(declared.default)
    read: Callable[[str], Any] = _parse_boolean if kind is bool else kind
    if declared.metadata["auto"]:
        read = _parse_count
    default, shown, metavar = declared.default, str(declared.default), kind.__name__.upper()
    if searched:
        default = space.AUTO
        defaults = {name: str(space.search_default(declared, name)) for name in space.SPACES}
        if len(set(defaults.values())) > 1:
            shown = ", ".join(f"{name} {value}" for name, value in defaults.items())
        if kind is not str:
            read, metavar = _make_range_reader(read, space.is_logarithmic(declared.name)), "LOW:HIGH"
    parser.add_argument(
        f"--{declared.name}",
        type=read,
        default=default,
        metavar=metavar,
        help=f"{declared.metadata['help']} (default: {shown})".replace("%", "%%"),
    )


def _make_range_reader(read: Callable[[str], Any], log: bool) -> Callable[[str], Any]:
    """Return a reader of `LOW:HIGH`, of a single value, which the search keeps, or of `auto`, the search space's."""

    def read_range(text: str) -> Any:
        low, colon, high = text.partition(":")
        if colon:
            return space.Range(read(low), read(high), log)
        return text if text == space.AUTO else read(text)

    read_range.__name__ = f"{read.__name__} or LOW:HIGH"  # argparse's name for it in messages
    return read_range


def _parse_boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: write true or false")
    return text.lower() == "true"


def _parse_count(text: str) -> int:
    return 0 if text == space.AUTO else int(text)


_parse_count.__name__ = "int or auto"  # argparse's name for it in messages


def _run_command(command: str, **values: Any) -> None:
    """Check the parameters, open the experiment, load the photographs, and call the command's function."""
    declared = COMMANDS[command]
    given = values
    if "space" in values:
        values = {**values, "space": space.resolve_space(values["space"], values["start_from"])}
    groups: list[Any] = []
    for group in declared.parameters:
        chosen = {field.name: values[field.name] for field in _list_fields(group)}
        groups.append(Space.of(values["space"], **chosen) if group is Space else group(**chosen))
    if declared.needs_tensorflow:  # its import, and MLflow's, take seconds
        defaults = parse_arguments([command])
        changed = [f"{option}={value}" for option, value in values.items() if given[option] != defaults[option]]
        log.info("%s: %s", command, ", ".join(changed) or "all parameters have their defaults")
    module, _, function = (declared.function or f"{command}:{command}").partition(":")
    if declared.is_checked:
        importlib.import_module(f"signdigits.{module}").check(*groups)
    if not declared.needs_mlflow:
        getattr(importlib.import_module(f"signdigits.{module}"), function)(*groups)
        return
    from signdigits import startup

    startup.configure_mlflow()
    from signdigits import home
    from signdigits.tracking import runs, store

    start = Path.cwd()
    home.enter_home()
    groups = home.find_inputs(groups, start)
    if declared.is_entry_point:
        runs.open_experiment(command)
    elif not values.get("model_uri"):  # a model in a folder needs no store
        store.connect_store()
    if isinstance(groups[0], config.DataParameters):  # before TensorFlow: an unusable folder is reported at once
        from signdigits.data import loading

        groups[0] = loading.load_data(groups[0])
    if declared.needs_tensorflow:
        startup.import_tensorflow()
    getattr(importlib.import_module(f"signdigits.{module}"), function)(*groups)
