"""One rank of a conversion of files, and what it says in the end: a script for torchrun, a function for other ranks."""

from __future__ import annotations

import os
import signal
import sys

from converters.convert import convert_folder
from converters.errors import CheckpointError
from converters.files.pending import Pending
from converters.files.stream import Written


def convert(source: str, target: str, column: str, fate: str = "") -> str:
    """Convert as one of several ranks.

    Args:
        source: Folder to read.
        target: Folder to make.
        column: Its format.
        fate: `fail:RANK` or `kill:RANK`: what meets a rank when it has written three chunks.
    """
    rank = os.environ["RANK"]
    noted = 0
    note = Pending.note

    def meet(self: Pending, written: Written) -> None:
        nonlocal noted
        note(self, written)
        noted += 1
        if noted == 3 and fate == f"kill:{rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        if noted == 3 and fate == f"fail:{rank}":
            raise CheckpointError(f"{written.file}: {written.key} is not what it should be")

    Pending.note = meet  # type: ignore[method-assign]
    try:
        done = convert_folder(source, target, target_column=column)
    except (CheckpointError, KeyboardInterrupt) as error:
        return f"rank {rank} ended with {type(error).__name__}: {error}"
    return f"rank {rank} wrote {noted} of {len(done.written)}"


if __name__ == "__main__":
    outcome = convert(*sys.argv[1:])
    sys.stdout.write(outcome + "\n")
    sys.stdout.flush()
    sys.exit(" ended with " in outcome)
