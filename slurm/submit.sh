#!/usr/bin/env bash
# What a job's script does when it is run by hand: renders and submits itself, with the checkout's Python if it has one.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
[ ! -d "$root/megalong" ] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # else megalong is installed
exec "$python" -P -m megalong.commands.submit "$@"
