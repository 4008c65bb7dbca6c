"""Every benchmarked op by name, in the order of what matters most to a training step."""

from bench import (
    bench_add_layer_norm,
    bench_attention,
    bench_attention_varlen,
    bench_cross_entropy,
    bench_geglu,
    bench_gelu,
    bench_linear,
    bench_linear_cross_entropy,
    bench_linear_gelu,
    bench_mlp,
)
from bench.cases import Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        bench_attention.OP,
        bench_cross_entropy.OP,
        bench_linear_cross_entropy.OP,
        bench_attention_varlen.OP,
        bench_linear.OP,
        bench_gelu.OP,
        bench_gelu.BIAS_GELU,
        bench_linear_gelu.OP,
        bench_mlp.OP,
        bench_geglu.OP,
        bench_add_layer_norm.OP,
    )
}
