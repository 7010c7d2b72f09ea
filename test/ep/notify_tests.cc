// layout and notify by themselves: what they must tell, also when nothing follows them.
#include <algorithm>
#include <chrono>

#include "ep/manual.hpp"
#include "ep/nodes.hpp"
#include "ep/scenario.hpp"
#include "ext/ep/group.hpp"

namespace mscclpp::ep::testing {
namespace {

using device::RuntimeConfig;
using reference::Pattern;

/// The heap of one rank, and notify's inputs and outputs there, without a Buffer around them.
struct NotifyRank {
  std::shared_ptr<Group> group;
  Tensor mask, perExpert, topkIdx, position, sendCount, sendStart, rankOffset, recvPerExpert;

  void prepare(RankContext& rank, const World& world, std::vector<std::int64_t> topk) {
    const int me = rank.rank(), ranks = world.ranks();
    const auto sent = reference::layout(world.routing(me), world.placement());
    const std::int64_t tokens = world.tokens(me);
    mask = rank.upload(DType::u8, {tokens, ranks}, sent.isTokenInRank);
    perExpert = rank.upload(DType::i32, {world.placement().experts()}, sent.tokensPerExpert);
    topkIdx = rank.upload(DType::i64, {tokens, world.spec().topk}, topk);
    position = rank.empty(DType::i32, {tokens, ranks});
    sendCount = rank.empty(DType::i32, {ranks});
    sendStart = rank.empty(DType::i32, {ranks});
    rankOffset = rank.empty(DType::i32, {ranks + 1});
    recvPerExpert = rank.empty(DType::i32, {world.spec().experts / ranks});
  }
  NotifyArgs args(const World& world, int me, std::uint32_t sequence) const {
    NotifyArgs args;
    args.group = group->args();
    args.group.wait.limitNs = 0;
    args.experts.experts = world.spec().experts;
    args.experts.perRank = args.experts.localExperts = world.spec().experts / world.ranks();
    args.isTokenInRank = mask.as<const std::uint8_t>();
    args.tokensPerExpert = perExpert.as<const std::int32_t>();
    args.topkIdx = topkIdx.as<const std::int64_t>();
    args.tokens = world.tokens(me);
    args.topk = world.spec().topk;
    args.signature = 77;
    args.position = position.as<std::int32_t>();
    args.sendCount = sendCount.as<std::int32_t>();
    args.sendStart = sendStart.as<std::int32_t>();
    args.rankOffset = rankOffset.as<std::int32_t>();
    args.recvPerExpert = recvPerExpert.as<std::int32_t>();
    args.result = &group->notifyResult();
    args.sequence = sequence;
    return args;
  }
  /// What the host reads once `sequence` is there.
  void expectResult(const World& world, int me) const {
    const NotifyResult& result = group->notifyResult();
    const auto& expected = world.received(me);
    EXPECT_EQ(result.badRank, -1);
    EXPECT_EQ(result.recvRows, expected.count());
    EXPECT_EQ(result.maxTokens, world.maxTokens());
    EXPECT_EQ(result.maxRecvRows, world.maxRows());
    for (std::size_t e = 0; e < expected.tokensPerExpert.size(); ++e) {
      EXPECT_EQ(result.perExpert[e], expected.tokensPerExpert[e]) << "expert " << e;
    }
  }
};

std::vector<NotifyRank> makeRanks(ManualGroup& group, Meeting& meeting) {
  std::vector<NotifyRank> all(static_cast<std::size_t>(group.ranks()));
  group.inThreads([&](RankContext& rank) {
    all[static_cast<std::size_t>(rank.rank())].group =
        std::make_shared<Group>(meeting.bootstrap(rank.rank()), testOptions(1 << 16));
  });
  return all;
}

/// A refused call leaves notify without a dispatch behind it: the next notify must neither take the
/// old counts nor the old complaint. The bad id is one that a block's second warp finds: the first
/// counts the block as done.
TEST(EpSequence, NotifiesInARow) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const int ranks = underSanitizer() ? 2 : 2 + static_cast<int>(seed % 2);
    const WorldSpec spec{.ranks = ranks, .tokens = {70, 100}, .topk = 2, .experts = 4 * ranks};
    const World bad(spec);
    WorldSpec after = spec;
    after.tokens = {65, 3};
    after.pattern = Pattern::skewed;
    after.seed = seed + 1;
    const World good(after);
    ManualGroup group(ranks, testOptions(1 << 16));
    Meeting meeting(ranks);
    std::vector<NotifyRank> first = makeRanks(group, meeting);
    const auto notifyAll = [&](std::vector<NotifyRank>& all, const World& world, int badRank,
                               std::uint32_t sequence) {
      return group.run(config, [&](RankContext& rank) {
        NotifyRank& mine = all[static_cast<std::size_t>(rank.rank())];
        auto topk = world.routing(rank.rank()).topkIdx;
        if (rank.rank() == badRank) topk[32 + 64 * (seed % 3) + seed % 5] = 1000;
        mine.prepare(rank, world, topk);
        mine.group->kernels().notify(mine.args(world, rank.rank(), sequence), 3,
                                     rank.compute().native());
      });
    };
    ASSERT_TRUE(notifyAll(first, bad, 1, 41)) << group.failure();
    for (const NotifyRank& rank : first) {
      EXPECT_EQ(rank.group->notifyResult().sequence, 41u);
      EXPECT_EQ(rank.group->notifyResult().badRank, 1);
      EXPECT_EQ(rank.group->notifyResult().badSeen, 1000u);
    }
    ASSERT_TRUE(notifyAll(first, good, -1, 42)) << group.failure();
    group.forEach([&](RankContext& rank) {
      const NotifyRank& mine = first[static_cast<std::size_t>(rank.rank())];
      EXPECT_EQ(mine.group->notifyResult().sequence, 42u);
      mine.expectResult(good, rank.rank());
      expectSame("rank offsets", good.received(rank.rank()).rankOffset,
                 rank.download<std::int32_t>(mine.rankOffset));
    });
  });
}

