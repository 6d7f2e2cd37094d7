#!/bin/bash
# sbatch cli/cluster/slurm.sh: gpt train large on 8 nodes of 8 GPUs. One task a node; torchrun starts one process a GPU.
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

# The runs folder must be one that all nodes see. A run that is there already is gone on with.
RUN=${RUN:-runs/large}
RESUME=""
if compgen -G "$RUN/checkpoints/step-*" > /dev/null; then RESUME=--resume; fi
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# --kill-on-bad-exit: the job ends when a node gives up for good, and does not wait for it.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29500" --rdzv-id="$SLURM_JOB_ID" \
    -m cli train large --shard --out "$RUN" $RESUME
