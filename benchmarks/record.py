"""Writes a results file of a run folder: what was run, where, and every epoch.

    python benchmarks/record.py RUN_FOLDER --output=benchmarks/results/NAME.json --what=TEXT --command=TEXT
                                [--hardware=TEXT]

A stage that was stopped before its last epoch is recorded as far as it came. Nothing is computed anew: the figures are
those of the run's own config.json, result.json and metrics.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bnn_jax import run_files
from bnn_jax.experiment import folder as run_folder
from bnn_jax.training import metrics


def stage_record(folder: Path) -> dict[str, Any]:
    """What a stage's folder says: its result, or that it has none yet, and the records of its epochs."""
    unfinished = {"stage": folder.name.partition("_")[2], "finished": False}
    result = run_files.read(folder / run_folder.RESULT, run_files.SEARCHED) or unfinished
    return {**result, "metrics": metrics.read(folder / run_folder.METRICS)}


def record(run: Path, **texts: str) -> dict[str, Any]:
    """The results of a run.

    Args:
      run: run folder.
      **texts: what was run and where, in words.

    Raises:
      SystemExit: the folder holds no run.
    """
    config = run / run_folder.CONFIG
    if not config.is_file():
        raise SystemExit(f"{run}: no run folder, {config.name} is missing")
    content = run_files.read(config, run_files.CONFIG) or {}
    # Where the images lay is nobody else's business; '<stage>.old-1' was moved aside.
    content["config"]["data"]["data_dir"] = "DIR"
    stages = [stage_record(folder) for folder in sorted(run.glob("[0-9][0-9]_*")) if ".old-" not in folder.name]
    keep = ("git_commit", "versions", "config")
    return {**texts, **{name: content[name] for name in keep}, "stages": stages}


def main() -> None:
    """Parses the command line and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--what", required=True, help="what was run, in words")
    parser.add_argument("--command", required=True, help="the command line, with DIR for the data folder")
    parser.add_argument("--hardware", default="", help="where it ran")
    options = parser.parse_args()
    texts = {name: getattr(options, name) for name in ("what", "command", "hardware")}
    options.output.write_text(json.dumps(record(options.run, **texts), indent=1) + "\n")
    print(options.output)


if __name__ == "__main__":
    main()
