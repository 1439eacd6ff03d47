"""`python -m polyclinic.client.check.worker`: looks at images that are named on its input, one a line.

A process of its own for two reasons: a decoder that dies of a damaged file takes nothing else with it, and
its memory has a limit. Each answer is one line of JSON. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

MEMORY = 3 << 30  # address space in bytes: 64 million pixels with their working copies


def main() -> None:
    """Answer until the input ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders in C grumble about damaged files
    from polyclinic.client.check.look import look
    from polyclinic.common.refusals import BadInput

    for line in sys.stdin:
        path, part = json.loads(line)
        try:
            answer = look(Path(path), part)
        except BadInput as error:
            answer = {"stop": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
