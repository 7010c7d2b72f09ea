"""Low-latency dispatch and combine in plain torch: slow, short, and obviously right.

Payloads are keyed by (rank, token, call), every expert computes another function, and every choice
has another weight: a row that went astray cannot look right.
"""

import dataclasses
from typing import Any, List, Optional, Tuple

import torch
from checks import same


def host(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU. Waits for the stream first: see Rank.put."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor.cpu()


@dataclasses.dataclass(frozen=True)
class LlShape:
    tokens: Tuple[int, ...]  # of each rank
    hidden: int = 264  # more than two blocks of 128, the last one partial
    topk: int = 3
    experts: int = 8
    max_tokens: int = 9
    missing: float = 0.2  # share of top-k entries that are -1

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def local(self) -> int:
        return -(-self.experts // self.ranks)

    @property
    def rows(self) -> int:
        return self.ranks * self.max_tokens


@dataclasses.dataclass(frozen=True)
class Format:
    use_fp8: bool = False
    round_scale: bool = False
    use_ue8m0: bool = False

    @property
    def keywords(self) -> dict:
        return dataclasses.asdict(self)


FORMATS = {
    "bf16": Format(),
    "fp8": Format(True),
    "round_scale": Format(True, True),
    "ue8m0": Format(True, True, True),
}


@dataclasses.dataclass
class LlInputs:
    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor

    def to(self, device: Any) -> "LlInputs":
        return LlInputs(*(t.to(device) for t in (self.x, self.topk_idx, self.topk_weights)))


def make_inputs(shape: LlShape, rank: int, call: int) -> LlInputs:
    """The same on every process for the same arguments."""
    g = torch.Generator().manual_seed(100003 * call + 101 * rank + 7)
    n = shape.tokens[rank]
    x = torch.randn(n, shape.hidden, generator=g) * (1 + rank + torch.rand(n, 1, generator=g))
    topk_idx = torch.rand(n, shape.experts, generator=g).topk(shape.topk, dim=1).indices
    topk_idx[torch.rand(n, shape.topk, generator=g) < shape.missing] = -1
    return LlInputs(x.bfloat16(), topk_idx, torch.rand(n, shape.topk, generator=g) + 0.1)


def power_of_two(biased: torch.Tensor) -> torch.Tensor:
    """float32 of int32 exponents plus 127."""
    return (biased << 23).view(torch.float32)


def quantise(x: torch.Tensor, round_scale: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    """e4m3 values and float32 scales per 128 values of every row; the last block may be partial."""
    values, scales = [], []
    for block in x.float().split(128, dim=1):
        largest = block.abs().amax(1, keepdim=True).clamp_min(1e-4)
        # 448.0 / largest would be a product with the reciprocal.
        scale, factor = largest * torch.tensor(1 / 448.0), torch.tensor(448.0) / largest
        if round_scale:  # the next power of two
            fraction, exponent = torch.frexp(scale)
            scale = power_of_two(exponent - (fraction == 0.5).int() + 127)
            factor = 1 / scale
        values.append((block * factor).to(torch.float8_e4m3fn).view(torch.uint8))
        scales.append(scale)
    return torch.cat(values, 1).view(torch.float8_e4m3fn), torch.cat(scales, 1)


def dequantise(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`[.., hidden]` float32. `scales`: float32, or int32 of four exponents each."""
    if scales.dtype == torch.int32:
        exponents = torch.stack([(scales >> (8 * i)) & 0xFF for i in range(4)], -1)
        scales = power_of_two(exponents).flatten(-2)
    return values.float() * scales.repeat_interleave(128, -1)[..., : values.size(-1)]


class LlWorld:
    """What all ranks send in one call, and what they must get."""

    def __init__(self, shape: LlShape, call: int = 0) -> None:
        self.shape, self.call = shape, call
        self.inputs = [make_inputs(shape, r, call) for r in range(shape.ranks)]

    def sources(self, expert: int) -> List[List[int]]:
        """Per source rank the tokens that chose the expert, in order."""
        return [
            (sent.topk_idx == expert).any(1).nonzero().flatten().tolist() for sent in self.inputs
        ]

    def counts(self, rank: int) -> List[int]:
        return [sum(map(len, self.sources(e))) for e in self.experts(rank)]

    def experts(self, rank: int) -> range:
        """Global ids of a rank's experts; there may be ids beyond the last expert."""
        return range(rank * self.shape.local, (rank + 1) * self.shape.local)

    def apply(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """What an expert computes; something else for every expert and call."""
        factor = 0.75 + 0.5 * expert + 0.25 * (self.call % 3)
        return (x.float() * factor + 0.125 * (expert % 3)).bfloat16()

    # ---- dispatch --------------------------------------------------------------------------

    def check_dispatch(self, rank: int, form: Format, recv_x: Any, count: Any, handle: Any) -> None:
        shape = self.shape
        assert isinstance(handle, tuple) and len(handle) == 5
        assert handle[2:] == (shape.max_tokens, shape.hidden, shape.experts)
        src_info, layout_range = map(host, handle[:2])
        assert (src_info.dtype, tuple(src_info.shape)) == (torch.int32, (shape.local, shape.rows))
        assert tuple(layout_range.shape) == (shape.local, shape.ranks)
        assert layout_range.dtype == torch.int64
        same("recv_count", count, torch.tensor(self.counts(rank), dtype=torch.int32))
        x, scales = self.check_form(form, recv_x)
        for i, expert in enumerate(self.experts(rank)):
            begin = 0
            for source, tokens in enumerate(self.sources(expert)):
                what, end = f"expert {expert}, source {source}", begin + len(tokens)
                packed = int(layout_range[i, source])
                assert (packed >> 32, packed & 0xFFFFFFFF) == (begin, len(tokens)), what
                assert src_info[i, begin:end].tolist() == tokens, what
                self.check_rows(
                    what, form, x[i, begin:end], scales, (i, begin, end), source, tokens
                )
                begin = end

    def check_form(self, form: Format, recv_x: Any) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Shapes, types and strides; returns them on the CPU."""
        shape = self.shape
        assert isinstance(recv_x, tuple) == form.use_fp8
        x, scales = recv_x if form.use_fp8 else (recv_x, None)
        assert tuple(x.shape) == (shape.local, shape.rows, shape.hidden) and x.is_contiguous()
        assert x.dtype == (torch.float8_e4m3fn if form.use_fp8 else torch.bfloat16)
        if scales is not None:
            columns = -(-shape.hidden // (512 if form.use_ue8m0 else 128))
            assert scales.dtype == (torch.int32 if form.use_ue8m0 else torch.float32)
            assert tuple(scales.shape) == (shape.local, shape.rows, columns)
            if scales.numel():  # TMA reads columns
                assert scales.stride() == (columns * shape.rows, 1, shape.rows)
            scales = host(scales)
        return host(x), scales

    def check_rows(self, what, form, got, scales, where, source, tokens) -> None:
        sent = self.inputs[source].x[tokens]
        if not form.use_fp8:
            same(what, got, sent)
            return
        values, wanted = quantise(sent, form.round_scale)
        same(what, got, values)
        i, begin, end = where
        mine = scales[i, begin:end]
        if form.use_ue8m0:
            padded = torch.zeros(len(tokens), 4 * mine.size(1), dtype=torch.int32)
            padded[:, : wanted.size(1)] = wanted.view(torch.int32) >> 23
            bytes_ = padded.view(len(tokens), mine.size(1), 4)
            wanted = sum(bytes_[..., k] << (8 * k) for k in range(4)).int()
        same(f"scales, {what}", mine, wanted)

    # ---- combine ---------------------------------------------------------------------------

    def outputs(self, rank: int, form: Format, recv_x: Any) -> torch.Tensor:
        """The experts' output for what a rank has received; NaN where nobody may look."""
        if form.use_fp8:
            x = dequantise(*map(host, recv_x)).bfloat16()
        else:
            x = host(recv_x)
        result = torch.full(x.shape, float("nan"), dtype=torch.bfloat16)
        for i, (expert, count) in enumerate(zip(self.experts(rank), self.counts(rank))):
            result[i, :count] = self.apply(expert, x[i, :count])
        return result

    def check_combined(
        self, rank: int, form: Format, combined: torch.Tensor, reduce: str = "rank"
    ) -> None:
        """Within the error bound: the sums of the other ranks, and the total, are rounded to bfloat16
        (by 2^-8 of their size). With reduce = "source" only the total is. With "logfmt" the sums are
        off by 1/1020 of at most 16 octaves, and what is 2^-16 of the largest one may be lost."""
        sent = self.inputs[rank]
        assert combined.dtype == torch.bfloat16 and combined.shape == sent.x.shape
        x = sent.x
        if form.use_fp8:
            x = dequantise(*quantise(x, form.round_scale)).bfloat16()
        total = torch.zeros(x.shape, dtype=torch.float64)
        size = torch.zeros_like(total)
        for k in range(self.shape.topk):
            for expert in range(self.shape.experts):
                rows = sent.topk_idx[:, k] == expert
                term = self.apply(expert, x[rows]).double() * sent.topk_weights[rows, k, None]
                total[rows] += term
                size[rows] += term.abs()
        got = host(combined).double()
        bound = 2**-7 * size if reduce == "rank" else 2**-8 * total.abs() + 1e-6 * size
        if reduce == "logfmt" and size.numel():
            bound = (16.1 / 1020 + 2**-8) * size + 2**-15 * size.amax(1, keepdim=True)
        wrong = (~((got - total).abs() <= 1.01 * bound)).nonzero()  # NaN is wrong
        assert wrong.numel() == 0, (
            f"call {self.call}, rank {rank}: {len(wrong)} of {total.numel()} values are wrong, first "
            f"at {wrong[:1].tolist()}"
        )
