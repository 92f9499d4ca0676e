#!/bin/bash
#SBATCH --job-name=vcot
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
# A Ray cluster over the nodes of a SLURM job, and a run on the first of them:
#
#     RUN=/shared/runs/paper RECIPE=paper sbatch docs/clusters/slurm.sh
#
# RUN lies on storage that all nodes see under that path, and `vcot` and `ray` are on the PATH there. The job may be submitted
# again with the same RUN: it goes on where it was stopped.
set -euo pipefail
: "${RUN:?set RUN to a folder that all nodes share, as RUN=/shared/runs/paper}"
RECIPE=${RECIPE:-paper}
PORT=${PORT:-6379}
REPLICAS=${REPLICAS:-$((SLURM_NNODES * SLURM_GPUS_ON_NODE))}
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port="$PORT" --block &
cluster=($!)
trap 'kill "${cluster[@]}" 2>/dev/null || true' EXIT
sleep 10 # the others look for the head at once
if ((SLURM_NNODES > 1)); then
    srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
        ray start --address="$head:$PORT" --block &
    cluster+=($!)
fi

run= warned=
trap 'warned=yes; kill -TERM "$run" 2>/dev/null || true' TERM # SLURM's warning before the end: what is answered is kept
vcot run --run "$RUN" --recipe "$RECIPE" --set "serve.ray_address=$head:$PORT" "serve.replicas=$REPLICAS" &
run=$!
[[ -z $warned ]] || kill -TERM "$run" 2>/dev/null || true # the warning came while the run was being started
while kill -0 "$run" 2>/dev/null; do wait "$run" || true; done # a signal ends a wait, and not the run
wait "$run"
