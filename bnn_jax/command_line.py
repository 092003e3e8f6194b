"""The command line behind ``launch.py``: flags, config file, overrides, and what each mode prints.

Results go to stdout, the log of the work to stderr. With ``--json`` the last line of stdout is one JSON object.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bnn_jax import hosts
from bnn_jax.deploy import jobs, load
from bnn_jax.errors import UserError, one_line
from bnn_jax.experiment.config import SECTIONS, flatten, keys_of, suggest, validate
from bnn_jax.experiment.config import load as load_config

MODES = ("train", "evaluate", "summary", "report", "export", "predict")

# The modes that read an option; the others refuse it.
OPTION_MODES = {
    "stage": ("train", "evaluate", "summary", "export", "predict"),
    "checkpoint": ("evaluate", "summary", "export", "predict"),
    "output": ("export",),
    "format": ("export",),
    "fresh": ("train",),
    "coordinator": ("train", "evaluate"),
    "num_processes": ("train", "evaluate"),
    "process_id": ("train", "evaluate"),
}
# Options that name something, and what.
PATHS = {
    "workdir": "a folder",
    "stage": "the name of a stage",
    "checkpoint": "a file or folder",
    "output": "a file",
    "coordinator": "HOST:PORT",
}
DISTRIBUTED = ("auto", "off")
FORMATS = ("bnn", "stablehlo", "onnx")


def parse(argv: Sequence[str]) -> Any:
    """Parses the command line, loads the config file and applies the overrides.

    Args:
      argv: program name and arguments.

    Returns:
      Flag values: ``config`` (ConfigDict), ``mode``, ``workdir``, ``stage``, ``checkpoint``, ``fresh``, ``json``, and
      those of several processes (``peers_of``).

    Raises:
      UserError: one line about what is wrong.
    """
    path, argv = _split_config(argv)
    config = None if path is None else load_config(path)
    argv = argv if config is None else _last_overrides(argv, config)
    try:
        values = _define_flags(config, argv)
        rest = values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        raise UserError(_describe_illegal_value(one_line(error))) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"command line: {one_line(error)}; --help lists the options") from None
    for name in PATHS:
        if values[name].value == "":
            raise UserError(f"--{name}= is empty: accepted is {PATHS[name]}, or leave the option out")
    if values.mode not in MODES:
        raise UserError(f"--mode={values.mode}: accepted are {', '.join(MODES)}")
    if rest and values.mode != "predict":
        raise UserError(f"command line: {rest[0]!r} is no option; --help lists the options")
    values.images = rest
    if values.format not in (None, *FORMATS):
        raise UserError(f"--format={values.format}: accepted are {', '.join(FORMATS)}")
    _check_checkpoint(values, has_config=config is not None)
    if values.distributed not in DISTRIBUTED:
        raise UserError(f"--distributed={values.distributed}: accepted are {', '.join(DISTRIBUTED)}")
    _refuse_unused(values)
    peers_of(values)
    return values


def _check_checkpoint(values: Any, *, has_config: bool) -> None:
    """Raises UserError where a mode needs a config and there is none, or cannot read such a checkpoint."""
    of_file = jobs.is_exported(values.checkpoint)
    if not has_config and values.mode != "report" and not (of_file and values.mode in ("predict", "summary")):
        raise UserError("--config is missing, e.g. --config=configs/quickstart.py; --help lists the options")
    if values.mode == "summary" and values.checkpoint and not of_file:
        raise UserError(f"--checkpoint={values.checkpoint}: accepted with --mode=summary is an exported file, .bnn")
    if values.mode == "export" and of_file:
        raise UserError(f"--checkpoint={values.checkpoint}: it is exported already")


def _refuse_unused(values: flags.FlagValues) -> None:
    """Raises UserError for an option that the mode would ignore."""
    for name, modes in OPTION_MODES.items():
        if values[name].value not in (None, False, "") and values.mode not in modes:
            raise UserError(f"--{name} is of no use with --mode={values.mode}: accepted with {', '.join(modes)}")


def _define_flags(config: ConfigDict | None, argv: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    for name in ("workdir", "stage", "checkpoint", "output", "format", "coordinator"):
        flags.DEFINE_string(name, None, name, flag_values=values)
    flags.DEFINE_string("mode", "train", "what to do", flag_values=values)
    flags.DEFINE_string("distributed", "auto", "join other processes", flag_values=values)
    for name, default in list(dataclasses.asdict(hosts.Peers()).items())[1:]:
        flags.DEFINE_integer(name, default, name, flag_values=values)
    flags.DEFINE_bool("fresh", False, "start anew", flag_values=values)
    flags.DEFINE_bool("json", False, "JSON as the last line", flag_values=values)
    flags.DEFINE_list("images", [], "pictures, given behind the options", flag_values=values)
    if config is not None:
        config_flags.DEFINE_config_dict("config", config, "config", flag_values=values, sys_argv=argv)
    return values


def _split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of ``--config`` or None, and the other arguments."""
    rest, config = [], None
    arguments = iter(argv[1:])
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            config = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    return config or None, [argv[0], *rest]


