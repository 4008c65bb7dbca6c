"""Python programs in processes of their own that do not import PyTorch again: forks of a server that has.

For programs that find nothing else in their environment than the tests do; what changes what is imported, or how, needs
an interpreter of its own.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import get_context
from pathlib import Path

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "fastgpt.cli", "fastgpt.train"])


def python(*arguments: object, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """What `python -m MODULE …` or `python -c CODE …` prints and returns, on one thread.

    Raises:
        TimeoutError: it has not ended in time, and was killed.
    """
    words = [str(a) for a in arguments]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when the server imports PyTorch
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        process = CONTEXT.Process(target=_run, args=(words, str(cwd or Path.cwd()), str(out), str(err)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words[:3]} has not ended within {timeout} s")
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
