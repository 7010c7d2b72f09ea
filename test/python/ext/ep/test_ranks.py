"""The launcher itself: a failure of any rank must be seen, with its reason."""

import threading

import pytest
from ranks import RanksFailed, run_threads

pytestmark = pytest.mark.mp


def _returns(me, factor):
    return me.rank * factor


def _raises(me):
    if me.rank == 1:
        raise ValueError("the reason")


def _hangs(me):
    if me.rank == 0:
        threading.Event().wait()


def test_results_come_in_order(run_ranks):
    assert run_ranks(_returns, 2, 10) == [0, 10]


def test_a_failure_shows_every_rank(run_ranks):
    with pytest.raises(RanksFailed) as caught:
        run_ranks(_raises, 2)
    assert "rank 0: no error" in str(caught.value)
    assert "rank 1: Traceback" in str(caught.value) and "the reason" in str(caught.value)
    assert run_ranks(_returns, 2, 3) == [0, 3]  # fresh ranks


def test_a_rank_that_hangs_is_ended(run_ranks):
    with pytest.raises(RanksFailed, match="rank 0: no answer .limit 2 s"):
        run_ranks(_hangs, 2, limit=2)


def test_threads(platform):
    assert run_threads(_returns, 3, platform, (5,), 30) == [0, 5, 10]
    with pytest.raises(RanksFailed, match="the reason"):
        run_threads(_raises, 2, platform, (), 30)
