"""A driver that hangs holds up nobody for long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from structlog.testing import capture_logs

from lmd.daemon.devices.patience import PatientCards
from lmd.daemon.devices.values import Card
from tests.support.leaks import until

L4 = Card("nvidia", 0, "NVIDIA L4", "0000:01:00.0", 24, 23)


class Driver:
    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.asked = 0
        self.error: Exception | None = None

    def cards(self) -> Sequence[Card]:
        self.asked += 1
        assert self.answers.wait(20)
        if self.error is not None:
            raise self.error
        return [L4]

    def look_again(self) -> None:
        raise LookupError


async def test_what_the_driver_says_is_handed_on() -> None:
    driver = Driver()
    cards = PatientCards(driver)
    assert cards.cards() == [L4]
    assert cards.cards() == [L4]
    assert driver.asked == 2, "nothing is remembered in its stead"
    with pytest.raises(LookupError):
        cards.look_again()
    driver.error = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError):
        cards.cards()
    driver.error = None
    assert cards.cards() == [L4]


async def test_a_driver_that_hangs_is_waited_for_once_and_its_cards_are_as_good_as_lost() -> None:
    driver = Driver()
    cards = PatientCards(driver, answer_s=0.05)
    await until(lambda: cards.cards() == [L4])
    driver.answers.clear()
    before = driver.asked
    try:
        with capture_logs() as logs:
            for _ in range(3):
                [card] = cards.cards()
                assert (card.description, card.free_bytes) == ("NVIDIA L4", 0)
                assert card.fault == "its driver does not answer"
        assert [entry["event"] for entry in logs] == ["driver_hangs"]
        assert driver.asked == before + 1, "one question at a time"
    finally:
        driver.answers.set()
    await until(lambda: cards.cards() == [L4])


async def test_a_driver_that_never_answered_has_no_cards() -> None:
    driver = Driver()
    driver.answers.clear()
    cards = PatientCards(driver, answer_s=0.05)
    try:
        assert cards.cards() == []
    finally:
        driver.answers.set()


async def test_callers_at_the_same_time_share_a_question() -> None:
    driver = Driver()
    driver.answers.clear()
    cards = PatientCards(driver, answer_s=0.2)
    try:
        assert await asyncio.gather(*(asyncio.to_thread(cards.cards) for _ in range(4))) == [[]] * 4
        assert driver.asked == 1
    finally:
        driver.answers.set()
