"""The same training on 1, 2, 4 and 8 devices: equal steps, losses equal within rounding, and seconds.

    python benchmarks/scaling.py [--devices=1,2,4,8] [--json=FILE] [-- LAUNCH ARGUMENTS]

Each number of devices is a run of launch.py in a process and a folder of its own, by default two rungs of the
quickstart chain; other arguments of launch.py go behind `--`. On CPU the devices are forced ones that share the cores,
so that the table shows equality and nothing of speed; on a machine with N GPUs up to N of them are used.

Differences are those from the first row: of the losses, relative; of everything a checkpoint holds of the network, the
largest absolute one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bnn_jax.experiment import folder as run_folder

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = (
    f"--config={ROOT / 'configs' / 'quickstart.py'}:smoke",
    "--config.asbq.bits=(32,1,)",
    "--config.asbq.learning_rates=(0.1,0.02,)",
    "--config.asbq.epochs=(2,)",
    "--config.seed=1",
)


def environment(devices: int) -> dict[str, str]:
    """Environment in which a program sees that many devices."""
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not Path("/proc/driver/nvidia").exists():
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        return {**os.environ, "XLA_FLAGS": flags.strip()}
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices)))}


def train(devices: int, arguments: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """What a run on that many devices left, by stage."""
    command = [sys.executable, str(ROOT / "launch.py"), *arguments, f"--workdir={folder}"]
    finished = subprocess.run(command, env=environment(devices), capture_output=True, text=True, cwd=ROOT)
    if finished.returncode:
        raise SystemExit(f"on {devices} devices: {finished.stderr.strip().splitlines()[-1]}")
    return {path.parent.name: read_stage(path.parent) for path in sorted(folder.glob("[0-9]*/metrics.jsonl"))}


def read_stage(folder: Path) -> dict[str, Any]:
    """Losses of all epochs, steps, seconds, device and variables of a finished stage."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": np.asarray([[record["train_loss"], record["test_loss"]] for record in records]),
        "steps": records[-1]["step"],
        "seconds": sum(record["seconds"] for record in records),
        "device": json.loads((folder / "result.json").read_text())["device"],
        "variables": read_variables(folder / "checkpoints" / str(records[-1]["step"])),
    }


def read_variables(folder: Path) -> dict[str, np.ndarray]:
    """Parameters, running statistics and quantizer state of a checkpoint, by path."""
    import orbax.checkpoint

    arrays = {}
    for name in ("params", "batch_stats", "quant_state"):
        if (folder / name).exists():
            tree = orbax.checkpoint.PyTreeCheckpointer().restore(folder / name)
            flat = orbax.checkpoint.utils.to_flat_dict(tree, sep="/", keep_empty_nodes=False)
            arrays.update({f"{name}/{path}": np.asarray(value) for path, value in flat.items()})
    return arrays


def compare(stage: dict[str, Any], first: dict[str, Any]) -> dict[str, float]:
    """Largest differences of a stage from that of the first row."""
    assert stage["variables"].keys() == first["variables"].keys()
    return {
        "loss_difference": float(np.max(np.abs(stage["losses"] - first["losses"]) / np.abs(first["losses"]))),
        "variable_difference": max(
            float(np.max(np.abs(stage["variables"][path] - value), initial=0.0))
            for path, value in first["variables"].items()
        ),
    }


def main(argv: list[str] | None = None) -> None:
    """Runs all numbers of devices and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2,4,8", help="numbers of devices; the first is what others are held to")
    parser.add_argument("--json", help="file for the rows and where they come from")
    parser.add_argument("arguments", nargs="*", help="of launch.py, behind --")
    options = parser.parse_args(argv)
    arguments = options.arguments or list(DEFAULT)
    rows, first = [], None
    for devices in map(int, options.devices.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            stages = train(devices, arguments, Path(folder))
        first = first or stages
        for name, stage in stages.items():
            rows.append(
                {
                    "devices": devices,
                    "device": stage["device"],
                    "stage": name,
                    "steps": stage["steps"],
                    "last_loss": float(stage["losses"][-1, 0]),
                    **compare(stage, first[name]),
                    "seconds": round(stage["seconds"], 1),
                }
            )
    show(rows)
    if options.json:
        content = {"arguments": arguments, "rows": rows, **run_folder.provenance()}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(rows: list[dict[str, Any]]) -> None:
    """The table on stdout."""
    table = Table(title=f"Devices: {rows[0]['device'].split(' x ')[-1]}")
    for title in ("stage", "devices", "steps", "train loss", "losses differ by", "variables differ by", "seconds"):
        table.add_column(title, justify="left" if title == "stage" else "right")
    for row in sorted(rows, key=lambda row: (row["stage"], row["devices"])):
        table.add_row(
            row["stage"],
            str(row["devices"]),
            str(row["steps"]),
            f"{row['last_loss']:.6f}",
            f"{row['loss_difference']:.1e}",
            f"{row['variable_difference']:.1e}",
            f"{row['seconds']:.1f}",
        )
    # Wide enough for the table also where the output is a file.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    main()
