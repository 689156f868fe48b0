#!/bin/bash
# Slurm: one task a node, which starts a rank on each of its GPUs. Give the files and overrides of `minillm train`.
#   sbatch configs/cluster/slurm.sh configs/paper/base.yaml configs/paper/zero3.yaml configs/paper/llama-7b.yaml
# A job that is requeued goes on from the newest checkpoint: --resume begins anew where there is none.
#SBATCH --job-name=minillm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "$first:${MASTER_PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
  -m minillm train --resume "$@"
