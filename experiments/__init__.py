"""What people run: one folder a task, the tools beside them, and what their command lines share."""

import os
import signal
import sys
from contextlib import suppress

# transformers says on import that there is no torch; nobody here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _leave_at_once(number: int, _: object) -> None:
    """As `fjax.runs.endings.leave_at_once`, which cannot be imported without jax."""
    with suppress(OSError):
        os.write(2, f"Interrupted at once ({signal.Signals(number).name}).\n".encode())
    os._exit(128 + number)


# python -m experiments.…, which is still being looked for: jax and all else is yet to be imported,
# and an exception would pass through code that loses it.
if sys.argv[:1] == ["-m"]:
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if _number != signal.SIGHUP or signal.getsignal(_number) != signal.SIG_IGN:
            signal.signal(_number, _leave_at_once)
