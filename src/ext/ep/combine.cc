#include <algorithm>

#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>

#include "buffer_impl.hpp"
#include "checks.hpp"
#include "handle.hpp"
#include "internode.hpp"
#include "tensors.hpp"

namespace mscclpp::ep {

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
  check(
      staging.tokens > 0, ErrorCode::invalidArgument,
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
  const std::uint64_t waves = std::max<std::uint64_t>(
      ceilDiv(static_cast<std::size_t>(handle.maxTokens), staging.tokens), 1);
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
    if (group.ports() != nullptr) {
      combineBetweenNodes(group, args, handle, blocks);
      continue;
    }
    if (topk > 0) group.kernels().stageWeights(args, blocks, group.comm().native());
    group.kernels().combine(args, blocks, group.comm().native());
  }
  result.event = order.finish();
  return result;
}

}  // namespace mscclpp::ep
