from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_nvml import FakeGpu, FakeMig

from llm_at_home.metering import energy, rapl, session, sources
from llm_at_home.metering.energy import EnergyMeter
from llm_at_home.metering.rapl import RaplCounter

A = "GPU-aaaaaaaa-1111-2222-3333-444444444444"
B = "GPU-bbbbbbbb-1111-2222-3333-444444444444"
UNKNOWN = ("energy_gross", "energy_net", "energy_per_token", "energy_per_token_net")


def zone(root: Path, name: str, label: str, uj: int | None, span: int = 262_143_328_850) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    if uj is not None:
        (folder / "energy_uj").write_text(f"{uj}\n")
    return folder / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "powercap"
    root.mkdir()
    monkeypatch.setattr(rapl, "RAPL_ROOT", root)
    return root


class Clock:
    """Time that passes when somebody sleeps, and draws power meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, use) -> None:
        self.now, self.use = 100.0, use
        self.asleep, self.thread = energy.time.sleep, threading.get_ident()
        monkeypatch.setattr(energy.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(energy.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        if threading.get_ident() != self.thread:  # what an earlier test left running
            self.asleep(seconds)
            return
        self.now += seconds
        self.use(seconds)


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests with a false clock, which a waiting thread would race with."""
    monkeypatch.setattr(rapl.threading.Thread, "start", lambda self: None)


# -- the GPU's counter


def test_nvml_counts_in_millijoules(driver) -> None:
    (gpu,) = driver(FakeGpu(energy_mj=5_000_000))
    meter = EnergyMeter("cuda")
    meter.start()
    gpu.energy_mj += 7_200_000  # 7200 J are 2 Wh
    meter.stop()
    figures = meter.readings("token", 100)
    assert figures["energy_gross"].value == pytest.approx(2.0)
    assert (figures["energy_gross"].unit, figures["energy_gross"].method) == ("Wh", "nvml_counter")
    assert figures["energy_per_token"].value == pytest.approx(72.0)
    assert figures["energy_per_token"].unit == "J/token"


@pytest.mark.parametrize("visible", ["1", B, "GPU-bbbb", f"{B},0", "1,0"])
def test_nvml_counts_the_visible_gpu_and_not_its_neighbour(driver, visible: str) -> None:
    first, second = driver(FakeGpu(uuid=A, energy_mj=1), FakeGpu(uuid=B, energy_mj=9_000), visible=visible)
    meter = EnergyMeter("cuda")
    meter.start()
    first.energy_mj += 10**9
    second.energy_mj += 3_600_000
    meter.stop()
    assert meter.readings("token", 1)["energy_gross"].value == pytest.approx(1.0)


def test_both_methods_are_recorded_and_agree_on_a_steady_load(driver) -> None:
    now = time.monotonic()
    driver(FakeGpu(power_steps=[(now - 60, 40.0), (now + 0.5, 240.0)], update_seconds=0.02))
    with EnergyMeter("cuda", idle_seconds=0.2) as meter:
        meter.measure_idle()
        time.sleep(max(0.0, now + 0.6 - time.monotonic()))
        meter.start()
        time.sleep(1.0)
        meter.stop()
        figures = meter.readings("token", 10)
        assert meter.flags == []
    gross, other = figures["energy_gross"], figures["energy_gross_power_integral"]
    assert (gross.method, other.method) == ("nvml_counter", "nvml_power_integral")
    assert gross.value == pytest.approx(240 / 3600, rel=0.06), "the counter's edges are 20 ms wide"
    assert other.value == pytest.approx(240 / 3600, rel=0.03)
    assert other.n > 50
    assert figures["energy_methods_divergence"].value == pytest.approx(0, abs=0.05)
    assert figures["energy_methods_divergence"].unit == "1"


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "SETTLE_SECONDS", 0.0)


def joules_of(steps: list[tuple[float, float]], begin: float, end: float) -> float:
    """The known energy of a power profile between two instants, by summing slices of a millisecond."""
    slices = int((end - begin) * 1000)
    at = [begin + (i + 0.5) * (end - begin) / slices for i in range(slices)]
    return sum([level for since, level in steps if since <= t][-1] for t in at) * (end - begin) / slices


