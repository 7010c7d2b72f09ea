"""One dispatch and combine against the reference, used by several test files."""

from typing import Any, List, Optional

import reference
import torch
from reference import Shape, make_inputs


def same(name: str, got: Optional[torch.Tensor], wanted: Optional[torch.Tensor]) -> None:
    """Equal shape, dtype and bits; the message shows where they differ."""
    if wanted is None:
        assert got is None, f"{name}: None expected, got {got.shape}"
        return
    assert got is not None, f"{name} is None"
    if got.is_cuda:  # see Rank.put
        torch.cuda.current_stream(got.device).synchronize()
    got = got.cpu()
    assert got.dtype == wanted.dtype, f"{name}: dtype {got.dtype}, expected {wanted.dtype}"
    assert got.shape == wanted.shape, f"{name}: {tuple(got.shape)}, expected {tuple(wanted.shape)}"
    if got.dtype == torch.float8_e4m3fn:
        got, wanted = got.view(torch.uint8), wanted.view(torch.uint8)
    wrong = (got != wanted).nonzero()
    assert wrong.numel() == 0, (
        f"{name}: {len(wrong)} of {got.numel()} values differ, first at {wrong[0].tolist()}: "
        f"{got[tuple(wrong[0])]}, expected {wanted[tuple(wrong[0])]}"
    )


class World:
    """What all ranks send and receive for one shape and seed, computed by the reference."""

    def __init__(
        self,
        shape: Shape,
        seed: int = 0,
        hosts: Optional[torch.Tensor] = None,
        routing_of_seed: Optional[int] = None,
    ) -> None:
        self.shape = shape
        self.hosts = reference.rank_of_expert(shape) if hosts is None else hosts
        self.inputs = [make_inputs(shape, r, seed) for r in range(shape.ranks)]
        if routing_of_seed is not None:
            for rank, sent in enumerate(self.inputs):
                other = make_inputs(shape, rank, routing_of_seed)
                sent.topk_idx, sent.topk_weights = other.topk_idx, other.topk_weights
        self.received = [
            reference.dispatch(shape, self.inputs, r, self.hosts) for r in range(shape.ranks)
        ]
        self.outputs = [
            reference.experts(got.x, got.scales, got.topk_weights, r)
            for r, got in enumerate(self.received)
        ]

    def combined(self, rank: int, bias=()) -> torch.Tensor:
        return reference.combine(self.shape, self.outputs, self.received, rank, bias)

    def combined_weights(self, rank: int) -> torch.Tensor:
        return reference.combine_weights(self.shape, self.received, rank)

    def check_layout(self, rank: int, layout: tuple) -> None:
        sent = self.inputs[rank]
        in_rank = reference.tokens_in_rank(self.shape, sent, self.hosts)
        chosen = sent.topk_idx[sent.topk_idx >= 0]
        per_expert = torch.bincount(chosen, minlength=self.shape.experts).int()
        same("num_tokens_per_rank", layout[0], in_rank.sum(0).int())
        per_node = self.shape.ranks_per_node
        if per_node in (0, self.shape.ranks):
            assert layout[1] is None
        else:
            in_node = torch.stack([part.any(1) for part in in_rank.split(per_node, 1)], 1)
            same("num_tokens_per_rdma_rank", layout[1], in_node.sum(0).int())
        same("num_tokens_per_expert", layout[2], per_expert)
        same("is_token_in_rank", layout[3], in_rank)

    def check_received(self, rank: int, recv_x: Any, rows: Optional[slice] = None) -> None:
        got = self.received[rank]
        x, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
        rows = slice(None) if rows is None else rows
        same("recv_x", x.view(torch.uint8)[rows].view(x.dtype), got.x)
        same("recv_x_scales", None if scales is None else scales[rows], got.scales)


def layout_of(buffer: Any, world: World, sent: Any, **options) -> tuple:
    return buffer.get_dispatch_layout(sent.topk_idx, world.shape.experts, **options)


def routing_of(layout: tuple, sent: Any) -> dict:
    """The keywords that dispatch takes from a layout."""
    return {
        "num_tokens_per_rank": layout[0],
        "num_tokens_per_rdma_rank": layout[1],
        "num_tokens_per_expert": layout[2],
        "is_token_in_rank": layout[3],
        "topk_idx": sent.topk_idx,
        "topk_weights": sent.topk_weights,
    }


def round_trip(buffer: Any, me: Any, world: World, alignment: int = 1, biases: int = 0) -> Any:
    """Layout, dispatch, experts, combine; everything is compared. Returns the handle."""
    sent = me.put(world.inputs[me.rank])
    got = world.received[me.rank]
    layout = layout_of(buffer, world, sent)
    world.check_layout(me.rank, layout)
    assert layout[4].event is None
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        sent.payload, expert_alignment=alignment, **routing_of(layout, sent)
    )
    assert event.event is None
    world.check_received(me.rank, recv_x)
    same("recv_topk_idx", recv_idx, got.topk_idx)
    same("recv_topk_weights", recv_weights, got.topk_weights)
    assert counts == [-(-n // alignment) * alignment for n in got.per_expert]
    assert type(counts) is list
    same("counts on the device", handle.recv_tokens_per_expert, torch.tensor(got.per_expert).int())
    same("recv_source_tokens", handle.recv_source_tokens, got.source_token.int())

    out = me.put(world.outputs[me.rank])
    bias = (None, sent.bias[0], sent.bias)[biases]
    combined, weights, event = buffer.combine(out, handle, topk_weights=recv_weights, bias=bias)
    assert event.event is None
    wanted_bias: List[torch.Tensor] = list(world.inputs[me.rank].bias[:biases])
    same("combined_x", combined, world.combined(me.rank, wanted_bias))
    same("combined_topk_weights", weights, world.combined_weights(me.rank))
    return handle
