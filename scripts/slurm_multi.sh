#!/usr/bin/env bash
# Runs one command of rlhf on several nodes under SLURM, one time limit after the other:
#
#   sbatch --nodes=2 scripts/slurm_multi.sh rlhf train algo=ppo model=pythia_6_9b launch.zero=2
#
# Every node gives the same command, each with its own rank; nothing needs ssh. The first node's is started by
# this script itself, so that it alone hears the signal ahead of the limit: the run stops on all nodes after
# its step, keeps what it needs, ends with code 75, and the job is put back into the queue. Any other code is
# the job's own. For one node there is scripts/slurm.sh. Options given to sbatch win over the lines below.
#
# The working directory (or paths.runs) must be on a disk that all nodes share.
#
#SBATCH --job-name=rlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -u

readonly GO_ON=75             # the exit code of a run that goes on when it is given again
readonly KILLED=$((128 + 10)) # by SIGUSR1, before rlhf listened: nothing was begun that could be lost

if (($# == 0)); then
    echo "usage: sbatch --nodes=N $0 rlhf train WORD..." >&2
    exit 2
fi

# A line for each node, in the order of their ranks.
hostfile=$PWD/hosts-$SLURM_JOB_ID
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
printf "%s slots=${SLURM_GPUS_ON_NODE:-1}\n" "${nodes[@]}" >"$hostfile"

port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node rarely share it
words=(
    launch=deepspeed "launch.hostfile=$hostfile" launch.no_ssh=true
    "launch.master_addr=${nodes[0]}" "launch.master_port=$port"
)

child="" others="" heard=0 limit=0 cancelled=0
# A signal interrupts `wait`, whose code then says so and not what became of the child: hence the loop.
trap 'kill -USR1 "$child" 2>/dev/null; limit=1 heard=1' USR1
trap 'kill -TERM "$child" 2>/dev/null; cancelled=1 heard=1' TERM

if ((${#nodes[@]} > 1)); then
    # The step leaves out the first node and counts the others from 0.
    # shellcheck disable=SC2016 # expanded on the other nodes
    srun --relative=1 --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 \
        bash -c '"$@" launch.node_rank=$((SLURM_NODEID + 1))' node "$@" "${words[@]}" &
    others=$!
fi
"$@" "${words[@]}" launch.node_rank=0 &
child=$!

while true; do
    heard=0 code=0
    wait "$child" || code=$?
    ((heard)) || break
done
[[ -z $others ]] || wait "$others" || true # they end when the first does

if ((cancelled)); then
    exit "$code"
fi
if ((code == GO_ON || (limit && code == KILLED))); then
    echo "job $SLURM_JOB_ID goes back into the queue (code $code)" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
