#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "device/bulk_kernels.cuh"
#include "device/float_samples.hpp"
#include "device/line_cases.hpp"
#include "device/primitive_kernels.cuh"

/// Launches the kernels of primitive_kernels.cuh and checks what they did. The same on both
/// platforms: a Harness gives memory that host and device share, a stream, and run(), which waits.
namespace mscclpp::test::MSCCLPP_PLATFORM_NS {

inline constexpr uint64_t kSecond = 1'000'000'000;

template <class Harness>
struct Cases {
  static OutArgs out(Harness& h, size_t words) {
    return {h.template allocate<uint32_t>(words), h.control()};
  }

  static void checkIndices(Harness& h) {
    const OutArgs args = out(h, 3 * 96 * 6);
    launch<indices, kMaxThreads>({.blocks = 3, .threads = 96}, h.stream(), args);
    h.run();
    const auto* rows = reinterpret_cast<const IndexRow*>(args.out);
    for (uint32_t i = 0; i < 3 * 96; ++i) {
      const uint32_t thread = i % 96;
      const uint32_t expected[6] = {thread, i / 96, 96, 3, thread % 32, thread / 32};
      ASSERT_EQ(0, std::memcmp(&rows[i], expected, sizeof expected)) << "thread " << i;
    }
  }

  static void checkShuffles(Harness& h) {
    const OutArgs args = out(h, 2 * 64 * 8);
    launch<shuffles, kMaxThreads>({.blocks = 2, .threads = 64}, h.stream(), args);
    h.run();
    for (uint32_t i = 0; i < 128; ++i) {
      const uint32_t lane = i % 32;
      const uint32_t* row = args.out + i * 8;
      EXPECT_EQ(row[0], 15u);
      EXPECT_EQ(row[1], lane ^ 4u);
      EXPECT_EQ(row[2], lane >= 3 ? lane - 3 : lane);
      EXPECT_EQ(row[3], 31u);
      EXPECT_EQ(row[4], std::bit_cast<uint32_t>(9.0f));
      EXPECT_EQ(row[5], 7u);
      EXPECT_EQ(row[6], lane % 2 == 1 ? 1u : 30u);
      EXPECT_EQ(row[7], lane ^ 2u);
    }
  }

  static void checkVotes(Harness& h) {
    const OutArgs args = out(h, 2 * 64 * 8);
    launch<votes, kMaxThreads>({.blocks = 2, .threads = 64}, h.stream(), args);
    h.run();
    uint32_t thirds = 0;
    for (uint32_t lane = 0; lane < 32; lane += 3) thirds |= 1u << lane;
    for (uint32_t i = 0; i < 128; ++i) {
      const bool low = i % 32 < 8;
      const uint32_t* row = args.out + i * 8;
      EXPECT_EQ(row[0], thirds);
      EXPECT_EQ(row[1], 1u);
      EXPECT_EQ(row[2], 0u);
      EXPECT_EQ(row[3], 1u);
      EXPECT_EQ(row[4], 0u);
      EXPECT_EQ(row[5], low ? 0xFBu : 0x200u);
      EXPECT_EQ(row[6], low ? 1u : 0u);
      EXPECT_EQ(row[7], 0xFFFFFFFFu);
    }
  }

  static void checkExitedLanes(Harness& h) {
    const OutArgs args = out(h, 64 * 4);
    launch<exitedLanes, kMaxThreads>({.blocks = 1, .threads = 64}, h.stream(), args);
    h.run();
    for (uint32_t i = 0; i < 64; ++i) {
      if (i % 32 >= 16) continue;
      EXPECT_EQ(args.out[i * 4], 0xFFFFu);
      EXPECT_EQ(args.out[i * 4 + 1], 15u);
      EXPECT_EQ(args.out[i * 4 + 2], 1u);
    }
  }

  static void checkSyncWarp(Harness& h) {
    const OutArgs args = out(h, 2 * 128);
    launch<syncWarps, kMaxThreads>({.blocks = 2, .threads = 128, .sharedBytes = 512}, h.stream(),
                                   args);
    h.run();
    for (uint32_t i = 0; i < 256; ++i) EXPECT_EQ(args.out[i], 2800 + 8 * ((i % 32 + 1) % 32));
  }

  static void checkSyncBlock(Harness& h) {
    const OutArgs args = out(h, 2 * 256);
    launch<syncBlocks, kMaxThreads>({.blocks = 2, .threads = 256, .sharedBytes = 1024}, h.stream(),
                                    args);
    h.run();
    for (uint32_t i = 0; i < 512; ++i) EXPECT_EQ(args.out[i], 28000 + 8 * ((i % 256 + 33) % 256));
  }

