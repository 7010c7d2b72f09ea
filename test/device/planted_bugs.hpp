#pragma once

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/device/cpu/runtime.hpp>

#include "device/planted_kernels.hpp"

/// The table of planted bugs, which detector must find them, and a world of two ranks to run them
/// in.

#if defined(__has_feature)
#define MSCCLPP_TEST_HAS_FEATURE(x) __has_feature(x)
#else
#define MSCCLPP_TEST_HAS_FEATURE(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || MSCCLPP_TEST_HAS_FEATURE(address_sanitizer)
#define MSCCLPP_TEST_ASAN 1
#include <sanitizer/asan_interface.h>
#else
#define MSCCLPP_TEST_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__) || MSCCLPP_TEST_HAS_FEATURE(thread_sanitizer)
#define MSCCLPP_TEST_TSAN 1
#else
#define MSCCLPP_TEST_TSAN 0
#endif

namespace mscclpp::test::planted {

inline const char* const kNotFound = nullptr;
inline const char* const kWrongData = "wrong data";

using LaunchFunction = void (*)(Stream*, const Args&);

template <auto Body>
void launchOn(Stream* stream, const Args& args) {
  launch<Body, kThreads>(
      {.blocks = kBlocks, .threads = kThreads, .sharedBytes = sizeof(RingShared)}, stream, args);
}

struct Planted {
  const char* name;
  LaunchFunction right;
  LaunchFunction wrong;
  const char* fifo;   // text of the report under FIFO; kNotFound: this detector need not see it
  const char* chaos;  // under at least one of 40 chaos seeds
  bool race;          // ThreadSanitizer reports it
  bool address;       // AddressSanitizer reports it
  Lines lines;
};

inline constexpr Lines kFlagLines{kFlagFirst, kFlagLast};
inline constexpr Lines kWarpLines{kWarpFirst, kWarpLast};
inline constexpr Lines kPartyLines{kPartyFirst, kPartyLast};
inline constexpr Lines kRingLines{kRingFirst, kRingLast};
inline constexpr Lines kBoundsLines{kBoundsFirst, kBoundsLast};

template <Flag Kind>
Planted flagBug(const char* name, const char* fifo, const char* chaos) {
  return {name,      launchOn<flags<Flag::right>>, launchOn<flags<Kind>>, fifo, chaos, true, false,
          kFlagLines};
}
template <Party Kind>
Planted partyBug(const char* name, const char* report) {
  return {name,
          launchOn<parties<Party::right>>,
          launchOn<parties<Kind>>,
          report,
          report,
          false,
          false,
          kPartyLines};
}
template <Ring Kind>
Planted ringBug(const char* name, const char* fifo, const char* chaos, bool race) {
  return {name,      launchOn<ring<Ring::right>>, launchOn<ring<Kind>>, fifo, chaos, race, false,
          kRingLines};
}

inline const std::vector<Planted>& plantedBugs() {
  static const std::vector<Planted> bugs = {
    flagBug<Flag::relaxed>("RelaxedFlagStore", kNotFound, kNotFound),
    flagBug<Flag::plain>("PlainFlagStore", kNotFound, kNotFound),
    flagBug<Flag::relaxedLoad>("RelaxedFlagLoad", kNotFound, kNotFound),
    flagBug<Flag::beforeData>("FlagBeforeData", kNotFound, kWrongData),
    flagBug<Flag::noBarrier>("NoBarrierBeforeFlag", kNotFound, kWrongData),
    {"NoWaitForPeer",
     launchOn<pull<false>>,
     launchOn<pull<true>>,
     kNotFound,
     kWrongData,
     true,
     false,
     {kPullFirst, kPullLast}},
    {"FlagNeverRaised",
     launchOn<neverRaised<false>>,
     launchOn<neverRaised<true>>,
     "to reach 3, sees 0",
     "to reach 3, sees 0",
     false,
     false,
     {kNeverFirst, kNeverLast}},
    {"NoSyncWarpBeforeRead", launchOn<warpExchange<Exchange::right>>,
     launchOn<warpExchange<Exchange::noSyncWarpRaw>>, kWrongData, kWrongData, true, false,
     kWarpLines},
    {"NoSyncWarpBeforeWrite", launchOn<warpExchange<Exchange::right>>,
     launchOn<warpExchange<Exchange::noSyncWarpWar>>, kWrongData, kWrongData, true, false,
     kWarpLines},
    {"ShuffleAsFence", launchOn<warpExchange<Exchange::right>>,
     launchOn<warpExchange<Exchange::shuffleAsFence>>, kNotFound, kNotFound, true, false,
     kWarpLines},
    {"NoSyncBlockBeforeWrite",
     launchOn<blockExchange<false>>,
     launchOn<blockExchange<true>>,
     kWrongData,
     kWrongData,
     true,
     false,
     {kBlockFirst, kBlockLast}},
    {"PlainIncrement",
     launchOn<counting<Count::right>>,
     launchOn<counting<Count::plain>>,
     kNotFound,
     kNotFound,
     true,
     false,
     {kCountFirst, kCountLast}},
    {"SplitAtomicAdd",
     launchOn<counting<Count::right>>,
     launchOn<counting<Count::split>>,
     kNotFound,
     kWrongData,
     false,
     false,
     {kCountFirst, kCountLast}},
    partyBug<Party::divergentSync>("DivergentSyncBlock", "32 of 64 arrived"),
    partyBug<Party::earlyExit>("EarlyExit", "32 threads of the block have exited"),
    partyBug<Party::namedCount>("NamedBarrierCount", "syncBarrier 1"),
    partyBug<Party::namedMismatch>("NamedBarrierTwoCounts", "two thread counts for one barrier"),
    partyBug<Party::absentLane>("AbsentLane", "lanes 0x0000ffff of 0xffffffff arrived"),
    partyBug<Party::absentSource>("AbsentSourceLane", "the source lane does not take part"),
    partyBug<Party::notInMask>("LaneNotInMask", "the caller's lane is not in the mask"),
    partyBug<Party::different>("DifferentCollectives", "lanes of one mask are in different"),
    ringBug<Ring::noFreeWait>("BulkNoFreeWait", "more arrivals than", "", false),
    ringBug<Ring::noFullWait>("BulkNoFullWait", "", kWrongData, true),
    {"BulkNoFullWaitSameData",
     launchOn<loadTwice<false>>,
     launchOn<loadTwice<true>>,
     kWrongData,
     kWrongData,
     true,
     false,
     {kTwiceFirst, kTwiceLast}},
    ringBug<Ring::wrongParity>("BulkWrongParity", "waitParity", "waitParity", false),
    ringBug<Ring::tooFewBytes>("BulkTooFewBytes", "waitParity", "waitParity", false),
    ringBug<Ring::tooManyBytes>("BulkTooManyBytes", "waitParity", "waitParity", false),
    ringBug<Ring::stagingReused>("BulkStagingReused", kNotFound, kWrongData, true),
    ringBug<Ring::noProxyFence>("BulkNoProxyFence", kWrongData, kWrongData, false),
    ringBug<Ring::exitInFlight>("BulkExitInFlight", "exit with a bulk store in flight",
                                "exit with a bulk store in flight", false),
    ringBug<Ring::notInitialised>("MbarrierNotInitialised", "the mbarrier is not initialised",
                                  "the mbarrier is not initialised", false),
    ringBug<Ring::tooManyArrivals>("MbarrierTooManyArrivals", "more arrivals than",
                                   "more arrivals than", false),
    ringBug<Ring::unaligned>("BulkUnaligned", "not a multiple of 16", "not a multiple of 16",
                             false),
    ringBug<Ring::outsideShared>("BulkOutsideShared", "outside the block's shared memory",
                                 "outside the block's shared memory", false),
    {"HandLoopNeverRaised",
     launchOn<handLoop<false>>,
     launchOn<handLoop<true>>,
     "in a loop without a wait primitive",
     "in a loop without a wait primitive",
     false,
     false,
     {kHandFirst, kHandLast}},
#if !MSCCLPP_TEST_ASAN
    // In plain builds a guard around shared memory and the data behind a buffer tell.
    {"SharedOutOfBounds", launchOn<bounds<Bounds::right>>, launchOn<bounds<Bounds::shared>>,
     "wrote outside its shared memory", "wrote outside its shared memory", false, true,
     kBoundsLines},
    {"GlobalOutOfBounds", launchOn<bounds<Bounds::right>>, launchOn<bounds<Bounds::global>>,
     kWrongData, kWrongData, false, true, kBoundsLines},
#else
    {"SharedOutOfBounds", launchOn<bounds<Bounds::right>>, launchOn<bounds<Bounds::shared>>,
     kNotFound, kNotFound, false, true, kBoundsLines},
    {"GlobalOutOfBounds", launchOn<bounds<Bounds::right>>, launchOn<bounds<Bounds::global>>,
     kNotFound, kNotFound, false, true, kBoundsLines},
    {"HeapPadding", launchOn<bounds<Bounds::right>>, launchOn<bounds<Bounds::padding>>, kNotFound,
     kNotFound, false, true, kBoundsLines},
    {"BulkGlobalOutOfBounds", launchOn<bounds<Bounds::right>>, launchOn<bounds<Bounds::bulkGlobal>>,
     "touches poisoned memory", "touches poisoned memory", false, false, kBoundsLines},
#endif
#if !MSCCLPP_TEST_ASAN && !MSCCLPP_TEST_TSAN
    {"StackOverflow",
     launchOn<deepStack<false>>,
     launchOn<deepStack<true>>,
     "stack overflow in",
     "stack overflow in",
     false,
     false,
     {0, 0}},
#endif
  };
  return bugs;
}

// Two ranks in one process, each with its memory.
class World {
 public:
  explicit World(const RuntimeConfig& config) : manual_(config) {
    for (int rank = 0; rank < 2; ++rank) {
      // A little room behind, filled with a pattern, that AddressSanitizer builds do without.
      const size_t room = MSCCLPP_TEST_ASAN ? 0 : kRoom;
      memory_[rank] = static_cast<Memory*>(std::aligned_alloc(16, sizeof(Memory) + room));
      std::memset(memory_[rank], 0, sizeof(Memory) + room);
      for (uint32_t i = 0; i < kRows * kRow; ++i) {
        memory_[rank]->rows[i] = static_cast<char>(i * 3 + i / kRow);
      }
#if MSCCLPP_TEST_ASAN
      __asan_poison_memory_region(&memory_[rank]->flags[15], 4);
#endif
      stream_[rank] = createStream(rank);
    }
  }
  ~World() {
    for (int rank = 0; rank < 2; ++rank) {
      destroyStream(stream_[rank]);
#if MSCCLPP_TEST_ASAN
      __asan_unpoison_memory_region(&memory_[rank]->flags[15], 4);
#endif
      std::free(memory_[rank]);
    }
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  // The report, kWrongData, or nothing.
  std::string run(LaunchFunction function, bool counts, bool copies) {
    for (int rank = 0; rank < 2; ++rank) {
      function(stream_[rank], {memory_[rank], memory_[1 - rank], rank, {nullptr, 0, rank}});
    }
    if (!manual_.runAll()) return manual_.lastFailure();
    for (const Memory* memory : memory_) {
      if (memory->errors != 0) return kWrongData;
      if (counts && memory->counter != kThreads * kBlocks) return kWrongData;
      if (copies && !copied(*memory)) return kWrongData;
      if (!MSCCLPP_TEST_ASAN && reinterpret_cast<const uint32_t*>(memory + 1)[0] != 0) {
        return kWrongData;
      }
    }
    return {};
  }

 private:
  static constexpr size_t kRoom = 64;
  static bool copied(const Memory& memory) {
    for (uint32_t i = 0; i < kRows * kRow; ++i) {
      if (memory.out[i] != static_cast<char>(memory.rows[i] + 1)) return false;
    }
    return true;
  }
  Manual manual_;
  Memory* memory_[2];
  Stream* stream_[2];
};

inline std::string runOnce(const Planted& bug, bool wrong, uint64_t seed, bool chaos) {
  World world(RuntimeConfig::testing(seed, chaos));
  const bool counts = bug.lines.first == kCountFirst;
  const bool copies = bug.lines.first == kRingFirst;
  return world.run(wrong ? bug.wrong : bug.right, counts, copies);
}

inline std::string bugName(const ::testing::TestParamInfo<Planted>& info) {
  return info.param.name;
}

}  // namespace mscclpp::test::planted
