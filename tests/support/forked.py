"""Run Python programs in processes forked from a server that has imported PyTorch, which saves its import.

Only for programs that need no environment variables of their own: imports that depend on them have been made.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

LONGEST = 300  # seconds
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "fastgpt.cli", "fastgpt.training.trainer"])


def python(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run `python -m MODULE …` or `python -c CODE …` on one thread; return its status and output.

    Raises:
        TimeoutError: it has not ended within LONGEST seconds, and was killed.
    """
    words = [str(a) for a in arguments]
    one_thread = mock.patch.dict(os.environ, OMP_NUM_THREADS="1")  # read when the server imports PyTorch
    with tempfile.TemporaryDirectory() as folder, one_thread:
        out, err = (Path(folder) / name for name in ("out", "err"))
        process = CONTEXT.Process(target=_run, args=(words, str(cwd or Path.cwd()), str(out), str(err)))
        process.start()
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words[:3]} has not ended within {LONGEST} s")
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _run(words: list[str], cwd: str, out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    kind, program, *sys.argv[1:] = words
    code: object = 0
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))
