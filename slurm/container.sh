# What srun needs so that a step runs in the image, if one is set; sourced by the jobs, which have set `root`.
# pyxis lets values of the image and of cluster hooks (MASTER_ADDR) win over the job's unless they are named.
container=()
if [ -n "${MEGALONG_CONTAINER_IMAGE:-}" ]; then
  own=PYTHONPATH
  for name in PYTHONUNBUFFERED MASTER_ADDR MASTER_PORT "${!TORCH_@}"; do
    [ -z "${!name:-}" ] || own+=,$name
  done
  container=(--container-image="$MEGALONG_CONTAINER_IMAGE" --container-workdir="$PWD" --container-env="$own"
    --container-mounts="$root:$root,$PWD:$PWD${MEGALONG_CONTAINER_MOUNTS:+,$MEGALONG_CONTAINER_MOUNTS}")
fi
