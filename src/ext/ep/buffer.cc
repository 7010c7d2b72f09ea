#include <mscclpp/ext/ep/buffer.hpp>

#include <algorithm>

#include <mscclpp/errors.hpp>

#include "call_order.hpp"
#include "checks.hpp"
#include "group.hpp"
#include "handle.hpp"

namespace mscclpp::ep {
namespace {

constexpr auto kBad = ErrorCode::invalidArgument;

/// Threads of a table copy do not pay; blocks of notify and of stageWeights.
constexpr int kNotifyBlocks = 8;

Tensor viewOf(const std::shared_ptr<void>& owner, std::size_t offset, DType dtype,
              std::vector<std::int64_t> shape, const Group& group) {
  Tensor tensor;
  tensor.present = true;
  tensor.data = owner ? static_cast<char*>(owner.get()) + offset : nullptr;
  tensor.dtype = dtype;
  tensor.shape = std::move(shape);
  tensor.platform = group.options().platform;
  tensor.deviceIndex = group.options().deviceIndex;
  tensor.owner = owner;
  return tensor;
}

Tensor ordinary(Group& group, CallOrder& order, DType dtype, std::vector<std::int64_t> shape) {
  Tensor tensor = viewOf(nullptr, 0, dtype, std::move(shape), group);
  tensor.owner = group.allocate(tensor.bytes(), group.comm(), order.owner());
  tensor.data = tensor.owner.get();
  return tensor;
}

/// Several small tables in one allocation.
class TableArena {
 public:
  TableArena(Group& group, CallOrder& order, std::size_t bytes)
      : group_(group), memory_(group.allocate(bytes, group.comm(), order.owner())) {}
  static std::size_t bytesFor(std::int64_t elements) {
    return alignUp(static_cast<std::size_t>(elements) * 4, kTensorAlign);
  }
  Tensor i32(std::vector<std::int64_t> shape) {
    Tensor tensor = viewOf(memory_, used_, DType::i32, std::move(shape), group_);
    used_ += bytesFor(tensor.elements());
    return tensor;
  }

 private:
  Group& group_;
  std::shared_ptr<void> memory_;
  std::size_t used_ = 0;
};

}  // namespace

struct Buffer::Impl {
  std::shared_ptr<Group> group;

