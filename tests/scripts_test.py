"""The files of scripts/ start commands that exist; the page about many GPUs names flags and files that exist."""

import argparse
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import launch
from bnn_jax import command_line
from bnn_jax.errors import UserError
from scripts import gpu_campaign
from tests.conftest import ROOT

# Takes the place of Python, and of srun before it, and prints what it was called with.
FAKE_PYTHON = '#!/bin/bash\nprintf "%s\\n" "$@"\n'
FAKE_SRUN = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'


def executable(path: Path, content: str) -> None:
    """Writes a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)


def called_with(script: str, folder: Path, **environment: str) -> list[str]:
    """Runs a shell script in a folder where programs are replaced, and returns the arguments of Python."""
    executable(folder / ".venv" / "bin" / "python", FAKE_PYTHON)
    executable(folder / "bin" / "srun", FAKE_SRUN)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return done.stdout.splitlines()


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The flags, as the command line reads them in the checkout."""
    assert arguments[0] == "launch.py"
    monkeypatch.chdir(ROOT)
    return command_line.parse(arguments)


def read_yaml(name: str) -> dict[str, Any]:
    """A file of scripts/."""
    return pytest.importorskip("yaml").safe_load((ROOT / "scripts" / name).read_text())


def test_the_slurm_script_starts_a_command_that_exists(tmp_path, monkeypatch):
    script = (ROOT / "scripts" / "slurm.sh").read_text()
    values = parsed(called_with(script, tmp_path, SLURM_SUBMIT_DIR=str(tmp_path)), monkeypatch)
    # srun names the others, and the folder is one that all hosts see.
    assert values.coordinator is None and values.mode == "train"
    assert values.workdir and values.config.data.data_dir


def test_the_slurm_script_starts_one_task_per_gpu():
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (ROOT / "scripts" / "slurm.sh").read_text(), re.M))
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]


def test_the_jobset_starts_a_command_that_exists_once_in_each_pod(monkeypatch):
    jobset = read_yaml("jobset.yaml")
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    [container] = spec["template"]["spec"]["containers"]
    assert container["command"] == ["python", "launch.py"]
    last = spec["completions"] - 1
    arguments = [argument.replace("$(JOB_COMPLETION_INDEX)", str(last)) for argument in container["args"]]
    values = parsed(["launch.py", *arguments], monkeypatch)
    assert values.num_processes == spec["completions"] == spec["parallelism"]
    assert values.process_id == last
    # JobSet names the first pod of the first replica so.
    name = jobset["metadata"]["name"]
    assert values.coordinator.partition(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(values.workdir.startswith(f"{path}/") for path in mounted)


def test_the_skypilot_file_starts_a_command_that_exists_on_each_node(tmp_path, monkeypatch):
    task = read_yaml("skypilot.yaml")
    given = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    values = parsed(called_with(task["run"], tmp_path, **given), monkeypatch)
    assert (values.coordinator, values.num_processes, values.process_id) == ("10.0.0.1:55527", 2, 1)
    assert any(values.workdir.startswith(f"{path}/") for path in task["volumes"])


def test_a_wrong_flag_in_a_script_would_be_found(monkeypatch):
    with pytest.raises(UserError, match="nonsense"):
        parsed(["launch.py", "--config=configs/quickstart.py", "--nonsense=1"], monkeypatch)


def test_the_page_about_many_gpus_names_flags_and_files_that_exist():
    page = (ROOT / "docs" / "many_gpus.md").read_text()
    flags = set(re.findall(r"--([a-z]\w+)", page))
    assert flags and all(f"--{flag}" in launch.USAGE for flag in flags)
    files = set(re.findall(r"\b(?:scripts|configs)/\w+\.\w+", page))
    assert len(files) >= 4 and all((ROOT / file).is_file() for file in files)


# ---- the campaign of a lent GPU


def campaign_options(output: Path) -> Any:
    return argparse.Namespace(output=output, data_dir=output, toy=True)


@pytest.mark.parametrize("name", sorted(gpu_campaign.CAMPAIGNS))
def test_every_job_of_a_campaign_starts_a_program_of_the_project(name, capsys):
    assert gpu_campaign.main([name, "--output=out", "--list"]) == 0
    for line in capsys.readouterr().out.splitlines():
        program, *rest = line.split()[2:]
        assert (ROOT / program).is_file()
        configs = [argument.removeprefix("--config=") for argument in rest if argument.startswith("--config=")]
        assert all((ROOT / config).is_file() for config in configs)


def test_a_job_that_takes_too_long_is_asked_to_stop(tmp_path):
    # It goes on until it is told to stop, and says so.
    program = "import signal,time;signal.signal(15,lambda *_:(print(1),exit()));print(0,flush=True);time.sleep(60)"
    log = tmp_path / "endless.log"
    job = gpu_campaign.Job("endless", f"-c '{program}'", 1.0)
    assert gpu_campaign.run(job, campaign_options(tmp_path), 5.0) == "cut off"
    assert log.read_text().split() == ["0", "1"]


def test_a_job_that_fails_says_where_to_look(tmp_path):
    job = gpu_campaign.Job("broken", "-c 'raise SystemExit(3)'", 60.0)
    assert gpu_campaign.run(job, campaign_options(tmp_path), 60.0) == "exit status 3, see broken.log"
