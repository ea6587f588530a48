"""Run a command that dies with its parent process, also if that is killed with SIGKILL.

python -m signdigits.serving.die_with_parent PARENT_PID COMMAND...
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from Linux' prctl.h


def main() -> None:
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":  # elsewhere the children of a killed parent survive
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # the parent died before the call
            sys.exit(f"{command[0]}: parent process {parent} is gone")
    try:
        os.execvp(command[0], command)  # keeps the process, and with it the setting
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
