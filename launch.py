"""Command line of bnn_jax: train, evaluate, summarise and report the run a config describes."""

import os
import signal
import sys
import traceback
from collections.abc import Sequence

USAGE = """\
usage: python launch.py --config=FILE[:smoke] [--config.KEY=VALUE ...] [options]

  --config=FILE          config, e.g. configs/quickstart.py; FILE:smoke runs two steps per epoch
                         on generated images, FILE:smoke_real on a few of its own data set
  --config.KEY=VALUE     replaces one value, e.g. --config.train.batch_size=64
                         --config.data.data_dir=DIR  (all keys: --help-config)
  --workdir=DIR          run folder (default runs/<config name>)
  --mode=MODE            train      train all stages; skips finished, goes on with interrupted ones
                         evaluate   accuracy on the test images
                         summary    parameters, bits and operations per layer
                         report     table and pictures of the finished stages; without --config
                                    tables and plots of the documents, from results/
                         export     the network of a stage as a small file that classifies
                         predict    classes of pictures, given behind the options
                         (default train)
  --stage=NAME           train: train this stage and all after it again; moves old results aside
                         summary: which stage; evaluate, export, predict: NAME or NAME@best
  --checkpoint=PATH      evaluate, export, predict: weights (.pth, .safetensors, .npz) or a folder
                         evaluate, predict, summary: an exported file (.bnn), without --config
  --output=FILE          export: file to write (default: in the stage folder, or beside PATH)
  --format=FORMAT        export: bnn (default), or with float weights stablehlo, onnx
  --fresh                train: move an existing run folder aside and start anew
  --json                 one JSON object as the last line
  --help                 this text
  --help-config          all keys of a config: default, meaning, accepted values

on several processes (hosts): train and evaluate; the same command in each of them
  under SLURM (srun), Open MPI and in a Kubernetes JobSet they find each other; elsewhere:
  --coordinator=HOST:PORT    address of the first process
  --num_processes=N          how many there are
  --process_id=I             which one this is, 0 to N - 1
  --distributed=off          every process on its own, whatever started it (default auto)
  --heartbeat_seconds=S      silence after which a process counts as lost (default 100)
  --connect_seconds=S        how long to wait for the others at the start (default 300)

environment: JAX_COMPILATION_CACHE_DIR=DIR  keeps compiled programs, for later runs of a network

example: python launch.py --config=configs/quickstart.py
exit status: 0 done; 1 training failed or a process was lost; 2 bad input
             130 or 143 stopped by a signal, state saved
"""


def ask_for_huge_pages() -> None:
    """Starts this program again with glibc set to huge pages, where Linux gives them to those who ask only.

    XLA asks for its memory anew in every step; on a CPU a step takes about a fifth less time with huge pages. glibc
    reads the setting when a program starts. A setting that is there already is left as it is.
    """
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            on_request = "[madvise]" in file.read()
    except OSError:
        return
    if on_request and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    if any(argument in ("--help", "-help", "-h", "--helpfull", "--helpshort") for argument in argv[1:]):
        print(USAGE, end="")
        return 0
    if any(argument in ("--help-config", "--help_config") for argument in argv[1:]):
        from bnn_jax.experiment.config import describe_keys

        try:
            print(describe_keys(), flush=True)
        except BrokenPipeError:
            # Its reader, such as ``head``, has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    from bnn_jax import command_line, hosts
    from bnn_jax.errors import Interrupted, NonFiniteLossError, UserError, one_line

    group = hosts.Group()
    try:
        command_line.run(command_line.parse(argv), group)
    except Interrupted as stopped:
        return group.finish(128 + stopped.signal_number, str(stopped))
    except UserError as error:
        return group.fail(1 if isinstance(error, NonFiniteLossError) else 2, one_line(error))
    except KeyboardInterrupt:
        message = "stopped; what was saved is kept, the same command goes on from there"
        return group.fail(128 + signal.SIGINT, message, label="")
    except Exception as error:
        group.end_if_lost(error)
        if isinstance(error, OSError):
            # A full disk, mostly: mistakes about files that can be foreseen are UserErrors.
            from bnn_jax.experiment.folder import describe_os_error

            where = f"{error.filename}: " if error.filename else ""
            return group.fail(2, f"{where}{describe_os_error(error)}")
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return group.fail(2, f"not enough memory: {one_line(error)[:200]}")
        if group.is_alone:
            raise
        traceback.print_exc()
        return group.fail(1, f"{type(error).__name__}, see above")
    return group.finish(0, None)


if __name__ == "__main__":
    ask_for_huge_pages()
    sys.exit(main(sys.argv))
