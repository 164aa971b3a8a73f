#!/bin/bash
# Train a recipe over several machines with Slurm: one torchrun on each, which starts one process per GPU.
#
#   sbatch --nodes=2 --gpus-per-node=8 examples/launch/slurm.sh RECIPE [key=value ...]
#
# The output folder must lie on a file system that all nodes see. Slurm sends SIGTERM two minutes before the time is up
# (--signal): every process then saves, and the same command goes on from there. For several copies of the model, each
# cut over the GPUs of one machine, add mesh.replicate=2 (the number of nodes).
#SBATCH --job-name=modalora
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue

set -euo pipefail

recipe=${1:?give a recipe: sbatch slurm.sh RECIPE [key=value ...]}
shift

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# exec: signals reach torchrun itself
exec srun --kill-on-bad-exit=1 \
    torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first:${PORT:-29500}" \
    -m modalora.cli.main train "$recipe" device=cuda "$@"
