# How a job is started again; sourced by slurm/stage.sbatch, which has set `job` and `attempt`. Shell and not Python,
# since squeue and scontrol are the host's, and Python may be in an image only.
say() { echo "job $job, start $attempt: $*"; }

# The same job again, from its last checkpoint. What somebody cancels stays cancelled: Slurm would revive that too.
requeued=
again() {
  local state
  [ -z "$requeued" ] || return 0
  state=$(squeue --noheader --jobs="$job" --format='%T %r' || true)
  case $state in COMPLETING\ TimeLimit) say "the time limit came before the end" ;;
    COMPLETING* | CANCELLED*) say "ended from outside" && return 0 ;;
  esac
  trap '' TERM # comes with the requeue, to whatever runs here
  for pause in 5 15 0; do
    scontrol requeue "$job" && requeued=yes && say "requeued" && return 0
    sleep "$pause"
  done
  say "Slurm does not requeue it: submit it again, it goes on from its last checkpoint"
}
trap ':' USR1 # the steps get signals too: they save, and the job's shell waits for how they end
limit() { case $(squeue --noheader --jobs="$job" --format=%r || true) in TimeLimit) again ;; esac }
trap limit TERM # seconds are left, and the step may not end in them