  Group& alive() const {
    check(group != nullptr, ErrorCode::invalidState,
          "the Buffer was destroyed: make a new one to dispatch or combine");
    group->raiseIfFailed();
    return *group;
  }
  std::shared_ptr<HandleState> notify(const DispatchRequest& request, const DispatchShape& shape,
                                      const ExpertArgs& experts, CallOrder& order);
  void awaitCounts(HandleState& handle, std::uint32_t sequence);
};

Buffer::Buffer(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options)
    : impl_(std::make_unique<Impl>()) {
  check(bootstrap != nullptr, kBad, "a Buffer needs a bootstrap");
  impl_->group = std::make_shared<Group>(std::move(bootstrap), options);
}

Buffer::~Buffer() {
  if (impl_ && impl_->group) {
    runNoThrow("~Buffer", [&] { impl_->group->comm().synchronize(); });
  }
}

void Buffer::destroy() {
  if (!impl_->group) return;
  impl_->group->close();
  impl_->group.reset();
}

int Buffer::rank() const { return impl_->alive().rank(); }
int Buffer::ranks() const { return impl_->alive().ranks(); }
const BufferOptions& Buffer::options() const { return impl_->alive().options(); }
void* Buffer::commStream() const { return impl_->alive().comm().native(); }
void Buffer::checkHealth() {
  impl_->alive().device().checkAsyncErrors();
  impl_->group->raiseIfFailed();
}
std::size_t Buffer::poolBytesFree() const { return impl_->alive().pool().bytesFree(); }
bool Buffer::inPool(const Tensor& tensor) const { return impl_->alive().inPool(tensor.data); }

Tensor Buffer::createTensor(DType dtype, std::vector<std::int64_t> shape, void* computeStream) {
  Group& group = impl_->alive();
  Tensor tensor = viewOf(nullptr, 0, dtype, std::move(shape), group);
  for (const std::int64_t extent : tensor.shape) {
    check(extent >= 0, kBad, "createTensor: {} has a negative extent", tensor.describe());
  }
  Stream compute = group.borrow(computeStream);
  tensor.owner = group.takeFromPool(tensor.bytes(), compute, computeStream);
  if (!tensor.owner) tensor.owner = group.allocate(tensor.bytes(), compute, computeStream);
  tensor.data = tensor.owner.get();
  return tensor;
}

LayoutResult Buffer::getDispatchLayout(const LayoutRequest& request) {
  Group& group = impl_->alive();
  const int topk = checkLayout(request, group);
  CallOrder order(group, request.order);
  const std::int64_t tokens = request.topkIdx.shape[0], ranks = group.ranks();
  LayoutResult result;
  TableArena tables(group, order,
                    TableArena::bytesFor(ranks) + TableArena::bytesFor(request.numExperts));
  result.numTokensPerRank = tables.i32({ranks});
  result.numTokensPerExpert = tables.i32({request.numExperts});
  result.isTokenInRank = ordinary(group, order, DType::u8, {tokens, ranks});
  for (const Tensor* counts : {&result.numTokensPerRank, &result.numTokensPerExpert}) {
    group.device().fill(counts->data, 0, counts->bytes(), group.comm());
  }
  LayoutArgs args;
  args.topkIdx = request.topkIdx.as<const std::int64_t>();
  args.tokens = static_cast<int>(tokens);
  args.topk = topk;
  args.ranks = group.ranks();
  args.experts = expertArgs(request.numExperts, request.expertMap, group);
  args.tokensPerRank = result.numTokensPerRank.as<std::int32_t>();
  args.tokensPerExpert = result.numTokensPerExpert.as<std::int32_t>();
  args.isTokenInRank = result.isTokenInRank.as<std::uint8_t>();
  args.invalidExpert =
      &reinterpret_cast<LocalWords*>(group.heap() + group.plan().localWords())->invalidExpert;
  group.kernels().layout(args, group.comm().native());
  result.event = order.finish();
  return result;
}

std::shared_ptr<HandleState> Buffer::Impl::notify(const DispatchRequest& request,
                                                  const DispatchShape& shape,
                                                  const ExpertArgs& experts, CallOrder& order) {
  auto handle = std::make_shared<HandleState>();
  const std::int64_t tokens = shape.tokens, ranks = group->ranks();
  handle->groupId = group->id();
  handle->tokens = shape.tokens;
  handle->topk = shape.topk;
  TableArena tables(*group, order,
                    TableArena::bytesFor(tokens * ranks) + 2 * TableArena::bytesFor(ranks) +
                        TableArena::bytesFor(ranks + 1) +
                        TableArena::bytesFor(experts.localExperts));
  handle->position = tables.i32({tokens, ranks});
  handle->sendCount = tables.i32({ranks});
  handle->sendStart = tables.i32({ranks});
  handle->rankOffset = tables.i32({ranks + 1});
  handle->recvPerExpert = tables.i32({experts.localExperts});
  NotifyArgs args;
  args.group = group->args();
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
  args.result = &group->notifyResult();
  args.sequence = group->nextSequence();
  group->kernels().notify(args, group->blocks(kNotifyBlocks), group->comm().native());
  if (request.numWorstTokens > 0) {
    handle->rows = handle->maxTokens = handle->maxRows = request.numWorstTokens;
  } else {
    awaitCounts(*handle, args.sequence);
  }
  return handle;
}

/// Blocks the host until every rank's counts are there, and refuses what some rank got wrong.
void Buffer::Impl::awaitCounts(HandleState& handle, std::uint32_t sequence) {
  group->awaitNotify(sequence);
  const NotifyResult& result = group->notifyResult();
  if (result.badRank >= 0) {
    FailureRecord record;
    record.what = result.badWhat;
    record.rank = group->rank();
    record.peer = result.badRank;
    record.expected = result.badExpected;
    record.seen = result.badSeen;
    fail(kBad, "dispatch refused on all ranks: {}", describeFailure(record));
  }
  handle.rows = result.recvRows;
  handle.maxTokens = result.maxTokens;
  handle.maxRows = result.maxRecvRows;
}

namespace {

/// One dispatch from the checked request to the enqueued kernels.
class DispatchCall {
 public:
  DispatchCall(Group& group, CallOrder& order, const DispatchRequest& request,
               const DispatchShape& shape, const HandleState& handle)
      : group_(group), order_(order), request_(request), shape_(shape), handle_(handle) {
    layout_.rowBytes = shape.rowBytes;
    layout_.scaleBytes = static_cast<std::uint64_t>(shape.scaleCount) * 4;
    layout_.topk = static_cast<std::uint64_t>(shape.topk);
  }

