"""low_latency_combine with use_logfmt: sums that travel in 10 bits per value."""

import itertools

import pytest
import torch
from low_latency_checks import BF16, FP8, ll_buffer, ll_round_trip, shape_for
from low_latency_reference import LlWorld, host

pytestmark = pytest.mark.mp


def _logfmt(me, shape):
    """Call after call in both formats; the other one gives other values where sums have crossed."""
    with ll_buffer(me, shape) as buffer:
        for call, (form, hook) in enumerate(itertools.product((BF16, FP8), (False, True))):
            how = {"return_recv_hook": True} if hook else {"async_finish": True}
            world = LlWorld(shape, call)
            plain = ll_round_trip(me, buffer, world, form, zero_copy=hook, **how)
            short = ll_round_trip(me, buffer, world, form, out=hook, use_logfmt=True, **how)
            assert torch.equal(host(plain), host(short)) == (shape.ranks == 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_logfmt(run_ranks, ranks):
    run_ranks(_logfmt, ranks, shape_for(ranks))
