#!/bin/bash
# sbatch cli/cluster/slurm.sh: gpt train large on 8 nodes of 8 GPUs, one task a node. Submitted again, it goes on.
#SBATCH --job-name=gpt-large
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log

set -euo pipefail

# The runs folder must be one that all nodes see.
RUN=${RUN:-runs/large}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# --kill-on-bad-exit: the job ends when a node gives up for good, and does not wait for it.
srun --kill-on-bad-exit=1 \
    gpt train large --gpus 8 --nodes "$SLURM_NNODES" --rendezvous "$HEAD:29500" --shard --out "$RUN"