def test_a_card_before_volta_is_measured_by_its_power(driver) -> None:
    """Pascal: no counter, instantaneous power. The sampler is the real process; the profile's energy is known."""
    idle = (time.monotonic() - 60, 30.0)
    (gpu,) = driver(
        FakeGpu(name="Tesla P100", capability=(6, 0), energy_mj=None, power_steps=[idle], update_seconds=0.02)
    )
    with EnergyMeter("cuda", idle_seconds=0.5) as meter:
        meter.measure_idle()
        now = time.monotonic()
        gpu.power_steps = [idle, *((now + 0.1 + 0.3 * i, w) for i, w in enumerate([180.0, 95.0, 230.0, 60.0, 150.0]))]
        driver.publish()
        time.sleep(0.2)
        begin = time.monotonic()
        meter.start()
        time.sleep(1.6)
        meter.stop()
        end = time.monotonic()
        time.sleep(0.2)  # what comes after is not counted
        figures = meter.readings("token", 100)
        assert meter.flags == []
    known = joules_of(gpu.power_steps, begin, end)
    assert figures["energy_gross"].method == "nvml_power_integral"
    assert figures["energy_gross"].value * 3600 == pytest.approx(known, rel=0.02)
    assert figures["energy_per_token"].value == pytest.approx(known / 100, rel=0.02)
    assert figures["idle_power"].value == pytest.approx(30.0, rel=0.02)
    net = known - 30 * (end - begin)
    assert figures["energy_net"].value * 3600 == pytest.approx(net, rel=0.03)
    assert figures["energy_per_token_net"].value == pytest.approx(net / 100, rel=0.03)
    assert "Not Supported" in figures["energy_methods_divergence"].reason
    assert "energy_gross_power_integral" not in figures, "it is the main figure"


def test_a_card_that_gives_neither_is_unknown_and_nothing_is_waited_for(driver) -> None:
    driver(FakeGpu(name="GeForce", capability=(6, 1), energy_mj=None, power_mw=None))
    meter = EnergyMeter("cuda", idle_seconds=100)
    before = time.perf_counter()
    meter.measure_idle()
    assert time.perf_counter() - before < 5
    meter.start()
    meter.stop()
    figures = meter.readings("token", 10)
    for name in UNKNOWN:
        assert figures[name].value is None
        assert "counter" in figures[name].reason
        assert "power" in figures[name].reason
        assert "Not Supported" in figures[name].reason


def test_a_counter_that_stands_still_under_load_is_not_believed(driver) -> None:
    steps = [(time.monotonic() - 60, 100.0)]
    driver(FakeGpu(power_steps=steps, counter_moves=False, update_seconds=0.02))
    with EnergyMeter("cuda") as meter:
        meter.start()
        time.sleep(0.5)
        meter.stop()
        figures = meter.readings("token", 1)
        assert figures["energy_gross"].method == "nvml_power_integral"
        assert figures["energy_gross"].value * 3600 == pytest.approx(50.0, rel=0.1)
        assert "did not move" in figures["energy_methods_divergence"].reason
        assert len(meter.flags) == 1
        assert "did not move" in meter.flags[0]


def test_of_two_cards_one_counter_that_stands_still_spoils_the_sum(driver) -> None:
    steps = [(time.monotonic() - 60, 100.0)]
    moves, stands = (FakeGpu(uuid=uuid, power_steps=steps, update_seconds=0.02) for uuid in (A, B))
    driver(moves, stands)
    for stands.counter_moves, method in ((True, "nvml_counter"), (False, "nvml_power_integral")):
        driver(moves, stands)
        with EnergyMeter("cuda", gpus=2) as meter:
            meter.start()
            time.sleep(0.5)
            meter.stop()
            reading = meter.readings("token", 1)["energy_gross"]
        assert reading.method == method
        assert reading.value * 3600 == pytest.approx(100.0, rel=0.15), "two cards of 100 W for half a second"


def test_a_short_phase_on_a_card_that_averages_over_a_second_is_flagged(driver) -> None:
    """Ampere and later: a step of power reaches the sensor over a second, so that half of a second's rise is missed."""
    idle = (time.monotonic() - 60, 50.0)
    (gpu,) = driver(FakeGpu(power_steps=[idle], average_seconds=1.0, update_seconds=0.02))
    with EnergyMeter("cuda") as meter:
        gpu.power_steps = [idle, (time.monotonic(), 350.0)]
        driver.publish()
        meter.start()
        time.sleep(1.0)
        meter.stop()
        figures = meter.readings("token", 1)
        assert figures["energy_gross"].value * 3600 == pytest.approx(350, rel=0.06)
        assert figures["energy_gross_power_integral"].value * 3600 == pytest.approx(200, rel=0.06)
        assert figures["energy_methods_divergence"].value == pytest.approx(200 / 350 - 1, abs=0.05)
        assert len(meter.flags) == 1
        assert "differ by -4" in meter.flags[0]


