#include <algorithm>

#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>

#include "buffer_impl.hpp"
#include "checks.hpp"
#include "handle.hpp"
#include "internode.hpp"
#include "tensors.hpp"

namespace mscclpp::ep {
namespace {

/// Blocks of notify: enough to read the topk indices, few enough to finish together.
constexpr int kNotifyBlocks = 8;

/// Blocks the host until every rank's counts are there, and refuses what some rank got wrong.
void awaitCounts(Group& group, HandleState& handle, std::uint32_t sequence) {
  group.awaitNotify(sequence);
  const NotifyResult& result = group.notifyResult();
  if (result.badRank >= 0) {
    FailureRecord record;
    record.what = result.badWhat;
    record.rank = group.rank();
    record.peer = result.badRank;
    record.expected = result.badExpected;
    record.seen = result.badSeen;
    fail(ErrorCode::invalidArgument, "dispatch refused on all ranks: {}", describeFailure(record));
  }
  handle.rows = result.recvRows;
  handle.maxTokens = result.maxTokens;
  handle.maxRows = result.maxRecvRows;
}

/// Enqueues notify; without numWorstTokens also waits for its answer.
std::shared_ptr<HandleState> notify(Group& group, const DispatchRequest& request,
                                    const DispatchShape& shape, const ExpertArgs& experts,
                                    CallOrder& order) {
  auto handle = std::make_shared<HandleState>();
  const std::int64_t tokens = shape.tokens, ranks = group.ranks();
  handle->groupId = group.id();
  handle->tokens = shape.tokens;
  handle->topk = shape.topk;
  TableArena tables(group, order,
                    TableArena::bytesFor(tokens * ranks) + 2 * TableArena::bytesFor(ranks) +
                        TableArena::bytesFor(ranks + 1) +
                        TableArena::bytesFor(experts.localExperts) + TableArena::bytesFor(ranks));
  handle->position = tables.i32({tokens, ranks});
  handle->sendCount = tables.i32({ranks});
  handle->sendStart = tables.i32({ranks});
  handle->rankOffset = tables.i32({ranks + 1});
  handle->recvPerExpert = tables.i32({experts.localExperts});
  NotifyArgs args;
  args.group = group.args();
  if (group.ports() != nullptr) {
    args.rails = group.rails();
    handle->railTokens = tables.i32({args.rails.ins});
    args.railTokens = handle->railTokens.as<std::int32_t>();
  }
  args.experts = experts;
  args.isTokenInRank = request.isTokenInRank.as<const std::uint8_t>();
  args.tokensPerExpert = request.numTokensPerExpert.as<const std::int32_t>();
  args.topkIdx = request.topkIdx.as<const std::int64_t>();
  args.tokens = shape.tokens;
  args.topk = shape.topk;
  args.signature = shape.call.pack();
  args.position = handle->position.as<std::int32_t>();
  args.sendCount = handle->sendCount.as<std::int32_t>();
  args.sendStart = handle->sendStart.as<std::int32_t>();
  args.rankOffset = handle->rankOffset.as<std::int32_t>();
  args.recvPerExpert = handle->recvPerExpert.as<std::int32_t>();
  args.result = &group.notifyResult();
  args.sequence = group.nextSequence();
  args.hostWaits = request.numWorstTokens == 0;
  group.kernels().notify(args, group.blocks(kNotifyBlocks), group.comm().native());
  if (request.numWorstTokens > 0) {
    handle->rows = handle->maxTokens = handle->maxRows = request.numWorstTokens;
  } else {
    awaitCounts(group, *handle, args.sequence);
  }
  if (group.ports() != nullptr) makeRailRows(group, order, *handle);
  return handle;
}

/// One dispatch from the checked request to the enqueued kernels.
class DispatchCall {
 public:
  DispatchCall(Group& group, CallOrder& order, const DispatchRequest& request,
               const DispatchShape& shape, const HandleState& handle)
      : group_(group), order_(order), request_(request), shape_(shape), handle_(handle) {
    layout_ = shape.row;
  }

  /// `sourceTokens`: where the uncached call keeps the rows' tokens; absent otherwise.
  void run(const ExpertArgs& experts, const Tensor& sourceTokens, DispatchResult& result) {
    layout_.rows = static_cast<std::uint64_t>(handle_.rows);
    pool_ = group_.takeFromPool(layout_.total(), group_.comm(), order_.owner());
    makeOutputs(result);
    const auto windows = static_cast<std::int64_t>(std::max<std::size_t>(
        ceilDiv(static_cast<std::size_t>(handle_.maxRows), shape_.stagingRows), 1));
    for (std::int64_t w = 0; w < windows; ++w) {
      const RecvWindow window = windowAt(w, static_cast<std::int64_t>(shape_.stagingRows));
      launch(experts, window);
      if (!pool_) copyOut(window, sourceTokens, result);
    }
    if (pool_ && sourceTokens) {
      copyRows(sourceTokens, static_cast<const char*>(pool_.get()) + layout_.sourceTokens(), 0,
               handle_.rows, 4);
    }
  }

