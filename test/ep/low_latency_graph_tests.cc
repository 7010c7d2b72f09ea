// Low-latency calls captured into CUDA graphs: thousands of replays with inputs that change, mixed
// with eager calls. GPUs only.
#include <barrier>

#include "ep/low_latency_scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

/// What a graph works on: inputs that are overwritten between replays, outputs that stay in place.
struct GraphCall {
  LowLatencyDispatchRequest dispatch;
  LowLatencyCombineRequest combine;
  LowLatencyDispatchResult sent;
  LowLatencyCombineResult combined;
};

constexpr int kHidden = 1024;

GraphCall makeCall(RankContext& rank, const LowLatencyWorld& world, bool fp8, bool hook) {
  const std::int64_t tokens = world.tokens(rank.rank()), topk = world.spec().topk;
  const std::int64_t ranks = world.ranks(), experts = world.localExperts();
  const std::int64_t rows = ranks * world.maxTokens();
  GraphCall call;
  LowLatencyDispatchRequest& d = call.dispatch;
  d.x = rank.empty(DType::bf16, {tokens, kHidden});
  d.topkIdx = rank.empty(DType::i64, {tokens, topk});
  d.maxTokens = world.maxTokens();
  d.experts = world.spec().experts;
  d.useFp8 = fp8;
  d.returnRecvHook = hook;
  d.order = rank.order();
  d.outputs.recvX = rank.empty(fp8 ? DType::e4m3 : DType::bf16, {experts, rows, kHidden});
  if (fp8) d.outputs.recvXScales = rank.empty(DType::f32, {experts, kHidden / 128, rows});
  d.outputs.recvCount = rank.empty(DType::i32, {experts});
  d.outputs.sourceInfo = rank.empty(DType::i32, {experts, rows});
  d.outputs.layoutRange = rank.empty(DType::i64, {experts, ranks});
  d.outputs.slots = rank.empty(DType::i32, {ranks, world.maxTokens(), topk});
  d.outputs.sourceTokens = rank.empty(DType::i32, {ranks});
  d.outputs.rowTable = rank.empty(DType::i32, {2, ranks, world.maxTokens() + 2});
  LowLatencyCombineRequest& c = call.combine;
  c.x = rank.empty(DType::bf16, {experts, rows, kHidden});
  c.topkIdx = d.topkIdx;
  c.topkWeights = rank.empty(DType::f32, {tokens, topk});
  c.returnRecvHook = hook;
  c.out = rank.empty(DType::bf16, {tokens, kHidden});
  c.order = rank.order();
  return call;
}

void enqueue(RankContext& rank, GraphCall& call) {
  call.sent = rank.buffer().lowLatencyDispatch(call.dispatch);
  if (call.sent.hook) call.sent.hook(rank.compute().native());
  call.combine.handle = call.sent.handle;
  call.combined = rank.buffer().lowLatencyCombine(call.combine);
  if (call.combined.hook) call.combined.hook(rank.compute().native());
}

/// New contents for the inputs that the graph reads.
void writeInputs(RankContext& rank, const LowLatencyWorld& world, const GraphCall& call,
                 std::uint64_t id) {
  const reference::Routing& routing = world.routing(rank.rank());
  rank.uploadTo(call.dispatch.x,
                reference::keyedBf16({id, rank.rank(), 0}, routing.tokens, kHidden));
  rank.uploadTo(call.dispatch.topkIdx, routing.topkIdx);
  rank.uploadTo(call.combine.topkWeights, routing.topkWeights);
  rank.uploadTo(call.combine.x, lowLatencyExperts(world, id, kHidden, rank.rank()));
}

class EpLowLatencyGraph : public ::testing::TestWithParam<std::tuple<bool, bool, int>> {};

