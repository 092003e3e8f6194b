#!/bin/bash
# Trains on several hosts under SLURM: sbatch scripts/slurm.sh
# Replace what is marked with "replace". One task per GPU; bnn_jax finds the others by itself.
#SBATCH --job-name=bnn_jax
#SBATCH --nodes=2                # replace: hosts
#SBATCH --gpus-per-node=4        # replace: GPUs of a host ...
#SBATCH --ntasks-per-node=4      # ... and as many tasks
#SBATCH --cpus-per-task=8        # replace: for reading and decoding images
#SBATCH --time=24:00:00
#SBATCH --requeue                # after a preemption or a lost host the job starts again and goes on
#SBATCH --signal=TERM@60         # a minute before the time is over: save and stop
#SBATCH --open-mode=append

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"           # the checkout of bnn_jax, with its environment in .venv

# No --gpus-per-task and no --gpu-bind: every task must see all GPUs of its host and takes the one of its local number.
# --kill-on-bad-exit ends all tasks with the first one that fails.
srun --kill-on-bad-exit=1 .venv/bin/python launch.py \
  --config=configs/skd_resnet18_imagenet.py \
  --config.data.data_dir=/replace/with/datasets \
  --workdir=/replace/with/shared/folder/skd_resnet18_imagenet
