#include "checks.hpp"

#include <limits>

#include <mscclpp/errors.hpp>

#include "internode.hpp"

namespace mscclpp::ep {
namespace {

constexpr auto kBad = ErrorCode::invalidArgument;
constexpr std::int64_t kMaxTokens = std::numeric_limits<std::int32_t>::max() / 64;

void checkExperts(int experts, const ExpertMap& map, const Group& group) {
  check(experts >= 1 && experts <= CallShape::kMaxExperts, kBad,
        "num_experts = {} must be in 1 .. {}", experts, CallShape::kMaxExperts);
  if (map) {
    check(map->groupId == group.id(), kBad, "the expert map belongs to another Buffer");
    check(map->experts == experts, kBad, "the expert map places {} experts, the call has {}",
          map->experts, experts);
    return;
  }
  check(experts % group.ranks() == 0, kBad,
        "num_experts = {} must be divisible by the {} ranks, or come with an expert map", experts,
        group.ranks());
  check(experts / group.ranks() <= group.options().maxExpertsPerRank, kBad,
        "{} experts per rank exceed max_experts_per_rank = {}: raise it when making the Buffer",
        experts / group.ranks(), group.options().maxExpertsPerRank);
}

void checkHandle(const DispatchHandle& handle, const Group& group) {
  check(handle->groupId == group.id(), kBad,
        "the handle belongs to another Buffer: dispatch and combine must use the Buffer that made "
        "it");
}

void checkTokens(const Tensor& x, const char* name) {
  check(x.shape[0] <= kMaxTokens, kBad, "{} is {}: at most {} tokens per rank", name, x.describe(),
        kMaxTokens);
}

void checkScales(const DispatchRequest& request, DispatchShape& shape, const Group& group) {
  const Tensor& scales = request.xScales;
  check((request.x.dtype == DType::e4m3) == static_cast<bool>(scales), kBad,
        "x is {} and its scales are {}: e4m3 needs scales, bf16 has none", request.x.describe(),
        scales.describe());
  if (!scales) return;
  checkOnDevice(scales, "x_scales", group);
  check(scales.dtype == DType::f32 || scales.dtype == DType::i32, kBad,
        "x_scales is {}: its dtype must be f32, or i32 for packed scales", scales.describe());
  const int most = scalesPerRow(shape.hidden);
  const bool fits = scales.shape.size() == 2 && scales.shape[0] == request.x.shape[0] &&
                    scales.shape[1] >= 1 && scales.shape[1] <= most;
  check(fits, kBad,
        "x_scales is {}: its shape must be [{}, {}], one scale per 128 values (fewer when packed)",
        scales.describe(), request.x.shape[0], most);
  check(scales.dtype == DType::i32 || scales.shape[1] == most, kBad,
        "x_scales is {}: f32 scales need {} columns for hidden = {}", scales.describe(), most,
        shape.hidden);
  checkAligned(scales, "x_scales", 4);
  shape.scaleCount = static_cast<int>(scales.shape[1]);
  shape.call.scales = scales.dtype == DType::f32 ? 1 : 2;
}

void checkRouting(const DispatchRequest& request, DispatchShape& shape, const Group& group) {
  const std::int64_t tokens = request.x.shape[0];
  checkTensor(request.isTokenInRank, "is_token_in_rank", DType::u8, {tokens, group.ranks()}, group);
  checkTensor(request.numTokensPerExpert, "num_tokens_per_expert", DType::i32, {-1}, group);
  if (request.numTokensPerRank) {
    checkTensor(request.numTokensPerRank, "num_tokens_per_rank", DType::i32, {group.ranks()},
                group);
  }
  if (request.numTokensPerRdmaRank) {
    checkTensor(request.numTokensPerRdmaRank, "num_tokens_per_rdma_rank", DType::i32,
                {group.topology().nodes()}, group);
  }
  shape.experts = static_cast<int>(request.numTokensPerExpert.shape[0]);
  checkExperts(shape.experts, request.expertMap, group);
  check(static_cast<bool>(request.topkIdx) == static_cast<bool>(request.topkWeights), kBad,
        "topk_idx is {} and topk_weights is {}: give both or neither", request.topkIdx.describe(),
        request.topkWeights.describe());
  if (request.topkIdx) {
    checkTensor(request.topkIdx, "topk_idx", DType::i64, {tokens, -1}, group);
    shape.topk = static_cast<int>(request.topkIdx.shape[1]);
    check(shape.topk >= 1 && shape.topk <= CallShape::kMaxTopk, kBad,
          "topk_idx is {}: top-k must be in 1 .. {}", request.topkIdx.describe(),
          CallShape::kMaxTopk);
    checkTensor(request.topkWeights, "topk_weights", DType::f32, {tokens, shape.topk}, group);
  }
  check(request.expertAlignment >= 1, kBad, "expert_alignment = {} must be at least 1",
        request.expertAlignment);
  check(request.numWorstTokens >= 0, kBad, "num_worst_tokens = {} must not be negative",
        request.numWorstTokens);
  check(request.numWorstTokens == 0 || tokens <= request.numWorstTokens, kBad,
        "x has {} tokens, more than num_worst_tokens = {}: it bounds the tokens of every rank too",
        tokens, request.numWorstTokens);
}

void checkCached(const DispatchRequest& request, const Group& group) {
  checkHandle(request.handle, group);
  check(!request.topkIdx && !request.topkWeights && !request.isTokenInRank, kBad,
        "a handle brings its routing along: leave topk_idx, topk_weights and is_token_in_rank out");
  check(request.x.shape[0] == request.handle->tokens, kBad,
        "x is {}, but the handle's dispatch had {} tokens", request.x.describe(),
        request.handle->tokens);
}

/// The staging area must take at least one row: what the pool does not hold goes through it.
void checkStaging(DispatchShape& shape, const Group& group) {
  shape.row.rowBytes = shape.rowBytes;
  shape.row.scaleBytes = static_cast<std::uint64_t>(shape.scaleCount) * 4;
  shape.row.topk = static_cast<std::uint64_t>(shape.topk);
  shape.stagingRows = RecvLayout::rowsThatFit(group.plan().stagingBytes, shape.row);
  check(shape.stagingRows >= 1, kBad,
        "the staging area of {} bytes does not hold one received row of {} bytes: raise "
        "num_nvl_bytes "
        "(now {})",
        group.plan().stagingBytes, shape.row.bytesPerRow(), group.options().numNvlBytes);
  checkDispatchRing(group, shape.row);
}

}  // namespace

void checkTensor(const Tensor& tensor, const char* name, DType dtype,
                 const std::vector<std::int64_t>& shape, const Group& group) {
  check(static_cast<bool>(tensor), kBad, "{} is missing", name);
  checkOnDevice(tensor, name, group);
  check(tensor.dtype == dtype, kBad, "{} is {}: its dtype must be {}", name, tensor.describe(),
        nameOf(dtype));
  bool fits = tensor.shape.size() == shape.size();
  std::string wanted;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    fits = fits && (shape[i] < 0 || tensor.shape[i] == shape[i]);
    wanted += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  }
  check(fits, kBad, "{} is {}: its shape must be [{}]", name, tensor.describe(), wanted);
  check(tensor.contiguous(), kBad, "{} is {} with gaps or transposed: call .contiguous() first",
        name, tensor.describe());
}

