#include "ep/low_latency_scenario.hpp"

#include <algorithm>

namespace mscclpp::ep::testing {

using reference::LowLatencyReceived;
using reference::RowKey;
using reference::Source;

namespace {

std::size_t index(int i) {
  return static_cast<std::size_t>(i);
}
constexpr std::uint64_t kExpertKey = 0xE497;

std::vector<std::uint16_t> inputRow(const LowLatencyCase& call, const Source& source) {
  return reference::keyedBf16({call.id, source.rank, source.token}, 1, call.hidden);
}

int blocksOf(const LowLatencyCase& call) {
  return scalesPerRow(call.hidden);
}
int scaleColumns(const LowLatencyCase& call) {
  return call.ue8m0 ? (blocksOf(call) + 3) / 4 : blocksOf(call);
}

}  // namespace

LowLatencyWorld::LowLatencyWorld(const LowLatencySpec& spec)
    : spec_(spec), placement_(reference::lowLatencyPlacement(spec.experts, spec.ranks)) {
  maxTokens_ = spec.maxTokens;
  for (int r = 0; r < spec.ranks; ++r) {
    if (spec.maxTokens == 0) maxTokens_ = std::max(maxTokens_, tokens(r));
    routing_.push_back(
        reference::makeRouting({spec.pattern, tokens(r), spec.topk, r, spec.seed}, placement_));
  }
  for (int r = 0; r < spec.ranks; ++r) {
    received_.push_back(reference::lowLatencyDispatch(routing_, placement_, maxTokens_, r));
  }
}

int LowLatencyWorld::tokens(int rank) const {
  return spec_.tokens[index(rank) % spec_.tokens.size()];
}
const reference::Routing& LowLatencyWorld::routing(int rank) const {
  return routing_.at(index(rank));
}
const LowLatencyReceived& LowLatencyWorld::received(int rank) const {
  return received_.at(index(rank));
}

BufferOptions lowLatencyOptions(const LowLatencyWorld& world, int hidden) {
  BufferOptions options = testOptions(std::size_t{1} << 20);
  options.lowLatencyMode = true;
  options.numRdmaBytes =
      lowLatencySizeHint(world.maxTokens(), hidden, world.ranks(), world.spec().experts);
  return options;
}

BufferOptions sourceOptions(const LowLatencyWorld& world, int hidden, bool spansNodes) {
  BufferOptions options = lowLatencyOptions(world, hidden);
  options.numRdmaBytes = lowLatencySizeHint(
      world.maxTokens(), hidden, world.ranks(), world.spec().experts,
      {.reduce = LowLatencyReduce::source, .topk = world.spec().topk, .spansNodes = spansNodes});
  return options;
}
BufferOptions roomForBoth(const LowLatencyWorld& world, int hidden) {
  BufferOptions options = lowLatencyOptions(world, hidden);
  options.numRdmaBytes =
      std::max(options.numRdmaBytes, sourceOptions(world, hidden, true).numRdmaBytes);
  return options;
}

LowLatencyDispatchResult lowLatencyDispatch(RankContext& rank, const LowLatencyWorld& world,
                                            const LowLatencyCase& call) {
  const reference::Routing& routing = world.routing(rank.rank());
  const std::int64_t tokens = routing.tokens, topk = routing.topk;
  const std::int64_t rows = static_cast<std::int64_t>(world.ranks()) * world.maxTokens();
  LowLatencyDispatchRequest request;
  request.x =
      rank.upload(DType::bf16, {tokens, call.hidden},
                  reference::keyedBf16({call.id, rank.rank(), 0}, routing.tokens, call.hidden));
  request.topkIdx = rank.upload(DType::i64, {tokens, topk}, routing.topkIdx);
  request.maxTokens = world.maxTokens();
  request.experts = world.spec().experts;
  request.useFp8 = call.fp8;
  request.roundScale = call.roundScale;
  request.useUe8m0 = call.ue8m0;
  request.returnRecvHook = call.hook;
  request.numSms = call.numSms;
  request.order = rank.order();
  if (call.outputs) {
    const std::int64_t experts = world.localExperts(), ranks = world.ranks();
    auto& out = request.outputs;
    out.recvX = rank.empty(call.fp8 ? DType::e4m3 : DType::bf16, {experts, rows, call.hidden});
    if (call.fp8) {
      out.recvXScales =
          rank.empty(call.ue8m0 ? DType::i32 : DType::f32, {experts, scaleColumns(call), rows});
    }
    out.recvCount = rank.empty(DType::i32, {experts});
    out.sourceInfo = rank.empty(DType::i32, {experts, rows});
    out.layoutRange = rank.empty(DType::i64, {experts, ranks});
    out.slots = rank.empty(DType::i32, {ranks, world.maxTokens(), topk});
    out.sourceTokens = rank.empty(DType::i32, {ranks});
    out.rowTable = rank.empty(DType::i32, {2, ranks, world.maxTokens() + 2});
  }
  return rank.buffer().lowLatencyDispatch(request);
}

namespace {

/// Compares what is defined of [slots, columns] with what `expected` gives for a source.
template <class T, class Expected>
void expectSlots(const char* what, const LowLatencyReceived& received, const std::vector<T>& actual,
                 std::size_t columns, Expected&& expected) {
  std::vector<T> wanted, got;
  for (std::size_t slot = 0; slot < received.sourceOf.size(); ++slot) {
    const Source& source = received.sourceOf[slot];
    if (source.rank < 0) continue;
    const std::vector<T> row = expected(source);
    ASSERT_EQ(columns, row.size());
    wanted.insert(wanted.end(), row.begin(), row.end());
    got.insert(got.end(), actual.begin() + static_cast<std::ptrdiff_t>(slot * columns),
               actual.begin() + static_cast<std::ptrdiff_t>((slot + 1) * columns));
  }
  expectSame(what, wanted, got, columns);
}

/// Rows of [local experts, columns, rows] as [slots, columns].
template <class T>
std::vector<T> transposed(const std::vector<T>& in, int experts, int columns, int rows) {
  std::vector<T> out(in.size());
  for (int e = 0; e < experts; ++e) {
    for (int c = 0; c < columns; ++c) {
      for (int r = 0; r < rows; ++r) {
        out[index((e * rows + r) * columns + c)] = in[index((e * columns + c) * rows + r)];
      }
    }
  }
  return out;
}

void expectRows(RankContext& rank, const LowLatencyWorld& world, const LowLatencyCase& call,
                const LowLatencyDispatchResult& result) {
  const LowLatencyReceived& expected = world.received(rank.rank());
  if (!call.fp8) {
    expectSlots("recv_x", expected, rank.download<std::uint16_t>(result.recvX), index(call.hidden),
                [&](const Source& s) { return inputRow(call, s); });
    return;
  }
  const auto quantised = [&](const Source& source) {
    return reference::quantise(inputRow(call, source).data(), call.hidden, call.roundScale);
  };
  expectSlots("recv_x", expected, rank.download<std::uint8_t>(result.recvX), index(call.hidden),
              [&](const Source& s) { return quantised(s).values; });
  const int rows = world.ranks() * world.maxTokens(), columns = scaleColumns(call);
  if (call.ue8m0) {
    expectSlots("packed scales", expected,
                transposed(rank.download<std::int32_t>(result.recvXScales), world.localExperts(),
                           columns, rows),
                index(columns),
                [&](const Source& s) { return reference::packScales(quantised(s).scales); });
  } else {
    expectSlots(
        "scales", expected,
        transposed(rank.download<float>(result.recvXScales), world.localExperts(), columns, rows),
        index(columns), [&](const Source& s) { return quantised(s).scales; });
  }
}

}  // namespace

void expectLowLatencyDispatch(RankContext& rank, const LowLatencyWorld& world,
                              const LowLatencyCase& call, const LowLatencyDispatchResult& result) {
  const LowLatencyReceived& expected = world.received(rank.rank());
  expectSame("recv_count", expected.count, rank.download<std::int32_t>(result.recvCount));
  expectSame("layout_range", expected.layoutRange,
             rank.download<std::int64_t>(result.handle.layoutRange()), index(world.ranks()));
  expectSlots("source_info", expected, rank.download<std::int32_t>(result.handle.sourceInfo()), 1,
              [](const Source& s) { return std::vector<std::int32_t>{s.token}; });
  expectRows(rank, world, call, result);
}

std::vector<std::uint16_t> lowLatencyExperts(const LowLatencyWorld& world, std::uint64_t id,
                                             int hidden, int rank) {
  auto rows = reference::keyedBf16({id ^ kExpertKey, rank, 0}, world.slots(), hidden);
  const LowLatencyReceived& received = world.received(rank);
  for (std::size_t slot = 0; slot < received.sourceOf.size(); ++slot) {
    if (received.sourceOf[slot].rank >= 0) continue;
    std::fill_n(rows.begin() + static_cast<std::ptrdiff_t>(slot * index(hidden)), hidden,
                std::uint16_t{0x7FC1});
  }
  return rows;
}

LowLatencyCombineResult lowLatencyCombine(RankContext& rank, const LowLatencyWorld& world,
                                          const LowLatencyCase& call,
                                          const LowLatencyHandle& handle) {
  const reference::Routing& routing = world.routing(rank.rank());
  const std::int64_t tokens = routing.tokens, topk = routing.topk;
  LowLatencyCombineRequest request;
  request.x =
      rank.upload(DType::bf16,
                  {world.localExperts(),
                   static_cast<std::int64_t>(world.ranks()) * world.maxTokens(), call.hidden},
                  lowLatencyExperts(world, call.id, call.hidden, rank.rank()));
  request.topkIdx = rank.upload(DType::i64, {tokens, topk}, routing.topkIdx);
  request.topkWeights = rank.upload(DType::f32, {tokens, topk}, routing.topkWeights);
  request.handle = handle;
  request.useLogfmt = call.logfmt;
  request.reduce = call.source ? LowLatencyReduce::source : LowLatencyReduce::rank;
  request.returnRecvHook = call.hook;
  request.numSms = call.numSms;
  request.order = rank.order();
  if (call.outputs) request.out = rank.empty(DType::bf16, {tokens, call.hidden});
  const LowLatencyCombineResult result = rank.buffer().lowLatencyCombine(request);
  // The send half leaves the experts' output free.
  if (call.hook) {
    rank.uploadTo(request.x, std::vector<std::uint16_t>(
                                 static_cast<std::size_t>(request.x.elements()), 0x7FC2));
  }
  return result;
}

std::vector<std::uint16_t> combinedReference(const LowLatencyWorld& world,
                                             const LowLatencyCase& call,
                                             const std::vector<std::vector<std::uint16_t>>& y,
                                             int home) {
  const auto reduce = call.source   ? reference::lowLatencyCombineAtSource
                      : call.logfmt ? reference::lowLatencyCombineLogfmt
                                    : reference::lowLatencyCombine;
  return reduce(world.allReceived(), y, world.routing(home), world.placement(), home, call.hidden);
}

void expectLowLatencyCombine(RankContext& rank, const LowLatencyWorld& world,
                             const LowLatencyCase& call, const LowLatencyCombineResult& result) {
  std::vector<std::vector<std::uint16_t>> y;
  for (int r = 0; r < world.ranks(); ++r) {
    y.push_back(lowLatencyExperts(world, call.id, call.hidden, r));
  }
  expectSame("combined x", combinedReference(world, call, y, rank.rank()),
             rank.download<std::uint16_t>(result.x), index(call.hidden));
}

void lowLatencyRoundTrip(RankContext& rank, const LowLatencyWorld& world,
                         const LowLatencyCase& sent, const LowLatencyCase& back) {
  const LowLatencyDispatchResult a = lowLatencyDispatch(rank, world, sent);
  if (sent.hook) a.hook(rank.compute().native());
  const LowLatencyCombineResult b = lowLatencyCombine(rank, world, back, a.handle);
  if (back.hook) b.hook(rank.compute().native());
  expectLowLatencyDispatch(rank, world, sent, a);
  expectLowLatencyCombine(rank, world, back, b);
}

std::vector<std::string> combineUnequally(const LowLatencyCase& odd) {
  const LowLatencyWorld world({.ranks = 2, .tokens = {4, 3}, .topk = 2, .experts = 8});
  BufferOptions options = roomForBoth(world, 64);
  options.timeoutSeconds = 1;
  return tryRanks(
      2, [&](int) { return options; },
      [&](RankContext& rank) {
        const LowLatencyCase plain{.id = odd.id};
        const auto sent = lowLatencyDispatch(rank, world, plain);
        rank.sync();
        lowLatencyCombine(rank, world, rank.rank() == 0 ? odd : plain, sent.handle);
        rank.sync();
        rank.buffer().checkHealth();
      });
}

}  // namespace mscclpp::ep::testing
