"""Measurements and trainings for a GPU that is at hand for some minutes only, in the order of their value.

    python scripts/gpu_campaign.py speed    --output=DIR [--seconds=240]
    python scripts/gpu_campaign.py training --output=DIR --data_dir=DATA [--seconds=600]

Every job is a command of this project with a time limit of its own; what it found lies in DIR/<job>.json as soon as it
ends, its output in DIR/<job>.log. A training that is cut off saves its state and is recorded as far as it came; the
same command goes on there. --toy does the same at the size of a test, on whatever device there is; --list shows the
commands.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a training may take to save its state after SIGTERM; a job without that much time left is not begun.
SAVING_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Job:
    """A command and how long it may take.

    Attributes:
      name: name of its files.
      arguments: after 'python'; {output}, {data_dir} and {variant} (of a config) are filled in.
      seconds: time limit.
      toy: further arguments at the size of a test.
      environment: variables set for it.
      training: whether it is a run of launch.py in {output}/<name>, to be recorded at its end.
    """

    name: str
    arguments: str
    seconds: float
    toy: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    training: bool = False


def steps(name: str, dtype: str, precision: str, seconds: float) -> Job:
    """Speed and share of the roofline of the training steps, with float32 products of a given precision."""
    return Job(
        name,
        f"benchmarks/roofline.py --dtypes={dtype} --json={{output}}/{name}.json",
        seconds,
        toy="--only=irnet --batch_size=4 --steps=1 --rounds=1",
        environment=(("JAX_DEFAULT_MATMUL_PRECISION", precision),),
    )


def training(name: str, config: str, seconds: float, *values: str) -> Job:
    """A run of a config; the values replace some of its own."""
    overrides = "".join(f" --config.{value}" for value in values)
    arguments = f"launch.py --config=configs/{config}.py{{variant}}{overrides} --workdir={{output}}/{name}"
    return Job(name, f"{arguments} --config.data.data_dir={{data_dir}}", seconds, training=True)


CAMPAIGNS = {
    "speed": (
        steps("steps_float32", "float32", "highest", 60),
        steps("steps_tf32", "float32", "tensorfloat32", 50),
        steps("steps_bfloat16", "bfloat16", "highest", 50),
        Job(
            "seeds",
            "benchmarks/seeds.py --seeds=2,4,8,16 --json={output}/seeds.json",
            80,
            toy="--seeds=2 --bits=1 --network=resnet8 --batch_size=4 --steps=2 --rounds=1",
        ),
    ),
    "training": (
        training("asbq_resnet20", "asbq_resnet20", 400),
        training("weight_search_1b", "weight_search_resnet20", 120, "weight_search.values=1b"),
        training("weight_search_fp32", "weight_search_resnet20", 120, "weight_search.values=fp32"),
        training("skd_resnet20", "skd_resnet20", 600),
    ),
}


def command(job: Job, options: argparse.Namespace) -> list[str]:
    """The command line of a job."""
    paths = {name: shlex.quote(str(getattr(options, name))) for name in ("output", "data_dir")}
    arguments = job.arguments.format(**paths, variant=":smoke" if options.toy else "")
    return [sys.executable, *shlex.split(f"{arguments} {job.toy}" if options.toy else arguments)]


def run(job: Job, options: argparse.Namespace, seconds: float) -> str:
    """Runs a job for at most so many seconds; says how it ended."""
    log = options.output / f"{job.name}.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            command(job, options), cwd=ROOT, env={**os.environ, **dict(job.environment)}, stdout=file, stderr=file
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(SAVING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            status = None
    if job.training:
        record(job, options)
    return "cut off" if status is None else "done" if status == 0 else f"exit status {status}, see {log.name}"


def record(job: Job, options: argparse.Namespace) -> None:
    """Writes the results file of a training, finished or not."""
    folder = options.output / job.name
    if not (folder / "config.json").exists():
        return
    output = options.output / f"{job.name}.json"
    shown = command(job, argparse.Namespace(output="DIR", data_dir="DATA", toy=options.toy))[1:]
    texts = [f"--what={job.name}", f"--command=python {shlex.join(shown)}", f"--hardware={options.hardware}"]
    subprocess.run(
        [sys.executable, "benchmarks/record.py", str(folder), f"--output={output}", *texts], cwd=ROOT, check=True
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a campaign; the exit status is 1 if a job failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=tuple(CAMPAIGNS))
    parser.add_argument("--output", type=Path, required=True, help="folder for results, logs and run folders")
    parser.add_argument("--data_dir", type=Path, default=Path("DATA"), help="folder of prepared data sets")
    parser.add_argument("--hardware", default="", help="what the results say of the machine, and how busy it was")
    parser.add_argument("--seconds", type=float, default=600.0, help="time for everything")
    parser.add_argument("--only", default="", help="names of jobs, separated by commas")
    parser.add_argument("--toy", action="store_true", help="at the size of a test")
    parser.add_argument("--list", action="store_true", help="show the commands and stop")
    options = parser.parse_args(argv)
    options.output, options.data_dir = options.output.absolute(), options.data_dir.absolute()
    names = options.only.split(",") if options.only else [job.name for job in CAMPAIGNS[options.campaign]]
    unknown = set(names) - {job.name for job in CAMPAIGNS[options.campaign]}
    if unknown:
        parser.error(f"--only: accepted are {', '.join(job.name for job in CAMPAIGNS[options.campaign])}")
    jobs = [job for job in CAMPAIGNS[options.campaign] if job.name in names]
    if options.list:
        print("\n".join(f"{job.seconds:5.0f} s  {shlex.join(command(job, options)[1:])}" for job in jobs))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + options.seconds, False
    for job in jobs:
        left = end - time.monotonic() - SAVING_SECONDS
        if left < SAVING_SECONDS:
            print(f"{job.name}: no time left", flush=True)
            continue
        started = time.monotonic()
        ended = run(job, options, min(job.seconds, left))
        failed |= ended.startswith("exit")
        print(f"{job.name}: {ended} after {time.monotonic() - started:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