  /// `sourceTokens`: where the uncached call keeps the rows' tokens; absent otherwise.
  void run(const ExpertArgs& experts, const Tensor& sourceTokens, DispatchResult& result) {
    const std::uint64_t stagingRows =
        RecvLayout::rowsThatFit(group_.plan().stagingBytes, layout_);
    check(stagingRows >= 1, kBad,
          "the staging area of {} bytes does not hold one row of {} bytes: raise num_nvl_bytes (now "
          "{})",
          group_.plan().stagingBytes, layout_.rowBytes + layout_.scaleBytes + layout_.topk * 12 + 4,
          group_.options().numNvlBytes);
    layout_.rows = static_cast<std::uint64_t>(handle_.rows);
    pool_ = group_.takeFromPool(layout_.total(), group_.comm(), order_.owner());
    makeOutputs(result);
    const auto windows = static_cast<std::int64_t>(
        std::max<std::size_t>(ceilDiv(static_cast<std::size_t>(handle_.maxRows), stagingRows), 1));
    for (std::int64_t w = 0; w < windows; ++w) {
      const RecvWindow window = windowAt(w, static_cast<std::int64_t>(stagingRows));
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
      const auto offset = static_cast<std::uint64_t>(static_cast<char*>(pool_.get()) - group_.heap());
      return w == 0 ? RecvWindow{offset, 0, handle_.rows} : RecvWindow{offset, handle_.rows, 0};
    }
    const std::int64_t begin = std::min<std::int64_t>(w * stagingRows, handle_.rows);
    return {group_.plan().staging(), begin, std::min<std::int64_t>(stagingRows, handle_.rows - begin)};
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
    group_.kernels().dispatch(args, group_.blocks(request_.config.numSms), group_.comm().native());
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
  const std::shared_ptr<HandleState> handle = impl_->notify(request, shape, experts, order);
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

CombineResult Buffer::combine(const CombineRequest& request) {
  Group& group = impl_->alive();
  const std::uint32_t rowBytes = checkCombine(request, group);
  const HandleState& handle = *request.handle;
  const std::int64_t topk = request.topkWeights ? request.topkWeights.shape[1] : 0;
  CombineStaging staging;
  staging.destinations = static_cast<std::uint64_t>(group.ranks() - 1);
  staging.rowBytes = rowBytes;
  staging.topk = static_cast<std::uint64_t>(topk);
  staging.tokens = CombineStaging::tokensThatFit(group.plan().stagingBytes, staging);
  check(staging.tokens > 0, kBad,
        "the staging area of {} bytes does not hold {} rows of {} bytes for each of {} peers: raise "
        "num_nvl_bytes (now {})",
        group.plan().stagingBytes, kChunkRows, rowBytes, staging.destinations,
        group.options().numNvlBytes);
  CallOrder order(group, request.order);
  CombineResult result;
  result.x = ordinary(group, order, DType::bf16, {handle.tokens, request.x.shape[1]});
  if (topk > 0) result.topkWeights = ordinary(group, order, DType::f32, {handle.tokens, topk});

  CallShape shape;
  shape.operation = CallShape::Operation::combine;
  shape.hidden = request.x.shape[1];
  shape.topk = static_cast<int>(topk);
  const std::uint64_t waves =
      std::max<std::uint64_t>(ceilDiv(static_cast<std::size_t>(handle.maxTokens), staging.tokens), 1);
  CombineArgs args;
  args.group = group.args();
  args.y = request.x.as<const char>();
  args.rowBytes = rowBytes;
  args.staged = !group.inPool(args.y);
  args.partBytes = group.kernels().combinePartBytes(rowBytes, args.staged);
  args.stagingOffset = group.plan().staging();
  if (!args.staged) args.heapOffset = static_cast<std::uint64_t>(args.y - group.heap());
  args.weights = request.topkWeights.as<const float>();
  args.topk = static_cast<int>(topk);
  args.bias0 = request.bias0.as<const char>();
  args.bias1 = request.bias1.as<const char>();
  args.tokens = handle.tokens;
  args.position = handle.position.as<const std::int32_t>();
  args.sendStart = handle.sendStart.as<const std::int32_t>();
  args.rankOffset = handle.rankOffset.as<const std::int32_t>();
  args.sourceTokens = waves > 1 ? handle.sourceTokens.as<const std::int32_t>() : nullptr;
  args.staging = staging;
  args.signature = shape.pack();
  args.out = result.x.as<char>();
  args.outWeights = result.topkWeights.as<float>();
  const int blocks = group.blocks(request.config.numSms);
  for (std::uint64_t w = 0; w < waves; ++w) {
    args.tokenBegin = static_cast<int>(w * staging.tokens);
    args.tokenEnd = static_cast<int>((w + 1) * staging.tokens);
    if (topk > 0) group.kernels().stageWeights(args, blocks, group.comm().native());
    group.kernels().combine(args, blocks, group.comm().native());
  }
  result.event = order.finish();
  return result;
}

ExpertMap Buffer::createExpertMap(const std::vector<int>& rankOfExpert) {
  Group& group = impl_->alive();
  const int experts = static_cast<int>(rankOfExpert.size()), ranks = group.ranks();
  check(experts >= 1 && experts <= CallShape::kMaxExperts, kBad,
        "the expert map has {} experts: allowed are 1 .. {}", experts, CallShape::kMaxExperts);
  auto state = std::make_shared<ExpertMapState>();
  state->groupId = group.id();
  state->experts = experts;
  state->hash = 1469598103934665603ull;  // FNV-1a
  std::vector<std::int32_t> rankOf(rankOfExpert.begin(), rankOfExpert.end()), indexOf, listed;
  std::vector<std::vector<std::int32_t>> byRank(static_cast<std::size_t>(ranks));
  for (int e = 0; e < experts; ++e) {
    const int r = rankOfExpert[static_cast<std::size_t>(e)];
    check(r >= 0 && r < ranks, kBad, "the expert map puts expert {} on rank {}: ranks are 0 .. {}", e,
          r, ranks - 1);
    auto& hosted = byRank[static_cast<std::size_t>(r)];
    indexOf.push_back(static_cast<std::int32_t>(hosted.size()));
    hosted.push_back(e);
    state->hash = (state->hash ^ static_cast<std::uint64_t>(r)) * 1099511628211ull;
  }
  for (const auto& hosted : byRank) {
    check(static_cast<int>(hosted.size()) <= group.options().maxExpertsPerRank, kBad,
          "the expert map puts {} experts on one rank, more than max_experts_per_rank = {}",
          hosted.size(), group.options().maxExpertsPerRank);
    state->firstOf.push_back(static_cast<std::int32_t>(listed.size()));
    listed.insert(listed.end(), hosted.begin(), hosted.end());
  }
  state->firstOf.push_back(experts);
  std::vector<std::int32_t> tables;
  for (const auto* part : {&rankOf, &indexOf, &listed, &state->firstOf}) {
    tables.insert(tables.end(), part->begin(), part->end());
  }
  void* commStream = group.comm().native();
  state->tables = viewOf(group.allocate(tables.size() * 4, group.comm(), commStream), 0, DType::i32,
                         {static_cast<std::int64_t>(tables.size())}, group);
  group.device().copy(state->tables.data, tables.data(), tables.size() * 4, group.comm());
  group.comm().synchronize();
  return ExpertMap(std::move(state));
}

ExpertArgs ExpertMapState::args(int rank) const {
  ExpertArgs out;
  const auto at = static_cast<std::size_t>(rank);
  out.experts = experts;
  out.localExperts = firstOf[at + 1] - firstOf[at];
  out.rankOf = tables.as<const std::int32_t>();
  out.indexOf = out.rankOf + experts;
  out.listed = out.indexOf + experts;
  out.firstOf = out.listed + experts;
  return out;
}

int DispatchHandle::numTokens() const { return state_->tokens; }
int DispatchHandle::numRecvTokens() const { return state_->rows; }
Tensor DispatchHandle::recvSourceTokens() const { return state_->sourceTokens; }
Tensor DispatchHandle::rankOffsets() const { return state_->rankOffset; }

}  // namespace mscclpp::ep
