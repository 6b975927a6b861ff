#!/usr/bin/env bash
# The data of one stage as two jobs: an array that tokenizes, and what lays out once all of the array has ended well.
#   slurm/data.sh [--dry-run] [sbatch options] +stage=1048k data=upsampled data.source=... data.out=... init_from=...
# Any number of array tasks (--array=0-199%50) gives the same bytes. What is tokenized stays: submit again what failed.
set -euo pipefail

dry=()
[ "${1:-}" = --dry-run ] && { dry=(--dry-run); shift; }
[ $# -ge 1 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
submit=$(cd "$(dirname "$0")" && pwd)/submit.sh
array=$(bash "$submit" tokenize "${dry[@]}" "$@")
if [ ${#dry[@]} -gt 0 ]; then
  printf '### tokenize\n%s\n\n' "$array"
  array=JOB_OF_tokenize
else
  echo "tokenize: job $array"
fi
rest=()
for argument in "$@"; do case $argument in --array=*) ;; *) rest+=("$argument") ;; esac done
laying=$(bash "$submit" lay-out "${dry[@]}" "--dependency=afterok:$array" --kill-on-invalid-dep=yes "${rest[@]}")
if [ ${#dry[@]} -gt 0 ]; then printf '### lay-out\n%s\n' "$laying"; else echo "lay-out: job $laying"; fi
