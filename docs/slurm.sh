#!/bin/bash
# One run on the nodes of a Slurm allocation: `sbatch docs/slurm.sh run.yaml`. See docs/cluster.md.
#SBATCH --job-name=backlens
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=4
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

config=${1:?give a YAML file of options}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Other users may reach these nodes; without the token they are refused.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/auth_token"
export RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300

# The same command runs on every node: the first node becomes Ray's head and runs `backlens`, the others are workers.
# A job that is requeued or submitted again resumes the run.
srun --kill-on-bad-exit=1 ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_NNODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus=4 \
    -- backlens run "$config" --executor ray --address "$head:6379"