void checkAligned(const Tensor& tensor, const char* name, std::size_t alignment) {
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.data);
  check(
      tensor.elements() == 0 || address % alignment == 0, kBad,
      "{} starts at an address that is {} modulo {}: it must be a multiple of {} bytes (clone the "
      "slice)",
      name, address % alignment, alignment, alignment);
}

void checkOnDevice(const Tensor& tensor, const char* name, const Group& group) {
  const BufferOptions& options = group.options();
  check(tensor.platform == options.platform, kBad, "{} is on the {} platform, the Buffer on {}",
        name, toString(tensor.platform), toString(options.platform));
  check(tensor.platform == Platform::cpu || tensor.deviceIndex == options.deviceIndex, kBad,
        "{} is on device {}, the Buffer on device {}", name, tensor.deviceIndex,
        options.deviceIndex);
  check(tensor.data != nullptr || tensor.elements() == 0, kBad, "{} is {} without memory", name,
        tensor.describe());
}

int checkLayout(const LayoutRequest& request, const Group& group) {
  checkTensor(request.topkIdx, "topk_idx", DType::i64, {-1, -1}, group);
  checkTokens(request.topkIdx, "topk_idx");
  const std::int64_t topk = request.topkIdx.shape[1];
  check(topk >= 1 && topk <= CallShape::kMaxTopk, kBad, "topk_idx is {}: top-k must be in 1 .. {}",
        request.topkIdx.describe(), CallShape::kMaxTopk);
  checkExperts(request.numExperts, request.expertMap, group);
  return static_cast<int>(topk);
}

