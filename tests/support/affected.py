"""Which tests a change needs: the table, from paths of sources to tests. Changed tests are run by `make test-all`.

`.ci/run` runs what this prints of the slow tier, and tests/support/mutations.py what it names for a mutated file:

    python -m tests.support.affected [--since COMMIT]    the test files, or nothing
"""

import argparse
import fnmatch
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HOURS = 6  # commits that lie no further apart are one change

GELUS = "gelu geglu linear_gelu mlp"
DROP_IN = "functional functional_attention functional_losses patch_functional examples"
OPS = f"attention attention_varlen cross_entropy linear_cross_entropy linear {GELUS} add_layer_norm"
DATA = "data data_cleaning data_duplicates data_packing data_prepare data_shards"
CPU = "not triton and not cuda and not reference"
RUNS = "train train_options train_distributed checkpoint cli"

# (paths, names of test files, what pytest's -k selects of them); of several rows that fit, the first.
TABLE = [
    ("csrc/cpu/gelu*", GELUS, CPU),
    ("csrc/cpu/attention_varlen.cpp", "attention_varlen", CPU),
    ("csrc/cpu/attention*", "attention attention_varlen threads out_of_memory", CPU),
    ("csrc/cpu/philox.h", "attention philox", CPU),
    ("csrc/cpu/cross_entropy*", "cross_entropy linear_cross_entropy", CPU),
    ("csrc/cpu/linear_cross_entropy*", "linear_cross_entropy out_of_memory", CPU),
    ("csrc/cpu/linear*", "linear linear_gelu mlp", CPU),
    ("csrc/cpu/gemm.h", "linear linear_gelu mlp linear_cross_entropy", CPU),
    ("csrc/cpu/add_layer_norm*", "add_layer_norm", CPU),
    ("csrc/cuda/gelu*", GELUS, "cuda"),
    ("csrc/cuda/attention*", "attention attention_varlen attention_cuda simt", "cuda or fault"),
    ("csrc/cuda/tiles.cuh", "attention attention_varlen attention_cuda simt", "cuda or fault"),
    (
        "csrc/cuda/cross_entropy*",
        "cross_entropy cross_entropy_with_grad linear_cross_entropy simt",
        "cuda or fault",
    ),
    ("csrc/cuda/add_layer_norm*", "add_layer_norm simt", "cuda or fault"),
    ("csrc/cuda/team.cuh", "add_layer_norm simt", "cuda or fault"),
    ("csrc/cuda/linear_gelu*", "linear_gelu_cuda linear_gelu", "cuda"),
    ("csrc/cuda/product.cuh", "linear_gelu_cuda mlp_cuda linear_gelu mlp", "cuda"),
    ("csrc/cuda/mlp*", "mlp_cuda mlp", "cuda"),
    ("csrc/cuda/*", f"{OPS} simt cuda_compile", "cuda or fault"),
    ("csrc/*", OPS, "cpp or cuda"),
    ("kernels/triton/gelu.py", GELUS, "triton"),
    ("kernels/triton/attention_varlen.py", "attention_varlen", "triton"),
    (
        "kernels/triton/attention*",
        "attention attention_varlen attention_split attention_descriptors",
        "triton or split or descriptors",
    ),
    (
        "kernels/triton/cross_entropy.py",
        "cross_entropy cross_entropy_with_grad linear_cross_entropy",
        "triton",
    ),
    ("kernels/triton/linear_cross_entropy.py", "linear_cross_entropy", "triton"),
    ("kernels/triton/linear*", "linear linear_gelu mlp", "triton"),
    ("kernels/triton/add_layer_norm.py", "add_layer_norm", "triton"),
    ("kernels/triton/philox.py", "attention attention_varlen philox", ""),
    ("kernels/hub/*", "hub", ""),
    ("kernels/*", f"{OPS} triton_compile tune hub", "triton"),
    ("fastgpt/reference/*", f"{OPS} philox second_derivatives", "reference"),
    ("fastgpt/ops/*", f"{OPS} cross_entropy_with_grad second_derivatives backends model threads", ""),
    ("fastgpt/functional.py", DROP_IN, ""),
    ("fastgpt/patch.py", DROP_IN, ""),
    ("fastgpt/backends.py", "backends functional extension", ""),
    ("fastgpt/extension.py", "extension backends packaging", ""),
    ("fastgpt/flash_attention.py", "flash_attention flash_attention_cuda", ""),
    ("fastgpt/model.py", "model model_mlp sampling data_packing large", ""),
    ("fastgpt/positions.py", "model", ""),
    ("fastgpt/kv_cache.py", "model sampling generate", ""),
    ("fastgpt/sampling.py", "sampling generate model", ""),
    ("fastgpt/generate.py", "generate cli sampling", ""),
    ("fastgpt/tokenizer.py", "tokenizer pretrained data_prepare", ""),
    ("fastgpt/pretrained.py", "pretrained cli", ""),
    ("fastgpt/hub.py", "hub", ""),
    ("fastgpt/in_context.py", "in_context", ""),
    ("fastgpt/evaluate.py", "cli in_context finetune", ""),
    ("fastgpt/tasks/*", "tasks finetune", ""),
    (
        "fastgpt/data/*",
        "data data_cleaning data_duplicates data_packing data_prepare data_shards word_vectors tokenizer",
        "",
    ),
    ("fastgpt/distributed.py", "train_distributed train", ""),
    ("fastgpt/checkpoint.py", RUNS, ""),
    ("fastgpt/durable.py", f"{RUNS} data_shards data_prepare", ""),
    (
        "fastgpt/integrations/*",
        "accelerate accelerate_calls accelerate_others accelerate_torch training_stacks",
        "",
    ),
    ("fastgpt/accelerate.py", "accelerate accelerate_others accelerate_torch training_stacks", ""),
    ("fastgpt/*.py", f"{RUNS} finetune in_context", ""),
    ("bench/tune.py", "tune", ""),
    ("bench/launches.py", "triton_compile", ""),
    ("bench/cubins.py", "cuda_compile", ""),
    ("bench/resources.py", "triton_compile cuda_compile", ""),
    ("bench/sass.py", "triton_compile cuda_compile", ""),
    ("bench/gpu.py", "bench_gpu", ""),
    ("bench/page.py", "bench_page", ""),
    ("bench/*", "bench bench_harness bench_page bench_report bench_data bench_trainer bench_generate", ""),
    ("examples/*", "examples in_context finetune", ""),
    ("tests/simt/*.[!p]*", "simt", ""),
    ("setup.py", "packaging extension", ""),
    ("pyproject.toml", "packaging", ""),
]


