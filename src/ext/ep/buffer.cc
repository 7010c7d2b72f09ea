#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>

#include "buffer_impl.hpp"
#include "checks.hpp"
#include "handle.hpp"
#include "tensors.hpp"

namespace mscclpp::ep {
Buffer::Buffer(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options)
    : impl_(std::make_unique<Impl>()) {
  check(bootstrap != nullptr, ErrorCode::invalidArgument, "a Buffer needs a bootstrap");
  impl_->group = std::make_shared<Group>(std::move(bootstrap), options);
}

Buffer::~Buffer() {
  if (impl_ && impl_->group) {
    runNoThrow("~Buffer", [&] { impl_->group->drain(); });
  }
}

void Buffer::destroy() {
  if (!impl_->group) return;
  impl_->group->close();
  impl_->group.reset();
}

int Buffer::rank() const {
  return impl_->alive().rank();
}
int Buffer::ranks() const {
  return impl_->alive().ranks();
}
const BufferOptions& Buffer::options() const {
  return impl_->alive().options();
}
void Buffer::noteProxySignals(bool on) {
  if (PortPeers* const ports = impl_->alive().ports()) ports->noteSignals(on);
}
std::vector<SignalTime> Buffer::takeProxySignals() {
  PortPeers* const ports = impl_->alive().ports();
  return ports != nullptr ? ports->takeSignals() : std::vector<SignalTime>{};
}
std::vector<ProxyStatistics> Buffer::proxyStatistics() const {
  return impl_->alive().proxyStatistics();
}

const Topology& Buffer::topology() const {
  return impl_->alive().topology();
}
void* Buffer::commStream() const {
  return impl_->alive().comm().native();
}
void Buffer::checkHealth() {
  impl_->alive().device().checkAsyncErrors();
  impl_->group->raiseIfFailed();
}
std::size_t Buffer::poolBytesFree() const {
  return impl_->alive().pool().bytesFree();
}
bool Buffer::inPool(const Tensor& tensor) const {
  return impl_->alive().inPool(tensor.data);
}

Tensor Buffer::createTensor(DType dtype, std::vector<std::int64_t> shape, void* computeStream) {
  Group& group = impl_->alive();
  Tensor tensor = viewOf(nullptr, 0, dtype, std::move(shape), group);
  for (const std::int64_t extent : tensor.shape) {
    check(extent >= 0, ErrorCode::invalidArgument, "createTensor: {} has a negative extent",
          tensor.describe());
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
                    2 * TableArena::bytesFor(ranks) + TableArena::bytesFor(request.numExperts));
  result.numTokensPerRank = tables.i32({ranks});
  const int nodes = group.topology().nodes();
  if (nodes > 1) result.numTokensPerRdmaRank = tables.i32({nodes});
  result.numTokensPerExpert = tables.i32({request.numExperts});
  result.isTokenInRank = ordinary(group, order, DType::u8, {tokens, ranks});
  for (const Tensor* counts :
       {&result.numTokensPerRank, &result.numTokensPerExpert, &result.numTokensPerRdmaRank}) {
    if (*counts) group.device().fill(counts->data, 0, counts->bytes(), group.comm());
  }
  LayoutArgs args;
  args.topkIdx = request.topkIdx.as<const std::int64_t>();
  args.tokens = static_cast<int>(tokens);
  args.topk = topk;
  args.ranks = group.ranks();
  if (nodes > 1) args.rails = group.rails();
  args.tokensPerNode = result.numTokensPerRdmaRank.as<std::int32_t>();
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

int DispatchHandle::numTokens() const {
  return state_->tokens;
}
int DispatchHandle::numRecvTokens() const {
  return state_->rows;
}
Tensor DispatchHandle::recvSourceTokens() const {
  return state_->sourceTokens;
}
Tensor DispatchHandle::rankOffsets() const {
  return state_->rankOffset;
}

}  // namespace mscclpp::ep
