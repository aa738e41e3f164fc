#!/bin/bash
# Two hosts with all their GPUs: sbatch examples/cluster/slurm.sh run.yaml [a.b=c]...
#SBATCH --job-name=tunesmith
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# One launcher a host; it starts a process for each GPU. The job's number stays when the job is queued again, so the run goes on.
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
status=0
srun --kill-on-bad-exit=1 tunesmith train "$@" \
    --nodes "$SLURM_JOB_NUM_NODES" --rendezvous "$host:29400" --rendezvous-id "slurm-$SLURM_JOB_ID" || status=$?

# 130: a signal stopped the run before its time was up, and it has saved; queue it again.
if [ "$status" -eq 130 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