/// A host thread that waits for `sequence`, as it does on GPUs, sees all of the answer.
TEST(EpSequence, PollingHostSeesTheCounts) {
  const World world({.ranks = 2, .tokens = {30}, .topk = 2, .experts = 80});
  ManualGroup group(2, testOptions(1 << 16));
  Meeting meeting(2);
  std::vector<NotifyRank> all = makeRanks(group, meeting);
  group.inThreads([&](RankContext& rank) {
    NotifyRank& mine = all[static_cast<std::size_t>(rank.rank())];
    mine.prepare(rank, world, world.routing(rank.rank()).topkIdx);
    mine.group->kernels().notify(mine.args(world, rank.rank(), 9), 2, rank.compute().native());
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (__atomic_load_n(&mine.group->notifyResult().sequence, __ATOMIC_ACQUIRE) != 9) {
      ASSERT_LT(std::chrono::steady_clock::now(), end) << "the answer does not come";
    }
    mine.expectResult(world, rank.rank());
    rank.sync();
  });
}

/// Several blocks count the same experts, ranks and nodes at once.
TEST(EpSequence, Layout) {
  underAllSchedules([](std::uint64_t seed, const RuntimeConfig& config) {
    const World world(
        {.ranks = 2, .tokens = {190, 130}, .topk = 3, .experts = 6, .seed = seed + 5});
    const bool nodes = seed % 2 == 1;
    ManualGroup group(2, nodes ? nodeOptions({}, 1 << 16) : testOptions(1 << 16));
    std::vector<LayoutResult> results(2);
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      const auto& routing = world.routing(rank.rank());
      LayoutRequest request;
      request.topkIdx = rank.upload(DType::i64, {routing.tokens, routing.topk}, routing.topkIdx);
      request.numExperts = 6;
      request.order = rank.order();
      results[static_cast<std::size_t>(rank.rank())] = rank.buffer().getDispatchLayout(request);
    })) << group.failure();
    group.forEach([&](RankContext& rank) {
      const LayoutResult& result = results[static_cast<std::size_t>(rank.rank())];
      const auto expected = reference::layout(world.routing(rank.rank()), world.placement());
      expectSame("tokens per rank", expected.tokensPerRank,
                 rank.download<std::int32_t>(result.numTokensPerRank));
      expectSame("tokens per expert", expected.tokensPerExpert,
                 rank.download<std::int32_t>(result.numTokensPerExpert));
      expectSame("is_token_in_rank", expected.isTokenInRank,
                 rank.download<std::uint8_t>(result.isTokenInRank), 2);
      ASSERT_EQ(static_cast<bool>(result.numTokensPerRdmaRank), nodes);
      if (!nodes) return;
      expectSame("tokens per node", tokensPerNode(world, rank.rank(), rank.buffer().topology()),
                 rank.download<std::int32_t>(result.numTokensPerRdmaRank));
    });
    results.clear();
    group.inThreads([](RankContext& rank) { rank.buffer().destroy(); });
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
