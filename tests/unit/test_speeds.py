"""What is learned from answers about a machine's speed, and what it says about models that never ran."""

from __future__ import annotations

import json
import sys

import pytest

from lmd.daemon.rated_bandwidth import rated_bandwidth
from lmd.daemon.residency.plans import Placement, Share
from lmd.daemon.residency.speeds import UNKNOWN, Expected, Part, Speeds, parts_of, place_name
from lmd.registry.digest import Digest
from lmd.registry.errors import LmdError
from tests.support.residents import Threads

MIB, GIB = 1 << 20, 1 << 30
SECOND_NS = 1_000_000_000
A, B = Digest.of(b"a"), Digest.of(b"b")


class Facts:
    def __init__(self) -> None:
        self.facts: dict[tuple[str, str], str] = {}
        self.broken = False

    def recall(self, kind: str, key: str) -> str | None:
        if self.broken:
            raise LmdError("the disk fails")
        return self.facts.get((kind, key))

    def remember(self, kind: str, key: str, value: str) -> None:
        if self.broken:
            raise LmdError("the disk fails")
        self.facts[kind, key] = value


@pytest.fixture
def facts() -> Facts:
    return Facts()


@pytest.fixture
def speeds(facts: Facts) -> Speeds:
    return Speeds(facts, Threads(), unrated)


async def unrated(_device: str) -> int:
    return 0


async def ran(speeds: Speeds, digest: Digest, active_bytes: int, per_second: int, device: str = "cpu") -> None:
    await speeds.note(digest, device, [Part(device, active_bytes)], tokens=10 * per_second, duration_ns=10 * SECOND_NS)


async def test_nothing_is_known_at_first(speeds: Speeds) -> None:
    assert await speeds.expect(A, "cpu", [Part("cpu", GIB)]) == UNKNOWN
    assert await speeds.bandwidth("cpu") == 0


async def test_a_model_that_ran_is_expected_to_run_like_that_again(speeds: Speeds) -> None:
    await ran(speeds, A, GIB, 40)
    assert await speeds.expect(A, "cpu", [Part("cpu", GIB)]) == Expected(40.0, calibrated=True)


async def test_another_model_is_as_fast_as_the_bandwidth_allows(speeds: Speeds) -> None:
    await ran(speeds, A, GIB, 40)
    assert await speeds.bandwidth("cpu") == 40 * GIB
    expected = await speeds.expect(B, "cpu", [Part("cpu", 4 * GIB)])
    assert expected.tokens_per_second == pytest.approx(10.0)
    assert expected.calibrated


async def test_experts_that_rest_do_not_count(speeds: Speeds) -> None:
    """Whoever asks brings the active bytes: a mixture of experts is as fast as what it reads of itself."""
    await ran(speeds, A, GIB, 40)
    expected = await speeds.expect(B, "cpu", [Part("cpu", 2 * GIB)])
    assert expected.tokens_per_second == pytest.approx(20.0)


async def test_only_the_best_counts_because_others_may_have_run_beside(speeds: Speeds) -> None:
    for per_second in (30, 40, 20):
        await ran(speeds, A, GIB, per_second)
    assert (await speeds.expect(A, "cpu", [])).tokens_per_second == 40


async def test_short_answers_say_nothing(speeds: Speeds) -> None:
    await speeds.note(A, "cpu", [Part("cpu", GIB)], tokens=15, duration_ns=SECOND_NS)
    await speeds.note(A, "cpu", [Part("cpu", GIB)], tokens=100, duration_ns=1000)
    assert await speeds.expect(A, "cpu", [Part("cpu", GIB)]) == UNKNOWN


async def test_what_a_tiny_model_did_says_nothing_about_a_large_one(speeds: Speeds) -> None:
    """A model of a megabyte lives in caches, or is slow for reasons that have nothing to do with memory."""
    await ran(speeds, A, MIB, 900)
    assert await speeds.expect(B, "cpu", [Part("cpu", GIB)]) == UNKNOWN
    assert (await speeds.expect(B, "cpu", [Part("cpu", 2 * MIB)])).calibrated


async def test_of_two_sizes_the_nearer_larger_one_counts(speeds: Speeds) -> None:
    await ran(speeds, A, 512 * MIB, 100)
    await ran(speeds, B, 4 * GIB, 10)
    expected = await speeds.expect(None, "cpu", [Part("cpu", 3 * GIB)])
    assert expected.tokens_per_second == pytest.approx(10 * 4 / 3)


async def test_parts_on_several_devices_add_their_time(speeds: Speeds) -> None:
    await ran(speeds, A, GIB, 10, "cpu")
    await ran(speeds, B, GIB, 90, "cuda0")
    expected = await speeds.expect(None, "cuda0+cpu", [Part("cuda0", GIB), Part("cpu", GIB)])
    assert expected.tokens_per_second == pytest.approx(9.0)