 private:
  void makeOutputs(DispatchResult& result) {
    const std::int64_t rows = handle_.rows, topk = shape_.topk;
    const auto make = [&](std::size_t offset, DType dtype, std::int64_t columns) {
      return pool_ ? viewOf(pool_, offset, dtype, {rows, columns}, group_)
                   : ordinary(group_, order_, dtype, {rows, columns});
    };
    result.recvX = make(layout_.x(), request_.x.dtype, shape_.hidden);
    if (shape_.scaleCount > 0) {
      result.recvXScales = make(layout_.scales(), request_.xScales.dtype, shape_.scaleCount);
    }
    if (topk > 0) {
      result.recvTopkIdx = make(layout_.topkIdx(), DType::i64, topk);
      result.recvTopkWeights = make(layout_.topkWeights(), DType::f32, topk);
    }
  }
  /// Outputs in the pool take everything in the first window; staged ones a staging area at a time.
  /// All ranks launch equally often, since some may stage and others not.
  RecvWindow windowAt(std::int64_t w, std::int64_t stagingRows) const {
    if (pool_) {
      const auto offset =
          static_cast<std::uint64_t>(static_cast<char*>(pool_.get()) - group_.heap());
      return w == 0 ? RecvWindow{offset, 0, handle_.rows} : RecvWindow{offset, handle_.rows, 0};
    }
    const std::int64_t begin = std::min<std::int64_t>(w * stagingRows, handle_.rows);
    return {group_.plan().staging(), begin,
            std::min<std::int64_t>(stagingRows, handle_.rows - begin)};
  }
  void launch(const ExpertArgs& experts, const RecvWindow& window) {
    DispatchArgs args;
    args.group = group_.args();
    args.experts = experts;
    args.x = request_.x.as<const char>();
    args.rowBytes = shape_.rowBytes;
    args.bulk = shape_.rowBytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(args.x) % 16 == 0;
    args.partBytes = group_.kernels().dispatchPartBytes(shape_.rowBytes);
    args.scales = request_.xScales.as<const char>();
    args.scaleCount = shape_.scaleCount;
    if (request_.xScales) {
      const auto& strides = request_.xScales.strides;
      args.scaleTokenStride = strides.empty() ? shape_.scaleCount : strides[0];
      args.scaleBlockStride = strides.empty() ? 1 : strides[1];
    }
    args.topkIdx = request_.topkIdx.as<const std::int64_t>();
    args.topkWeights = request_.topkWeights.as<const float>();
    args.topk = shape_.topk;
    args.tokens = shape_.tokens;
    args.position = handle_.position.as<const std::int32_t>();
    args.sendStart = handle_.sendStart.as<const std::int32_t>();
    args.rankOffset = handle_.rankOffset.as<const std::int32_t>();
    args.window = window;
    args.signature = shape_.call.pack();
    args.rowLimit = request_.handle ? 0 : request_.numWorstTokens;
    const int blocks = group_.blocks(request_.config.numSms);
    if (group_.ports() != nullptr) {
      dispatchBetweenNodes(group_, args, handle_, !request_.handle, blocks);
    } else {
      group_.kernels().dispatch(args, blocks, group_.comm().native());
    }
  }
  void copyRows(const Tensor& to, const char* from, std::int64_t firstRow, std::int64_t rows,
                std::size_t rowBytes) {
    if (rows == 0) return;
    group_.device().copy(to.as<char>() + static_cast<std::size_t>(firstRow) * rowBytes, from,
                         static_cast<std::size_t>(rows) * rowBytes, group_.comm());
  }
  void copyOut(const RecvWindow& window, const Tensor& sourceTokens, DispatchResult& result) {
    RecvLayout staged = layout_;
    staged.rows = static_cast<std::uint64_t>(window.rows);
    const char* base = group_.heap() + window.heapOffset;
    const auto copy = [&](const Tensor& to, std::size_t offset, std::size_t rowBytes) {
      if (to) copyRows(to, base + offset, window.rowBegin, window.rows, rowBytes);
    };
    copy(result.recvX, staged.x(), layout_.rowBytes);
    copy(result.recvXScales, staged.scales(), layout_.scaleBytes);
    copy(result.recvTopkIdx, staged.topkIdx(), layout_.topk * 8);
    copy(result.recvTopkWeights, staged.topkWeights(), layout_.topk * 4);
    copy(sourceTokens, staged.sourceTokens(), 4);
  }

  Group& group_;
  CallOrder& order_;
  const DispatchRequest& request_;
  const DispatchShape& shape_;
  const HandleState& handle_;
  RecvLayout layout_;
  std::shared_ptr<void> pool_;
};

}  // namespace

DispatchResult Buffer::dispatch(const DispatchRequest& request) {
  Group& group = impl_->alive();
  const DispatchShape shape = checkDispatch(request, group);
  CallOrder order(group, request.order);
  DispatchResult result;
  if (request.handle) {
    result.handle = request.handle;
    DispatchCall(group, order, request, shape, *request.handle).run(ExpertArgs{}, Tensor{}, result);
    result.event = order.finish();
    return result;
  }
  const ExpertArgs experts = expertArgs(shape.experts, request.expertMap, group);
  const std::shared_ptr<HandleState> handle = notify(group, request, shape, experts, order);
  handle->sourceTokens = ordinary(group, order, DType::i32, {handle->rows});
  DispatchCall(group, order, request, shape, *handle).run(experts, handle->sourceTokens, result);
  if (request.numWorstTokens == 0) {
    const std::int32_t* counts = group.notifyResult().perExpert;
    for (int e = 0; e < experts.localExperts; ++e) {
      const int aligned = (counts[e] + request.expertAlignment - 1) / request.expertAlignment;
      result.numRecvTokensPerExpert.push_back(aligned * request.expertAlignment);
    }
  }
  result.recvTokensPerExpert = handle->recvPerExpert;
  result.handle = DispatchHandle(handle);
  result.event = order.finish();
  return result;
}

}  // namespace mscclpp::ep
