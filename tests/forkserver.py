"""Runs train_sr.py in forks of one process that has done the imports: as from the shell, but seconds sooner.

One JSON line in for each run: `arguments`; `folder` (to work in); `log` (file for its output); `kill` (null, or when
to send SIGKILL: folder, N and seconds, so long after the folder has checkpoint-N or a later one); `terminate_at` (null
or a text in the log upon which SIGTERM is sent); `file_limit` (null, or the bytes that a file may have). One JSON line
out: the exit status, negative for a signal.
"""

import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_script(request: dict) -> None:
    """Never returns: becomes `python train_sr.py ARGUMENTS`."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if request["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    os.chdir(request["folder"])
    sys.argv = ["train_sr.py", *request["arguments"]]
    status = 0
    try:
        runpy.run_path(str(ROOT / "train_sr.py"), run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def newest(folder: str) -> int:
    """The step of the latest checkpoint in a folder, 0 for none."""
    numbers = (path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*"))
    return max([int(number) for number in numbers if number.isdigit()], default=0)  # not what is half written


def main() -> None:
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    import train_sr  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setpgrp()
            run_script(request)
        ended = None
        if request["kill"] is not None or request["terminate_at"]:
            folder, number, delay = request["kill"] or (None, 0, 0)
            while ended is None:
                printed = Path(request["log"]).read_text()
                if newest(folder) >= number if folder else request["terminate_at"] in printed:
                    time.sleep(delay)
                    if request["kill"]:
                        os.kill(child, signal.SIGKILL)
                    else:
                        os.killpg(child, signal.SIGTERM)  # as a terminal and a scheduler of jobs do it
                    break
                time.sleep(0.005)
                pid, status = os.waitpid(child, os.WNOHANG)
                ended = status if pid else None
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1] if ended is None else ended)
        print(json.dumps(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