async def test_a_device_that_was_never_measured_makes_the_whole_unknown(speeds: Speeds) -> None:
    await ran(speeds, A, GIB, 10, "cpu")
    assert await speeds.expect(None, "cuda0+cpu", [Part("cuda0", GIB), Part("cpu", GIB)]) == UNKNOWN


async def test_a_split_model_is_remembered_by_itself_only(speeds: Speeds) -> None:
    parts = [Part("cuda0", GIB), Part("cpu", GIB)]
    await speeds.note(A, "cuda0+cpu", parts, tokens=30, duration_ns=SECOND_NS)
    assert (await speeds.expect(A, "cuda0+cpu", parts)).tokens_per_second == 30
    assert await speeds.bandwidth("cuda0") == await speeds.bandwidth("cpu") == 0


async def test_the_next_daemon_knows_it_too(speeds: Speeds, facts: Facts) -> None:
    await ran(speeds, A, GIB, 40)
    await speeds.stop()
    again = Speeds(facts, Threads(), unrated)
    assert (await again.expect(A, "cpu", [])).tokens_per_second == 40
    assert await again.bandwidth("cpu") == 40 * GIB


@pytest.mark.parametrize(
    "text", ["", "[]", "-7", "{", '{"cpu": 3}', '{"cpu": {"x": 1}}', '{"cpu": {"31": null}}', "nan"]
)
async def test_what_cannot_be_read_is_unknown(facts: Facts, text: str) -> None:
    first = Speeds(facts, Threads(), unrated)
    await ran(first, A, GIB, 40)
    await first.stop()
    facts.facts = dict.fromkeys(facts.facts, text)
    assert await Speeds(facts, Threads(), unrated).expect(A, "cpu", [Part("cpu", GIB)]) == UNKNOWN


async def test_an_absurd_record_is_not_believed(facts: Facts) -> None:
    first = Speeds(facts, Threads(), unrated)
    await ran(first, A, GIB, 40)
    await first.stop()
    facts.facts = dict.fromkeys(facts.facts, json.dumps({"cpu": {"31": 1e300}}))
    assert await Speeds(facts, Threads(), unrated).bandwidth("cpu") == 0


async def test_a_store_that_fails_costs_the_memory_only(speeds: Speeds, facts: Facts) -> None:
    facts.broken = True
    await ran(speeds, A, GIB, 40)
    await speeds.stop()
    assert (await speeds.expect(A, "cpu", [])).tokens_per_second == 40


async def test_a_device_that_says_what_it_is_rated_for_is_expected_to_reach_a_part_of_it(facts: Facts) -> None:
    async def rated(device: str) -> int:
        return 1000 * GIB if device == "cuda0" else 0

    speeds = Speeds(facts, Threads(), rated)
    expected = await speeds.expect(A, "cuda0", [Part("cuda0", 10 * GIB)])
    assert expected.tokens_per_second == pytest.approx(60.0)
    assert not expected.calibrated
    assert await speeds.expect(A, "cuda0:1+cpu:1", [Part("cuda0", GIB), Part("cpu", GIB)]) == UNKNOWN
    await ran(speeds, B, 10 * GIB, 80, "cuda0")
    expected = await speeds.expect(A, "cuda0", [Part("cuda0", 10 * GIB)])
    assert expected.tokens_per_second == pytest.approx(80.0)
    assert expected.calibrated


class Driver:
    """Stands in for NVIDIA's library: an H100."""

    NVML_CLOCK_MEM = 2

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> int:
        if bus_id != "0000:c1:00.0":
            raise self.NVMLError("no such device")
        return 0

    def nvmlDeviceGetMemoryBusWidth(self, _handle: int) -> int:
        return 5120

    def nvmlDeviceGetMaxClockInfo(self, _handle: int, _clock: int) -> int:
        return 2619


def test_what_a_gpu_is_rated_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    assert rated_bandwidth("0000:c1:00.0") == pytest.approx(3.35e12, rel=0.01)
    assert rated_bandwidth("0000:c2:00.0") == rated_bandwidth("") == 0


def test_a_place_is_called_by_its_layers() -> None:
    whole = Placement(0, (Share("cuda0", 5, 33), Share("cpu", 1)))
    split = Placement(0, (Share("cuda0", 5, 20), Share("cpu", 1, 13)))
    assert (place_name(whole), place_name(split)) == ("cuda0", "cuda0:20+cpu:13")
    assert parts_of(whole, 330) == [Part("cuda0", 330)]
    assert parts_of(split, 330) == [Part("cuda0", 200), Part("cpu", 130)]