@pytest.mark.parametrize("case", ["no driver", "no visible GPU"])
def test_cuda_without_a_gpu_the_driver_names_is_unknown_and_not_zero(driver, case: str) -> None:
    driver(FakeGpu(), present=case != "no driver", visible="7" if case == "no visible GPU" else None)
    reading = EnergyMeter("cuda").readings("token", 1)["energy_gross"]
    assert reading.value is None
    assert reading.reason == "the GPU's energy cannot be read (the driver names no visible GPU)"


def test_the_energy_of_a_mig_slice_is_unknown(driver, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(time.monotonic() - 60, 100.0)]
    driver(FakeGpu(power_steps=steps, mig=[FakeMig(uuid="MIG-1")]))
    monkeypatch.setattr(session, "used_gpus", lambda count: [SimpleNamespace(uuid="MIG-1", mig=True)])
    meter = EnergyMeter("cuda", idle_seconds=100)
    meter.measure_idle()
    meter.start()
    meter.stop()
    figures = meter.readings("step", 1)
    assert {reading.value for reading in figures.values()} == {None}
    assert {reading.reason for reading in figures.values()} == {"the counter covers the whole card, not the MIG slice"}


def test_a_counter_that_fails_during_the_run_leaves_the_power(driver) -> None:
    (gpu,) = driver(FakeGpu(power_steps=[(time.monotonic() - 60, 100.0)], update_seconds=0.02))
    with EnergyMeter("cuda") as meter:
        meter.start()
        gpu.errors["nvmlDeviceGetTotalEnergyConsumption"] = 15  # in this process, where the counter is read
        time.sleep(0.5)
        meter.stop()
        meter.start()
        meter.stop()
        figures = meter.readings("token", 10)
        assert figures["energy_gross"].method == "nvml_power_integral"
        assert figures["energy_gross"].value * 3600 == pytest.approx(50, rel=0.1)
        assert "failed during the run (GPU is lost)" in figures["energy_methods_divergence"].reason
        assert "failed during the run" in meter.flags[0]


def test_a_power_that_fails_during_the_run_leaves_the_counter(driver) -> None:
    (gpu,) = driver(FakeGpu(power_steps=[(time.monotonic() - 60, 100.0)], update_seconds=0.02))
    with EnergyMeter("cuda") as meter:
        meter.start()
        gpu.errors["nvmlDeviceGetPowerUsage"] = 999
        driver.publish()  # the power is read in the sampler
        time.sleep(0.3)
        meter.stop()
        figures = meter.readings("token", 10)
        assert figures["energy_gross"].method == "nvml_counter"
        assert figures["energy_gross_power_integral"].value is None
        assert "Unknown Error" in figures["energy_gross_power_integral"].reason


def test_a_sampler_that_dies_costs_its_figure_and_not_the_run(driver) -> None:
    (gpu,) = driver(FakeGpu(energy_mj=None))
    for gpu.energy_mj, survives in ((None, False), (1000, True)):
        driver(gpu)
        with EnergyMeter("cuda") as meter:
            meter.start()
            meter._sampler.process.kill()
            gpu.energy_mj = gpu.energy_mj and 3_601_000
            meter.stop()
            figures = meter.readings("token", 10)
        dead = figures["energy_gross_power_integral" if survives else "energy_gross"]
        assert dead.value is None
        assert "ended by signal 9" in dead.reason
        if survives:
            assert figures["energy_gross"].value == pytest.approx(1.0)


# -- the processor's counter


def test_packages_are_added_up_and_their_parts_are_not_counted_twice(powercap: Path) -> None:
    first = zone(powercap, "intel-rapl:0", "package-0", 1_000_000)
    core = zone(powercap, "intel-rapl:0:0", "core", 500_000)
    second = zone(powercap, "intel-rapl:1", "package-1", 0)
    platform = zone(powercap, "intel-rapl:2", "psys", 0)
    other_way = zone(powercap, "intel-rapl-mmio:0", "package-0", 1_000_000)
    (powercap / "intel-rapl").mkdir()
    counter = RaplCounter()
    first.write_text("4000000\n")
    core.write_text("9000000\n")
    second.write_text("2000000\n")
    platform.write_text("50000000\n")
    other_way.write_text("4000000\n")
    assert counter.joules() == pytest.approx(5.0)


def test_the_wrap_around_is_put_right_each_time(powercap: Path) -> None:
    file = zone(powercap, "intel-rapl:0", "package-0", 65_000_000_000, span=65_532_610_987)
    counter = RaplCounter()
    file.write_text("467389013")  # 532.6 J to the end and 467.4 J from the start
    assert counter.joules() == pytest.approx(1000.0, abs=1e-3)
    file.write_text("65000000000")
    file_total = 1000.0 + (65_000_000_000 - 467_389_013) / 1e6
    assert counter.joules() == pytest.approx(file_total, abs=1e-3)
    file.write_text("467389013")
    assert counter.joules() == pytest.approx(file_total + 1000.0, abs=1e-3)


