#!/usr/bin/env bash
# One rank, as slurm/stage.sbatch starts it: says where it sits, keeps its own log, notes who ended badly first.
set -uo pipefail

trap ':' USR1 TERM INT HUP # Slurm signals every process of a step: the trainer saves, this shell waits for its code
log=$MEGALONG_LOGS/rank-$SLURM_PROCID.log
if [ "$SLURM_PROCID" -eq 0 ]; then
  exec > >(trap '' USR1 TERM INT HUP && exec tee -a "$log") 2>&1 # in the job's log too
else
  exec >>"$log" 2>&1
fi
echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS on $SLURMD_NODENAME (${SLURM_TOPOLOGY_ADDR:-no topology})," \
  "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, $(date --iso-8601=seconds)"

"$@"
code=$?
if [ "$code" -ne 0 ]; then
  (set -o noclobber && echo "$code $SLURM_PROCID $SLURMD_NODENAME" >"$MEGALONG_FIRST_END") 2>/dev/null
fi
# saved after a signal: nobody needs to be killed, and rank 0 may still be tidying up
[ "$code" -eq "$MEGALONG_EXIT_SAVED" ] && exit 0
exit "$code"
