"""torch.jit.script, torch.jit.trace and torch.export of the drop-in, of patched code and of accelerated modules."""

import io

import pytest
import torch
import torch.nn.functional as T
from torch import Tensor, nn

import fastgpt
from fastgpt import functional as F


class Patched(nn.Module):
    """Calls that `patch_functional` replaces, with options by position and by name."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = T.gelu(T.layer_norm(T.rms_norm(x, [8], eps=0.1), [8], eps=1e-3)) + T.gelu(x, approximate="tanh")
        q = h.view(2, 2, 2, 8)
        h = T.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.5).reshape(-1, 8)
        return T.cross_entropy(h, y, ignore_index=3, label_smoothing=0.1, reduction="sum")


class Ours(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.rms_norm(F.layer_norm(F.relu(x), [8]), [8])
        return F.cross_entropy(F.gelu(h), y) + F.scaled_dot_product_attention(h, h, h).sum()


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.activation = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8)), nn.GELU("tanh")
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.activation(self.norm(x)), y)


def loaded(module):
    """What the saved module is, for a process that has no fastgpt."""
    file = io.BytesIO()
    torch.jit.save(module, file)
    assert b"fastgpt::" not in file.getvalue()
    file.seek(0)
    return torch.jit.load(file)


INPUTS = torch.linspace(-2, 2, 64).view(8, 8), torch.arange(8)


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda module: torch.jit.trace(module, INPUTS)])
@pytest.mark.parametrize("kind", [Patched, Ours, Layers])
def test_script_and_trace_run_pytorchs_operators(kind, compiled):
    expected = kind()(*INPUTS)
    with fastgpt.patch_functional():
        module = kind()
        if kind is Layers:
            fastgpt.accelerate(module)
        found = loaded(compiled(module))
    torch.testing.assert_close(found(*INPUTS), expected)
    if kind is Layers:  # it is accelerated still
        assert fastgpt.explain(module, *INPUTS).backend != "pytorch"


def test_pytorchs_own_layers_are_scripted_in_patch_functional():
    x = INPUTS[0]
    with fastgpt.patch_functional():
        for layer in (nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"), nn.LayerNorm(8), nn.GELU()):
            layer.eval()
            torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
        attention = nn.MultiheadAttention(8, 2)
        torch.testing.assert_close(torch.jit.script(attention)(x, x, x)[0], attention(x, x, x)[0])
    torch.testing.assert_close(torch.jit.script(F.gelu)(x), T.gelu(x))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.MultiheadAttention(8, 2), 3),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"), 1),
        (lambda: nn.TransformerDecoderLayer(8, 2, 16, activation="gelu"), 2),
    ],
)
def test_layer_that_cannot_be_scripted_says_what_to_do(make, inputs):
    layer, arguments = make().eval(), (INPUTS[0],) * inputs
    found = layer(*arguments)
    expected = found[0] if isinstance(found, tuple) else found
    model = nn.ModuleList([layer])
    fastgpt.accelerate(model)
    with pytest.raises(RuntimeError, match=r"accelerated \w+: script .* fastgpt\.restore"):
        torch.jit.script(model)
    for again in (torch.jit.trace(layer, arguments), torch.export.export(layer, arguments).module()):
        out = again(*arguments)
        torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, expected)
    fastgpt.restore(model)
    scripted = torch.jit.script(layer)(*arguments)  # the failure leaves the class as it was
    torch.testing.assert_close(scripted[0] if isinstance(scripted, tuple) else scripted, expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", [Ours, Layers])
def test_exported_program_runs_our_ops(kind, strict):
    module = kind()
    expected = module(*INPUTS)
    fastgpt.accelerate(module)
    program = torch.export.export(module, INPUTS, strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert any("fastgpt" in str(node.target) for graph in graphs for node in graph.nodes)
    torch.testing.assert_close(program.module()(*INPUTS), expected)


def test_backend_named_refuses_to_be_traced():
    with (
        fastgpt.use_backend("reference"),
        pytest.raises(fastgpt.BackendUnavailable, match=r"torch\.jit\.trace"),
    ):
        torch.jit.trace(F.gelu, INPUTS[0])
