// Many round trips in a row, the routing another one each time; what the experts return is what
// they got, so that every result depends on everything before it. Every one of them is looked at.
#include <cstdlib>

#include "ep/low_latency_scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

constexpr int kHidden = 128, kAtOnce = 25;  // trips between two looks

/// MSCCLPP_TEST_TRIPS, by default few.
int trips() {
  const char* text = std::getenv("MSCCLPP_TEST_TRIPS");
  return text != nullptr ? std::max(1, std::atoi(text)) : 100;
}

/// One routing's tensors, which stay in place.
struct Trip {
  LowLatencyDispatchRequest dispatch;
  LowLatencyCombineRequest combine;
  std::vector<std::uint16_t> expected;
};

Trip makeTrip(RankContext& rank, const LowLatencyWorld& world, std::uint64_t id) {
  const reference::Routing& routing = world.routing(rank.rank());
  const std::int64_t tokens = routing.tokens, topk = routing.topk;
  Trip trip;
  trip.dispatch.x =
      rank.upload(DType::bf16, {tokens, kHidden},
                  reference::keyedBf16({id, rank.rank(), 0}, routing.tokens, kHidden));
  trip.dispatch.topkIdx = rank.upload(DType::i64, {tokens, topk}, routing.topkIdx);
  trip.dispatch.maxTokens = world.maxTokens();
  trip.dispatch.experts = world.spec().experts;
  trip.dispatch.useFp8 = false;
  trip.dispatch.outputs.recvX = rank.empty(
      DType::bf16, {world.localExperts(),
                    static_cast<std::int64_t>(world.ranks()) * world.maxTokens(), kHidden});
  trip.combine.topkIdx = trip.dispatch.topkIdx;
  trip.combine.topkWeights = rank.upload(DType::f32, {tokens, topk}, routing.topkWeights);
  trip.dispatch.order = trip.combine.order = rank.order();
  std::vector<std::vector<std::uint16_t>> received;
  for (int r = 0; r < world.ranks(); ++r) {
    auto& rows = received.emplace_back();
    for (const reference::Source& source : world.received(r).sourceOf) {
      const auto row = source.rank < 0
                           ? std::vector<std::uint16_t>(kHidden)
                           : reference::keyedBf16({id, source.rank, source.token}, 1, kHidden);
      rows.insert(rows.end(), row.begin(), row.end());
    }
  }
  trip.expected = reference::lowLatencyCombine(world.allReceived(), received, routing,
                                               world.placement(), rank.rank(), kHidden);
  return trip;
}

void enqueue(RankContext& rank, Trip& trip, bool halves, const Tensor& out) {
  trip.dispatch.returnRecvHook = trip.combine.returnRecvHook = halves;
  const LowLatencyDispatchResult sent = rank.buffer().lowLatencyDispatch(trip.dispatch);
  if (halves) sent.hook(rank.compute().native());
  trip.combine.x = sent.recvX;
  trip.combine.handle = sent.handle;
  trip.combine.out = out;
  const LowLatencyCombineResult back = rank.buffer().lowLatencyCombine(trip.combine);
  if (halves) back.hook(rank.compute().native());
}

TEST(EpLowLatencyChain, RoutingsChangeEveryTime) {
  constexpr int kRanks = 2;
  std::vector<LowLatencyWorld> worlds;
  const std::vector<std::vector<int>> tokens = {{24, 24}, {7, 24}, {24, 0},
                                                {1, 19},  {0, 0},  {13, 2}};
  for (std::uint64_t seed = 0; seed < tokens.size(); ++seed) {
    worlds.emplace_back(LowLatencySpec{.ranks = kRanks,
                                       .tokens = tokens[seed],
                                       .topk = 6,
                                       .experts = 14,
                                       .pattern = reference::Pattern::gaps,
                                       .maxTokens = 24,
                                       .seed = seed + 1});
  }
  const int count = trips();
  runRanks(kRanks, lowLatencyOptions(worlds[0], kHidden), [&](RankContext& rank) {
    std::vector<Trip> all;
    std::vector<Tensor> outs;
    for (const LowLatencyWorld& world : worlds) {
      all.push_back(makeTrip(rank, world, 40 + all.size()));
    }
    for (int i = 0; i < kAtOnce; ++i) outs.push_back(rank.empty(DType::bf16, {24, kHidden}));
    const auto worldOf = [&](int trip) {  // the same on all ranks
      return static_cast<std::size_t>(reference::mix({7, static_cast<std::uint64_t>(trip)}) %
                                      worlds.size());
    };
    const auto outOf = [&](int trip) {
      Tensor out = outs[static_cast<std::size_t>(trip % kAtOnce)];
      out.shape = {worlds[worldOf(trip)].tokens(rank.rank()), kHidden};
      return out;
    };
    for (int first = 0; first < count && !::testing::Test::HasFailure(); first += kAtOnce) {
      const int end = std::min(first + kAtOnce, count);
      for (int i = first; i < end; ++i) enqueue(rank, all[worldOf(i)], i % 5 == 3, outOf(i));
      for (int i = first; i < end; ++i) {
        expectSame("trip " + std::to_string(i), all[worldOf(i)].expected,
                   rank.download<std::uint16_t>(outOf(i)), kHidden);
        rank.device().fill(outOf(i).data, 0xEE, outs[0].bytes(), rank.compute());
      }
    }
    rank.sync();
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