  static void checkNamedBarriers(Harness& h) {
    const OutArgs args = out(h, 128);
    launch<namedBarriers, kMaxThreads>({.blocks = 1, .threads = 128, .sharedBytes = 256},
                                       h.stream(), args);
    h.run();
    for (uint32_t i = 0; i < 64; ++i) EXPECT_EQ(args.out[i], 15000 + 6 * ((i + 1) % 64 + 64));
  }

  static void checkBits(Harness& h) {
    const std::vector<uint32_t> values = {0u,          1u,          0x80000000u,
                                          0xFFFFFFFFu, 0x00F00000u, 0x7FC00001u};
    const OutArgs args = out(h, 32 * 8);
    for (size_t i = 0; i < values.size(); ++i) args.out[i * 8] = values[i];
    launch<bitFunctions, kMaxThreads>({.blocks = 1, .threads = 32}, h.stream(), args);
    h.run();
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t* row = args.out + i * 8;
      EXPECT_EQ(row[1], static_cast<uint32_t>(std::popcount(values[i])));
      EXPECT_EQ(row[2],
                values[i] == 0 ? 0u : static_cast<uint32_t>(std::countr_zero(values[i]) + 1));
      EXPECT_EQ(row[3], values[i]);
      EXPECT_EQ(row[4], 0x3A000400u);  // fused: 2^-11 + 2^-24; multiply then add loses the last bit
    }
  }

  static void checkShared(Harness& h) {
    const OutArgs args = out(h, 8);
    launch<sharedMemory, kMaxThreads>(
        {.blocks = 1, .threads = 64, .sharedBytes = sizeof(SharedParts) + 64}, h.stream(), args);
    h.run();
    EXPECT_EQ(args.out[0], 0u);
    EXPECT_EQ(args.out[1], 0u);
    EXPECT_EQ(args.out[2], 120u);
  }

  static void checkAtomics(Harness& h) {
    const uint32_t n = 3 * 96;
    const AtomicArgs args{h.template allocate<uint32_t>(8), h.template allocate<int32_t>(8),
                          h.template allocate<uint64_t>(8), h.template allocate<int64_t>(8),
                          h.template allocate<uint32_t>(n)};
    launch<atomicAdds, kMaxThreads>({.blocks = 3, .threads = 96}, h.stream(), args);
    h.run();
    EXPECT_EQ(args.u32[0], n);
    EXPECT_EQ(args.i32[0], -2 * static_cast<int32_t>(n));
    EXPECT_EQ(args.u64[0], uint64_t{n} << 33);
    EXPECT_EQ(args.i64[0], -(int64_t{n} << 33));
    EXPECT_EQ(args.u32[1], 3 * n);
    EXPECT_EQ(args.u64[1], 5u * n);
    EXPECT_EQ(args.u32[2], 7 * n);
    EXPECT_EQ(args.u64[2], 9u * n);
    EXPECT_EQ(args.u32[3], 11 * n);
    EXPECT_EQ(args.i64[3], -13 * int64_t{n});
    EXPECT_EQ(args.u32[4], 2 * n);
    EXPECT_EQ(args.u64[4], uint64_t{n} << 40);
    std::vector<uint32_t> seen(args.seen, args.seen + n);
    std::sort(seen.begin(), seen.end());
    for (uint32_t i = 0; i < n; ++i) ASSERT_EQ(seen[i], i);
  }

  static void checkMessages(Harness& h) {
    const MessageArgs args{h.template allocate<uint32_t>(64), h.template allocate<uint32_t>(2),
                           h.template allocate<uint64_t>(2), h.template allocate<uint32_t>(1),
                           h.control()};
    launch<messages, kMaxThreads>({.blocks = 2, .threads = 64}, h.stream(), args);
    h.run();
    EXPECT_EQ(*args.errors, 0u);
    EXPECT_EQ(args.flags[1], 40u);
    EXPECT_EQ(args.wide[1], (uint64_t{1} << 40) + 40);
  }

  static CopyArgs copyArgs(Harness& h, uint32_t rows, uint32_t rowBytes) {
    char* in = h.template allocate<char>(size_t{rows} * rowBytes);
    for (size_t i = 0; i < size_t{rows} * rowBytes; ++i) in[i] = static_cast<char>(i * 7 + i / 256);
    return {h.template allocate<char>(size_t{rows} * rowBytes), in, rows, rowBytes, h.control()};
  }

  static void checkVectors(Harness& h) {
    const CopyArgs args = copyArgs(h, 64, 32);
    launch<vectors, kMaxThreads>({.blocks = 1, .threads = 64}, h.stream(), args);
    h.run();
    for (size_t i = 0; i < 64 * 32; ++i) ASSERT_EQ(args.out[i], args.in[i ^ 16]) << "byte " << i;
  }

