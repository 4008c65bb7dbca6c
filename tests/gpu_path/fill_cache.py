"""Fills Triton's cache for a GPU that is not there, so that minutes on one are not spent compiling.

    TRITON_CACHE_DIR=build/triton python -m tests.gpu_path.fill_cache 9.0

Compiles what the first calls of each op, and GPT-2's training and generation, would compile on a GPU of that compute
capability. `python -m bench gpu` looks in build/triton. Triton, its version and that of Python must be those of the
machine that the folder is carried to.
"""

from __future__ import annotations

import sys

from tests.gpu_path import machine as machines

machine = machines.enter(compiles=True)  # before fastgpt is imported

from tqdm import tqdm  # noqa: E402

from tests.gpu_path import calls  # noqa: E402


def main(capability: str, names: list[str]) -> None:
    """Compile for one compute capability.

    Args:
        names: beginnings of the calls that are made; all, with none.
    """
    major, minor = map(int, capability.split("."))
    with machines.gpu(machine, (major, minor)):
        chosen = [(name, run) for name, run in calls.calls() if name.startswith(tuple(names or [""]))]
        for name, run in (bar := tqdm(chosen, unit="call", disable=None)):
            bar.set_description(name)
            run()
        if not names:
            model = calls.gpt()
            calls.train(model, 8, 1024)
            calls.generate(model.eval(), 100, 2)
    print(f"{len(machine.launches)} launches of {len({x.kernel for x in machine.launches})} kernels")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