def test_a_thread_sees_the_wrap_arounds_between_two_questions(powercap: Path, monkeypatch) -> None:
    monkeypatch.setattr(rapl, "RAPL_READ_SECONDS", 0.01)
    file = zone(powercap, "intel-rapl:0", "package-0", 0, span=999_999)
    counter = RaplCounter()
    for value in (600_000, 200_000, 800_000, 400_000, 0):  # 0.6 J each
        temporary = file.with_suffix(".new")
        temporary.write_text(str(value))
        temporary.replace(file)
        deadline = time.monotonic() + 5
        while counter._last[0] != value and time.monotonic() < deadline:
            time.sleep(0.005)
    assert counter.joules() == pytest.approx(3.0)


@pytest.mark.parametrize("case", ["nothing there", "no energy_uj", "garbage", "only psys"])
def test_unreadable_counters_are_unknown_with_a_reason_and_never_zero(powercap: Path, case: str) -> None:
    if case == "no energy_uj":
        zone(powercap, "intel-rapl:0", "package-0", None)
    elif case == "garbage":
        zone(powercap, "intel-rapl:0", "package-0", 5).write_text("not a number")
    elif case == "only psys":
        zone(powercap, "intel-rapl:0", "psys", 5)
    meter = EnergyMeter("cpu")
    meter.measure_idle()
    meter.start()
    meter.stop()
    for name in UNKNOWN:
        reading = meter.readings("token", 10)[name]
        assert reading.value is None
        assert "processor's energy counter cannot be read" in reading.reason
        assert "\n" not in reading.reason


def test_a_counter_that_only_root_may_read_is_unknown(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(powercap, "intel-rapl:0", "package-0", 5)
    read_text = Path.read_text

    def denied(self: Path, *arguments, **options):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", denied)  # root, as whom tests may run, could read any file
    ((method, counter, reason),) = sources.offers("cpu", 1, borrow=session.borrow)
    assert (method, counter) == ("rapl", None)
    assert "Permission denied" in reason


def test_a_counter_that_vanishes_during_the_run_is_unknown(powercap: Path) -> None:
    file = zone(powercap, "intel-rapl:0", "package-0", 5)
    meter = EnergyMeter("cpu")
    meter.start()
    file.unlink()
    meter.stop()
    assert meter.readings("step", 3)["energy_per_step"].value is None


@pytest.mark.parametrize("started", [True, False])
def test_a_counter_that_stands_still_is_no_reading_of_zero(powercap: Path, started: bool) -> None:
    zone(powercap, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter("cpu")
    if started:
        meter.start()
    meter.stop()
    for reading in meter.readings("token", 3).values():
        assert reading.value is None
        assert reading.reason == "the counter did not move"


# -- the meter


@pytest.mark.usefixtures("no_thread")
def test_net_is_gross_less_the_idle_power_times_the_time(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = zone(powercap, "intel-rapl:0", "package-0", 0)
    watts = 10.0

    def use(seconds: float) -> None:
        file.write_text(str(int(file.read_text()) + int(watts * seconds * 1e6)))

    clock = Clock(monkeypatch, use)
    meter = EnergyMeter("cpu", idle_seconds=4.0)
    meter.measure_idle()
    assert clock.now == 104.0
    watts = 46.0
    for _ in range(2):  # what passes between stop and start is not counted
        meter.start()
        clock.sleep(50.0)
        meter.stop()
        clock.sleep(1000.0)
    figures = meter.readings("step", 20)
    assert figures["idle_power"].value == pytest.approx(10.0)
    assert figures["idle_power"].unit == "W"
    assert figures["energy_gross"].value == pytest.approx(4600 / 3600)
    assert figures["energy_net"].value == pytest.approx(3600 / 3600)
    assert figures["energy_per_step"].value == pytest.approx(230.0)
    assert figures["energy_per_step_net"].value == pytest.approx(180.0)
    assert {reading.method for reading in figures.values()} == {"rapl"}


def test_net_is_unknown_without_a_baseline_and_no_unit_of_work_means_no_share(powercap: Path) -> None:
    file = zone(powercap, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter("cpu")
    meter.start()
    file.write_text("3600000000")
    meter.stop()
    figures = meter.readings("token", 0)
    assert figures["energy_gross"].value == pytest.approx(1.0)
    assert figures["energy_net"].value is None
    assert "baseline" in figures["energy_net"].reason
    assert figures["energy_per_token"].value is None
    assert "no token" in figures["energy_per_token"].reason
    assert "no token" in figures["energy_per_token_net"].reason