  static void checkBulkRing(Harness& h) {
    for (const uint32_t rowBytes : {16u, 240u, kMaxRow}) {
      const CopyArgs args = copyArgs(h, 37, rowBytes);
      launch<bulkRing, kMaxThreads>({.blocks = 2, .threads = 96, .sharedBytes = sizeof(RingShared)},
                                    h.stream(), args);
      h.run();
      for (size_t i = 0; i < 37 * size_t{rowBytes}; ++i) {
        ASSERT_EQ(args.out[i], static_cast<char>(args.in[i] + 1))
            << "byte " << i << " in rows of " << rowBytes;
      }
    }
  }

  static void checkMbarrierPhases(Harness& h) {
    const OutArgs args = out(h, 8);
    launch<mbarrierPhases, kMaxThreads>({.blocks = 1, .threads = 64, .sharedBytes = 64}, h.stream(),
                                        args);
    h.run();
    EXPECT_EQ(args.out[0], 1u);
    EXPECT_EQ(args.out[1], 0u);
    for (int phase = 0; phase < 5; ++phase) EXPECT_EQ(args.out[2 + phase], 1u) << phase;
  }

  static void checkFreshRows(Harness& h) {
    const size_t bytes = 8 * kMaxRow;
    const ProxyArgs args{h.template allocate<char>(bytes), h.template allocate<char>(bytes),
                         h.template allocate<uint32_t>(1), h.control()};
    launch<bulkLoadOfFreshRows, kMaxThreads>(
        {.blocks = 2, .threads = 64, .sharedBytes = sizeof(RingShared)}, h.stream(), args);
    h.run();
    for (uint32_t i = 0; i < bytes; ++i) {
      ASSERT_EQ(args.out[i], static_cast<char>(i % kMaxRow * 3 + i / kMaxRow)) << "byte " << i;
    }
  }

  static void checkConversions(Harness& h) {
    const std::vector<uint32_t> samples = floatSamples();
    auto* floats = h.template allocate<uint32_t>(samples.size());
    std::copy(samples.begin(), samples.end(), floats);
    const ConvertArgs args{floats,
                           static_cast<uint32_t>(samples.size()),
                           h.template allocate<uint16_t>(samples.size()),
                           h.template allocate<uint8_t>(samples.size()),
                           h.template allocate<uint32_t>(256),
                           h.template allocate<uint32_t>(65536)};
    launch<conversions, kMaxThreads>({.blocks = 4, .threads = 128}, h.stream(), args);
    h.run();
    for (size_t i = 0; i < samples.size(); ++i) {
      ASSERT_EQ(args.bf16[i], bits::floatToBf16(samples[i])) << std::hex << samples[i];
      ASSERT_EQ(args.e4m3[i], bits::floatToE4m3(samples[i])) << std::hex << samples[i];
    }
    for (uint32_t i = 0; i < 256; ++i) {
      ASSERT_EQ(args.fromE4m3[i], bits::e4m3ToFloat(static_cast<uint8_t>(i)));
    }
    for (uint32_t i = 0; i < 65536; ++i) ASSERT_EQ(args.fromBf16[i], i << 16);
  }

  static void checkVectorConversions(Harness& h) {
    const uint32_t n = 4 * 128 * 8;
    auto* a = h.template allocate<uint16_t>(n);
    auto* b = h.template allocate<uint16_t>(n);
    for (uint32_t i = 0; i < n; ++i) {
      a[i] = static_cast<uint16_t>(0x3F80 + i * 13 % 1024);
      b[i] = static_cast<uint16_t>(0xBC00 + i * 29 % 2048);
    }
    const VectorConvertArgs args{a, b, h.template allocate<uint32_t>(n),
                                 h.template allocate<uint16_t>(n)};
    launch<vectorConversions, kMaxThreads>({.blocks = 4, .threads = 128}, h.stream(), args);
    h.run();
    for (uint32_t i = 0; i < n; ++i) {
      const float sum =
          std::bit_cast<float>(uint32_t{a[i]} << 16) + std::bit_cast<float>(uint32_t{b[i]} << 16);
      ASSERT_EQ(args.sums[i], std::bit_cast<uint32_t>(sum)) << i;
      ASSERT_EQ(args.narrow[i], bits::floatToBf16(std::bit_cast<uint32_t>(sum))) << i;
    }
  }

  static WaitArgs waitArgs(Harness& h, uint32_t epoch, uint64_t limitNs) {
    WaitControl control = h.control();
    control.limitNs = limitNs;
    control.rank = 9;
    return {h.template allocate<uint32_t>(1), epoch, h.template allocate<uint32_t>(8),
            h.template allocate<uint64_t>(2), control};
  }

