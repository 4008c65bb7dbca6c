"""Summaries and ratios of measured times; host time of the Triton ops."""

import os
import subprocess
import sys

import pytest

from bench.harness.machine import percentile
from bench.harness.measure import Contender, ratio, summary
from tests.support.benching import ROOT


def test_summary_and_percentile():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.25) == 2.5
    assert percentile([7.0], 0.9) == 7.0
    found = summary([float(i) for i in range(1, 12)])
    assert (found["seconds"], found["rounds"]) == (6.0, 11)
    assert found["spread"] == pytest.approx((10 - 2) / 2 / 6)


def test_ratio_is_a_peers_time_over_the_fastest_of_ours():
    def contender(peer, *times):
        return Contender("cpp", peer, lambda: None, times={"fwd": list(times)})

    ours = [contender(None, 1.0, 2.0, 4.0), contender(None, 9.0, 9.0, 9.0)]
    found = ratio(contender("PyTorch", 3.0, 4.0, 4.0), "fwd", ours)
    assert found["ratio"] == 2.0 and found["ratio_low"] < 2.0 < found["ratio_high"] < 3.0
    assert ratio(ours[0], "fwd", ours) == {}


def test_host_time_of_the_triton_ops_can_be_measured():
    pytest.importorskip("triton")
    command = "from bench.harness import overhead; overhead.ROUNDS, overhead.CALLS = 1, 2; overhead.main('launchers')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]]
    assert rows == ["gelu", "bias_gelu", "cross_entropy", "add_layer_norm", "rms_norm", "linear_gelu"]
