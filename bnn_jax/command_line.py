"""The command line behind ``launch.py``: flags, config file, overrides, and what each mode prints.

Results go to stdout, the log of the work to stderr. With ``--json`` the last line of stdout is one JSON object.
"""

import collections
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bnn_jax.config import flatten, suggest, validate
from bnn_jax.errors import UserError

MODES = ("train", "evaluate", "summary", "report")

# The modes that read an option; the others refuse it.
OPTION_MODES = {"stage": ("train", "evaluate", "summary"), "checkpoint": ("evaluate",), "fresh": ("train",)}


def parse(argv: Sequence[str]) -> Any:
    """Parses the command line, loads the config file and applies the overrides.

    Args:
      argv: program name and arguments.

    Returns:
      Flag values: ``config`` (ConfigDict), ``mode``, ``workdir``, ``stage``, ``checkpoint``, ``fresh``, ``json``.

    Raises:
      UserError: one line about what is wrong.
    """
    path, argv = _split_config(argv)
    config = _load_config(path)
    argv = _last_overrides(argv, config)
    try:
        values = _define_flags(config, argv)
        rest = values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        raise UserError(_describe_illegal_value(one_line(error), config)) from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"command line: {one_line(error)}; --help lists the options") from None
    if rest:
        raise UserError(f"command line: {rest[0]!r} is no option; --help lists the options")
    if values.mode not in MODES:
        raise UserError(f"--mode={values.mode}: accepted are {', '.join(MODES)}")
    _refuse_unused(values)
    return values


def _refuse_unused(values: flags.FlagValues) -> None:
    """Raises UserError for an option that the mode would ignore."""
    for name, modes in OPTION_MODES.items():
        if values[name].value and values.mode not in modes:
            raise UserError(f"--{name} is of no use with --mode={values.mode}: accepted with {', '.join(modes)}")


def _define_flags(config: ConfigDict, argv: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    for name in ("workdir", "stage", "checkpoint"):
        flags.DEFINE_string(name, None, name, flag_values=values)
    flags.DEFINE_string("mode", "train", "what to do", flag_values=values)
    flags.DEFINE_bool("fresh", False, "start anew", flag_values=values)
    flags.DEFINE_bool("json", False, "JSON as the last line", flag_values=values)
    config_flags.DEFINE_config_dict("config", config, "config", flag_values=values, sys_argv=argv)
    return values


def _split_config(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of ``--config``, and the other arguments."""
    rest, config = [], None
    arguments = iter(argv[1:])
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            config = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    if not config:
        raise UserError("--config is missing, e.g. --config=configs/quickstart.py; --help lists the options")
    return config, [argv[0], *rest]


def _load_config(value: str) -> ConfigDict:
    """The config a file's ``get_config`` returns; ``FILE:ARGUMENT`` hands it the argument."""
    path, _, argument = value.partition(":")
    if not Path(path).is_file() or not path.endswith(".py"):
        raise UserError(f"--config={value}: {path} is no Python file; configs/ holds the configs")
    try:
        module_spec = importlib.util.spec_from_file_location("config", path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        config = module.get_config(argument)
    except Exception as error:
        # Anything can go wrong in a file of the user's; the message names the file, Python's own text the rest.
        raise UserError(f"--config={value}: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={value}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


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


def _describe_illegal_value(message: str, config: ConfigDict) -> str:
    """Adds the accepted type to absl's message about a value of the wrong type."""
    name = message.removeprefix("flag --").partition("=")[0]
    if not name.startswith("config."):
        return f"command line: {message}"
    *sections, key = name.removeprefix("config.").split(".")
    place: Any = config
    for section in sections:
        place = place[section]
    return f"{message.removeprefix('flag ')}: accepted is {place.get_type(key).__name__}"


def one_line(error: BaseException) -> str:
    """An exception's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def run(values: Any) -> None:
    """Does what the flags ask for, and prints the result.

    Args:
      values: what ``parse`` returned.

    Raises:
      UserError: bad input.
      Interrupted: a signal came; the run is saved.
    """
    config = validate(values.config.to_dict())
    # Only now: importing jax takes seconds, and a mistake should show at once.
    from bnn_jax import pipeline
    from bnn_jax.report import tables

    job = pipeline.Run(config, Path(values.workdir or Path("runs") / config["name"]))
    if values.mode == "train":
        tables.show(tables.stages_table(job.stages), file=sys.stderr)
        result = {"stages": pipeline.train(job, from_stage=values.stage, fresh=values.fresh)}
        tables.show(tables.results_table(result["stages"]))
    elif values.mode == "evaluate":
        checkpoint = Path(values.checkpoint) if values.checkpoint else None
        result = pipeline.evaluate(job, stage_name=values.stage, checkpoint=checkpoint)
        print(
            f"{values.stage or result['stage']}: top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  "
            f"loss {result['loss']:.4f}  ({result['num_images']:,} images, {result['checkpoint']})"
        )
    elif values.mode == "summary":
        name = values.stage or job.stages[-1].name
        costs = pipeline.summary(job, stage_name=name)
        tables.show(costs.table())
        result = {"stage": name, **costs.to_json()}
    else:
        result = pipeline.report(job)
        tables.show(tables.results_table(result["stages"]))
        for path in result["pictures"]:
            print(f"picture: {path}")
    if values.json:
        print(json.dumps(result), flush=True)
