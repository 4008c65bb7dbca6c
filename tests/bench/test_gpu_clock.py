"""`GpuClock` on a simulated GPU: the host fills a queue, and the device executes it."""

import pytest
import torch

from bench.harness import gpu_clock
from bench.harness.gpu_clock import ATTEMPTS, GpuClock

TICKS = 1e9  # of the device, per second
FLUSH = 1e-4  # seconds for overwriting the cache


class Simulation:
    """Current times of host and device, in seconds; a launch enters the queue at the host's time."""

    def __init__(self):
        self.host = 0.0
        self.device = 0.0  # end of the last launch in the queue

    def launch(self, seconds, cost=1e-5):
        self.host += cost
        self.device = max(self.device, self.host) + seconds

    def synchronize(self):
        self.host = max(self.host, self.device)


class Event:
    def __init__(self, machine):
        self.machine, self.at = machine, None

    def record(self):
        self.machine.launch(0.0, cost=1e-6)
        self.at = self.machine.device

    def query(self):
        return self.machine.host >= self.at

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Memory:
    def __init__(self, machine):
        self.zero_ = lambda: machine.launch(FLUSH)


@pytest.fixture
def machine(monkeypatch):
    machine = Simulation()
    monkeypatch.setattr(gpu_clock.time, "perf_counter", lambda: machine.host)
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda ticks: machine.launch(ticks / TICKS))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(machine))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: Memory(machine))
    return machine


@pytest.fixture
def clock(machine):
    return GpuClock(torch.device("cuda"))


def kernels(machine, count, seconds, host):
    """Return a call of `count` launches of `seconds` on the device and `host` seconds on the host."""

    def call():
        for _ in range(count):
            machine.launch(seconds, cost=host)

    return lambda: None, call


@pytest.mark.parametrize("host", [1e-6, 1e-4, 2e-2])
def test_device_time_does_not_depend_on_the_host(machine, clock, host):
    for _ in range(3):
        (found,) = clock.time_round([kernels(machine, 4, 1e-5, host)])
        assert found.hidden
        assert found.seconds == pytest.approx(4e-5, abs=5e-6)
        assert found.host == pytest.approx(4 * host)


def test_waits_as_long_as_each_call_needed_before(machine, clock):
    slow, quick = kernels(machine, 1, 1e-5, 1e-2), kernels(machine, 1, 1e-5, 1e-6)
    clock.time_round([slow, quick], ["slow", "quick"])
    before = machine.host
    clock.time_round([quick], ["quick"])
    assert machine.host - before < 1e-3
    tried = []
    monitored = (lambda: tried.append(1), slow[1])
    clock.time_round([monitored], ["slow"])
    assert len(tried) == 1  # no second attempt: the wait was long enough


def test_a_call_that_waits_for_the_device_is_said_not_to_be_hidden(machine, clock):
    prepared = []

    def call():
        machine.launch(1e-5)
        machine.synchronize()
        machine.launch(1e-5)

    (found,) = clock.time_round([(lambda: prepared.append(1), call)])
    assert not found.hidden
    assert len(prepared) == ATTEMPTS


def test_whole_time_has_the_hosts_part(machine, clock):
    found = clock.time_whole([kernels(machine, 10, 1e-6, 1e-4), kernels(machine, 10, 1e-3, 1e-6)])
    assert [t.seconds for t in found] == pytest.approx([1e-3, 1e-2], rel=0.01)
    assert found[0].host == pytest.approx(1e-3)
