"""Run one command, wait for it, print what the operating system says it took.

A script of the standard library only, started by
:mod:`compress.eval.bench.process`. On Linux the peak
memory of a process begins with what its parent had when it was started: the parent must be small.

    python launch.py LOG COMMAND [ARGUMENT ...]
"""

import json
import os
import subprocess
import sys
import time


def main() -> None:
    log, command = sys.argv[1], sys.argv[2:]
    with open(log, "wb") as file:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    result = {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * unit,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
