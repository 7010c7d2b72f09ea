// Ranks whose calls do not fit together, several blocks each: they give up, whole and for good.
#include "ep/manual.hpp"
#include "ext/ep/group.hpp"

namespace mscclpp::ep::testing {
namespace {

/// Every block of every rank sees that the signatures differ, while others count themselves done.
/// The words behind it must come out as if they had taken turns: the next kernel counts from them.
TEST(EpSequence, EveryBlockGivesUp) {
  underAllSchedules([](std::uint64_t seed, const device::RuntimeConfig& config) {
    const int ranks = underSanitizer() ? 2 : 3;
    ManualGroup group(ranks, testOptions(1 << 16));
    Meeting meeting(ranks);
    std::vector<std::shared_ptr<Group>> heaps(static_cast<std::size_t>(ranks));
    group.inThreads([&](RankContext& rank) {
      heaps[static_cast<std::size_t>(rank.rank())] =
          std::make_shared<Group>(meeting.bootstrap(rank.rank()), testOptions(1 << 16));
    });
    std::vector<Tensor> starts;
    for (int r = 0; r < ranks; ++r) {
      starts.push_back(group[r].upload(DType::i32, {ranks},
                                       std::vector<std::int32_t>(static_cast<std::size_t>(ranks))));
    }
    constexpr int kCalls = 3;
    const int wrong = static_cast<int>(seed % kCalls);  // this call and all after it are void
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      const auto at = static_cast<std::size_t>(rank.rank());
      DispatchArgs args;
      args.group = heaps[at]->args();
      args.group.wait.limitNs = 0;
      args.rowBytes = args.partBytes = 16;
      args.sendStart = starts[at].as<const std::int32_t>();
      for (int call = 0; call <= wrong; ++call) {
        args.signature = call < wrong ? 7 : static_cast<std::uint64_t>(rank.rank());
        heaps[at]->kernels().dispatch(args, 3, rank.compute().native());
      }
      args.signature = 9;  // fits, and comes too late
      heaps[at]->kernels().dispatch(args, 2, rank.compute().native());
    })) << group.failure();
    const auto calls = static_cast<std::uint32_t>(wrong) + 2;
    for (const auto& heap : heaps) {
      SCOPED_TRACE("rank " + std::to_string(heap->rank()));
      const auto& words =
          *reinterpret_cast<const LocalWords*>(heap->heap() + heap->plan().localWords());
      EXPECT_EQ(words.epoch, heap->options().firstEpoch + calls);
      EXPECT_EQ(words.blocksDone, 0u);
      EXPECT_EQ(words.ticket, 0u);
      EXPECT_EQ(words.broken, 1u);
      EXPECT_THROW(heap->raiseIfFailed(), Error);
    }
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
