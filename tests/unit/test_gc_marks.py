"""Mark and sweep over abstract nodes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmd.registry.store.gc import is_young, mark, sweep_order

NODES = st.integers(0, 12)
GRAPHS = st.dictionaries(NODES, st.lists(NODES, max_size=4))


def reachable(roots: set[int], graph: dict[int, list[int]]) -> set[int]:
    """The definition, as slow as it is plain: grow until nothing is added."""
    found = set(roots)
    while True:
        grown = found | {node for each in found for node in graph.get(each, ())}
        if grown == found:
            return found
        found = grown


@given(st.sets(NODES), GRAPHS)
def test_marking_finds_exactly_what_can_be_reached(roots: set[int], graph: dict[int, list[int]]) -> None:
    assert mark(roots, lambda node: graph.get(node, ())) == reachable(roots, graph)


@given(st.sets(NODES), GRAPHS)
def test_sweeping_keeps_what_is_left_whole(garbage: set[int], graph: dict[int, list[int]]) -> None:
    """Stopped anywhere, no node is left that refers to one that is gone (of a graph without cycles)."""
    graph = {node: [other for other in others if other > node] for node, others in graph.items()}
    order = sweep_order(garbage, lambda node: graph.get(node, ()))
    assert sorted(order) == sorted(garbage)
    for position, node in enumerate(order):
        assert not set(graph.get(node, ())) & set(order[:position])


@given(st.sets(NODES), GRAPHS)
def test_cycles_end(garbage: set[int], graph: dict[int, list[int]]) -> None:
    assert sorted(sweep_order(garbage, lambda node: graph.get(node, ()))) == sorted(garbage)


def test_deep_graphs_do_not_exhaust_the_stack() -> None:
    graph = {node: [node + 1] for node in range(100_000)}
    assert len(mark({0}, lambda node: graph.get(node, ()))) == 100_001
    assert sweep_order(graph, lambda node: graph.get(node, ()))[:2] == [0, 1]


def test_the_grace_period() -> None:
    assert is_young(stamp=100.0, now=159.0, grace_s=60.0)
    assert not is_young(stamp=100.0, now=160.0, grace_s=60.0)
    assert is_young(stamp=500.0, now=100.0, grace_s=60.0), "the clock was set back"
    assert not is_young(stamp=500.0, now=100.0, grace_s=0.0), "no grace was asked for"
