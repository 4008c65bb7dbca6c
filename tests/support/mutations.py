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

LONGEST = 900  # seconds for the tests of a tier; what has not ended then is not judged

# (name, file, what stands there once, what is put in its place)
MUTATIONS = [
    # ---- csrc/cpu ----
    ("gelu cpp: the tail of the derivative is not written", "csrc/cpu/gelu.cpp",
     "fill<STREAM, A>(dx, begin * BLOCK, std::min(end * BLOCK, numel), [&]",
     "fill<STREAM, A>(dx, begin * BLOCK, std::min(end * BLOCK, numel / 8 * 8), [&]"),
    ("geglu cpp: db forgets the factor a", "csrc/cpu/gelu.cpp",
     "return load<A>(grad + i, n...) * (z * share<TANH>(z));",
     "return load<A>(grad + i, n...) * share<TANH>(z);"),
    ("bias_gelu cpp: rows left over by the spans are skipped", "csrc/cpu/gelu.cpp",
     "const int64_t span = (rows + parts - 1) / parts;",
     "const int64_t span = rows / parts;"),
    ("add_layer_norm cpp: variance counts lanes past the end", "csrc/cpu/add_layer_norm.cpp",
     "const Vector<A> d = first<A>(load<A>(&z[j], n...) - middle, A(0), n...);",
     "const Vector<A> d = load<A>(&z[j], n...) - middle;"),
    ("attention cpp: the log-sum-exp lacks the maximum", "csrc/cpu/attention.cpp",
     "of_row[0] = nothing ? NOTHING<A> : top[r];",
     "of_row[0] = nothing ? NOTHING<A> : A(0);"),
    ("attention cpp: a score is contracted with the maximum", "csrc/cpu/attention.cpp",
     "return rounded<A>(load<A>(s + c * ROWS + r) * scale);",
     "return load<A>(s + c * ROWS + r) * scale;"),
    ("attention cpp: delta of one tile forgets dropout", "csrc/cpu/attention_bwd.h",
     "const Vector<A> term = e * (keep ? load<A>(dp + at) * load<A>(keep + at) : load<A>(dp + at));",
     "const Vector<A> term = e * load<A>(dp + at);"),
    ("cross_entropy cpp: the smoothing sum keeps old maxima", "csrc/cpu/cross_entropy.h",
     "s.weighted += (s.top - old) * s.weights;",
     "s.weighted += A(0) * s.weights;"),
    ("attention cpp: dropout acts on the softmax's sum too", "csrc/cpu/attention.cpp",
     "total += e[i];",
     "total += keep ? e[i] * load<A>(keep + (c + i) * ROWS + r) : e[i];"),
    ("attention_varlen cpp: keys begin where queries do", "csrc/cpu/attention_varlen.cpp",
     "p.keys = {0, k_starts[n]}", "p.keys = {0, q_starts[n]}"),
    ("attention_varlen cpp: spare keys get no gradient", "csrc/cpu/attention_varlen.cpp",
     "add(rest, 0, k.size(2) - k_starts[rest]);",
     "add(rest, 0, 0);"),
    ("cross_entropy cpp: backward reads at the result's stride", "csrc/cpu/cross_entropy.cpp",
     "const int64_t stride = logits.stride(0), out_stride = out.stride(0);",
     "const int64_t stride = out.stride(0), out_stride = out.stride(0);"),
    ("linear cpp: few rows lose columns beyond fours", "csrc/cpu/linear.cpp",
     "if (n % 4 || m * k", "if (m * k"),
    ("linear cpp: dbias alone is never summed", "csrc/cpu/linear.cpp",
     "(with_weight ? sums : at::sum(grad, {0}, false, at::kFloat))",
     "sums"),
    ("linear_cross_entropy cpp: dweight of no rows is garbage", "csrc/cpu/linear_cross_entropy.cpp",
     "hidden.size(0) > 0 ?", "hidden.size(0) >= 0 ?"),
    ("attention cpp: windows see one column less on the left", "csrc/cpu/attention_tiles.h",
     "std::clamp<int64_t>(below + p.left + 1, 0, ROWS)",
     "std::clamp<int64_t>(below + p.left, 0, ROWS)"),
    ("attention cpp: the gradient of lse has the wrong sign", "csrc/cpu/attention_bwd.h",
     "lane_sum<A>(sum) - (grad_lse.data",
     "lane_sum<A>(sum) + (grad_lse.data"),
    ("linear_cross_entropy cpp: z-loss gradient lacks its 2", "csrc/cpu/linear_cross_entropy.h",
     "A(2 * options_.z_loss) * (both[0]",
     "A(options_.z_loss) * (both[0]"),
    ("attention cpp: all heads share a dropout mask", "csrc/cpu/philox.h",
     "static_cast<uint32_t>(head),",
     "static_cast<uint32_t>(batch),"),
    ("cross_entropy cpp: targets may be fewer than rows", "csrc/cpu/cross_entropy.cpp",
     'check("target", target, {rows}, at::kLong)', 'check("target", target, {ANY}, at::kLong)'),
    # ---- kernels/triton ----
    ("gelu triton: a gradient of any strides is taken", "kernels/triton/gelu.py",
     'contiguous("gelu_bwd_triton", grad=grad, x=x)', 'contiguous("gelu_bwd_triton", x=x)'),
    ("attention triton: sum of split columns is in base 2", "kernels/triton/attention.py",
     "rest + tl.log(b_divisor)", "rest + tl.log2(b_divisor)"),
    ("attention triton: a tile counts as whole one column early", "kernels/triton/attention_tiles.py",
     "tl.maximum(first + high + 1, 0)",
     "tl.maximum(first + high + 2, 0)"),
    ("attention triton: deterministic dq is not scaled", "kernels/triton/attention_bwd.py",
     "store_rows(p_dq, b_dq * scale, o_row",
     "store_rows(p_dq, b_dq, o_row"),
    ("attention_varlen triton: all use one document's slopes", "kernels/triton/attention_tiles.py",
     "else (slopes.stride(0), slopes.stride(1))",
     "else (0, slopes.stride(1))"),
    ("cross_entropy triton: the gradient is not divided by the sum", "kernels/triton/cross_entropy.py",
     "    c_p /= row_sum",
     "    c_p /= 1.0"),
    ("cross_entropy triton: class weights shift with the row", "kernels/triton/cross_entropy.py",
     "b_more = _load(p_weight + (start - shift), o",
     "b_more = _load(p_weight + start, o"),
    ("linear_cross_entropy triton: chunks read the first statistics", "kernels/triton/linear_cross_entropy.py",
     "target[part], statistics[part], *options",
     "target[part], statistics, *options"),
    ("gelu triton: tanh slope is NaN far to the left", "kernels/triton/gelu.py",
     "return s, tl.minimum(e, LARGE) * s * s",
     "return s, e * s * s"),
    ("bias_gelu triton: dbias is that of the first 64 rows", "kernels/triton/gelu.py",
     "return dx, partial.sum(0).to(x.dtype)",
     "return dx, partial[0].to(x.dtype)"),
    ("geglu triton: da forgets the factor b", "kernels/triton/gelu.py",
     "(b_grad * b_b * _gelu_grad(b_a, TANH))",
     "(b_grad * _gelu_grad(b_a, TANH))"),
    ("linear_gelu triton: the tail of K is not masked", "kernels/triton/linear_gelu.py",
     "K % block_k == 0,",
     "K >= block_k,"),
    ("add_layer_norm triton: a long row's mean is of a tile", "kernels/triton/add_layer_norm.py",
     "tl.store(p_means + N + i_n, tl.sum(b_c2, 0) / D)",
     "tl.store(p_means + N + i_n, tl.sum(b_c2, 0) / BLOCK_D)"),
    ("attention triton: dropout's words come in another order", "kernels/triton/philox.py",
     "tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))",
     "tl.join(tl.join(b_0, b_1), tl.join(b_2, b_3))"),
    ("linear triton: dbias is a mean over the rows", "kernels/triton/linear.py",
     "dbias = grad.sum(0).to(weight.dtype)",
     "dbias = grad.mean(0).to(weight.dtype)"),
    ("attention triton: ALiBi forgets the diagonal's offset", "kernels/triton/attention_tiles.py",
     "tl.abs(o_m + offset - o_n)",
     "tl.abs(o_m - o_n)"),
    # ---- csrc/cuda ----
    ("add_layer_norm cuda: means may be fewer than rows", "csrc/cuda/add_layer_norm.cu",
     'check("mean", mean, {sum.size(0)}, {ScalarType::Double})',
     'check("mean", mean, {ANY}, {ScalarType::Double})'),
    ("attention cuda: maximum of plain kernels lacks the scale", "csrc/cuda/attention.cu",
     "multiply_rounded(top[h], unit)",
     "multiply_rounded(top[h], 1.0f)"),
    ("attention cuda: one column past the end is seen", "csrc/cuda/attention.cuh",
     "? place.Lk - 1 : centre + p.right;",
     "? place.Lk : centre + p.right;"),
    ("attention cuda: a float16 mask is subtracted", "csrc/cuda/attention.cuh",
     "s + to_float(load(m.in_fp16 + at));",
     "s - to_float(load(m.in_fp16 + at));"),
    ("attention cuda: fourth columns take the third's dropout", "csrc/cuda/attention.cuh",
     "second = upper ? words.at[3] : words.at[1];",
     "second = upper ? words.at[2] : words.at[1];"),
    ("attention cuda: deterministic dq has one sum for all", "csrc/cuda/attention_bwd.cu",
     "g.deterministic ? rows * HEAD : int64_t{0},",
     "int64_t{0},"),
    ("attention cuda: dq of padded heads is read too narrow", "csrc/cuda/attention_bwd_rows.cuh",
     "(n * sum_of_block + i * width + d)",
     "(n * sum_of_block + i * D + d)"),
    ("attention_varlen cuda: bounds may pass the tensor's end", "csrc/cuda/attention.cuh",
     "(last < begin ? begin : last > total ? total : last) - begin",
     "(last < begin ? begin : last) - begin"),
    ("cross_entropy cuda: a cluster drops the last vectors", "csrc/cuda/cross_entropy.cu",
     "const int part = (r.vectors + blocks - 1) / blocks, first",
     "const int part = r.vectors / blocks, first"),
    ("gelu cuda: the gradient's alignment is not looked at", "csrc/cuda/gelu.cu",
     "aligned(grad, x, dx), [&]",
     "aligned(x, dx), [&]"),
    ("bias_gelu cuda: dbias of no rows is garbage", "csrc/cuda/gelu.cu",
     "return {dx, zeros(x, {columns}, x.scalar_type())};",
     "return {dx, empty(x, {columns}, x.scalar_type())};"),
    ("geglu cuda: gate and value change places", "csrc/cuda/gelu.cu",
     "from_float<T>(gelu_of<TANH>(to_float(v.at[k])) * to_float(gate.at[k]))",
     "from_float<T>(gelu_of<TANH>(to_float(gate.at[k])) * to_float(v.at[k]))"),
    ("linear_gelu cuda: the exact GELU goes by tanh's epilogue", "csrc/cuda/linear_gelu.cu",
     "if (tanh && Product::takes(x, weight)",
     "if (Product::takes(x, weight)"),
    ("mlp cuda: without a bias the derivative is tanh's", "csrc/cuda/mlp.cu",
     'call<Tensor>("fastgpt::gelu_bwd_cuda", dy, z, tanh)',
     'call<Tensor>("fastgpt::gelu_bwd_cuda", dy, z, true)'),
    ("add_layer_norm cuda: the variance is the unbiased one", "csrc/cuda/add_layer_norm.cu",
     "moments[1] / static_cast<float>(columns) - fminf",
     "moments[1] / static_cast<float>(columns - 1) - fminf"),
    # ---- fastgpt/reference ----
    ("gelu reference: two digits of a constant swapped", "fastgpt/reference/gelu.py",
     "(z + 0.044715 * z**3)",
     "(z + 0.044751 * z**3)"),
    ("attention reference: windows are one short on the left", "fastgpt/reference/attention.py",
     "seen &= column >= diagonal - left",
     "seen &= column > diagonal - left"),
    ("attention_varlen reference: documents share a mask", "fastgpt/reference/attention.py",
     "slopes, seed, first_batch=n, **options)",
     "slopes, seed, **options)"),
    ("cross_entropy reference: probabilities ignore weights", "fastgpt/reference/cross_entropy.py",
     "loss = (p * w * nll).sum(dim=1)",
     "loss = (p * nll).sum(dim=1)"),
    ("attention reference: Philox has seven rounds", "fastgpt/reference/philox.py",
     "for _ in range(10):",
     "for _ in range(7):"),
    # ---- fastgpt/ops, functional, backends, flash_attention, model ----
    ("attention ops: windows without causality go upper left", "fastgpt/ops/attention.py",
     'return causal != "upper_left", left,',
     'return causal == "lower_right", left,'),
    ("linear_cross_entropy ops: gradients are scaled twice", "fastgpt/ops/linear_cross_entropy.py",
     "                ctx.grads = None",
     "                pass"),
    ("cross_entropy ops: ignored targets count in the mean", "fastgpt/ops/cross_entropy.py",
     "return torch.where(valid, weight.to(dtype).take(torch.where(valid, target, 0)), 0).sum()",
     "return weight.to(dtype).take(torch.where(valid, target, 0)).sum()"),
    ("cross_entropy ops: gradients are written over shared memory", "fastgpt/ops/cross_entropy.py",
     "overlap = rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]",
     "overlap = False"),
    ("ops: the tangent of an upstream gradient is dropped", "fastgpt/ops/_transforms.py",
     "differentiates = any(map(has_tangent, grads))",
     "differentiates = False"),
    ("attention functional: the result's strides are not PyTorch's", "fastgpt/functional.py",
     "return out if out.stride() == like.stride() else like.copy_(out)",
     "return out"),
    ("add_layer_norm ops: second backward forgets the sum", "fastgpt/ops/add_layer_norm.py",
     "dsum = dsum if grad_sum is None or dsum is None else dsum + grad_sum",
     "dsum = dsum if grad_sum is None or dsum is None else dsum"),
    ("mlp ops: z is not kept where x alone wants a gradient", "fastgpt/ops/mlp.py",
     "for t in (rows, *layers[:2]))",
     "for t in layers[:2])"),
    ("attention functional: is_causal goes lower right", "fastgpt/functional.py",
     'causal="upper_left" if is_causal else "none",',
     'causal="lower_right" if is_causal else "none",'),
    ("backends: leaving a nested choice gives auto", "fastgpt/backends.py",
     "_thread.backend = _traced_backend = self._outer.pop()",
     '_thread.backend = _traced_backend = "auto"'),
    ("flash_attention: the result's strides are not PyTorch's", "fastgpt/flash_attention.py",
     "return _laid_out(out, query), lse.transpose(1, 2)",
     "return out, lse.transpose(1, 2)"),
    ("model: packed rotary positions swap sin and cos", "fastgpt/model.py",
     "cos, sin = (angles.view(B * T, 1, -1) for angles in rotation)",
     "sin, cos = (angles.view(B * T, 1, -1) for angles in rotation)"),
    # ---- trainer ----
    ("trainer: every step has the same dropout", "fastgpt/train.py",
     'f"{seed}/{step}/{rank}"',
     'f"{seed}/{rank}"'),
    ("trainer: accumulated batches overlap the next step's", "fastgpt/train.py",
     "range(self.step * config.grad_accum, (self.step + 1) * config.grad_accum)",
     "range(self.step, self.step + config.grad_accum)"),
    ("optimization: warm-up begins at a rate of zero", "fastgpt/optimization.py",
     "return config.lr * (step + 1) / config.warmup_steps",
     "return config.lr * step / config.warmup_steps"),
    ("start: a restart resumes another run's checkpoint", "fastgpt/start.py",
     "return resumed if replace(_checkpoint_to_resume(out).train, resume=True) == resumed else config",
     "return resumed"),
    ("material: a task's loss counts the prompts", "fastgpt/material.py",
     "torch.zeros(len(prompt), dtype=torch.bool)",
     "torch.ones(len(prompt), dtype=torch.bool)"),
    ("papers: config.toml says whether to resume", "fastgpt/papers.py",
     'if v is not None and k != "resume"}',
     "if v is not None}"),
    ("distributed: processes compute each other's rows", "fastgpt/distributed.py",
     "return slice(self.rank, None, self.world)",
     "return slice(self.rank, None)"),
    ("config: label smoothing of 1.0 is accepted", "fastgpt/config.py",
     "if not 0 <= getattr(self, name) < 1:",
     "if not 0 <= getattr(self, name) <= 1:"),
    # ---- checkpoints ----
    ("checkpoint: the best one is removed with the old ones", "fastgpt/checkpoint.py",
     "if best is None or old != step_path(out, best):",
     "if old != path:"),
    ("checkpoint: the rename is not flushed to the disk", "fastgpt/checkpoint.py",
     "flush(out)",
     "pass"),
    ("pretrained: the checkpoint's LayerNorm epsilon is lost", "fastgpt/pretrained.py",
     'layer_norm_eps=options.get("layer_norm_epsilon", 1e-5),',
     "layer_norm_eps=1e-5,"),
    # ---- data ----
    ("shards: an aborted write leaves its files", "fastgpt/data/shards.py",
     "if not self._finished:",
     "if self._finished:"),
    ("packing: a document's last token predicts the next one's", "fastgpt/data/packing.py",
     "np.maximum(ends - begins - 1, 0)",
     "np.maximum(ends - begins, 0)"),
    ("batches: what counts is looked up one token early", "fastgpt/data/batches.py",
     "~self.counted[start + 1 : start + length + 1]",
     "~self.counted[start : start + length]"),
    ("cleaning: lines must repeat by number and by size", "fastgpt/data/cleaning.py",
     "return repeated > _LINES * count or repeated_characters",
     "return repeated > _LINES * count and repeated_characters"),
    ("formats: errors name the line before", "fastgpt/data/formats.py",
     'place = f"{name}, line {number}"',
     'place = f"{name}, line {number - 1}"'),
    ("word_vectors: a line's last space makes a field", "fastgpt/data/word_vectors.py",
     '.rstrip(b" \\r\\n")',
     '.rstrip(b"\\r\\n")'),
    # ---- text ----
    ("sampling: the penalty favours negative logits", "fastgpt/sampling.py",
     "logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty",
     "logits > 0, logits / self.repetition_penalty, logits / self.repetition_penalty"),
    ("kv_cache: a new token does not see itself", "fastgpt/kv_cache.py",
     "(columns <= self.lengths[:, None])",
     "(columns < self.lengths[:, None])"),
    ("generate: every batch begins with the same seed", "fastgpt/generate.py",
     "None if seed is None else seed + first",
     "None if seed is None else seed"),
    ("tokenizer: a text may spell the end of text", "fastgpt/tokenizer.py",
     "self.engine.encode_special_tokens = True",
     "self.engine.encode_special_tokens = False"),
    ("integrations: two masks of attention join by or", "fastgpt/integrations/torch_modules.py",
     "return kept[0] & kept[1] if",
     "return kept[0] | kept[1] if"),
    ("in_context: the second pass counts its unknowable token", "fastgpt/in_context.py",
     "estimate(right[:, length:].mean(1))",
     "estimate(right[:, length - 1 :].mean(1))"),
    ("bench harness: the spread is twice as wide", "bench/harness.py",
     "percentile(times, 0.1)) / 2 / median",
     "percentile(times, 0.1)) / median"),
    ("bench harness: ratios are upside down", "bench/harness.py",
     "ratios = [t / o for t, o in",
     "ratios = [o / t for t, o in"),
]  # fmt: skip


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
