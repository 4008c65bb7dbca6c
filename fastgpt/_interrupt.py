"""Ctrl-C while the command `fastgpt` imports PyTorch: the process ends without a traceback."""

import os
import signal
import sys


def end_quietly() -> None:
    """Let SIGINT end the process by its default action, if it is the command and nobody handles the signal."""
    is_command = os.path.basename(sys.argv[0]) == "fastgpt" or sys.orig_argv[1:3] == ["-m", "fastgpt"]
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """Undo `end_quietly`: SIGINT raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


end_quietly()
