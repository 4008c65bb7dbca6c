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
TESTS = {p.stem[5:]: p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("test_*.py")}
HOURS = 6  # a change without a stated beginning is what was committed in the last hours

GATES = "swiglu relu_squared"
GELUS = "gelu geglu linear_gelu mlp op_sizes"
CALLS = "functional functional_attention functional_calls functional_losses differential"
DROP_IN = f"{CALLS} transforms torchscript patch_functional examples functional functional_attention functional_losses"
DATA = (
    "data data_formats data_cleaning data_duplicates data_packing data_prepare data_shards data_description "
    "data_inputs"
)
MODELS = (
    "accelerate accelerate_recognized accelerate_masks accelerate_sinks accelerate_encoders accelerate_calls "
    "accelerate_others accelerate_biases accelerate_torch accelerate_report accelerate_verify accelerate_heads "
    "accelerate_zoo deferred_logits torchscript training_stacks"
)
ATTENTION = (
    "attention attention_extremes attention_head_sizes attention_masks attention_mask_grad attention_sinks "
    "attention_varlen op_sizes"
)
LOSSES = "cross_entropy cross_entropy_extremes cross_entropy_with_grad linear_cross_entropy op_sizes"
OPS = " ".join(
    dict.fromkeys(f"{ATTENTION} {LOSSES} linear {GELUS} {GATES} add_layer_norm rms_norm rope".split())
)
CHECKPOINTS = "checkpoint untrusted_checkpoint fuzz_checkpoints"
RUNS = f"train train_options train_distributed resume run_directory console divergence {CHECKPOINTS} cli"

CPU = "not triton and not cuda and not reference"
EMULATED = "cuda or fault"
GPU_PATH = "gpu_path"  # where the GPU path is called without a GPU
TRITON = "triton or gpu_path"
SPLIT = f"{TRITON} or split or descriptors or grids"