def tests_of(path: str) -> tuple[list[str], str]:
    """The test files that prove a file of the project, and the keywords that select what in them does."""
    for pattern, names, keywords in TABLE:
        if fnmatch.fnmatch(path, pattern):
            return [f"tests/test_{name}.py" for name in names.split()], keywords
    return [], ""


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def base() -> str:
    """Where a change begins that nobody named: the branch point from origin/main, or the last commit of hours before.

    Returns:
        A commit; nothing if the history is too short to tell.
    """
    head = git("rev-parse", "HEAD")
    try:
        point = git("merge-base", "HEAD", "origin/main")
    except subprocess.CalledProcessError:
        point = head
    if point != head:
        return point
    before = int(git("show", "-s", "--format=%ct", head)) - 3600 * HOURS
    return git("rev-list", "-1", f"--before={before}", head)


def changed(since: str) -> list[str]:
    """The files that differ from a commit, those that are not committed included."""
    return sorted(
        {
            *git("diff", "--name-only", since).splitlines(),
            *git("ls-files", "-o", "--exclude-standard").splitlines(),
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--since", default="", metavar="COMMIT", help="where the change begins")
    parser.add_argument("--paths", action="store_true", help="the changed files instead of their tests")
    arguments = parser.parse_args()
    since = arguments.since or base()
    if not since:
        print("the history is too short to tell what has changed", file=sys.stderr)
        return 0
    paths = changed(since)
    print(*(paths if arguments.paths else sorted({file for path in paths for file in tests_of(path)[0]})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