TEST_P(EpLowLatencyGraph, ReplaysMixWithEagerCalls) {
  const auto [fp8, hook, ranks] = GetParam();
  const auto worldOf = [ranks = ranks](std::uint64_t seed) {
    return LowLatencyWorld({.ranks = ranks,
                            .tokens = {17, 9, 0},
                            .topk = 4,
                            .experts = 4 * ranks,
                            .pattern = reference::Pattern::gaps,
                            .maxTokens = 20,
                            .seed = seed});
  };
  const std::vector<LowLatencyWorld> worlds = {worldOf(1), worldOf(2), worldOf(3)};
  // Instantiating a graph waits for the device, on which another rank's kernels would wait for
  // this.
  std::barrier captured(ranks);
  runRanks(ranks, lowLatencyOptions(worlds[0], kHidden), [&](RankContext& rank) {
    GraphCall call = makeCall(rank, worlds[0], fp8, hook);
    Stream& stream = rank.compute();
    const Graph graph = stream.capture([&] { enqueue(rank, call); });
    captured.arrive_and_wait();
    for (std::uint64_t id = 1; id <= 6; ++id) {
      const LowLatencyWorld& world = worlds[id % worlds.size()];
      writeInputs(rank, world, call, id);
      // The last replay of many is looked at: none of them may leave the epochs in disorder.
      for (int i = 0; i < 500; ++i) {
        stream.launch(graph);
        if (i % 50 == 49) stream.synchronize();  // see below
      }
      const LowLatencyCase expected{.id = id, .hidden = kHidden, .fp8 = fp8};
      expectLowLatencyDispatch(rank, world, expected, call.sent);
      expectLowLatencyCombine(rank, world, expected, call.combined);
      const LowLatencyCase eager{.id = 100 + id, .hidden = kHidden, .fp8 = !fp8};
      const auto sent = lowLatencyDispatch(rank, world, eager);
      expectLowLatencyDispatch(rank, world, eager, sent);
    }
    rank.sync();
  });
}
INSTANTIATE_TEST_SUITE_P(All, EpLowLatencyGraph,
                         ::testing::Combine(::testing::Bool(), ::testing::Bool(),
                                            ::testing::Values(2, 4)),
                         [](const auto& test) {
                           return std::string(std::get<0>(test.param) ? "Fp8" : "Bf16") +
                                  (std::get<1>(test.param) ? "Halves" : "Whole") +
                                  std::to_string(std::get<2>(test.param));
                         });

/// Inputs of four sets in turn, dispatch and combine chained in one graph without a look between.
TEST(EpLowLatencyGraphChain, TenThousandRoundTrips) {
  std::vector<LowLatencyWorld> worlds;
  const std::vector<std::vector<int>> tokens = {{128, 128}, {37, 128}, {128, 0}, {1, 90}};
  for (std::uint64_t seed = 0; seed < tokens.size(); ++seed) {
    worlds.emplace_back(LowLatencySpec{.ranks = 2,
                                       .tokens = tokens[seed],
                                       .topk = 8,
                                       .experts = 32,
                                       .maxTokens = 128,
                                       .seed = seed + 1});
  }
  std::barrier captured(2);  // as above
  runRanks(2, lowLatencyOptions(worlds[0], kHidden), [&](RankContext& rank) {
    std::vector<GraphCall> calls;
    for (std::size_t i = 0; i < worlds.size(); ++i) {
      calls.push_back(makeCall(rank, worlds[i], i % 2 == 1, false));
      writeInputs(rank, worlds[i], calls.back(), i + 1);
    }
    Stream& stream = rank.compute();
    stream.synchronize();
    const Graph graph = stream.capture([&] {
      for (int repeat = 0; repeat < 5; ++repeat) {
        for (GraphCall& call : calls) enqueue(rank, call);
      }
    });
    captured.arrive_and_wait();
    for (int replay = 0; replay < 500; ++replay) {
      stream.launch(graph);
      // Threads that share a GPU share its queue of launches: one that fills it up shuts out the
      // other, for which its kernels wait.
      if (replay % 10 == 9) stream.synchronize();
      if (replay % 100 != 99) continue;
      for (std::size_t i = 0; i < worlds.size(); ++i) {
        const LowLatencyCase expected{.id = i + 1, .hidden = kHidden, .fp8 = i % 2 == 1};
        expectLowLatencyDispatch(rank, worlds[i], expected, calls[i].sent);
        expectLowLatencyCombine(rank, worlds[i], expected, calls[i].combined);
      }
    }
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
