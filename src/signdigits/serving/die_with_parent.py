"""Run a command that ends when the process that started it ends, whatever ended that one, `kill -9` included.

python -m signdigits.serving.die_with_parent PARENT COMMAND...
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from Linux' prctl.h


def main() -> None:
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":  # elsewhere a killed parent leaves its children behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it was gone before it could be watched
            sys.exit(f"{command[0]}: process {parent} is gone")
    try:
        os.execvp(command[0], command)  # the same process, which keeps what was set
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
