"""Dispatch and combine in plain torch on the CPU: slow, short, and obviously right."""

import dataclasses
from typing import List, Optional, Tuple

import torch


@dataclasses.dataclass(frozen=True)
class Shape:
    tokens: Tuple[int, ...]  # of each rank
    hidden: int = 64
    topk: int = 2
    experts: int = 8
    fp8: bool = False
    missing: float = 0.0  # share of top-k entries that are -1
    skew: float = 0.0  # 0 = uniform; towards 1, the first experts get nearly everything
    ranks_per_node: int = 0  # 0 = all share a node

    @property
    def ranks(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass
class Inputs:
    """What one rank sends."""

    x: torch.Tensor
    scales: Optional[torch.Tensor]
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    bias: Tuple[torch.Tensor, torch.Tensor]

    def to(self, device) -> "Inputs":
        def moved(t):
            return None if t is None else t.to(device)

        return Inputs(
            moved(self.x),
            moved(self.scales),
            moved(self.topk_idx),
            moved(self.topk_weights),
            (moved(self.bias[0]), moved(self.bias[1])),
        )

    @property
    def payload(self):
        return self.x if self.scales is None else (self.x, self.scales)


def make_inputs(shape: Shape, rank: int, seed: int = 0) -> Inputs:
    """The same on every process for the same arguments."""
    g = torch.Generator().manual_seed(1000 * seed + rank)
    n, h = shape.tokens[rank], shape.hidden
    x = torch.randn(n, h, generator=g).bfloat16()
    scales = None
    if shape.fp8:
        x = torch.randint(0, 120, (n, h), generator=g, dtype=torch.uint8)
        x = x.view(torch.float8_e4m3fn)
        scales = torch.rand(n, (h + 127) // 128, generator=g)
    favour = torch.arange(shape.experts, 0, -1).float() ** (8 * shape.skew)
    scores = torch.rand(n, shape.experts, generator=g).clamp_min(1e-6).log() / favour
    topk_idx = scores.topk(shape.topk, dim=1).indices
    topk_idx[torch.rand(n, shape.topk, generator=g) < shape.missing] = -1
    topk_weights = torch.rand(n, shape.topk, generator=g)
    bias = tuple(torch.randn(n, h, generator=g).bfloat16() for _ in range(2))
    return Inputs(x, scales, topk_idx, topk_weights, bias)


@dataclasses.dataclass
class Received:
    """What one rank receives; rows ordered by (source rank, token)."""

    x: torch.Tensor
    scales: Optional[torch.Tensor]
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    source_rank: torch.Tensor
    source_token: torch.Tensor
    per_expert: List[int]


def rank_of_expert(shape: Shape) -> torch.Tensor:
    return torch.arange(shape.experts) // (shape.experts // shape.ranks)


def tokens_in_rank(shape: Shape, inputs: Inputs, hosts: torch.Tensor) -> torch.Tensor:
    """[tokens, ranks] bool."""
    result = torch.zeros(inputs.topk_idx.size(0), shape.ranks, dtype=torch.bool)
    for rank in range(shape.ranks):
        local = hosts == rank
        result[:, rank] = (local[inputs.topk_idx.clamp_min(0)] & (inputs.topk_idx >= 0)).any(1)
    return result


def dispatch(
    shape: Shape, everyone: List[Inputs], me: int, hosts: Optional[torch.Tensor] = None
) -> Received:
    hosts = rank_of_expert(shape) if hosts is None else hosts
    mine = (hosts == me).nonzero().flatten()  # global ids of this rank's experts
    local_of = torch.full((shape.experts + 1,), -1, dtype=torch.int64)  # last: for -1
    local_of[mine] = torch.arange(len(mine))
    parts = []
    for source, sent in enumerate(everyone):
        token = tokens_in_rank(shape, sent, hosts)[:, me].nonzero().flatten()
        idx = local_of[sent.topk_idx[token]]
        weights = torch.where(idx >= 0, sent.topk_weights[token], 0.0)
        raw = sent.x.view(torch.uint8)[token].view(sent.x.dtype)
        scales = None if sent.scales is None else sent.scales[token]
        parts.append((raw, scales, idx, weights, torch.full_like(token, source), token))
    x, scales, idx, weights, rank, token = (
        None if items[0] is None else _cat(items) for items in zip(*parts)
    )
    counts = [int((idx == e).sum()) for e in range(len(mine))]
    return Received(x, scales, idx, weights, rank, token, counts)


def experts(received_x, scales, topk_weights, rank: int) -> torch.Tensor:
    """The experts' output of one rank: something else on every rank and for every row."""
    x = received_x.float()
    if scales is not None:
        x = x * scales.repeat_interleave(128, 1)[:, : x.size(1)]
    factor = topk_weights.sum(1, keepdim=True) + (rank + 1) * 0.5
    return (x * factor).bfloat16()


def nodes_of(shape: Shape, rank: int) -> List[List[int]]:
    """Ranks by node, the node of `rank` first, then ascending."""
    per_node = shape.ranks_per_node or shape.ranks
    ranks = list(range(shape.ranks))
    nodes = [ranks[i : i + per_node] for i in range(0, shape.ranks, per_node)]
    own = nodes.pop(rank // per_node)
    return [own, *nodes]


def combine(
    shape: Shape, outputs: List[torch.Tensor], received: List[Received], me: int, bias=()
) -> torch.Tensor:
    """float32: the biases, then the own node's ranks in ascending order, then the sums of the other
    nodes, each made the same way and rounded to bfloat16; rounded at the end."""

    def add(total: torch.Tensor, rank: int) -> None:
        got = received[rank]
        mine = got.source_rank == me
        total[got.source_token[mine]] += outputs[rank][mine].float()

    total = torch.zeros(shape.tokens[me], outputs[0].size(1))
    for term in bias:
        total += term.float()
    own, *others = nodes_of(shape, me)
    for rank in own:
        add(total, rank)
    for node in others:
        part = torch.zeros_like(total)
        for rank in node:
            add(part, rank)
        total += part.bfloat16().float()
    return total.bfloat16()


def combine_weights(shape: Shape, received: List[Received], me: int) -> torch.Tensor:
    total = torch.zeros(shape.tokens[me], shape.topk)
    for node in nodes_of(shape, me):
        part = torch.zeros_like(total)
        for rank in node:
            mine = received[rank].source_rank == me
            part[received[rank].source_token[mine]] += received[rank].topk_weights[mine]
        total += part
    return total


def _cat(items) -> torch.Tensor:
    if items[0].dtype == torch.float8_e4m3fn:
        return torch.cat([t.view(torch.uint8) for t in items]).view(torch.float8_e4m3fn)
    return torch.cat(items)