DispatchShape checkDispatch(const DispatchRequest& request, const Group& group) {
  request.config.validate();
  const Tensor& x = request.x;
  check(static_cast<bool>(x), kBad, "x is missing");
  check(x.dtype == DType::bf16 || x.dtype == DType::e4m3, kBad,
        "x is {}: its dtype must be bf16, or e4m3 with scales", x.describe());
  checkTensor(x, "x", x.dtype, {-1, -1}, group);
  checkTokens(x, "x");
  DispatchShape shape;
  shape.tokens = static_cast<int>(x.shape[0]);
  shape.hidden = x.shape[1];
  check(shape.hidden >= 8 && shape.hidden % 8 == 0 && shape.hidden <= CallShape::kMaxHidden, kBad,
        "x is {}: hidden must be a multiple of 8 in 8 .. {} (pad {} to {})", x.describe(),
        CallShape::kMaxHidden, shape.hidden, (shape.hidden + 7) / 8 * 8);
  checkAligned(x, "x", 8);
  shape.rowBytes =
      static_cast<std::uint32_t>(static_cast<std::size_t>(shape.hidden) * sizeOf(x.dtype));
  checkScales(request, shape, group);
  shape.call.hidden = shape.hidden;
  shape.call.dtype = x.dtype;
  if (request.handle) {
    checkCached(request, group);
    shape.call.operation = CallShape::Operation::cachedDispatch;
    checkStaging(shape, group);
    return shape;
  }
  checkRouting(request, shape, group);
  shape.call.topk = shape.topk;
  shape.call.experts = shape.experts;
  shape.call.other = static_cast<std::uint64_t>(request.numWorstTokens) ^
                     (request.expertMap ? request.expertMap->hash : 0);
  checkStaging(shape, group);
  return shape;
}

std::uint32_t checkCombine(const CombineRequest& request, const Group& group) {
  request.config.validate();
  check(static_cast<bool>(request.handle), kBad, "combine needs the handle of a dispatch");
  checkHandle(request.handle, group);
  const HandleState& handle = *request.handle;
  checkTensor(request.x, "x", DType::bf16, {handle.rows, -1}, group);
  const std::int64_t hidden = request.x.shape[1];
  check(hidden >= 8 && hidden % 8 == 0 && hidden <= CallShape::kMaxHidden, kBad,
        "x is {}: hidden must be a multiple of 8 in 8 .. {}", request.x.describe(),
        CallShape::kMaxHidden);
  checkAligned(request.x, "x", 16);
  if (request.topkWeights) {
    checkTensor(request.topkWeights, "topk_weights", DType::f32, {handle.rows, -1}, group);
    const std::int64_t topk = request.topkWeights.shape[1];
    check(topk >= 1 && topk <= CallShape::kMaxTopk, kBad,
          "topk_weights is {}: top-k must be in 1 .. {}", request.topkWeights.describe(),
          CallShape::kMaxTopk);
  }
  checkCombineRing(group, static_cast<std::uint32_t>(hidden * 2),
                   request.topkWeights ? request.topkWeights.shape[1] : 0);
  check(request.bias0 || !request.bias1, kBad, "bias 1 is given without bias 0");
  for (const Tensor* bias : {&request.bias0, &request.bias1}) {
    if (!*bias) continue;
    checkTensor(*bias, "bias", DType::bf16, {handle.tokens, hidden}, group);
    checkAligned(*bias, "bias", 16);
  }
  return static_cast<std::uint32_t>(hidden * 2);
}

ExpertArgs expertArgs(int experts, const ExpertMap& map, const Group& group) {
  if (map) return map->args(group.rank());
  ExpertArgs args;
  args.experts = experts;
  args.perRank = experts / group.ranks();
  args.localExperts = args.perRank;
  return args;
}

}  // namespace mscclpp::ep
