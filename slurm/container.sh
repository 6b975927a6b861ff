# What srun needs so that a step runs in the image, if one is set; sourced by the jobs, which have set `root`, `jobs`.
# pyxis lets values of the image and of cluster hooks (MASTER_ADDR) win over the job's unless they are named.
container=()
alone=() # one process in the image on this node, beside whatever has not quite ended
if [ -n "${MEGALONG_CONTAINER_IMAGE:-}" ]; then
  own=PYTHONPATH
  for name in PYTHONUNBUFFERED MASTER_ADDR MASTER_PORT "${!TORCH_@}"; do
    [ -z "${!name:-}" ] || own+=,$name
  done
  container=(--container-image="$MEGALONG_CONTAINER_IMAGE" --container-workdir="$PWD" --container-env="$own"
    --container-mounts="${root:-$jobs}:${root:-$jobs},$PWD:$PWD${MEGALONG_CONTAINER_MOUNTS:+,$MEGALONG_CONTAINER_MOUNTS}")
  alone=(srun --nodelist="$SLURMD_NODENAME" --nodes=1 --ntasks=1 --ntasks-per-node=1 --overlap "${container[@]}")
fi
