#!/usr/bin/env bash
# Runs a command of rlhf under SLURM for as long as it takes, one time limit after the other:
#
#   sbatch scripts/slurm.sh rlhf train algo=p3o_v2 data=hh model=pythia_1b
#
# Ahead of the limit SLURM signals this script, which passes it on: the run stops after its step, keeps
# what it needs, and ends with code 75. The job is then put back into the queue and goes on from there.
# Any other code is the job's own. Options given to sbatch win over the lines below.
#
# One machine: launch=deepspeed starts as many processes there as launch.processes says. For several there is
# scripts/slurm_multi.sh.
#
#SBATCH --job-name=rlhf
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# 300 seconds must be enough for one step, or one evaluation, and a checkpoint. B: this script alone hears
# it; an srun in between would tell the workers too, and DeepSpeed's launcher then ends them at once.

set -u

readonly GO_ON=75             # the exit code of a run that goes on when it is given again
readonly KILLED=$((128 + 10)) # by SIGUSR1, before rlhf listened: nothing was begun that could be lost

if (($# == 0)); then
    echo "usage: sbatch $0 rlhf train WORD..." >&2
    exit 2
fi

child="" heard=0 limit=0 cancelled=0
# A signal interrupts `wait`, whose code then says so and not what became of the child: hence the loop.
trap 'kill -USR1 "$child" 2>/dev/null; limit=1 heard=1' USR1
trap 'kill -TERM "$child" 2>/dev/null; cancelled=1 heard=1' TERM

"$@" &
child=$!

while true; do
    heard=0 code=0
    wait "$child" || code=$?
    ((heard)) || break
done

if ((cancelled)) || [[ -z ${SLURM_JOB_ID:-} ]]; then
    exit "$code"
fi
if ((code == GO_ON || (limit && code == KILLED))); then
    echo "job $SLURM_JOB_ID goes back into the queue (code $code)" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
