# What each node of the job says of itself (megalong/slurm/nodes.py), in $notes/nodes-$attempt.jsonl; sourced by
# slurm/stage.sbatch. Leaves the nodes and their addresses in `nodes`, those that the job could get in $notes/partition.
mkdir -p "$notes/nodes-$attempt"
nodes=$(scontrol show node "$SLURM_JOB_NODELIST" --oneliner |
  sed -E 's/^NodeName=([^ ]+) .* NodeAddr=([^ ]+) .*/\1=\2/' | paste -sd,)
sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N >"$notes/partition" || true
touch "$notes/token-$job-$attempt"
# a step per node: a step over all of them dies with the first node that does not answer
for pair in ${nodes//,/ }; do
  srun --nodelist="${pair%%=*}" --nodes=1 --ntasks=1 --ntasks-per-node=1 --time=10 "${container[@]}" \
    "$python" -P -m megalong.slurm.nodes --nodes="$nodes" --run-dir="$run_dir" --token="$notes/token-$job-$attempt" \
    --wait-s="${MEGALONG_NEIGHBOUR_S:-120}" >"$notes/nodes-$attempt/${pair%%=*}" &
done
wait
cat "$notes/nodes-$attempt"/* >"$notes/nodes-$attempt.jsonl"
rm -r "$notes/nodes-$attempt"
