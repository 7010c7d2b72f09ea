// Tensors of more than 2^31 elements: no offset may be computed in 32 bits.
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <fstream>

#include <mscclpp/errors.hpp>

#include "ep/scenario.hpp"

namespace mscclpp::ep::testing {
namespace {

constexpr std::int64_t kHidden = std::int64_t{1} << 20;
constexpr std::int64_t kTokens = 2100;  // element 2^31 is the first of token 2048
constexpr std::int64_t kSent[] = {0, 1, 2047, 2048, 2049, 2099};

std::size_t availableBytes() {
  std::ifstream file("/proc/meminfo");
  std::size_t kilobytes = 0;
  for (std::string word; file >> word;) {
    if (word == "MemAvailable:") file >> kilobytes;
  }
  return kilobytes * 1024;
}

std::uint16_t valueAt(std::int64_t token, std::int64_t i) {
  return static_cast<std::uint16_t>((token * 7919 + i * 13) & 0x3FFF);  // a finite bf16
}

/// Pages that nobody has written cost no memory: only the rows that are sent are real.
Tensor sparseInput() {
  Tensor x;
  x.present = true;
  x.dtype = DType::bf16;
  x.shape = {kTokens, kHidden};
  const std::size_t bytes = x.bytes();
  x.data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (x.data == MAP_FAILED) throw SystemError(errno, "mmap");
  x.owner = std::shared_ptr<void>(x.data, [bytes](void* p) { ::munmap(p, bytes); });
  for (const std::int64_t token : kSent) {
    auto* const row = x.as<std::uint16_t>() + token * kHidden;
    for (std::int64_t i = 0; i < kHidden; ++i) row[i] = valueAt(token, i);
  }
  return x;
}

void expectRow(const char* what, const std::uint16_t* row, std::int64_t token) {
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < kHidden; ++i) wrong += row[i] != valueAt(token, i) ? 1 : 0;
  EXPECT_EQ(wrong, 0) << what << " of token " << token;
}

/// Rank 0 sends a few of its 2100 tokens to rank 1, which sends them back.
void sendThereAndBack(RankContext& rank) {
  const bool sender = rank.rank() == 0;
  std::vector<std::int64_t> choices(sender ? kTokens : 0, -1);
  if (sender) {
    for (const std::int64_t token : kSent) choices[static_cast<std::size_t>(token)] = 1;
  }
  const auto tokens = static_cast<std::int64_t>(choices.size());
  DispatchRequest request;
  request.order = rank.order();
  request.x = sender ? sparseInput() : rank.empty(DType::bf16, {0, kHidden});
  request.topkIdx = rank.upload(DType::i64, {tokens, 1}, choices);
  request.topkWeights =
      rank.upload(DType::f32, {tokens, 1}, std::vector<float>(choices.size(), 1.0f));
  LayoutRequest layout;
  layout.order = rank.order();
  layout.topkIdx = request.topkIdx;
  layout.numExperts = 2;
  const LayoutResult counted = rank.buffer().getDispatchLayout(layout);
  request.isTokenInRank = counted.isTokenInRank;
  request.numTokensPerRank = counted.numTokensPerRank;
  request.numTokensPerExpert = counted.numTokensPerExpert;
  const DispatchResult sent = rank.buffer().dispatch(request);
  rank.sync();
  if (!sender) {
    ASSERT_EQ(sent.recvX.shape, (std::vector<std::int64_t>{std::size(kSent), kHidden}));
    for (std::size_t i = 0; i < std::size(kSent); ++i) {
      expectRow("dispatched",
                sent.recvX.as<std::uint16_t>() + static_cast<std::int64_t>(i) * kHidden, kSent[i]);
    }
  }
  CombineRequest back;
  back.order = rank.order();
  back.x = sent.recvX;
  back.handle = sent.handle;
  const CombineResult combined = rank.buffer().combine(back);
  rank.sync();
  if (!sender) return;
  for (const std::int64_t token : kSent) {
    expectRow("combined", combined.x.as<std::uint16_t>() + token * kHidden, token);
  }
  for (const std::int64_t token : {std::int64_t{2}, std::int64_t{2050}, kTokens - 2}) {
    const auto* const row = combined.x.as<std::uint16_t>() + token * kHidden;
    EXPECT_TRUE(std::all_of(row, row + kHidden, [](std::uint16_t v) { return v == 0; }))
        << "nobody had token " << token;
  }
}

void moreThan2To31Elements(int ranksPerNode) {
  if (testPlatform() != Platform::cpu) GTEST_SKIP() << "the input lies in host memory";
  const std::size_t needed = std::size_t{6} << 30;
  if (availableBytes() < needed) GTEST_SKIP() << "needs 6 GB of free memory";
  static_assert(kTokens * kHidden > std::int64_t{1} << 31);
  BufferOptions options = testOptions(std::size_t{256} << 20);
  options.timeoutSeconds = 0;  // rank 1 waits all the time that rank 0 needs to write 4 GB
  options.topology = {.ranksPerNode = ranksPerNode, .transport = Transport::shm};
  runRanks(2, options, sendThereAndBack);
}
TEST(EpLarge, MoreThan2To31Elements) {
  moreThan2To31Elements(2);
}
TEST(EpLarge, MoreThan2To31ElementsBetweenNodes) {
  moreThan2To31Elements(1);
}

/// Rings between nodes that begin behind 4 GiB of the heap. Most of their pages are never touched.
TEST(EpLarge, RingsBehindFourGiB) {
  if (testPlatform() != Platform::cpu) GTEST_SKIP() << "memory that nobody touches costs nothing";
  const World world({.ranks = 3, .tokens = {40, 7}, .topk = 2, .experts = 6});
  for (const Transport transport : {Transport::shm, Transport::tcp}) {
    SCOPED_TRACE(toString(transport));
    BufferOptions options = testOptions();
    options.numRdmaBytes = std::size_t{12} << 30;
    options.topology = {.ranksPerNode = 1, .transport = transport};
    runRanks(3, options, [&](RankContext& rank) {
      const DispatchCase send{.hidden = 64};
      const CombineCase back{.hidden = 64, .inPool = false};
      const DispatchResult sent = dispatch(rank, world, send);
      expectDispatch(rank, world, send, sent);
      expectCombine(rank, world, back, combine(rank, world, back, sent.handle));
    });
  }
}

}  // namespace
}  // namespace mscclpp::ep::testing