  static void checkWaitLimit(Harness& h) {
    h.openEnded();
    const WaitArgs args = waitArgs(h, 6, kSecond / 5);
    *args.flag = 2;
    launch<waitTwice, kMaxThreads>({.blocks = 1, .threads = 1}, h.stream(), args);
    h.run();
    EXPECT_EQ(args.results[0], 0u);
    EXPECT_EQ(args.results[1], 1u);
    EXPECT_EQ(args.results[2], 0u);
    EXPECT_EQ(args.results[3], 1u) << "a flag that is reached is reached after a failure, too";
    EXPECT_GE(args.times[0], kSecond / 5);
    EXPECT_LT(args.times[0], 3 * kSecond / 5) << "gave up far too late";
    EXPECT_LT(args.times[1], kSecond / 100) << "waits after a failure must not wait";
    const FailureRecord& record = *args.control.record;
    ASSERT_TRUE(failurePublished(record));
    EXPECT_EQ(record.what, 77u);
    EXPECT_EQ(record.rank, 9);
    EXPECT_EQ(record.peer, 3);
    EXPECT_EQ(record.block, 0u);
    EXPECT_EQ(record.thread, 0u);
    EXPECT_EQ(record.expected, 6u);
    EXPECT_EQ(record.seen, 2u);
    EXPECT_GE(record.waitedNs, kSecond / 5);
    clearFailure(*args.control.record);
  }

  static void checkHostFailure(Harness& h) {
    h.openEnded();
    const WaitArgs args = waitArgs(h, 6, 0);  // no limit: only the host can end it
    ASSERT_TRUE(raiseFailure(*args.control.record, {42, 1}, 0));
    ASSERT_FALSE(raiseFailure(*args.control.record, {43, 1}, 0));
    launch<waitTwice, kMaxThreads>({.blocks = 1, .threads = 1}, h.stream(), args);
    h.run();
    EXPECT_EQ(args.results[0], 0u);
    EXPECT_EQ(args.control.record->what, 42u) << "the first failure is kept";
    clearFailure(*args.control.record);
  }

  static void checkWaitWraps(Harness& h) {
    h.openEnded();
    const WaitArgs args = waitArgs(h, 0, kSecond / 50);
    launch<waitWraps, kMaxThreads>({.blocks = 1, .threads = 1}, h.stream(), args);
    h.run();
    EXPECT_EQ(args.results[0], 1u);
    EXPECT_EQ(args.results[1], 1u);
    EXPECT_EQ(args.results[2], 1u);
    EXPECT_EQ(args.results[3], 1u);
    EXPECT_EQ(args.results[4], 0u);
    clearFailure(*args.control.record);
  }

  static void checkLaunchRefusals(Harness& h) {
    const OutArgs args = out(h, 8);
    EXPECT_THROW((launch<indices, 64>({.blocks = 1, .threads = 2048}, h.stream(), args)), Error);
    EXPECT_THROW((launch<indices, 64>({.blocks = 0, .threads = 32}, h.stream(), args)), Error);
    EXPECT_THROW((launch<indices, 64>({.blocks = 1, .threads = 32, .sharedBytes = size_t{1} << 20},
                                      h.stream(), args)),
                 Error);
    h.run();
  }
};

template <class Harness>
struct Case {
  const char* name;
  void (*check)(Harness&);
  bool timed;  // depends on wall-clock limits: needs no seed sweep
};

template <class Harness>
const std::vector<Case<Harness>>& allCases() {
  using C = Cases<Harness>;
  using L = LineCases<Harness>;
  static const std::vector<Case<Harness>> cases = {
      {"Indices", C::checkIndices, false},
      {"Shuffles", C::checkShuffles, false},
      {"Votes", C::checkVotes, false},
      {"ExitedLanes", C::checkExitedLanes, false},
      {"SyncWarp", C::checkSyncWarp, false},
      {"SyncBlock", C::checkSyncBlock, false},
      {"NamedBarriers", C::checkNamedBarriers, false},
      {"Bits", C::checkBits, false},
      {"Shared", C::checkShared, false},
      {"Atomics", C::checkAtomics, false},
      {"Messages", C::checkMessages, false},
      {"Vectors", C::checkVectors, false},
      {"BulkRing", C::checkBulkRing, false},
      {"MbarrierPhases", C::checkMbarrierPhases, false},
      {"FreshRows", C::checkFreshRows, false},
      {"Conversions", C::checkConversions, true},
      {"VectorConversions", C::checkVectorConversions, false},
      {"WaitLimit", C::checkWaitLimit, true},
      {"HostFailure", C::checkHostFailure, true},
      {"WaitWraps", C::checkWaitWraps, true},
      {"LaunchRefusals", C::checkLaunchRefusals, true},
      {"LinePingPong", L::checkPingPong, false},
      {"LineMissing", L::checkMissing, true},
      {"WarpFolds", L::checkFolds, false},
  };
  return cases;
}

}  // namespace mscclpp::test::MSCCLPP_PLATFORM_NS
