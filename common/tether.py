"""Start a program that dies with the process PARENT: `python -m polyclinic.common.tether PARENT ARGV...`.

A supervisor that is killed with `kill -9` cannot stop its parts; the kernel can. The wish is lost at
fork and kept at exec, so it is set here, between the two.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it died before the wish was heard
        sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])