def _last_overrides(argv: Sequence[str], config: ConfigDict) -> list[str]:
    """The arguments with only the last override of each key: of a tuple given twice, config_flags would add up the two.

    Raises:
      UserError: an override of a key the config does not have.
    """
    known = flatten(config.to_dict())
    overrides, rest = {}, []
    arguments = collections.deque(argv[1:])
    while arguments:
        argument = arguments.popleft()
        name = argument.partition("=")[0].lstrip("-")
        if not name.startswith("config."):
            rest.append(argument)
            continue
        if name.removeprefix("config.") not in known:
            raise UserError(f"--{name}: unknown key; {suggest(name.removeprefix('config.'), known)}")
        apart = "=" not in argument and arguments and not arguments[0].startswith("--")
        overrides[name] = f"{argument}={arguments.popleft()}" if apart else argument
    return [argv[0], *overrides.values(), *rest]


def _describe_illegal_value(message: str) -> str:
    """Adds what is accepted to absl's message about a value of the wrong type."""
    flag = message.removeprefix("flag ")
    key = keys_of(SECTIONS).get(flag.removeprefix("--config.").partition("=")[0])
    return f"command line: {message}" if key is None else f"{flag}: accepted is {key.describe()}"


def peers_of(values: Any) -> hosts.Peers | None:
    """The other processes, as the flags or else the launcher name them; None on a single process.

    Raises:
      UserError: flags that do not go together, or a mode that works on one process alone.
    """
    peers = hosts.Peers(**{field.name: values[field.name].value for field in dataclasses.fields(hosts.Peers)})
    named = peers.coordinator is not None
    if values.distributed == "off" and named:
        raise UserError("--distributed=off: of no use with --coordinator")
    launcher = None if named or values.distributed == "off" else hosts.launcher()
    if launcher is None:
        return peers if named else None
    if values.mode not in OPTION_MODES["coordinator"]:
        raise UserError(
            f"--mode={values.mode} works on one process, and {launcher} started several; start it outside of the job, "
            "or with --distributed=off"
        )
    return peers


def run(values: Any, group: hosts.Group) -> None:
    """Does what the flags ask for, and prints the result.

    Args:
      values: what ``parse`` returned.
      group: joins the other processes, if there are any.

    Raises:
      UserError: bad input.
      Interrupted: a signal came; the run is saved.
    """
    if jobs.is_exported(values.checkpoint) and values.mode in ("predict", "summary"):
        result = _predict_exported(values) if values.mode == "predict" else _summarise_exported(values)
        if values.json:
            print(json.dumps(result), flush=True)
        return
    if "config" not in values:
        result = _jobs().report_project(Path(values.workdir or "."))
        if values.json:
            print(json.dumps(result), flush=True)
        return
    config = validate(values.config.to_dict())
    peers = peers_of(values)
    if peers is not None:
        # Before anything looks for devices.
        group.connect(peers)
        _check_same_command(values, config)
    # Only now: importing jax takes seconds, and a mistake should show at once.
    from bnn_jax.experiment.build import make_experiment
    from bnn_jax.experiment.folder import RunFolder

    experiment = make_experiment(config)
    folder = RunFolder(Path(values.workdir or Path("runs") / config["name"]), experiment.stages)
    train = functools.partial(_train, group=group)
    modes = {
        "train": train,
        "evaluate": _evaluate,
        "summary": _summary,
        "report": _report,
        "export": _export,
        "predict": _predict,
    }
    result = modes[values.mode](experiment, folder, values)
    if values.json and hosts.is_first():
        print(json.dumps(result), flush=True)


def _check_same_command(values: Any, config: dict[str, Any]) -> None:
    """Raises UserError where a process was given another command than the first one; they would wait for each other."""
    options = {name: values[name].value for name in ("mode", "workdir", "stage", "checkpoint", "fresh")}
    hosts.same_everywhere("command", {**options, "config": flatten(config)})


def _train(experiment: Any, folder: Any, values: Any, *, group: hosts.Group) -> dict[str, Any]:
    return _jobs().train(experiment, folder, stage=values.stage, fresh=values.fresh, group=group)


def _evaluate(experiment: Any, folder: Any, values: Any) -> dict[str, Any]:
    return _jobs().evaluate(experiment, folder, stage=values.stage, checkpoint=_path(values, "checkpoint"))


def _summary(experiment: Any, _: Any, values: Any) -> dict[str, Any]:
    return _jobs().summary(experiment, stage=values.stage)


def _report(experiment: Any, folder: Any, _: Any) -> dict[str, Any]:
    return _jobs().report(experiment, folder)


def _export(experiment: Any, folder: Any, values: Any) -> dict[str, Any]:
    paths = {name: _path(values, name) for name in ("checkpoint", "output")}
    return _jobs().export(experiment, folder, stage=values.stage, form=values.format or "bnn", **paths)


def _predict(experiment: Any, folder: Any, values: Any) -> dict[str, Any]:
    checkpoint = _path(values, "checkpoint")
    return _jobs().predict(experiment, folder, values.images, stage=values.stage, checkpoint=checkpoint)


def _jobs() -> Any:
    """The jobs, which need jax."""
    from bnn_jax.experiment import jobs as experiment_jobs

    return experiment_jobs


def _path(values: Any, name: str) -> Path | None:
    return Path(values[name].value) if values[name].value else None


def _predict_exported(values: Any) -> dict[str, Any]:
    from bnn_jax.report import tables

    result = jobs.predict(load(values.checkpoint), values.images)
    tables.show(tables.predictions_table(result["predictions"]))
    return result


def _summarise_exported(values: Any) -> dict[str, Any]:
    from bnn_jax.report import tables

    result = jobs.summary(Path(values.checkpoint))
    tables.show(tables.stored_table(result))
    print(f"{values.checkpoint}: {result['file_bytes']:,} bytes")
    return result
