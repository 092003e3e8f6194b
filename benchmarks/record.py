"""Writes a result file: what was run, where, and every epoch. The tables and plots of the documents are made of these.

    python benchmarks/record.py RUN_FOLDER --output=results/NAME.json --what=TEXT --command=TEXT --hardware=TEXT
                                [--title=TEXT] [--shown=STAGE,...] [--published=[STAGE=]KEY,...] [--gap=TEXT]
    python benchmarks/record.py CONFIG.py --checkpoint=FILE --data_dir=DIR --output=results/NAME.json ...

The first form computes nothing anew: the figures are those of the run's own config.json, result.json and
metrics.jsonl. A stage that was stopped before its last epoch is recorded as far as it came; what no file says then
(device, numbers of images) are options. The second form evaluates a released checkpoint. `python launch.py
--mode=report` writes tables and plots anew afterwards.
"""

import argparse
import fnmatch
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bnn_jax import run_files
from bnn_jax.errors import UserError
from bnn_jax.experiment import config as configs
from bnn_jax.experiment import folder as run_folder
from bnn_jax.training import metrics

TEXTS = ("title", "what", "command", "hardware", "gap")


def stage_record(folder: Path, config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What a stage's folder says: its result, or how far it came, and the records of its epochs."""
    records = metrics.read(folder / run_folder.METRICS)
    result = run_files.read(folder / run_folder.RESULT, run_files.SEARCHED)
    if result is None:
        result = unfinished(folder.name.partition("_")[2], records, config, options)
    return {**result, "metrics": records}


def unfinished(
    name: str, records: list[dict[str, Any]], config: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """What is known of a stage that has no result yet."""
    train, test = options.images or (config["data"]["num_train"], config["data"]["num_eval"])
    known = {"seed": config["seed"], "data": config["data"]["name"], "num_train": train, "num_test": test}
    found = {"stage": name, "finished": False, **known, "device": options.device}
    if not records:
        return found
    best = max(records, key=lambda record: (record["test_top1"], -record["epoch"]))
    accuracies = {"last_top1": records[-1]["test_top1"], "best_top1": best["test_top1"], "best_epoch": best["epoch"]}
    return {**found, **accuracies, "selection": "test", "epochs": len(records)}


def without_folders(config: Any) -> Any:
    """A config whose files, 'file:PATH', are named without the folders they lie in on this machine."""
    if isinstance(config, dict):
        return {key: without_folders(value) for key, value in config.items()}
    is_file = isinstance(config, str) and config.startswith("file:")
    return f"file:{Path(config.removeprefix('file:')).name}" if is_file else config


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded config with the keys that were added since."""
    sections = {name: configs.defaults(name).to_dict() for name in ("", "data", "train", config["method"])}
    filled = {**sections.pop(""), **config}
    return {**filled, **{name: {**section, **config[name]} for name, section in sections.items()}}


def costs(config: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    """Adds what a network costs to stages that do not say it: bits, stored bits, bit operations."""
    from bnn_jax.experiment.build import make_experiment
    from bnn_jax.experiment.summaries import summary

    experiment = make_experiment(configs.validate(with_defaults(config)))
    for stage in stages:
        if stage.get("kind") != "search":
            total = summary(experiment, stage_name=stage["stage"]).total
            stage.setdefault("bits", experiment.find(stage["stage"]).bits)
            stage.setdefault("stored_bits", total.stored_bits)
            stage["bit_operations"] = total.bit_operations


def record(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The results of a run.

    Args:
      run: run folder.
      options: of the command line.

    Raises:
      SystemExit: the folder holds no run.
    """
    path = run / run_folder.CONFIG
    if not path.is_file():
        raise SystemExit(f"{run}: no run folder, {path.name} is missing")
    content = run_files.read(path, run_files.CONFIG) or {}
    # '<stage>.old-1' was moved aside.
    folders = [folder for folder in sorted(run.glob("[0-9][0-9]_*")) if ".old-" not in folder.name]
    stages = [stage_record(folder, content["config"], options) for folder in folders]
    if not stages:
        raise SystemExit(f"{run}: no stage has been begun")
    return {name: content[name] for name in ("git_commit", "versions", "config")} | {"stages": stages}


def evaluation(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The accuracy of a released checkpoint on the test images."""
    from bnn_jax.experiment.build import make_experiment
    from bnn_jax.experiment.evaluation import evaluate
    from bnn_jax.training.devices import describe_devices

    overrides = dict(entry.split("=", 1) for entry in options.set)
    config = configs.named(str(file), {**overrides, "data.data_dir": options.data_dir})
    experiment = make_experiment(configs.validate(config.to_dict()))
    folder = run_folder.RunFolder(Path("unused"), experiment.stages)
    found = evaluate(experiment, folder, stage_name=options.stage, checkpoint=options.checkpoint)
    stage = {
        **{"stage": found["stage"], "kind": "evaluation", "seed": config.seed, "data": config.data.name},
        **{"device": describe_devices(), "num_test": found["num_images"], "last_loss": found["loss"]},
        **{f"last_{name}": found[name] for name in ("top1", "top5")},
        "checkpoint": options.checkpoint.name,
        "checkpoint_sha256": hashlib.sha256(options.checkpoint.read_bytes()).hexdigest(),
    }
    content = {**run_folder.provenance(), "config": run_folder.to_json_config(experiment.config)}
    return {**content, "stages": [stage]}


def shown(options: argparse.Namespace, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tables show of a run: stages, and the published numbers beside them."""
    names = options.shown.split(",") if options.shown else [stages[-1]["stage"]]
    keys = [entry.rpartition("=")[::2] for entry in options.published.split(",")] if options.published else []
    return {"shown": names, "published": {(name or names[-1]): key for name, key in keys}, "headline": options.headline}


def in_tables(stage: dict[str, Any], names: list[str]) -> bool:
    """Whether the tables show a stage, which may be named by a pattern such as 'finetune_*'."""
    return any(fnmatch.fnmatchcase(stage["stage"], name) for name in names)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, or a config with --checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--what", required=True, help="what was run, in words")
    parser.add_argument("--command", required=True, help="the command line, with DIR for the data folder")
    parser.add_argument("--hardware", default="", help="where it ran, and how busy the machine was")
    parser.add_argument("--title", default="", help="name in the tables")
    parser.add_argument("--gap", default="", help="why it differs from what was published")
    parser.add_argument("--shown", default="", help="stages in the tables, separated by commas; default the last")
    parser.add_argument("--published", default="", help="keys of results/published.json, of the last stage shown")
    parser.add_argument("--headline", action="store_true", help="show it in the README")
    parser.add_argument("--device", default=None, help="of a stage that was stopped, e.g. '1 x cpu (cpu)'")
    parser.add_argument("--images", type=lambda text: tuple(map(int, text.split(","))), help="the same: TRAIN,TEST")
    parser.add_argument("--checkpoint", type=Path, help="a released file to evaluate")
    parser.add_argument("--stage", default=None, help="of the checkpoint; default the last one of the config")
    parser.add_argument("--data_dir", default=None, help="folder of prepared data, to evaluate")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, a text of the config, to evaluate")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line and writes the file."""
    options = parsed(argv)
    content = evaluation(options.run, options) if options.checkpoint else record(options.run, options)
    tables = shown(options, content["stages"])
    costs(content["config"], [stage for stage in content["stages"] if in_tables(stage, tables["shown"])])
    # Where the images lay is nobody else's business.
    content["config"] = without_folders(content["config"])
    content["config"]["data"]["data_dir"] = "DIR"
    texts = {name: getattr(options, name) for name in TEXTS if getattr(options, name)}
    options.output.write_text(json.dumps({**texts, **tables, **content}, indent=1) + "\n")
    print(options.output)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
