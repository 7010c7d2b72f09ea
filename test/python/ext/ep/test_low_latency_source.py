"""Low-latency combines that are reduced at the tokens' home."""

import itertools

import pytest
from low_latency_checks import BF16, FP8, ll_buffer, ll_round_trip, shape_for, size_hint
from low_latency_reference import LlWorld

pytestmark = pytest.mark.mp


def _reduced_at_home(me, shape, ranks_per_node):
    """Every way, in turn with combines that are reduced where the experts are."""
    nodes = {} if ranks_per_node is None else {"ranks_per_node": ranks_per_node}
    source = {"combine_reduce": "source", "num_topk": shape.topk, "spans_nodes": bool(nodes)}
    room = max(size_hint(shape), size_hint(shape, **source))
    with ll_buffer(me, shape, num_rdma_bytes=room, **nodes) as buffer:
        ways = itertools.product(
            ({}, {"return_recv_hook": True}, {"async_finish": True}), ("source", "rank"), (0, 1)
        )
        for call, (how, reduce, more) in enumerate(ways):
            how = {"zero_copy": more > 0, "out": more > 0, "reduce": reduce, **how}
            ll_round_trip(me, buffer, LlWorld(shape, call), FP8 if more else BF16, **how)


@pytest.mark.parametrize("ranks, ranks_per_node", [(1, None), (2, None), (4, None), (3, 2)])
def test_reduced_at_home(run_ranks, ranks, ranks_per_node):
    run_ranks(_reduced_at_home, ranks, shape_for(ranks), ranks_per_node)
