// Every bug of the table in docs/device.md, planted in a small kernel, and the detector that finds
// it. The same kernel without the bug must pass everywhere.
//
// Plain and AddressSanitizer builds: FIFO and chaos schedules must report the bug (or see wrong
// data). AddressSanitizer and ThreadSanitizer builds: a child process runs the kernel and must die
// with the sanitizer's report, naming a line of the kernel.

#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <mscclpp/device/cpu/runtime.hpp>

#include "device/planted_kernels.hpp"
#include "device/seeds.hpp"

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
namespace {

using ::testing::HasSubstr;

const char* const kNotFound = nullptr;
const char* const kWrongData = "wrong data";

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

constexpr Lines kFlagLines{kFlagFirst, kFlagLast};
constexpr Lines kWarpLines{kWarpFirst, kWarpLast};
constexpr Lines kPartyLines{kPartyFirst, kPartyLast};
constexpr Lines kRingLines{kRingFirst, kRingLast};
constexpr Lines kBoundsLines{kBoundsFirst, kBoundsLast};

template <Flag Kind>
Planted flagBug(const char* name, const char* fifo, const char* chaos) {
  return {name,      launchOn<flags<Flag::Right>>, launchOn<flags<Kind>>, fifo, chaos, true, false,
          kFlagLines};
}
template <Party Kind>
Planted partyBug(const char* name, const char* report) {
  return {name,
          launchOn<parties<Party::Right>>,
          launchOn<parties<Kind>>,
          report,
          report,
          false,
          false,
          kPartyLines};
}
template <Ring Kind>
Planted ringBug(const char* name, const char* fifo, const char* chaos, bool race) {
  return {name,      launchOn<ring<Ring::Right>>, launchOn<ring<Kind>>, fifo, chaos, race, false,
          kRingLines};
}

const std::vector<Planted>& plantedBugs() {
  static const std::vector<Planted> bugs = {
    flagBug<Flag::Relaxed>("RelaxedFlagStore", kNotFound, kNotFound),
    flagBug<Flag::Plain>("PlainFlagStore", kNotFound, kNotFound),
    flagBug<Flag::RelaxedLoad>("RelaxedFlagLoad", kNotFound, kNotFound),
    flagBug<Flag::BeforeData>("FlagBeforeData", kNotFound, kWrongData),
    flagBug<Flag::NoBarrier>("NoBarrierBeforeFlag", kNotFound, kWrongData),
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
    {"NoSyncWarpBeforeRead", launchOn<warpExchange<Exchange::Right>>,
     launchOn<warpExchange<Exchange::NoSyncWarpRaw>>, kWrongData, kWrongData, true, false,
     kWarpLines},
    {"NoSyncWarpBeforeWrite", launchOn<warpExchange<Exchange::Right>>,
     launchOn<warpExchange<Exchange::NoSyncWarpWar>>, kWrongData, kWrongData, true, false,
     kWarpLines},
    {"ShuffleAsFence", launchOn<warpExchange<Exchange::Right>>,
     launchOn<warpExchange<Exchange::ShuffleAsFence>>, kNotFound, kNotFound, true, false,
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
     launchOn<counting<Count::Right>>,
     launchOn<counting<Count::Plain>>,
     kNotFound,
     kNotFound,
     true,
     false,
     {kCountFirst, kCountLast}},
    {"SplitAtomicAdd",
     launchOn<counting<Count::Right>>,
     launchOn<counting<Count::Split>>,
     kNotFound,
     kWrongData,
     false,
     false,
     {kCountFirst, kCountLast}},
    partyBug<Party::DivergentSync>("DivergentSyncBlock", "32 of 64 arrived"),
    partyBug<Party::EarlyExit>("EarlyExit", "32 threads of the block have exited"),
    partyBug<Party::NamedCount>("NamedBarrierCount", "syncBarrier 1"),
    partyBug<Party::NamedMismatch>("NamedBarrierTwoCounts", "two thread counts for one barrier"),
    partyBug<Party::AbsentLane>("AbsentLane", "lanes 0x0000ffff of 0xffffffff arrived"),
    partyBug<Party::AbsentSource>("AbsentSourceLane", "the source lane does not take part"),
    partyBug<Party::NotInMask>("LaneNotInMask", "the caller's lane is not in the mask"),
    partyBug<Party::Different>("DifferentCollectives", "lanes of one mask are in different"),
    ringBug<Ring::NoFreeWait>("BulkNoFreeWait", "more arrivals than", "", false),
    ringBug<Ring::NoFullWait>("BulkNoFullWait", "", kWrongData, true),
    ringBug<Ring::WrongParity>("BulkWrongParity", "waitParity", "waitParity", false),
    ringBug<Ring::TooFewBytes>("BulkTooFewBytes", "waitParity", "waitParity", false),
    ringBug<Ring::TooManyBytes>("BulkTooManyBytes", "waitParity", "waitParity", false),
    ringBug<Ring::StagingReused>("BulkStagingReused", kNotFound, kWrongData, true),
    ringBug<Ring::NoProxyFence>("BulkNoProxyFence", kWrongData, kWrongData, false),
    ringBug<Ring::ExitInFlight>("BulkExitInFlight", "exit with a bulk store in flight",
                                "exit with a bulk store in flight", false),
    ringBug<Ring::NotInitialised>("MbarrierNotInitialised", "the mbarrier is not initialised",
                                  "the mbarrier is not initialised", false),
    ringBug<Ring::TooManyArrivals>("MbarrierTooManyArrivals", "more arrivals than",
                                   "more arrivals than", false),
    ringBug<Ring::Unaligned>("BulkUnaligned", "not a multiple of 16", "not a multiple of 16",
                             false),
    ringBug<Ring::OutsideShared>("BulkOutsideShared", "outside the block's shared memory",
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
    {"SharedOutOfBounds", launchOn<bounds<Bounds::Right>>, launchOn<bounds<Bounds::Shared>>,
     "wrote outside its shared memory", "wrote outside its shared memory", false, true,
     kBoundsLines},
    {"GlobalOutOfBounds", launchOn<bounds<Bounds::Right>>, launchOn<bounds<Bounds::Global>>,
     kWrongData, kWrongData, false, true, kBoundsLines},
#else
    {"SharedOutOfBounds", launchOn<bounds<Bounds::Right>>, launchOn<bounds<Bounds::Shared>>,
     kNotFound, kNotFound, false, true, kBoundsLines},
    {"GlobalOutOfBounds", launchOn<bounds<Bounds::Right>>, launchOn<bounds<Bounds::Global>>,
     kNotFound, kNotFound, false, true, kBoundsLines},
    {"HeapPadding", launchOn<bounds<Bounds::Right>>, launchOn<bounds<Bounds::Padding>>, kNotFound,
     kNotFound, false, true, kBoundsLines},
    {"BulkGlobalOutOfBounds", launchOn<bounds<Bounds::Right>>, launchOn<bounds<Bounds::BulkGlobal>>,
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

std::string runOnce(const Planted& bug, bool wrong, uint64_t seed, bool chaos) {
  World world(RuntimeConfig::testing(seed, chaos));
  const bool counts = bug.lines.first == kCountFirst;
  const bool copies = bug.lines.first == kRingFirst;
  return world.run(wrong ? bug.wrong : bug.right, counts, copies);
}

class PlantedBugs : public ::testing::TestWithParam<Planted> {};

TEST_P(PlantedBugs, RightVersionPasses) {
  EXPECT_EQ(runOnce(GetParam(), false, 1, false), "");
  const uint64_t seeds = seedCount(10);
  for (uint64_t seed = 1; seed <= seeds && !HasFailure(); ++seed) {
    EXPECT_EQ(runOnce(GetParam(), false, seed, true), "") << "seed " << seed;
  }
}

std::string bugName(const ::testing::TestParamInfo<Planted>& info) {
  return info.param.name;
}

INSTANTIATE_TEST_SUITE_P(Device, PlantedBugs, ::testing::ValuesIn(plantedBugs()), bugName);

#if !MSCCLPP_TEST_TSAN

// Reports without addresses: the heap need not place two runs alike.
std::string withoutAddresses(const std::string& report) {
  std::string text;
  for (size_t i = 0; i < report.size(); ++i) {
    text += report[i];
    if (report.compare(i, 3, "0x7") != 0 && report.compare(i, 3, "0x5") != 0 &&
        report.compare(i, 3, "0x6") != 0) {
      continue;
    }
    const size_t end = report.find_first_not_of("0123456789abcdef", i + 2);
    if (end != std::string::npos && end - i > 10) i = end - 1;
  }
  return text;
}

std::vector<Planted> foundBy(const char* Planted::*detector) {
  std::vector<Planted> found;
  for (const Planted& bug : plantedBugs()) {
    if (bug.*detector != kNotFound) found.push_back(bug);
  }
  return found;
}

class FifoFinds : public ::testing::TestWithParam<Planted> {};
TEST_P(FifoFinds, Bug) {
  const std::string report = runOnce(GetParam(), true, 1, false);
  EXPECT_NE(report, "");
  EXPECT_THAT(report, HasSubstr(GetParam().fifo));
  EXPECT_EQ(withoutAddresses(runOnce(GetParam(), true, 1, false)), withoutAddresses(report))
      << "the same run gives the same report";
}
INSTANTIATE_TEST_SUITE_P(Device, FifoFinds, ::testing::ValuesIn(foundBy(&Planted::fifo)), bugName);

class ChaosFinds : public ::testing::TestWithParam<Planted> {};
TEST_P(ChaosFinds, Bug) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    const std::string report = runOnce(GetParam(), true, seed, true);
    if (report.empty() || report.find(GetParam().chaos) == std::string::npos) continue;
    RecordProperty("seed", std::to_string(seed));
    EXPECT_EQ(withoutAddresses(runOnce(GetParam(), true, seed, true)), withoutAddresses(report))
        << "seed " << seed;
    return;
  }
  FAIL() << "40 seeds did not find it";
}
INSTANTIATE_TEST_SUITE_P(Device, ChaosFinds, ::testing::ValuesIn(foundBy(&Planted::chaos)),
                         bugName);

#endif

// ---- children: a process of its own for what ends the process

constexpr const char* kChildVariable = "MSCCLPP_TEST_PLANTED";

// Runs this program again with only the child test and the variable set; returns what it printed.
std::string runChild(const std::string& what, int* status) {
  char self[4096] = {};
  const ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
  if (length <= 0) return "cannot read /proc/self/exe";
  const std::string command = std::string(kChildVariable) + "=" + what +
                              " TSAN_OPTIONS=atexit_sleep_ms=0:halt_on_error=1:exitcode=66 "
                              "ASAN_OPTIONS=detect_leaks=0 MSCCLPP_SIMT_WATCHDOG=1 '" +
                              self + "' --gtest_also_run_disabled_tests " +
                              "--gtest_filter=PlantedChild.DISABLED_Run 2>&1";
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return "cannot start the child";
  std::string output;
  char buffer[4096];
  while (const size_t got = std::fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, got);
  *status = pclose(pipe);
  return output;
}

// Whether the text names a line of planted_kernels.hpp within the range.
[[maybe_unused]] bool namesLine(const std::string& text, Lines lines) {
  const std::string file = "planted_kernels.hpp:";
  for (size_t at = text.find(file); at != std::string::npos; at = text.find(file, at + 1)) {
    const unsigned line =
        static_cast<unsigned>(std::strtoul(text.c_str() + at + file.size(), nullptr, 10));
    if (line >= lines.first && line <= lines.last) return true;
  }
  return false;
}

#if MSCCLPP_TEST_TSAN
// A proxy: a real thread of the host that copies a row when the kernel rings.
template <bool Bug>
void doorbell(const Args& args) {
  args.mine->data[threadIndex()] = threadIndex() + 1;
  syncBlock();
  if (threadIndex() == 0 && blockIndex() == 0) {
    if (Bug) {
      storeRelaxed(&args.mine->flags[0], 1);
    } else {
      storeRelease(&args.mine->flags[0], 1);
    }
  }
}
void runDoorbell(bool wrong) {
  auto memory = std::make_unique<Memory>();
  std::memset(memory.get(), 0, sizeof(Memory));
  Stream* stream = createStream(0);
  std::thread proxy([&] {
    while (loadAcquire(&memory->flags[0]) == 0) std::this_thread::yield();
    std::memcpy(memory->out, memory->data, 256);
  });
  const Args args{memory.get(), memory.get(), 0, {}};
  const LaunchShape shape{.blocks = 1, .threads = kThreads};
  if (wrong) {
    launch<doorbell<true>, kThreads>(shape, stream, args);
  } else {
    launch<doorbell<false>, kThreads>(shape, stream, args);
  }
  proxy.join();
  stream->synchronize();
  destroyStream(stream);
}

// Two streams, one writes what the other reads, with and without an event between them.
void writeWords(const Args& args) {
  args.mine->data[slot()] = slot();
}
void readWords(const Args& args) {
  expectWord(args, args.mine->data[slot()], slot());
}
void runStreams(bool wrong) {
  Manual manual(RuntimeConfig::testing());
  auto memory = std::make_unique<Memory>();
  std::memset(memory.get(), 0, sizeof(Memory));
  Stream* first = createStream(0);
  Stream* second = createStream(0);
  const Args args{memory.get(), memory.get(), 0, {}};
  launchOn<writeWords>(first, args);
  Event event;
  event.record(*first);
  if (!wrong) event.streamWait(*second);
  launchOn<readWords>(second, args);
  // A second pair on each stream: ordered by their streams alone.
  launchOn<readWords>(second, args);
  EXPECT_TRUE(manual.runAll()) << manual.lastFailure();
  destroyStream(first);
  destroyStream(second);
}

std::vector<Planted> raceBugs() {
  std::vector<Planted> found;
  for (const Planted& bug : plantedBugs()) {
    if (bug.race) found.push_back(bug);
  }
  return found;
}
class RaceDetectorFinds : public ::testing::TestWithParam<Planted> {};
TEST_P(RaceDetectorFinds, Bug) {
  int status = 0;
  const std::string output = runChild(GetParam().name, &status);
  EXPECT_EQ(WEXITSTATUS(status), 66) << output;
  EXPECT_THAT(output, HasSubstr("ThreadSanitizer: data race"));
  EXPECT_TRUE(namesLine(output, GetParam().lines)) << output;
}
INSTANTIATE_TEST_SUITE_P(Device, RaceDetectorFinds, ::testing::ValuesIn(raceBugs()), bugName);

TEST(RaceDetector, DoorbellOfAProxy) {
  runDoorbell(false);
  int status = 0;
  const std::string output = runChild("doorbell", &status);
  EXPECT_EQ(WEXITSTATUS(status), 66) << output;
  EXPECT_THAT(output, HasSubstr("ThreadSanitizer: data race"));
}

TEST(RaceDetector, StreamsWithoutEvent) {
  runStreams(false);
  int status = 0;
  const std::string output = runChild("streams", &status);
  EXPECT_EQ(WEXITSTATUS(status), 66) << output;
  EXPECT_THAT(output, HasSubstr("ThreadSanitizer: data race"));
}
#endif

#if MSCCLPP_TEST_ASAN
std::vector<Planted> addressBugs() {
  std::vector<Planted> found;
  for (const Planted& bug : plantedBugs()) {
    if (bug.address) found.push_back(bug);
  }
  return found;
}
class AddressSanitizerFinds : public ::testing::TestWithParam<Planted> {};
TEST_P(AddressSanitizerFinds, Bug) {
  int status = 0;
  const std::string output = runChild(GetParam().name, &status);
  EXPECT_NE(WEXITSTATUS(status), 0) << output;
  EXPECT_THAT(output, HasSubstr("ERROR: AddressSanitizer"));
  EXPECT_TRUE(namesLine(output, GetParam().lines)) << output;
}
INSTANTIATE_TEST_SUITE_P(Device, AddressSanitizerFinds, ::testing::ValuesIn(addressBugs()),
                         bugName);
#endif

TEST(Watchdog, NamesAThreadThatCallsNoPrimitive) {
  int status = 0;
  const std::string output = runChild("volatileSpin", &status);
  EXPECT_NE(status, 0);
  EXPECT_THAT(output, HasSubstr("no primitive called for 1 s by rank 0 block 0 thread 3"));
}

TEST(PlantedChild, DISABLED_Run) {
  const char* what = std::getenv(kChildVariable);
  ASSERT_NE(what, nullptr);
  if (std::strcmp(what, "volatileSpin") == 0) {
    World world(RuntimeConfig::testing());
    world.run(launchOn<volatileSpin<true>>, false, false);
    return;
  }
#if MSCCLPP_TEST_TSAN
  if (std::strcmp(what, "doorbell") == 0) return runDoorbell(true);
  if (std::strcmp(what, "streams") == 0) return runStreams(true);
#endif
  for (const Planted& bug : plantedBugs()) {
    if (std::strcmp(what, bug.name) == 0) runOnce(bug, true, 1, false);
  }
}

}  // namespace
}  // namespace mscclpp::test::planted
