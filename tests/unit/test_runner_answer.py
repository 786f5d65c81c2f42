from __future__ import annotations

from lmd.daemon import runner_answer
from lmd.daemon.answer_events import Delta, TokenLogprob
from lmd.daemon.deadline import Deadline
from lmd.daemon.errors import ClientStalled, DeadlineExceeded, EngineFailed, Unloaded
from lmd.daemon.runner_answer import Answer, error_of
from lmd.registry.errors import CapabilityMissing, InvalidRequest, LmdError
from lmd.runner.v1 import frames_pb2 as frames


class Rig:
    """An answer, what was taken back, and how often its end was told."""

    def __init__(self, max_pending_bytes: int = runner_answer.MAX_PENDING_BYTES) -> None:
        self.cancelled: list[int] = []
        self.ends = 0
        self.answer = Answer(7, self.cancelled.append, max_pending_bytes=max_pending_bytes)
        self.answer.when_ended(self._note_end)

    def _note_end(self) -> None:
        self.ends += 1

    def say(self, text: str, tokens: int, choice: int = 0, *logprobs: frames.TokenLogprob) -> None:
        self.answer.note_delta(
            frames.Delta(request_id=7, text=text, generated_tokens=tokens, choice=choice, logprobs=logprobs)
        )


def test_text_is_merged_choice_by_choice() -> None:
    rig = Rig()
    rig.say("a", 1)
    rig.say("x", 1, 1)
    rig.say("b", 2)
    assert rig.answer.take() == [Delta("ab", 2, 0), Delta("x", 1, 1)]
    assert rig.answer.take() == []
    rig.say("y", 2, 1)
    assert rig.answer.take() == [Delta("y", 2, 1)]


def test_log_probabilities_are_merged_too() -> None:
    rig = Rig()
    alternative = frames.TokenLogprob(id=2, token=b"\xff", logprob=-2)
    rig.say("", 1, 0, frames.TokenLogprob(id=1, token=b"\xc3", logprob=-0.5, top=[alternative]))
    rig.say("ä", 2, 0, frames.TokenLogprob(id=3, token=b"\xa4", logprob=-1))
    [delta] = rig.answer.take()
    assert delta.text == "ä"
    assert delta.logprobs == (
        TokenLogprob(1, b"\xc3", -0.5, (TokenLogprob(2, b"\xff", -2),)),
        TokenLogprob(3, b"\xa4", -1),
    )


def test_merged_pieces_stay_below_what_clients_take() -> None:
    rig = Rig()
    text = "x" * 100_000
    for number in range(1, 31):
        rig.say(text, number, number % 2)
    deltas = rig.answer.take()
    for choice in (0, 1):
        assert "".join(delta.text for delta in deltas if delta.choice == choice) == text * 15
        assert [d.generated_tokens for d in deltas if d.choice == choice][-1] == 30 - choice
    assert max(len(delta.text) for delta in deltas) < runner_answer.MAX_DELTA_BYTES + 2 * len(text)
    assert len(deltas) < 10


def test_a_client_that_reads_nothing_is_given_up() -> None:
    rig = Rig(max_pending_bytes=1000)
    rig.say("x" * 500, 1)
    rig.say("x" * 600, 2)
    assert rig.cancelled == [7]
    assert isinstance(rig.answer.error, ClientStalled)
    assert rig.ends == 1
    rig.say("more", 3)
    rig.answer.note_error(Unloaded("m"))  # what the runner says to the cancel
    rig.answer.note_finished(frames.Finished(request_id=7))
    assert rig.answer.take() == [Delta("x" * 500, 1)]
    assert isinstance(rig.answer.error, ClientStalled)
    assert (rig.answer.finished, rig.ends) == (None, 1)


def test_a_client_that_reads_is_not_given_up_however_long_the_answer_is() -> None:
    rig = Rig(max_pending_bytes=1000)
    for number in range(1, 100):
        rig.say("x" * 500, number)
        assert rig.answer.take()
    assert not rig.answer.ended


def test_the_end_is_told_once_also_to_one_who_asks_late() -> None:
    rig = Rig()
    rig.answer.note_finished(frames.Finished(request_id=7))
    assert rig.ends == 1
    rig.answer.when_ended(rig._note_end)
    assert rig.ends == 2
    rig.answer.close()
    assert rig.cancelled == []


def error(kind: frames.Failed.Kind.ValueType, field: str = "") -> LmdError:
    failed = frames.Failed(request_id=7, kind=kind, message="the words", field=field)
    return error_of(failed, name="m", log="log", deadline=Deadline(3))


def test_failures_of_the_runner_become_domain_errors() -> None:
    invalid = error(frames.Failed.KIND_INVALID, "format")
    assert isinstance(invalid, InvalidRequest)
    assert (invalid.message, invalid.metadata) == ("the words", {"field": "format"})
    assert error(frames.Failed.KIND_INVALID).metadata == {"field": "prompt"}
    missing = error(frames.Failed.KIND_CAPABILITY, "shift")
    assert isinstance(missing, CapabilityMissing)
    assert missing.metadata["capability"] == "shift"
    assert missing.hint == "the words"
    late = error(frames.Failed.KIND_DEADLINE)
    assert isinstance(late, DeadlineExceeded)
    assert late.metadata == {"timeout_s": "3"}
    assert isinstance(error(frames.Failed.KIND_ENGINE), EngineFailed)
