#!/bin/bash
# One run on two nodes of four GPUs, a process a GPU:
#     SHARED=/a/folder/that/all/nodes/see sbatch slurm.sh --preset cifar10-flexible [other flags]
#SBATCH --job-name=jfed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@180
# JAX gives the process number i of a node its GPU number i. So all of a node's GPUs must be seen by
# each (not --gpus-per-task); for one process a node, export JAX_LOCAL_DEVICE_IDS=0,1,2,3.

# A job that is preempted, or loses a node, Slurm queues again by itself. One whose time is nearly
# over asks jfed to save, as long as there is time (SIGTERM), and queues again. The job's number
# stays the same, and so does the run folder: the same command goes on there.
unset again
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    jfed run --distributed --workdir "${SHARED:?}/jfed-$SLURM_JOB_ID" "$@" &
while wait $!; status=$?; [ "$status" = 138 ]; do :; done # 138: USR1 has ended `wait`, not srun

if [ "$status" = 143 ] && [ "${again-}" ]; then # 143: saved, see `jfed.cli.commands.main`
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
