#pragma once

#include <algorithm>
#include <bit>

#include <gtest/gtest.h>

#include "device/line_kernels.cuh"

/// Launches the kernels of line_kernels.cuh and checks what they did; see primitive_cases.hpp.
namespace mscclpp::test::MSCCLPP_PLATFORM_NS {

template <class Harness>
struct LineCases {
  static LineArgs args(Harness& h, LineWrites writes) {
    const auto lines = [&] {
      // Units of stale bytes must not pass for a message.
      const size_t bytes = (2 * kLinesInTurn + 1) * kLineSize;
      auto* memory = h.template allocate<char>(bytes);
      std::fill_n(memory, bytes, '\x5A');
      return memory + (kLineSize - reinterpret_cast<uintptr_t>(memory) % kLineSize) % kLineSize;
    };
    return {
        lines(), lines(),    h.template allocate<uint32_t>(1), h.template allocate<uint32_t>(64),
        writes,  h.control()};
  }

  static void checkPingPong(Harness& h) {
    for (const LineWrites writes : {LineWrites::whole, LineWrites::flagLast}) {
      const LineArgs a = args(h, writes);
      launch<linePingPong, kMaxThreads>({.blocks = 2, .threads = 64}, h.stream(), a);
      h.run();
      EXPECT_EQ(*a.wrong, 0u);
      // Block 0's thread 0 looks at line 0, whose tail lane is thread 7.
      for (uint32_t r = 0; r < kLineRounds; ++r) EXPECT_EQ(a.second[r], (r + 1) * 1000 + 7 * 4 + 2);
    }
  }

  static void checkMissing(Harness& h) {
    h.openEnded();
    for (const LineWrites writes : {LineWrites::whole, LineWrites::flagLast}) {
      LineArgs a = args(h, writes);
      a.control.limitNs = kNanoseconds;
      a.control.rank = 3;
      std::fill_n(a.second, 32, 7u);
      launch<lineMissing, kMaxThreads>({.blocks = 1, .threads = 32}, h.stream(), a);
      h.run();
      for (int i = 0; i < 32; ++i) EXPECT_EQ(a.second[i], 0u) << "lane " << i;
      const FailureRecord& record = *a.control.record;
      ASSERT_TRUE(failurePublished(record));
      EXPECT_EQ(record.what, 6u);
      EXPECT_EQ(record.rank, 3);
      EXPECT_EQ(record.peer, 4);
      EXPECT_EQ(record.expected, 9u);
      EXPECT_EQ(record.seen, 0x5A5A5A5A5A5A5A5Au);
      EXPECT_GE(record.waitedNs, kNanoseconds);
      clearFailure(*a.control.record);
    }
  }

  static void checkFolds(Harness& h) {
    const OutArgs a{h.template allocate<uint32_t>(64 * 4), h.control()};
    launch<warpFolds, kMaxThreads>({.blocks = 1, .threads = 64}, h.stream(), a);
    h.run();
    for (uint32_t i = 0; i < 64; ++i) {
      const uint32_t lane = i % 32;
      EXPECT_EQ(a.out[i * 4], 5u * 31 * 32 / 2);
      EXPECT_EQ(a.out[i * 4 + 1], 1u << 3 | 1u << 17);
      EXPECT_EQ(a.out[i * 4 + 2], std::min(lane, 4u) << 16 | std::min(lane, 7u));
      const uint32_t last = bits::floatToE4m3(std::bit_cast<uint32_t>(static_cast<float>(lane)));
      EXPECT_EQ(a.out[i * 4 + 3], 0x38u | 0xC0u << 8 | 0x7Eu << 16 | last << 24);
    }
  }

 private:
  static constexpr uint64_t kNanoseconds = 200'000'000;
};

}  // namespace mscclpp::test::MSCCLPP_PLATFORM_NS
