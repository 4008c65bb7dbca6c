"""`fastgpt.keep_freed_memory`."""

import os
import subprocess
import sys

import pytest

from fastgpt.malloc import keep_freed_memory

SINGLE = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are read from /proc")
def test_no_page_faults_for_freed_memory_without_malloc_trimming():
    script = (
        "import ctypes, resource, sys\n"
        "from fastgpt.malloc import keep_freed_memory\n"
        "kept = keep_freed_memory() if sys.argv[1] != 'leave' else False\n"
        "if sys.argv[1] == 'measure':\n"
        "    from bench.harness.machine import Machine\n"
        "    Machine('cpu').peak_bytes(lambda: None)\n"
        "def touch():\n"
        "    block = bytearray(64 << 20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "touch(); before = touch()\n"
        "for _ in range(5): after = touch()\n"
        "print(int(kept), after - before)\n"
    )
    found = {}
    for mode in ("keep", "measure", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", script, mode], check=True, capture_output=True, env=SINGLE, text=True
        )
        kept, faults = map(int, done.stdout.split())
        found[mode] = faults
        assert kept == (mode != "leave" and keep_freed_memory())
    if keep_freed_memory():
        assert max(found["keep"], found["measure"]) < 100 < 16_000 < found["leave"]
