"""The channel never blocks: what the daemon does not read grows together, in order, and is bounded."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from lmd.runner.answer_parser import Call, Part
from lmd.runner.channel import Channel
from lmd.runner.v1 import frames_pb2
from lmd.runner.wire import MAX_FRAME_BYTES, WireClosed, WireError, frame


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    # As little as the kernel allows, so that "full" comes soon.
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with ours, theirs:
        yield Channel(ours), theirs


def read_all(channel: Channel, theirs: socket.socket) -> list[frames_pb2.RunnerFrame]:
    theirs.setblocking(False)
    data = bytearray()
    while True:
        channel.flush()
        try:
            data += theirs.recv(1 << 20)
        except BlockingIOError:
            if not channel.has_unsent:
                break
    frames = []
    while data:
        (length,) = struct.unpack_from(">I", data)
        frames.append(frames_pb2.RunnerFrame.FromString(bytes(data[4 : 4 + length])))
        del data[: 4 + length]
    return frames


def finished(request_id: int) -> frames_pb2.RunnerFrame:
    return frames_pb2.RunnerFrame(finished=frames_pb2.Finished(request_id=request_id))


def test_texts_grow_together_while_nobody_reads(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    expected = dict.fromkeys(range(4), "")
    for count in range(1, 20_001):
        for request_id in expected:
            text = f"{request_id}.{count} "
            expected[request_id] += text
            channel.send_text(request_id, 0, text, count)
        channel.flush()
    for request_id in expected:
        channel.send(finished(request_id), last_of=request_id)
    frames = read_all(channel, theirs)
    assert len(frames) < 500
    got = dict.fromkeys(expected, "")
    ended: set[int] = set()
    for received in frames:
        if received.HasField("delta"):
            assert received.delta.request_id not in ended
            got[received.delta.request_id] += received.delta.text
        else:
            ended.add(received.finished.request_id)
    assert got == expected
    assert ended == set(expected)


def test_thoughts_text_and_calls_keep_their_order(ends: tuple[Channel, socket.socket]) -> None:
    """Within a delta thoughts come before text, and calls after it: what comes in another order begins a new one."""
    channel, theirs = ends
    call = Part(call=Call("f", "{}"))
    said = [
        [Part(thinking="a")],
        [Part(thinking="b"), Part(text="c")],
        [],
        [call],
        [call, Part(text="d")],
        [Part(thinking="e"), call],
        [Part(text="f")],
    ]
    for count, parts in enumerate(said, 1):
        channel.send_text(1, 0, parts, count)
    channel.send_text(1, 1, [Part(text="other")], 1)
    channel.send(finished(1), last_of=1)
    *frames, other, _ = read_all(channel, theirs)
    deltas = [(f.delta.thinking, f.delta.text, len(f.delta.tool_calls), f.delta.generated_tokens) for f in frames]
    assert deltas == [("ab", "c", 2, 5), ("", "d", 0, 6), ("e", "", 1, 7), ("", "f", 0, 7)]
    assert (other.delta.choice, other.delta.text) == (1, "other")
    assert frames[0].delta.tool_calls[0] == frames_pb2.ToolCall(name="f", arguments="{}")


def test_large_calls_congest(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    channel.send_text(1, 0, [Part(call=Call("f", "x" * (5 << 20)))], 1)
    assert channel.congested
    channel.send_text(1, 0, [Part(thinking="x" * (5 << 20))], 1)
    read_all(channel, theirs)
    assert not channel.congested


def test_congestion_is_told_and_passes(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    for _ in range(5):
        channel.send_text(1, 0, "x" * (1 << 20), 1)
        channel.flush()
    assert channel.congested
    read_all(channel, theirs)
    assert not channel.congested


def test_texts_wait_a_moment_for_company_but_not_for_the_first(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    # Tokens before it said nothing.
    for choice in range(2):
        channel.send_text(1, choice, "first", 3)
        channel.flush(now=False)
        assert not channel.has_unsent
    channel.send_text(1, 0, "second", 2)
    channel.flush(now=False)
    channel.send(finished(1), last_of=1)
    channel.flush(now=False)
    assert not channel.has_unsent, "an end is urgent"


def test_frames_arrive_whole_however_they_are_cut(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    ping = frames_pb2.DaemonFrame(ping=frames_pb2.Ping(nonce=7))
    data = frame(ping.SerializeToString()) * 3
    received = []
    for byte in data:
        theirs.sendall(bytes([byte]))
        received += channel.receive()
    assert received == [ping] * 3
    theirs.sendall(data)
    assert channel.receive() == [ping] * 3


def test_the_end_is_seen_after_the_last_frame(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    theirs.sendall(frame(frames_pb2.DaemonFrame(drain=frames_pb2.Drain()).SerializeToString()))
    theirs.close()
    assert len(channel.receive()) == 1
    with pytest.raises(WireClosed):
        channel.receive()
    channel.send(finished(1))
    with pytest.raises(WireClosed):
        channel.flush()


@pytest.mark.parametrize("data", [struct.pack(">I", MAX_FRAME_BYTES + 1), frame(b"\xff\xff\xff")])
def test_nonsense_is_refused(ends: tuple[Channel, socket.socket], data: bytes) -> None:
    channel, theirs = ends
    theirs.sendall(data)
    with pytest.raises(WireError):
        channel.receive()
