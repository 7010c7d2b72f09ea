// Bugs that only a sanitizer finds, or that end the process. A child process runs the kernel and
// must die with a report that names a line of the kernel. Which tests exist depends on the build's
// sanitizer.

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "device/planted_bugs.hpp"

namespace mscclpp::test::planted {
namespace {

using ::testing::HasSubstr;

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
