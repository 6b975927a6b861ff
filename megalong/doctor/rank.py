"""One rank of a task of the doctor: `torchrun -m megalong.doctor.rank FOLDER` runs what FOLDER/task holds."""

from __future__ import annotations

import pickle
import sys
import traceback
from pathlib import Path

from megalong.runtime import launch


def main(process: launch.Process) -> int:
    """Run the task and leave `result-<rank>`: (whether it came to its end, its value or the traceback).

    Returns:
        exit code.
    """
    folder = Path(sys.argv[1])
    from megalong.runtime import console, device

    console.speak_only_from(process.is_first)
    console.quiet_libraries()
    device.install()
    launch.init_process_group(process, timeout_s=600)
    fn, args = pickle.loads((folder / "task").read_bytes())
    try:
        found = (True, fn(*args))
    except Exception:
        found = (False, traceback.format_exc())
    (folder / f"result-{process.rank}").write_bytes(pickle.dumps(found))
    return 0 if found[0] else 1


if __name__ == "__main__":
    sys.exit(launch.run(main))
