// Calls between nodes under seeded chaos: frozen warps, blocks and ranks, while real proxies move
// the data. The seed decides the kernels' order, not the proxies'.
#include <algorithm>

#include "ep/manual.hpp"
#include "ep/nodes.hpp"

namespace mscclpp::ep::testing {
namespace {

using device::RuntimeConfig;
using reference::Pattern;

struct Outcome {
  DispatchResult sent[3];
  CombineResult combined[3];
};

/// Shapes, windows and routings that differ from seed to seed. Warps find out by 32 tokens of a
/// lane at once, of two lanes, who goes where: some ranks have more.
struct Setting {
  NodeShape shape;
  BufferOptions options;
  WorldSpec spec;
};
Setting settingFor(std::uint64_t seed) {
  constexpr NodeShape kShapes[] = {{2, 1}, {4, 2}, {3, 1}, {3, 2}, {2, 1, Transport::tcp}};
  constexpr Pattern kPatterns[] = {Pattern::uniform, Pattern::skewed, Pattern::gaps,
                                   Pattern::duplicates, Pattern::oneRank};
  const auto pick = [&](std::uint64_t key, std::uint64_t count) {
    return reference::mix({seed, key}) % count;
  };
  Setting setting;
  // Three nodes: two flows, each known to a lane of its own.
  setting.shape = underSanitizer() ? NodeShape{pick(1, 2) == 0 ? 2 : 3, 1} : kShapes[pick(1, 5)];
  const int ranks = setting.shape.ranks;
  setting.options = pick(2, 3) == 0 ? nodeOptions(setting.shape, std::size_t{1} << 20)
                                    : withSmallestWindow(setting.shape, 256);
  setting.spec = {.ranks = ranks,
                  .tokens = {static_cast<int>(1 + pick(3, 40)), static_cast<int>(pick(4, 20)),
                             static_cast<int>(pick(5, pick(8, 3) == 0 ? 150 : 60))},
                  .topk = 1 + static_cast<int>(pick(6, 3)),
                  .experts = 2 * ranks,
                  .pattern = kPatterns[pick(7, 5)],
                  .seed = seed};
  return setting;
}

TEST(EpNodeChaos, DispatchesAndCombines) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const Setting setting = settingFor(seed);
    WorldSpec other = setting.spec;
    other.seed += 1000;
    const World a(setting.spec), b(other);
    const int worst = std::max({a.maxRows(), b.maxRows(), a.maxTokens(), b.maxTokens(), 1});
    const int sms = 1 + static_cast<int>(seed % 3);
    const DispatchCase sendA{.id = 1, .hidden = 40, .numSms = sms, .worst = worst};
    const DispatchCase sendB{
        .id = 2, .hidden = 72, .dtype = DType::e4m3, .numSms = 2, .worst = worst};
    const CombineCase backB{.id = 3, .hidden = 24, .biases = 1, .numSms = sms};
    const CombineCase backA{
        .id = 4, .hidden = 40, .inPool = false, .weightColumns = 2, .numSms = 1};
    ManualGroup group(setting.shape.ranks, setting.options);
    std::vector<Outcome> got(static_cast<std::size_t>(group.ranks()));
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      rank.poisonPool();
      Outcome& mine = got[static_cast<std::size_t>(rank.rank())];
      mine.sent[0] = dispatch(rank, a, sendA);
      mine.sent[1] = dispatch(rank, b, sendB);
      mine.combined[0] = combine(rank, b, backB, mine.sent[1].handle);
      mine.combined[1] = combine(rank, a, backA, mine.sent[0].handle);
      mine.sent[2] = dispatch(rank, a, {.id = 6, .hidden = 64, .handle = mine.sent[0].handle});
      mine.combined[2] = combine(rank, b, backB, mine.sent[1].handle);
    })) << group.failure();
    group.forEach([&](RankContext& rank) {
      Outcome& mine = got[static_cast<std::size_t>(rank.rank())];
      expectDispatch(rank, a, sendA, mine.sent[0]);
      expectDispatch(rank, b, sendB, mine.sent[1]);
      expectDispatch(rank, a, {.id = 6, .hidden = 64, .handle = mine.sent[0].handle}, mine.sent[2]);
      expectCombine(rank, b, backB, mine.combined[0]);
      expectCombine(rank, a, backA, mine.combined[1]);
      expectCombine(rank, b, backB, mine.combined[2]);
    });
    got.clear();
    group.inThreads([](RankContext& rank) { rank.buffer().destroy(); });
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
