#include <cstddef>
#include <functional>
#include <limits>
#include <type_traits>

#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>
#include <mscclpp/format.hpp>

#include "buffer_impl.hpp"
#include "checks.hpp"
#include "low_latency_handle.hpp"
#include "tensors.hpp"

namespace mscclpp::ep {
namespace {

constexpr auto kBad = ErrorCode::invalidArgument;

int expertsPerRank(int experts, const Group& group) {
  return (experts + group.ranks() - 1) / group.ranks();
}
std::uint32_t ownerMagic(int perRank) {
  return perRank == 1 ? 0
                      : static_cast<std::uint32_t>(
                            ((std::uint64_t{1} << 32) + static_cast<std::uint64_t>(perRank) - 1) /
                            static_cast<std::uint64_t>(perRank));
}

void checkMode(const Group& group) {
  check(group.options().lowLatencyMode, ErrorCode::invalidState,
        "the Buffer was made without low_latency_mode: make it with low_latency_mode = true and "
        "num_rdma_bytes of get_low_latency_rdma_size_hint()");
}
void checkRegion(const Group& group, std::size_t areaBytes, const char* call) {
  const LowLatencyPlan& plan = group.lowLatencyPlan();
  check(areaBytes <= plan.areaBytes(), kBad,
        "{} needs num_rdma_bytes = {}, the Buffer has {}: make it with "
        "get_low_latency_rdma_size_hint() of the largest shape",
        call, LowLatencyPlan::bytesFor(group.ranks(), areaBytes), plan.bytes);
}
void checkBlocks(int numSms) {
  check(numSms >= 0, kBad, "num_sms = {} must be at least 0 (0: all)", numSms);
}

/// This rank's row of the statistics, or null.
std::int64_t* waitTotals(const Tensor& tensor, const Group& group) {
  if (!tensor) return nullptr;
  const bool square = tensor.shape.size() == 2;
  checkTensor(tensor, "wait_recv_cost_stats", DType::i64,
              square ? std::vector<std::int64_t>{group.ranks(), group.ranks()}
                     : std::vector<std::int64_t>{group.ranks()},
              group);
  return tensor.as<std::int64_t>() + (square ? group.rank() * group.ranks() : 0);
}

void checkTimes(const Tensor& times, const Group& group) {
  constexpr auto kMoments =
      static_cast<std::int64_t>(sizeof(LowLatencyTimes) / sizeof(std::int64_t));
  if (times) checkTensor(times, "times", DType::i64, {kMoments}, group);
}

struct DispatchDims {
  int tokens, topk, hidden, perRank, scaleColumns;
  std::int64_t rows;  ///< per local expert
};

DispatchDims checkDispatch(const LowLatencyDispatchRequest& r, const Group& group) {
  checkMode(group);
  checkTensor(r.x, "x", DType::bf16, {-1, -1}, group);
  checkAligned(r.x, "x", 16);
  const std::int64_t tokens = r.x.shape[0], hidden = r.x.shape[1];
  check(hidden >= 8 && hidden % 8 == 0 && hidden <= kMaxLowLatencyHidden, kBad,
        "x is {}: hidden must be a multiple of 8 in 8 .. {}", r.x.describe(), kMaxLowLatencyHidden);
  check(r.maxTokens >= 0 && r.maxTokens <= kMaxLowLatencyTokens, kBad,
        "num_max_dispatch_tokens_per_rank = {} must be in 0 .. {}", r.maxTokens,
        kMaxLowLatencyTokens);
  check(tokens <= r.maxTokens, kBad,
        "x is {}: more tokens than num_max_dispatch_tokens_per_rank = {}", r.x.describe(),
        r.maxTokens);
  checkTensor(r.topkIdx, "topk_idx", DType::i64, {tokens, -1}, group);
  const std::int64_t topk = r.topkIdx.shape[1];
  check(topk >= 1 && topk <= kMaxLowLatencyTopk, kBad, "topk_idx is {}: top-k must be in 1 .. {}",
        r.topkIdx.describe(), kMaxLowLatencyTopk);
  check(r.experts >= 1 && r.experts <= kMaxLowLatencyExperts, kBad,
        "num_experts = {} must be in 1 .. {}", r.experts, kMaxLowLatencyExperts);
  check(!r.roundScale || r.useFp8, kBad, "round_scale = true needs use_fp8 = true");
  check(!r.useUe8m0 || r.roundScale, kBad,
        "use_ue8m0 = true needs round_scale = true: an exponent holds powers of two only");
  checkBlocks(r.numSms);
  checkTimes(r.times, group);
  DispatchDims dims{static_cast<int>(tokens),
                    static_cast<int>(topk),
                    static_cast<int>(hidden),
                    expertsPerRank(r.experts, group),
                    0,
                    static_cast<std::int64_t>(group.ranks()) * r.maxTokens};
  const int blocks = scalesPerRow(hidden);
  if (r.useFp8) dims.scaleColumns = r.useUe8m0 ? (blocks + 3) / 4 : blocks;
  check(dims.rows * dims.perRank <= std::numeric_limits<std::int32_t>::max(), kBad,
        "{} local experts x {} ranks x {} tokens are more than 2^31 rows", dims.perRank,
        group.ranks(), r.maxTokens);
  if (r.expertTotals) {
    checkTensor(r.expertTotals, "cumulative_local_expert_recv_stats", DType::i32, {dims.perRank},
                group);
  }
  return dims;
}

/// The caller's tensor if there is one, else a new one.
Tensor output(Group& group, CallOrder& order, const Tensor& given, const char* name, DType dtype,
              const std::vector<std::int64_t>& shape) {
  if (!given) return ordinary(group, order, dtype, shape);
  checkTensor(given, name, dtype, shape, group);
  checkAligned(given, name, dtype == DType::bf16 || dtype == DType::e4m3 ? 16 : 8);
  return given;
}

std::uint32_t shapeHash(const LowLatencyDispatchRequest& r, const DispatchDims& d) {
  std::uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a
  for (const int value : {d.hidden, d.topk, r.maxTokens, r.experts, r.useFp8 ? 1 : 0,
                          r.roundScale ? 1 : 0, r.useUe8m0 ? 1 : 0}) {
    hash = (hash ^ static_cast<std::uint32_t>(value)) * 0x100000001B3u;
  }
  return static_cast<std::uint32_t>(hash >> 40) & ((1u << (32 - kHelloTokenBits)) - 1);
}

/// Launches one kernel with the phase and laterSends that it is given. Keeps the memory that it
/// needs.
using Launch = std::function<void(Group&, void* stream, LowLatencyPhase, std::uint64_t laterSends)>;

/// Enqueues a whole call, or its send half and makes the hook for the rest.
ReceiveHook issue(const std::shared_ptr<Group>& group, CallOrder& order, LowLatencyKind kind,
                  bool halves, Launch launchKernel) {
  const char* const name =
      kind == LowLatencyKind::dispatch ? "low_latency_dispatch" : "low_latency_combine";
  const std::uint64_t number = group->lowLatencyCalls(kind).next(halves, name);
  launchKernel(*group, order.stream().native(),
               halves ? LowLatencyPhase::send : LowLatencyPhase::whole, 0);
  if (!halves) return {};
  return [weak = std::weak_ptr<Group>(group), kind, number, receive = std::move(launchKernel),
          pending = std::make_shared<bool>(true)](void* computeStream) {
    check(*pending, ErrorCode::invalidState, "the hook was called before: it receives once");
    const std::shared_ptr<Group> alive = weak.lock();
    check(alive != nullptr, ErrorCode::invalidState,
          "the Buffer was destroyed before the hook was called");
    alive->raiseIfFailed();
    *pending = false;
    StreamOrder streamOrder;
    streamOrder.computeStream = computeStream;
    CallOrder now(*alive, streamOrder, CallStream::caller);
    receive(*alive, now.stream().native(), LowLatencyPhase::receive,
            alive->lowLatencyCalls(kind).received(number));
    now.finish();
  };
}

}  // namespace

LowLatencyDispatchResult Buffer::lowLatencyDispatch(const LowLatencyDispatchRequest& request) {
  Group& group = impl_->alive();
  const DispatchDims dims = checkDispatch(request, group);
  LowLatencyDispatchArgs args;
  args.area = DispatchArea::make(group.ranks(), request.maxTokens, dims.topk,
                                 request.useFp8 ? e4m3Units(dims.hidden) : bf16Units(dims.hidden));
  checkRegion(group, args.area.total(), "low_latency_dispatch");
  args.waitTotals = waitTotals(request.waitTotals, group);

  CallOrder order(group, request.order, CallStream::caller);
  const auto& given = request.outputs;
  const std::int64_t perRank = dims.perRank, ranks = group.ranks();
  LowLatencyDispatchResult result;
  auto handle = std::make_shared<LowLatencyHandleState>();
  *handle = {group.id(), request.maxTokens, dims.hidden, dims.topk, request.experts, {}, {}, {}, {},
             {}};
  result.recvX =
      output(group, order, given.recvX, "recv_x", request.useFp8 ? DType::e4m3 : DType::bf16,
             {perRank, dims.rows, dims.hidden});
  if (request.useFp8) {
    result.recvXScales =
        output(group, order, given.recvXScales, "recv_x_scales",
               request.useUe8m0 ? DType::i32 : DType::f32, {perRank, dims.scaleColumns, dims.rows});
  }
  result.recvCount = output(group, order, given.recvCount, "recv_count", DType::i32, {perRank});
  handle->sourceInfo =
      output(group, order, given.sourceInfo, "source_info", DType::i32, {perRank, dims.rows});
  handle->layoutRange =
      output(group, order, given.layoutRange, "layout_range", DType::i64, {perRank, ranks});
  handle->slots =
      output(group, order, given.slots, "slots", DType::i32, {ranks, request.maxTokens, dims.topk});
  handle->sourceTokens =
      output(group, order, given.sourceTokens, "source_tokens", DType::i32, {ranks});
  handle->rowTable = output(group, order, given.rowTable, "row_table", DType::i32,
                            {2, ranks, RowTable{1, request.maxTokens}.width()});

  args.group = group.lowLatencyArgs();
  args.x = request.x.as<const char>();
  args.topkIdx = request.topkIdx.as<const std::int64_t>();
  args.tokens = dims.tokens;
  args.hidden = dims.hidden;
  args.experts = request.experts;
  args.expertsPerRank = dims.perRank;
  args.ownerMagic = ownerMagic(dims.perRank);
  args.shapeHash = shapeHash(request, dims);
  args.roundScale = request.roundScale;
  args.packedScales = request.useUe8m0;
  args.recvX = result.recvX.as<char>();
  args.recvScales = result.recvXScales.data;
  args.recvCount = result.recvCount.as<std::int32_t>();
  args.sourceInfo = handle->sourceInfo.as<std::int32_t>();
  args.layoutRange = handle->layoutRange.as<std::int64_t>();
  args.slots = handle->slots.as<std::int32_t>();
  args.sourceTokens = handle->sourceTokens.as<std::int32_t>();
  args.group.ports.times = request.times.as<LowLatencyTimes>();
  args.rowTable = handle->rowTable.as<std::int32_t>();
  args.expertTotals = request.expertTotals.as<std::int32_t>();
  // The outputs live as long as the hook.
  const auto launch = [args, e4m3 = request.useFp8, numSms = request.numSms, result, handle,
                       totals = request.expertTotals, times = request.times,
                       waits = request.waitTotals](Group& g, void* stream, LowLatencyPhase phase,
                                                   std::uint64_t laterSends) mutable {
    args.group.phase = phase;
    args.group.laterSends = laterSends;
    g.lowLatencyKernels().dispatch(args, e4m3, g.lowLatencyBlocks(numSms), stream);
  };
  result.hook =
      issue(impl_->group, order, LowLatencyKind::dispatch, request.returnRecvHook, launch);
  result.handle = LowLatencyHandle(handle);
  result.event = order.finish();
  return result;
}

namespace {

int checkCombine(const LowLatencyCombineRequest& r, const Group& group) {
  checkMode(group);
  check(static_cast<bool>(r.handle), kBad, "low_latency_combine needs the handle of a dispatch");
  check(r.handle->groupId == group.id(), kBad, "the handle belongs to another Buffer");
  const LowLatencyHandleState& h = *r.handle.operator->();
  checkTensor(r.x, "x", DType::bf16,
              {expertsPerRank(h.experts, group),
               static_cast<std::int64_t>(group.ranks()) * h.maxTokens, h.hidden},
              group);
  checkAligned(r.x, "x", 16);
  checkTensor(r.topkIdx, "topk_idx", DType::i64, {-1, h.topk}, group);
  const std::int64_t tokens = r.topkIdx.shape[0];
  check(tokens <= h.maxTokens, kBad,
        "topk_idx is {}: more tokens than num_max_dispatch_tokens_per_rank = {} of the dispatch",
        r.topkIdx.describe(), h.maxTokens);
  checkTensor(r.topkWeights, "topk_weights", DType::f32, {tokens, h.topk}, group);
  check(!r.useLogfmt || r.reduce == LowLatencyReduce::rank, kBad,
        "use_logfmt = true needs combine_reduce = \"rank\": rows of single selections travel as "
        "they are");
  checkBlocks(r.numSms);
  checkTimes(r.times, group);
  return static_cast<int>(tokens);
}

CombineArea combineArea(const LowLatencyHandleState& h, const Group& group, bool logfmt) {
  return CombineArea::make(group.ranks(), h.maxTokens, h.topk, bf16Units(h.hidden), logfmt);
}
SourceArea sourceArea(const LowLatencyHandleState& h, const Group& group) {
  const bool spansNodes = group.topology().nodes() > 1;
  return SourceArea::make(group.ranks(), h.maxTokens, h.topk, bf16Units(h.hidden),
                          spansNodes ? mostOnOneRank(h.topk, h.experts, group.ranks()) : 0);
}

/// `out`: made by the caller. The kernel's arguments, and everything that it needs beside them.
template <class Area>
LowLatencyCombineArgsOf<Area> combineArgs(const LowLatencyCombineRequest& request, const Area& area,
                                          const Tensor& out, const Group& group) {
  const LowLatencyHandleState& handle = *request.handle.operator->();
  LowLatencyCombineArgsOf<Area> args;
  args.area = area;
  args.y = request.x.as<const char>();
  args.topkIdx = request.topkIdx.as<const std::int64_t>();
  args.weights = request.topkWeights.as<const float>();
  args.tokens = static_cast<int>(request.topkIdx.shape[0]);
  args.hidden = handle.hidden;
  args.experts = handle.experts;
  args.expertsPerRank = expertsPerRank(handle.experts, group);
  args.ownerMagic = ownerMagic(args.expertsPerRank);
  args.slots = handle.slots.as<const std::int32_t>();
  args.sourceTokens = handle.sourceTokens.as<const std::int32_t>();
  args.rowTable = handle.rowTable.as<const std::int32_t>();
  args.out = out.as<char>();
  args.logfmt = request.useLogfmt;
  args.waitTotals = waitTotals(request.waitTotals, group);
  args.group = group.lowLatencyArgs();
  args.group.ports.times = request.times.as<LowLatencyTimes>();
  return args;
}
/// The hook reads topk_idx and the weights again; their memory, the handle's and the output's live
/// as long as it.
template <class Area>
Launch combineLaunch(const LowLatencyCombineRequest& request, const Area& area, const Tensor& out,
                     const Group& group) {
  return [args = combineArgs(request, area, out, group), numSms = request.numSms, out,
          idx = request.topkIdx, weights = request.topkWeights, used = request.handle,
          times = request.times, waits = request.waitTotals](
             Group& g, void* stream, LowLatencyPhase phase, std::uint64_t laterSends) mutable {
    args.group.phase = phase;
    args.group.laterSends = laterSends;
    if constexpr (std::is_same_v<Area, SourceArea>) {
      g.lowLatencyKernels().combineAtSource(args, g.lowLatencyBlocks(numSms), stream);
    } else {
      g.lowLatencyKernels().combine(args, g.lowLatencyBlocks(numSms), stream);
    }
  };
}

}  // namespace

LowLatencyCombineResult Buffer::lowLatencyCombine(const LowLatencyCombineRequest& request) {
  Group& group = impl_->alive();
  const int tokens = checkCombine(request, group);
  const LowLatencyHandleState& handle = *request.handle.operator->();
  const bool atSource = request.reduce == LowLatencyReduce::source;
  const CombineArea area = combineArea(handle, group, request.useLogfmt);
  const SourceArea rows = sourceArea(handle, group);
  checkRegion(
      group, atSource ? rows.total() : area.total(),
      atSource ? "low_latency_combine with combine_reduce = \"source\"" : "low_latency_combine");
  waitTotals(request.waitTotals, group);  // complains before anything is under way
  CallOrder order(group, request.order, CallStream::caller);
  LowLatencyCombineResult result;
  result.x = output(group, order, request.out, "out", DType::bf16, {tokens, handle.hidden});
  result.hook = issue(impl_->group, order, LowLatencyKind::combine, request.returnRecvHook,
                      atSource ? combineLaunch(request, rows, result.x, group)
                               : combineLaunch(request, area, result.x, group));
  result.event = order.finish();
  return result;
}

namespace {

char* maskWord(const Group& group, int rank) {
  return group.lowLatencyRegion() + group.lowLatencyPlan().peer(rank) +
         offsetof(LowLatencyPeer, masked);
}
void checkShrink(const Group& group) {
  checkMode(group);
  check(group.options().enableShrink, ErrorCode::invalidState,
        "the Buffer was made without enable_shrink: there is no mask");
}

}  // namespace

void Buffer::updateLowLatencyMask(int rank, bool masked) {
  Group& group = impl_->alive();
  checkShrink(group);
  check(rank >= 0 && rank < group.ranks() && rank != group.rank(), kBad,
        "rank_to_mask = {} must be in 0 .. {} and not this rank ({})", rank, group.ranks() - 1,
        group.rank());
  const DeviceScope scope(group.device());
  group.enterComm();
  group.device().fill(maskWord(group, rank), masked ? 1 : 0, 1, group.comm());
}

void Buffer::cleanLowLatencyMask() {
  Group& group = impl_->alive();
  checkShrink(group);
  const DeviceScope scope(group.device());
  group.enterComm();
  for (int r = 0; r < group.ranks(); ++r) {
    group.device().fill(maskWord(group, r), 0, sizeof(std::uint32_t), group.comm());
  }
}

void Buffer::queryLowLatencyMask(const Tensor& mask, const StreamOrder& streamOrder) {
  Group& group = impl_->alive();
  checkShrink(group);
  checkTensor(mask, "mask_status", DType::i32, {group.ranks()}, group);
  CallOrder order(group, streamOrder);
  for (int r = 0; r < group.ranks(); ++r) {
    group.device().copy(mask.as<std::int32_t>() + r, maskWord(group, r), sizeof(std::int32_t),
                        group.comm());
  }
  order.finish();
}

Tensor LowLatencyHandle::sourceInfo() const {
  return state_->sourceInfo;
}
Tensor LowLatencyHandle::layoutRange() const {
  return state_->layoutRange;
}
int LowLatencyHandle::maxTokens() const {
  return state_->maxTokens;
}
int LowLatencyHandle::hidden() const {
  return state_->hidden;
}
int LowLatencyHandle::experts() const {
  return state_->experts;
}

}  // namespace mscclpp::ep
