"""Plain PyTorch: a GPT, its data, its training loop and its checkpoints, one noun per file. No Hydra inside.

Importing it ends a Python that is too old with one line, so older versions must be able to read this file and the
scripts, whose first import it is.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    print(f"error: Python {sys.version.split()[0]} is too old ({sys.executable}); use 3.11 or later", file=sys.stderr)
    sys.exit(5)
