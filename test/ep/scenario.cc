#include "ep/scenario.hpp"

#include <algorithm>

namespace mscclpp::ep::testing {

using reference::Placement;
using reference::Received;
using reference::RowKey;

namespace {

std::size_t index(int i) {
  return static_cast<std::size_t>(i);
}
std::size_t bytesPerRow(const DispatchCase& call) {
  return index(call.hidden) * sizeOf(call.dtype);
}
constexpr std::uint64_t kScaleKey = 0x5CA1E, kBiasKey = 0xB1A5, kWeightKey = 0x3E16;

/// Ranks get experts in uneven shares, scattered; some may get none.
Placement unevenPlacement(int experts, int ranks, std::uint64_t seed) {
  std::vector<int> rankOf;
  for (int e = 0; e < experts; ++e) {
    const auto bits = reference::mix({seed, index(e)});
    rankOf.push_back(static_cast<int>(std::max(bits % index(ranks), (bits >> 32) % index(ranks))));
  }
  return Placement::of(std::move(rankOf), ranks);
}

template <class T>
std::vector<std::uint8_t> asBytes(const std::vector<T>& values) {
  std::vector<std::uint8_t> bytes(values.size() * sizeof(T));
  if (!bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

std::vector<std::uint8_t> keyedRows(const DispatchCase& call, const RowKey& key, int rows) {
  if (call.dtype == DType::bf16) return asBytes(reference::keyedBf16(key, rows, call.hidden));
  return reference::keyedBytes(key, rows, call.hidden);
}
/// Scales [rows, blocks], 4 bytes each, any bits.
std::vector<std::uint8_t> keyedScales(const DispatchCase& call, RowKey key, int rows) {
  key.tensor ^= kScaleKey;
  return reference::keyedBytes(key, rows, scalesPerRow(call.hidden) * 4);
}

/// The rows that `received` names, made row by row from their keys.
template <class Make>
std::vector<std::uint8_t> expectedRows(const Received& received, const DispatchCase& call,
                                       Make&& make) {
  std::vector<std::uint8_t> out;
  for (const reference::Source& source : received.rows) {
    const auto row = make(call, RowKey{call.id, source.rank, source.token}, 1);
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

/// Scales in the layout that the case asks for.
Tensor uploadScales(RankContext& rank, const DispatchCase& call, int tokens) {
  const int blocks = scalesPerRow(call.hidden);
  const auto dense = keyedScales(call, {call.id, rank.rank(), 0}, tokens);
  const bool transposed = call.scales == Scales::transposed, padded = call.scales == Scales::padded;
  const std::int64_t tokenStride = transposed ? 1 : blocks + (padded ? 3 : 0);
  const std::int64_t blockStride = transposed ? std::max(tokens, 1) : 1;
  const DType dtype = call.scales == Scales::i32 ? DType::i32 : DType::f32;
  const std::int64_t words = transposed ? std::max(tokens, 1) * blocks : tokens * tokenStride;
  std::vector<std::uint8_t> memory(index(static_cast<int>(words)) * 4, 0xAB);
  for (int t = 0; t < tokens; ++t) {
    for (int b = 0; b < blocks; ++b) {
      std::memcpy(memory.data() + index(static_cast<int>(t * tokenStride + b * blockStride)) * 4,
                  dense.data() + index(t * blocks + b) * 4, 4);
    }
  }
  Tensor tensor = rank.upload(dtype, {words}, memory);
  tensor.shape = {tokens, blocks};
  if (transposed || padded) tensor.strides = {tokenStride, blockStride};
  return tensor;
}

/// Downloads and checks a [rows, columns] output of which the first `expected` rows are defined.
template <class T>
void expectHead(RankContext& rank, const char* what, const Tensor& tensor,
                const std::vector<T>& expected, std::size_t columns) {
  ASSERT_TRUE(tensor) << what << " is absent";
  std::vector<T> actual = rank.download<T>(tensor);
  ASSERT_GE(actual.size(), expected.size()) << what << " is " << tensor.describe();
  actual.resize(expected.size());
  expectSame(what, expected, actual, columns);
}

}  // namespace

World::World(const WorldSpec& spec)
    : spec_(spec), mapped_(spec.mapped || spec.experts % spec.ranks != 0) {
  placement_ = mapped_ ? unevenPlacement(spec.experts, spec.ranks, spec.seed)
                       : Placement::blocks(spec.experts, spec.ranks);
  for (int r = 0; r < spec.ranks; ++r) {
    routing_.push_back(
        reference::makeRouting({spec.pattern, tokens(r), spec.topk, r, spec.seed}, placement_));
  }
  for (int r = 0; r < spec.ranks; ++r) {
    received_.push_back(reference::dispatch(routing_, placement_, r));
  }
}

int World::tokens(int rank) const {
  return spec_.tokens[index(rank) % spec_.tokens.size()];
}
int World::maxTokens() const {
  int most = 0;
  for (int r = 0; r < ranks(); ++r) most = std::max(most, tokens(r));
  return most;
}
int World::maxRows() const {
  int most = 0;
  for (const Received& received : received_) most = std::max(most, received.count());
  return most;
}
const reference::Routing& World::routing(int rank) const {
  return routing_.at(index(rank));
}
const Received& World::received(int rank) const {
  return received_.at(index(rank));
}

std::shared_ptr<const World::AllRows> World::experts(std::uint64_t id, int hidden) const {
  const std::lock_guard lock(mutex_);
  auto& entry = experts_[{id, hidden}];
  if (!entry) {
    auto rows = std::make_shared<AllRows>();
    for (int r = 0; r < ranks(); ++r) {
      rows->push_back(reference::keyedBf16({id, r, 0}, received(r).count(), hidden));
    }
    entry = rows;
  }
  return entry;
}

ExpertMap expertMapOf(RankContext& rank, const World& world) {
  return world.mapped() ? rank.expertMap(world.placement().rankOf) : ExpertMap();
}

std::vector<std::uint8_t> inputRows(const World& world, const DispatchCase& call, int rank) {
  return keyedRows(call, {call.id, rank, 0}, world.tokens(rank));
}

DispatchRequest makeDispatch(RankContext& rank, const World& world, const DispatchCase& call) {
  const reference::Routing& routing = world.routing(rank.rank());
  const std::int64_t tokens = routing.tokens, topk = routing.topk;
  DispatchRequest request;
  request.order = rank.order();
  request.order.allocateOnCommStream = call.commStreamOwns;
  request.x = rank.upload(call.dtype, {tokens, call.hidden}, inputRows(world, call, rank.rank()));
  if (call.dtype == DType::e4m3) request.xScales = uploadScales(rank, call, routing.tokens);
  request.config.numSms = call.numSms;
  request.handle = call.handle;
  if (call.handle) return request;

  LayoutRequest layout;
  layout.topkIdx = rank.upload(DType::i64, {tokens, topk}, routing.topkIdx);
  layout.numExperts = world.placement().experts();
  layout.expertMap = expertMapOf(rank, world);
  layout.order = rank.order();
  const LayoutResult counted = rank.buffer().getDispatchLayout(layout);
  request.isTokenInRank = counted.isTokenInRank;
  request.numTokensPerRank = counted.numTokensPerRank;
  request.numTokensPerExpert = counted.numTokensPerExpert;
  request.expertMap = layout.expertMap;
  if (call.withTopk) {
    request.topkIdx = layout.topkIdx;
    request.topkWeights = rank.upload(DType::f32, {tokens, topk}, routing.topkWeights);
  }
  request.expertAlignment = call.alignment;
  request.numWorstTokens = call.worst;
  return request;
}

DispatchResult dispatch(RankContext& rank, const World& world, const DispatchCase& call) {
  return rank.buffer().dispatch(makeDispatch(rank, world, call));
}

namespace {

void expectHandle(RankContext& rank, const World& world, const DispatchCase& call,
                  const DispatchHandle& handle) {
  const Received& expected = world.received(rank.rank());
  EXPECT_EQ(handle.numTokens(), world.tokens(rank.rank()));
  EXPECT_EQ(handle.numRecvTokens(), call.worst > 0 ? call.worst : expected.count());
  std::vector<std::int32_t> sourceTokens;
  for (const auto& source : expected.rows) sourceTokens.push_back(source.token);
  expectHead(rank, "source tokens", handle.recvSourceTokens(), sourceTokens, 1);
  expectHead(rank, "rank offsets", handle.rankOffsets(), expected.rankOffset, 1);
}

void expectTopk(RankContext& rank, const World& world, const DispatchCase& call,
                const DispatchResult& result) {
  const Received& expected = world.received(rank.rank());
  const auto topk = index(world.spec().topk);
  std::vector<std::int64_t> indices = expected.topkIdx;
  if (call.worst > 0) indices.resize(index(call.worst) * topk, -1);  // unused rows say "no expert"
  expectHead(rank, "recv_topk_idx", result.recvTopkIdx, indices, topk);
  expectHead(rank, "recv_topk_weights", result.recvTopkWeights, expected.topkWeights, topk);
}

}  // namespace

void expectRows(RankContext& rank, const World& world, const DispatchCase& call,
                const Tensor& recvX) {
  expectHead(rank, "recv_x", recvX, expectedRows(world.received(rank.rank()), call, keyedRows),
             bytesPerRow(call));
}

void expectDispatch(RankContext& rank, const World& world, const DispatchCase& call,
                    const DispatchResult& result) {
  const Received& expected = world.received(rank.rank());
  const std::vector<std::int64_t> shape = {
      call.handle ? call.handle.numRecvTokens() : (call.worst > 0 ? call.worst : expected.count()),
      call.hidden};
  EXPECT_EQ(result.recvX.shape, shape);
  EXPECT_EQ(result.recvX.dtype, call.dtype);
  expectRows(rank, world, call, result.recvX);
  if (call.dtype == DType::e4m3) {
    expectHead(rank, "recv_x_scales", result.recvXScales, expectedRows(expected, call, keyedScales),
               index(scalesPerRow(call.hidden)) * 4);
    EXPECT_EQ(result.recvXScales.dtype, call.scales == Scales::i32 ? DType::i32 : DType::f32);
  } else {
    EXPECT_FALSE(result.recvXScales);
  }
  if (call.handle) {
    EXPECT_FALSE(result.recvTopkIdx);
    EXPECT_TRUE(result.numRecvTokensPerExpert.empty());
    return;
  }
  if (call.withTopk) {
    expectTopk(rank, world, call, result);
  } else {
    EXPECT_FALSE(result.recvTopkIdx);
  }
  std::vector<int> aligned;
  for (const int count : expected.tokensPerExpert) {
    aligned.push_back((count + call.alignment - 1) / call.alignment * call.alignment);
  }
  if (call.worst > 0) aligned.clear();
  EXPECT_EQ(result.numRecvTokensPerExpert, aligned);
  expectHead(rank, "tokens per expert", result.recvTokensPerExpert, expected.tokensPerExpert, 1);
  expectHandle(rank, world, call, result.handle);
}

namespace {

std::vector<float> keyedWeights(const World& world, const CombineCase& call, int rank) {
  return reference::keyedFloats({call.id ^ kWeightKey, rank, 0}, world.received(rank).count(),
                                call.weightColumns);
}
std::vector<std::uint16_t> keyedBias(const World& world, const CombineCase& call, int rank,
                                     int number) {
  return reference::keyedBf16({call.id ^ (kBiasKey + index(number)), rank, 0}, world.tokens(rank),
                              call.hidden);
}

}  // namespace

CombineRequest makeCombine(RankContext& rank, const World& world, const CombineCase& call,
                           const DispatchHandle& handle) {
  const std::int64_t rows = handle.numRecvTokens(), hidden = call.hidden;
  CombineRequest request;
  request.order = rank.order();
  request.handle = handle;
  request.config.numSms = call.numSms;
  request.x = call.inPool ? rank.buffer().createTensor(DType::bf16, {rows, hidden},
                                                       request.order.computeStream)
                          : rank.empty(DType::bf16, {rows, hidden});
  auto y = (*world.experts(call.id, call.hidden))[index(rank.rank())];
  y.resize(static_cast<std::size_t>(rows * hidden), 0x7FC1);  // rows nobody may read: NaN
  rank.uploadTo(request.x, y);
  if (call.weightColumns > 0) {
    auto weights = keyedWeights(world, call, rank.rank());
    weights.resize(static_cast<std::size_t>(rows * call.weightColumns), 1e30f);
    request.topkWeights = rank.upload(DType::f32, {rows, call.weightColumns}, weights);
  }
  const std::int64_t tokens = handle.numTokens();
  Tensor* biases[] = {&request.bias0, &request.bias1};
  for (int i = 0; i < call.biases; ++i) {
    *biases[i] = rank.upload(DType::bf16, {tokens, hidden}, keyedBias(world, call, rank.rank(), i));
  }
  return request;
}

CombineResult combine(RankContext& rank, const World& world, const CombineCase& call,
                      const DispatchHandle& handle) {
  return rank.buffer().combine(makeCombine(rank, world, call, handle));
}

void expectCombine(RankContext& rank, const World& world, const CombineCase& call,
                   const CombineResult& result) {
  const int me = rank.rank(), tokens = world.tokens(me);
  const auto y = world.experts(call.id, call.hidden);
  std::vector<std::uint16_t> biases[2];
  for (int i = 0; i < call.biases; ++i) biases[i] = keyedBias(world, call, me, i);
  reference::CombineInput input{me,      tokens,  call.hidden, &world.allReceived(),
                                y.get(), nullptr, nullptr};
  if (call.biases > 0) input.bias0 = &biases[0];
  if (call.biases > 1) input.bias1 = &biases[1];
  std::vector<int> nodeOf;
  for (int r = 0; r < world.ranks(); ++r) nodeOf.push_back(rank.buffer().topology().nodeOf(r));
  input.nodeOf = &nodeOf;
  EXPECT_EQ(result.x.shape, (std::vector<std::int64_t>{tokens, call.hidden}));
  expectSame("combined x", reference::combine(input), rank.download<std::uint16_t>(result.x),
             index(call.hidden));
  if (call.weightColumns == 0) {
    EXPECT_FALSE(result.topkWeights);
    return;
  }
  std::vector<std::vector<float>> weights;
  for (int r = 0; r < world.ranks(); ++r) weights.push_back(keyedWeights(world, call, r));
  const reference::WeightsInput weighted{me,       tokens, call.weightColumns, &world.allReceived(),
                                         &weights, &nodeOf};
  expectSame("combined weights", reference::combineWeights(weighted),
             rank.download<float>(result.topkWeights), index(call.weightColumns));
}

}  // namespace mscclpp::ep::testing
