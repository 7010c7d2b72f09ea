// The plain copy that the benchmark compares with.
#include "ep/manual.hpp"
#include "ep/scenario.hpp"
#include "ext/ep/group.hpp"

namespace mscclpp::ep::testing {
namespace {

/// One choice per token, else two blocks pull the same row.
/// The benchmark's plain copy: out to the places where dispatch puts the rows, and back.
TEST(EpSequence, CopyRowsOutAndBack) {
  underAllSchedules([](std::uint64_t seed, const device::RuntimeConfig& config) {
    const int ranks = underSanitizer() ? 2 : 2 + static_cast<int>(seed % 3);
    const World world(
        {.ranks = ranks, .tokens = {40, 9}, .topk = 1, .experts = 2 * ranks, .seed = seed});
    constexpr int kRowBytes = 48;
    ManualGroup group(world.ranks(), testOptions(1 << 16));
    Meeting meeting(world.ranks());
    std::vector<std::shared_ptr<Group>> heaps(static_cast<std::size_t>(world.ranks()));
    group.inThreads([&](RankContext& rank) {
      heaps[static_cast<std::size_t>(rank.rank())] =
          std::make_shared<Group>(meeting.bootstrap(rank.rank()), testOptions(1 << 18));
    });
    std::vector<Tensor> back(heaps.size());
    ASSERT_TRUE(group.run(config, [&](RankContext& rank) {
      const int me = rank.rank(), tokens = world.tokens(me);
      const auto at = static_cast<std::size_t>(me);
      std::vector<std::int32_t> position, sendStart;
      for (int r = 0; r < world.ranks(); ++r) {
        sendStart.push_back(world.received(r).rankOffset[at]);
      }
      for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < world.ranks(); ++r) {
          const int row = world.received(r).rowOf(me, t);
          position.push_back(row < 0 ? -1 : row - sendStart[static_cast<std::size_t>(r)]);
        }
      }
      const Tensor x = rank.upload(DType::u8, {tokens, kRowBytes},
                                   reference::keyedBytes({1, me, 0}, tokens, kRowBytes));
      const Tensor positions = rank.upload(DType::i32, {tokens, world.ranks()}, position);
      const Tensor starts = rank.upload(DType::i32, {world.ranks()}, sendStart);
      back[at] = rank.empty(DType::u8, x.shape);
      CopyRowsArgs args;
      args.group = heaps[at]->args();
      args.group.wait.limitNs = 0;
      args.rowBytes = kRowBytes;
      args.tokens = tokens;
      args.position = positions.as<const std::int32_t>();
      args.sendStart = starts.as<const std::int32_t>();
      args.heapOffset = heaps[at]->plan().pool();
      for (const bool pull : {false, true}) {
        args.x = (pull ? back[at] : x).as<const char>();
        args.pull = pull;
        heaps[at]->kernels().copyRows(args, 2, rank.compute().native());
      }
    })) << group.failure();
    group.forEach([&](RankContext& rank) {
      const int me = rank.rank();
      const auto at = static_cast<std::size_t>(me);
      const auto& rows = world.received(me).rows;
      std::vector<std::uint8_t> expected, actual(rows.size() * kRowBytes);
      for (const auto& source : rows) {
        const auto row = reference::keyedBytes({1, source.rank, source.token}, 1, kRowBytes);
        expected.insert(expected.end(), row.begin(), row.end());
      }
      std::memcpy(actual.data(), heaps[at]->heap() + heaps[at]->plan().pool(), actual.size());
      expectSame("rows written by the peers", expected, actual, kRowBytes);
      const auto read = rank.download<std::uint8_t>(back[at]);
      for (int t = 0; t < world.tokens(me); ++t) {
        bool sent = false;
        for (int r = 0; r < world.ranks(); ++r) sent = sent || world.received(r).rowOf(me, t) >= 0;
        const auto first = read.begin() + static_cast<std::ptrdiff_t>(t) * kRowBytes;
        const auto row = reference::keyedBytes({1, me, t}, 1, kRowBytes);
        EXPECT_TRUE(!sent || std::equal(row.begin(), row.end(), first)) << "token " << t;
      }
    });
  });
}

}  // namespace
}  // namespace mscclpp::ep::testing
