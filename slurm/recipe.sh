#!/usr/bin/env bash
# The whole recipe as a chain of four jobs: each stage starts when the one before has ended well; a failed stage
# cancels the rest.
#   slurm/recipe.sh [--dry-run] HF_DIR DATA_DIR RUNS_DIR [sbatch options]
# DATA_DIR holds 65k/, 262k/, 524k/ and 1048k/ as tools/prepare_data.py makes them.
set -euo pipefail

dry=
[ "${1:-}" = --dry-run ] && { dry=yes; shift; }
[ $# -ge 3 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
base=$1 data=$2 runs=$3
shift 3

here=$(cd "$(dirname "$0")" && pwd)
declare -A nodes=([65k]=1 [262k]=4 [524k]=64 [1048k]=64)
before='' from=$base
for stage in 65k 262k 524k 1048k; do
  submit=(sbatch --parsable --kill-on-invalid-dep=yes --nodes="${nodes[$stage]}" --job-name="megalong-$stage")
  [ -z "$before" ] || submit+=(--dependency="afterok:$before")
  submit+=("$@" "$here/stage.sbatch" "+stage=$stage" "init_from=$from" "data.path=$data/$stage" "run_dir=$runs/$stage")
  if [ -n "$dry" ]; then
    printf '%q ' "${submit[@]}"; echo
    before="<job of $stage>"
  else
    before=$("${submit[@]}")
    echo "$stage: job $before"
  fi
  from=$runs/$stage
done
echo "then: python tools/convert.py megatron-to-hf $runs/1048k <Hugging Face directory>"
