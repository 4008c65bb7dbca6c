"""Plant faults, one line each, and run the tests that should see them.

    python -m tests.support.mutations [--only TEXT] [--jobs 2] [--write tests/mutations.md]

Each mutation is made in a copy of the checkout under build/, whose kernels are built again; of the tests that
`affected.py` names for the file, first the quick ones run, then the slow ones, until one fails.
"""

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastgpt import extension
from tests.support.affected import ROOT, git, tests_of
from tests.support.planted_faults import MUTATIONS

LONGEST = 900  # seconds for the tests of a tier; what has not ended then is not judged


@dataclass
class Verdict:
    """The tier that caught a mutation ("quick", "slow", "none"; "late" if its tests took too long), and the test."""

    name: str
    file: str
    tier: str
    test: str
    seconds: float


class Copy:
    """A copy of the checkout in which files are mutated, with libraries of its own: builds go on where they stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.library = folder, f"_cpu_{extension.variant()}.so"
        listed = git("ls-files", "--cached", "--others", "--exclude-standard")
        for name in listed.splitlines():
            source, target = ROOT / name, folder / name
            if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        for library in (ROOT / "fastgpt").glob("*.so"):
            shutil.copyfile(library, folder / "fastgpt" / library.name)
        kernels = folder / "fastgpt" / "kernels"  # as setup.py maps it
        if not kernels.exists():
            kernels.symlink_to("../kernels/triton")
        self.build()

    def run(self, *command: str, timeout: float | None = None) -> subprocess.CompletedProcess:
        """A command on the copy's Python; what it wrote is in stdout."""
        env = os.environ | {
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=env, text=True, check=False, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def build(self) -> None:
        """The library of C++ kernels that this CPU loads; of what has not changed nothing is compiled."""
        folders = ("--build-lib", "build/lib", "--build-temp", "build/temp")
        variant = str(extension.variant())
        done = self.run("setup.py", "--quiet", "build_ext", "--force", *folders, "--variants", variant)
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:])
        shutil.copy(self.folder / "build" / "lib" / "fastgpt" / self.library, self.folder / "fastgpt")

    def tests(self, tier: str, files: list[str], keywords: str) -> str:
        """Run tests until one fails; return its name, or nothing.

        Raises:
            subprocess.TimeoutExpired: they have not ended within LONGEST seconds.
        """
        chosen = ["-m", {"quick": "not slow", "slow": "slow"}[tier], *(["-k", keywords] if keywords else [])]
        options = ("-x", "-q", "-p", "no:cacheprovider", "-rfE")
        done = self.run("-m", "pytest", *options, *chosen, *files, timeout=LONGEST)
        if done.returncode in (0, 5):  # 5: the tier has no such test
            return ""
        found = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return found[0] if found else f"(exit {done.returncode}: {done.stdout[-200:]!r})"

    def judge(self, mutation: tuple[str, str, str, str]) -> Verdict:
        name, file, old, new = mutation
        path, started = self.folder / file, time.monotonic()
        original = path.read_text()
        assert original.count(old) == 1, f"{name}: {file} has {old!r} {original.count(old)} times"
        files, keywords = tests_of(file)
        assert files, f"{name}: no test is known for {file}"
        present = [f for f in files if (self.folder / f).exists()]
        compiled = file.startswith("csrc/") and not file.startswith("csrc/cuda/")
        tier, test = "none", ""
        try:
            path.write_text(original.replace(old, new))
            if compiled:
                self.build()
            for tier in ("quick", "slow"):
                test = self.tests(tier, present, keywords)
                if test:
                    break
            else:
                tier = "none"
        except subprocess.TimeoutExpired:
            tier = "late"
        finally:
            path.write_text(original)  # what was compiled of it is compiled again when it is needed
            shutil.copy(ROOT / "fastgpt" / self.library, self.folder / "fastgpt")
        return Verdict(name, file, tier, test, time.monotonic() - started)


def report(verdicts: list[Verdict]) -> str:
    """The table as Markdown."""
    counts = {tier: sum(v.tier == tier for v in verdicts) for tier in ("quick", "slow", "none", "late")}
    lines = [
        f"{len(verdicts)} mutations: `make test` catches {counts['quick']}, `make test-all` {counts['slow']} more, "
        f"{counts['none']} are caught by none, of {counts['late']} the tests had not ended in time.",
        "", "| mutation | file | tier | caught by |", "|---|---|---|---|",
    ]  # fmt: skip
    for v in verdicts:
        test = v.test.replace("tests/", "").replace("|", "\\|")[:110]
        lines.append(f"| {v.name} | {v.file} | {v.tier} | {test} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="those whose name or file has this text")
    parser.add_argument("--jobs", type=int, default=1, help="how many copies at once")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if arguments.only in m[0] or arguments.only in m[1]]
    copies: queue.Queue[Copy] = queue.Queue()
    for n in range(arguments.jobs):
        copies.put(Copy(ROOT / "build" / "mutations" / str(n)))

    def judge(mutation: tuple[str, str, str, str]) -> Verdict:
        copy = copies.get()
        try:
            verdict = copy.judge(mutation)
        finally:
            copies.put(copy)
        print(f"{verdict.tier:5} {verdict.seconds:4.0f} s  {verdict.name}: {verdict.test}", flush=True)
        return verdict

    with ThreadPoolExecutor(arguments.jobs) as pool:
        verdicts = list(pool.map(judge, chosen))
    print(report(verdicts).splitlines()[0])
    if arguments.write:
        arguments.write.write_text(report(verdicts))
    return int(any(v.tier == "none" for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
