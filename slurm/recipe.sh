#!/usr/bin/env bash
# The whole recipe as a chain of five jobs: the four stages, each after the one before has ended well, and the export
# to Hugging Face. A stage that fails cancels the rest.
#   slurm/recipe.sh [--dry-run] HF_DIR DATA_DIR RUNS_DIR [sbatch options] [key=value ...]
# DATA_DIR holds 65k/, 262k/, 524k/ and 1048k/ as tools/prepare_data.py makes them; the export is RUNS_DIR/hf. With
# +scale=mini HF_DIR and DATA_DIR may be - (random weights, a small corpus).
set -euo pipefail

dry=()
[ "${1:-}" = --dry-run ] && { dry=(--dry-run); shift; }
[ $# -ge 3 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
# what the plan refuses for the last stage is refused before the first one is submitted
[ ${#dry[@]} -gt 0 ] || bash "$0" --dry-run "$@" >/dev/null
base=$1 data=$2 runs=$3
shift 3

here=$(cd "$(dirname "$0")" && pwd)
before='' from=$base
submit() { # name, script, arguments
  local name=$1 chain=(--kill-on-invalid-dep=yes) printed
  shift
  [ -z "$before" ] || chain+=("--dependency=afterok:$before")
  printed=$(bash "$1" "${dry[@]}" "${chain[@]}" "${@:2}")
  if [ ${#dry[@]} -gt 0 ]; then
    printf '### %s\n%s\n\n' "$name" "$printed"
    before="JOB_OF_$name"
  else
    echo "$name: job $printed"
    before=$printed
  fi
}

for stage in 65k 262k 524k 1048k; do
  inputs=()
  [ "$from" = - ] || inputs+=("init_from=$from")
  [ "$data" = - ] || inputs+=("data.path=$data/$stage")
  submit "$stage" "$here/stage.sbatch" "+stage=$stage" "${inputs[@]}" "run_dir=$runs/$stage" "$@"
  from=$runs/$stage
done
options=() # of these, what asks for nodes, GPUs and time is for the stages
for argument in "$@"; do
  case $argument in --account=* | --partition=* | --qos=* | --reservation=*) options+=("$argument") ;; esac
done
submit export "$here/export.sbatch" "${options[@]}" "$runs/1048k" "$runs/hf"