# (paths, names of test files, what pytest's -k selects of them); of several rows that fit, the first.
TABLE = [
    ("csrc/cpu/gelu*", GELUS, CPU),
    ("csrc/cpu/swiglu*", "swiglu op_sizes", CPU),
    ("csrc/cpu/relu_squared*", "relu_squared op_sizes", CPU),
    ("csrc/cpu/attention_varlen.cpp", "attention_varlen op_sizes", CPU),
    ("csrc/cpu/attention*", f"{ATTENTION} threads out_of_memory", CPU),
    ("csrc/cpu/tensors.h", f"{OPS} out_of_memory stable_abi wheel", CPU),
    ("csrc/cpu/vector.h", f"{OPS} wheel", CPU),
    ("csrc/cpu/philox.h", "attention attention_mask_grad philox", CPU),
    ("csrc/cpu/amx.h", f"{ATTENTION} threads out_of_memory", CPU),
    ("csrc/cpu/cross_entropy*", LOSSES, CPU),
    (
        "csrc/cpu/linear_cross_entropy*",
        "linear_cross_entropy cross_entropy_extremes op_sizes out_of_memory products",
        CPU,
    ),
    ("csrc/cpu/linear*", "linear linear_gelu mlp op_sizes products", CPU),
    ("csrc/cpu/products*", "products linear linear_cross_entropy stable_abi", CPU),
    ("csrc/cpu/gemm.h", "linear linear_gelu mlp linear_cross_entropy wheel", CPU),
    ("csrc/cpu/add_layer_norm*", "add_layer_norm op_sizes", CPU),
    ("csrc/cpu/rms_norm*", "rms_norm op_sizes", CPU),
    ("csrc/cpu/rope*", "rope op_sizes", CPU),
    ("csrc/cuda/gelu*", f"{GELUS} simt simt_profiles cuda_compile", EMULATED),
    ("csrc/cuda/swiglu*", "swiglu op_sizes simt simt_profiles cuda_compile", EMULATED),
    ("csrc/cuda/relu_squared*", "relu_squared op_sizes simt simt_profiles cuda_compile", EMULATED),
    (
        "csrc/cuda/elementwise.cuh",
        f"{GELUS} {GATES} rope simt simt_profiles cuda_compile",
        EMULATED,
    ),
    ("csrc/cuda/attention*", f"{ATTENTION} attention_cuda simt simt_profiles cuda_compile", EMULATED),
    ("csrc/cuda/tiles.cuh", f"{ATTENTION} attention_cuda simt simt_profiles cuda_compile", EMULATED),
    ("csrc/cuda/cross_entropy*", f"{LOSSES} simt simt_profiles cuda_compile", EMULATED),
    ("csrc/cuda/add_layer_norm*", "add_layer_norm op_sizes simt simt_profiles cuda_compile", EMULATED),
    ("csrc/cuda/rms_norm*", "rms_norm op_sizes simt simt_profiles cuda_compile", EMULATED),
    ("csrc/cuda/rope*", "rope op_sizes simt simt_profiles cuda_compile", EMULATED),
    ("csrc/cuda/norms.cuh", "add_layer_norm rms_norm op_sizes simt simt_profiles cuda_compile", EMULATED),
    ("csrc/cuda/row_threads.cuh", "add_layer_norm rms_norm simt simt_profiles cuda_compile", EMULATED),
    ("csrc/cuda/linear_gelu*", "linear_gelu_cuda linear_gelu op_sizes cuda_compile", EMULATED),
    ("csrc/cuda/cublaslt.cuh", "linear_gelu_cuda mlp_cuda linear_gelu mlp cuda_compile", EMULATED),
    ("csrc/cuda/mlp*", "mlp_cuda mlp op_sizes cuda_compile", EMULATED),
    ("csrc/cuda/*", f"{OPS} simt simt_profiles cuda_compile", EMULATED),
    ("csrc/call_op.h", f"{OPS} stable_abi wheel", "not triton and not reference"),
    ("csrc/*", OPS, "cpp or cuda"),
    ("kernels/triton/gelu.py", f"{GELUS} triton_compile triton_oldest hub {GPU_PATH}", TRITON),
    ("kernels/triton/swiglu.py", f"swiglu op_sizes triton_compile triton_oldest hub {GPU_PATH}", TRITON),
    (
        "kernels/triton/relu_squared.py",
        f"relu_squared op_sizes triton_compile triton_oldest hub {GPU_PATH}",
        TRITON,
    ),
    (
        "kernels/triton/attention_varlen.py",
        f"attention_varlen attention_grids op_sizes triton_compile triton_oldest hub {GPU_PATH}",
        SPLIT,
    ),
    (
        "kernels/triton/attention*",
        f"{ATTENTION} attention_split attention_descriptors attention_grids triton_compile triton_oldest hub "
        f"{GPU_PATH}",
        SPLIT,
    ),
    ("kernels/triton/cross_entropy.py", f"{LOSSES} triton_compile triton_oldest hub {GPU_PATH}", TRITON),
    (
        "kernels/triton/linear_cross_entropy.py",
        f"linear_cross_entropy op_sizes triton_compile triton_oldest hub {GPU_PATH}",
        TRITON,
    ),
    (
        "kernels/triton/linear_gelu.py",
        f"linear linear_gelu mlp op_sizes triton_compile triton_oldest hub {GPU_PATH}",
        TRITON,
    ),
    (
        "kernels/triton/add_layer_norm.py",
        f"add_layer_norm op_sizes triton_compile triton_oldest hub {GPU_PATH}",
        TRITON,
    ),
    (
        "kernels/triton/rms_norm.py",
        f"rms_norm op_sizes triton_compile triton_oldest hub {GPU_PATH}",
        TRITON,
    ),
    ("kernels/triton/rope.py", f"rope op_sizes triton_compile triton_oldest hub {GPU_PATH}", TRITON),
    (
        "kernels/triton/philox.py",
        f"{ATTENTION} philox triton_compile triton_oldest hub {GPU_PATH}",
        f"{TRITON} or philox",
    ),
    ("kernels/triton/tuned.py", "tune triton_compile triton_oldest hub", ""),
    ("kernels/hub/*", "hub", ""),
    ("kernels/*", f"{OPS} triton_compile triton_oldest tune hub {GPU_PATH}", TRITON),
    ("fastgpt/ops/_torch_linear.py", "linear op_sizes hub", "triton or cuda"),
    ("fastgpt/ops/_sinks.py", "attention_sinks accelerate_sinks", ""),
    ("fastgpt/reference/*", f"{OPS} philox second_derivatives hub", "reference"),
    (
        "fastgpt/ops/*",
        f"{OPS} cross_entropy_with_grad second_derivatives transforms overlap flops backends model threads hub "
        f"{GPU_PATH}",
        "",
    ),
    ("fastgpt/functional.py", f"{DROP_IN} {GPU_PATH}", ""),
    ("fastgpt/integrations/patch_functional.py", DROP_IN, ""),
    ("fastgpt/backends.py", f"backends kernels_off functional extension hub {GPU_PATH}", ""),
    ("fastgpt/extension.py", "extension stable_abi backends packaging wheel", ""),
    ("fastgpt/build_tools.py", "stable_abi packaging wheel", ""),
    ("fastgpt/flash_attn_interface.py", "flash_attn_interface", ""),
    ("fastgpt/flash_attention.py", f"flash_attention flash_attention_cuda {GPU_PATH}", ""),
    ("fastgpt/gpt_config.py", "architectures llama pretrained train_presets cli", ""),
    ("fastgpt/model.py", f"model architectures llama model_mlp sampling data_packing large {GPU_PATH}", ""),
    ("fastgpt/generation/decode.py", "sampling generate model divergence", ""),
    ("fastgpt/generation/kv_cache.py", "model architectures sampling generate", ""),
    ("fastgpt/generation/sampling.py", "sampling generate model divergence", ""),
    ("fastgpt/generation/text.py", "generate cli sampling", ""),
    ("fastgpt/tokenizer*.py", "tokenizer tokenizer_json fuzz_files pretrained data_prepare hub_names", ""),
    ("fastgpt/checkpoints/huggingface.py", "pretrained llama cli hub_names fuzz_checkpoints", ""),
    ("fastgpt/checkpoints/gpt2_layout.py", "pretrained model hub_names fuzz_checkpoints", ""),
    ("fastgpt/checkpoints/llama_layout.py", "llama train_presets", ""),
    ("fastgpt/download.py", "hub_names model", ""),
    ("fastgpt/evaluation/in_context.py", "in_context", ""),
    ("fastgpt/evaluation/perplexity.py", "cli in_context finetune", ""),
    ("fastgpt/evaluation/tasks/*", "tasks finetune", ""),
    ("fastgpt/data/*", f"{DATA} fuzz_files word_vectors tokenizer", ""),
    ("fastgpt/json_io.py", f"{RUNS} {DATA} fuzz_files console", ""),
    ("fastgpt/distributed.py", "train_distributed train resume", ""),
    ("fastgpt/checkpoints/load.py", "pretrained cli checkpoint", ""),
    ("fastgpt/checkpoints/native.py", RUNS, ""),
    ("fastgpt/checkpoints/optimizer_state.py", RUNS, ""),
    ("fastgpt/checkpoints/state_file.py", RUNS, ""),
    ("fastgpt/checkpoints/tensor_files.py", f"{RUNS} pretrained", ""),
    ("fastgpt/checkpoints/pickled_parts.py", CHECKPOINTS, ""),
    ("fastgpt/console.py", f"{RUNS} terminal", ""),
    ("fastgpt/atomic_io.py", f"{RUNS} data_shards data_prepare fuzz_files", ""),
    ("fastgpt/integrations/*", MODELS, ""),
    ("fastgpt/*.py", f"{RUNS} finetune in_context", ""),
    ("bench/codegen/tune.py", "tune", ""),
    ("bench/codegen/launches.py", "triton_compile", ""),
    ("bench/codegen/cubins.py", "cuda_compile", ""),
    ("bench/codegen/occupancy.py", f"triton_compile cuda_compile {GPU_PATH}", ""),
    ("bench/codegen/resources.py", f"triton_compile cuda_compile {GPU_PATH}", ""),
    ("bench/codegen/sass.py", "triton_compile cuda_compile", ""),
    ("bench/gpu.py", "bench_gpu", ""),
    ("bench/harness/gpu_clock.py", "gpu_clock bench_gpu", ""),
    ("bench/*", "bench bench_harness bench_report bench_data bench_trainer bench_generate", ""),
    ("examples/*", "examples in_context finetune", ""),
    ("tests/simt/*.[!p]*", "simt simt_profiles primitives_cuda", ""),
    ("setup.py", "packaging extension stable_abi wheel", ""),
    ("pyproject.toml", "packaging wheel", ""),
]


def file_of(name: str) -> str:
    """The path of a test file: "tests/ops/test_gelu.py" of "gelu"."""
    return TESTS.get(name, f"tests/test_{name}.py")


def tests_of(path: str) -> tuple[list[str], str]:
    """The test files that prove a file of the project, and the keywords that select what in them does."""
    for pattern, names, keywords in TABLE:
        if fnmatch.fnmatch(path, pattern):
            return [file_of(name) for name in names.split()], keywords
    return [], ""


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def base() -> str:
    """Find where a change without a stated beginning starts.

    Returns:
        The branch point from origin/main, else the last commit HOURS before HEAD; "" if the history is shorter.
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
