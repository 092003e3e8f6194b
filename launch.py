"""Command line of bnn_jax: train, evaluate, summarise and report the run a config describes."""

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

USAGE = """\
usage: python launch.py --config=FILE[:smoke] [--config.KEY=VALUE ...] [options]

  --config=FILE          config, e.g. configs/quickstart.py; FILE:smoke runs two steps per stage
                         on generated images
  --config.KEY=VALUE     replaces one value, e.g. --config.train.batch_size=64
                         --config.data.data_dir=DIR  (keys: configs/common.py)
  --workdir=DIR          run folder (default runs/<config name>)
  --mode=MODE            train      train all stages; skips finished ones, goes on with interrupted ones
                         evaluate   accuracy on the test images
                         summary    parameters, bits and operations per layer
                         report     table and picture of the finished stages
                         (default train)
  --stage=NAME           train: train this stage again, and all after it; old results are moved aside
                         evaluate: which stage, NAME or NAME@best; summary: which stage
  --checkpoint=PATH      evaluate: a PyTorch file (.pth, .pth.tar, .th) or a checkpoint folder
  --fresh                train: move an existing run folder aside and start anew
  --json                 evaluate, summary, report: one JSON object as the last line
  --help                 this text

example: python launch.py --config=configs/quickstart.py
exit status: 0 done; 1 training failed; 2 bad input; 130 or 143 stopped by a signal, state saved
"""

MODES = ("train", "evaluate", "summary", "report")


def parse_flags(argv: Sequence[str]) -> Any:
    """Parses the command line; the config file is loaded and the overrides are applied.

    Raises:
      UserError: one line about what is wrong.
    """
    from absl import flags
    from ml_collections import config_flags

    from bnn_jax.errors import UserError

    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "run folder", flag_values=values)
    flags.DEFINE_string("mode", "train", "what to do", flag_values=values)
    flags.DEFINE_string("stage", None, "stage", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "saved variables", flag_values=values)
    flags.DEFINE_bool("fresh", False, "start anew", flag_values=values)
    flags.DEFINE_bool("json", False, "JSON as the last line", flag_values=values)
    config_flags.DEFINE_config_file("config", None, "config", flag_values=values)
    if not any(argument.lstrip("-").split("=")[0] == "config" for argument in argv[1:]):
        raise UserError("--config is missing, e.g. --config=configs/quickstart.py; --help lists the options")
    try:
        rest = values(list(argv))[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        raise UserError(f"command line: {one_line(error)}; --help lists the options") from None
    if rest:
        raise UserError(f"command line: {rest[0]!r} is no option; --help lists the options")
    if values.mode not in MODES:
        raise UserError(f"--mode={values.mode}: accepted are {', '.join(MODES)}")
    return values


def one_line(error: BaseException) -> str:
    """An exception's message in one line."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def run(values: Any) -> None:
    """Does what the flags ask for."""
    from bnn_jax.config import validate

    config = validate(values.config.to_dict())
    from bnn_jax import pipeline

    job = pipeline.Run(config, Path(values.workdir or Path("runs") / config["name"]))
    if values.mode == "train":
        pipeline.train_and_show(job, from_stage=values.stage, fresh=values.fresh)
    elif values.mode == "evaluate":
        checkpoint = Path(values.checkpoint) if values.checkpoint else None
        show(pipeline.evaluate_and_show(job, stage_name=values.stage, checkpoint=checkpoint), values.json)
    elif values.mode == "summary":
        show(pipeline.summarise_and_show(job, stage_name=values.stage), values.json)
    else:
        show(pipeline.report_and_show(job), values.json)


def show(result: dict[str, Any], as_json: bool) -> None:
    """Prints the JSON line, if it was asked for."""
    if as_json:
        print(json.dumps(result), flush=True)


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    if any(argument in ("--help", "-help", "-h", "--helpfull", "--helpshort") for argument in argv[1:]):
        print(USAGE, end="")
        return 0
    from bnn_jax.errors import Interrupted, NonFiniteLossError, UserError

    try:
        run(parse_flags(argv))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteLossError) else 2
    except KeyboardInterrupt:
        print("stopped before training began; nothing was lost", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
