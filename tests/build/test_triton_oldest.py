"""The Triton kernels compile with the oldest Triton that pyproject.toml allows, too, and spill nothing there."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.build.test_triton_compile import ROOT, compile_now

pytestmark = pytest.mark.slow
PER_BLOCK = 227 << 10  # bytes of shared memory of an sm_90


def oldest():
    """The lower bound in pyproject.toml."""
    (asked,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][
        "triton"
    ]
    return re.fullmatch(r"triton>=(\d+\.\d+)", asked)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where that Triton is unpacked."""
    folder = tmp_path_factory.mktemp("triton")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    done = subprocess.run(
        [*command, f"triton=={oldest()}.0"], capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        pytest.skip(
            f"Triton {oldest()}.0 cannot be had: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        for member in files.infolist():
            path = Path(files.extract(member, folder))
            path.chmod(path.stat().st_mode | member.external_attr >> 16 & 0o777)
    wheel.unlink()
    return folder


def test_quick_configurations_compile_without_spills(folder, tmp_path):
    version, records = compile_now("c.quick", ["sm_90a"], tmp_path, ROOT, folder)
    assert version == f"{oldest()}.0"
    for record in records:
        assert record["spills"] == record["stack"] == 0, record["config"]
        assert record["shared"] <= PER_BLOCK, record["config"]
    assert {"attention", "attention_varlen", "cross_entropy", "linear_gelu", "add_layer_norm"} <= {
        record["op"] for record in records
    }
