"""Who is refused when there is no memory for what a load tried to serve: nobody who asks for less."""

from __future__ import annotations

import pytest

from lmd.daemon.errors import DeviceMemoryShort
from lmd.daemon.residency.keep_alive import Wish
from lmd.daemon.residency.requests import Requests
from lmd.daemon.residency.ticket import Ticket
from lmd.daemon.residency.values import LoadSettings, Waiting

SHORT = DeviceMemoryShort("m", needed_bytes=2, free_bytes=1, device="cuda0")


class Office:
    """Takes tickets back."""

    def wait_status(self, ticket: Ticket) -> Waiting:
        return Waiting(0)

    def give_back(self, ticket: Ticket) -> None:
        return None


def queue(*wanted: LoadSettings) -> tuple[Requests, list[Ticket]]:
    """Return the requests of a model, in order."""
    requests = Requests(wait_s=100)
    tickets = [Ticket(Office(), settings, Wish(value=None, last_used=0)) for settings in wanted]  # type: ignore[arg-type]
    for ticket in tickets:
        requests.add(ticket)
    return requests, tickets


@pytest.mark.parametrize(
    ("num_ctx", "num_gpu", "less"),
    [
        pytest.param(4096, 99, False, id="the same"),
        pytest.param(8192, 99, False, id="more context"),
        pytest.param(2048, 99, True, id="less context"),
        pytest.param(4096, -1, True, id="wherever it fits"),
        pytest.param(4096, 0, True, id="main memory"),
        pytest.param(8192, 0, True, id="main memory has room for more context"),
        pytest.param(4096, 20, True, id="fewer layers"),
    ],
)
def test_what_asks_for_less_than_99_layers(num_ctx: int, num_gpu: int, less: bool) -> None:
    refused = LoadSettings(num_ctx=4096, num_gpu=99)
    assert LoadSettings(num_ctx=num_ctx, num_gpu=num_gpu).asks_less_than(refused) is less


async def test_only_those_are_refused_who_asked_for_all_of_it() -> None:
    refused = LoadSettings(num_ctx=4096, num_gpu=99)
    requests, (all_layers, any_place, main) = queue(refused, LoadSettings(4096), LoadSettings(4096, num_gpu=0))
    requests.refuse_larger(SHORT, requests.target())
    assert list(requests.waiting) == [any_place, main]
    with pytest.raises(DeviceMemoryShort):
        all_layers.raise_refusal()
    assert not requests.narrow
    assert requests.target().num_gpu == -1


async def test_when_nobody_asked_for_all_of_it_the_first_is_tried_alone() -> None:
    first, second = LoadSettings(1024, num_gpu=99), LoadSettings(4096)
    requests, tickets = queue(first, second)
    together = requests.target()
    assert (together.num_ctx, together.num_gpu) == (4096, 99)
    requests.refuse_larger(SHORT, together)
    assert list(requests.waiting) == tickets
    assert requests.target() == first
    requests.refuse_larger(SHORT, first)
    assert list(requests.waiting) == tickets[1:]
    assert requests.target() == second
