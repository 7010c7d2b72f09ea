// Ranks as processes over POSIX shared memory: flags of another process, and what happens when it
// is late or dead.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include <gtest/gtest.h>

#include <mscclpp/device/cpu/runtime.hpp>
#include <mscclpp/device/device.hpp>
#include <mscclpp/device/launch.hpp>

namespace mscclpp::test {
namespace {

using namespace mscclpp::device;  // NOLINT

inline constexpr uint32_t kRounds = 200;

struct Board {
  uint32_t flags[2];
  uint32_t rows[2][64];
  uint32_t errors[2];
};

struct PingPongArgs {
  Board* board;
  int rank;
  uint32_t rounds;
  WaitControl control;
};
// Rank r writes a row for the other and raises its flag, then checks the row it was given.
void pingPong(const PingPongArgs& args) {
  Board& board = *args.board;
  const int peer = 1 - args.rank;
  const uint32_t thread = threadIndex();
  for (uint32_t round = 1; round <= args.rounds; ++round) {
    board.rows[peer][thread] = round * 64 + thread;
    syncBlock();
    if (thread == 0) {
      storeRelease(&board.flags[peer], 2 * round - 1);
      waitReached(args.control, &board.flags[args.rank], 2 * round - 1, {1, peer});
    }
    syncBlock();
    if (failed(args.control)) return;
    if (board.rows[args.rank][thread] != round * 64 + thread) {
      fetchAddRelaxed(&board.errors[args.rank], 1);
    }
    syncBlock();
    if (thread == 0) {  // consumed
      storeRelease(&board.flags[peer], 2 * round);
      waitReached(args.control, &board.flags[args.rank], 2 * round, {2, peer});
    }
    syncBlock();
  }
}

class SharedBoard {
 public:
  explicit SharedBoard(const std::string& name, bool create) : name_(name), create_(create) {
    const int file = shm_open(name.c_str(), create ? O_CREAT | O_EXCL | O_RDWR : O_RDWR, 0600);
    if (file < 0 || (create && ftruncate(file, sizeof(Board)) != 0)) std::abort();
    board_ = static_cast<Board*>(
        mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    close(file);
  }
  ~SharedBoard() {
    munmap(board_, sizeof(Board));
    if (create_) shm_unlink(name_.c_str());
  }
  SharedBoard(const SharedBoard&) = delete;
  SharedBoard& operator=(const SharedBoard&) = delete;
  Board* get() { return board_; }

 private:
  std::string name_;
  bool create_;
  Board* board_;
};

constexpr const char* kNameVariable = "MSCCLPP_TEST_BOARD";
constexpr const char* kRoundsVariable = "MSCCLPP_TEST_ROUNDS";

std::string uniqueName() {
  static int count = 0;
  return "/mscclpp_test_" + std::to_string(getpid()) + "_" + std::to_string(count++);
}

// Starts this program again as rank 1. exec, not only fork: the child needs a runtime of its own.
pid_t startPeer(const std::string& name, uint32_t rounds) {
  const std::string roundsText = std::to_string(rounds);
  const pid_t child = fork();
  if (child != 0) return child;
  setenv(kNameVariable, name.c_str(), 1);
  setenv(kRoundsVariable, roundsText.c_str(), 1);
  execl("/proc/self/exe", "peer", "--gtest_also_run_disabled_tests",
        "--gtest_filter=PeerProcess.DISABLED_Run", static_cast<char*>(nullptr));
  _exit(99);
}

// Returns whether the record stayed empty.
bool runRank(Board* board, int rank, uint32_t rounds, uint64_t limitNs, FailureRecord& record) {
  configure(RuntimeConfig::fromEnvironment());
  Stream* stream = createStream(rank);
  launch<pingPong, 64>({.blocks = 1, .threads = 64}, stream,
                       PingPongArgs{board, rank, rounds, {&record, limitNs, rank}});
  stream->synchronize();
  destroyStream(stream);
  return record.state == kFailureNone;
}

TEST(Processes, PingPongThroughSharedMemory) {
  const std::string name = uniqueName();
  SharedBoard board(name, true);
  const pid_t child = startPeer(name, kRounds);
  FailureRecord record;
  EXPECT_TRUE(runRank(board.get(), 0, kRounds, 60'000'000'000, record)) << "peer " << record.peer;
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(board.get()->errors[0], 0u);
  EXPECT_EQ(board.get()->errors[1], 0u);
  EXPECT_EQ(board.get()->flags[0], 2 * kRounds);
}

TEST(Processes, APeerThatStopsIsNamed) {
  const std::string name = uniqueName();
  SharedBoard board(name, true);
  const pid_t child = startPeer(name, 3);  // leaves after three rounds
  FailureRecord record;
  EXPECT_FALSE(runRank(board.get(), 0, kRounds, 5'000'000'000, record));
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  ASSERT_TRUE(failurePublished(record));
  EXPECT_EQ(record.what, 1u);
  EXPECT_EQ(record.peer, 1);
  EXPECT_EQ(record.expected, 7u);
  EXPECT_EQ(record.seen, 6u);
  EXPECT_GE(record.waitedNs, 5'000'000'000u);
}

TEST(PeerProcess, DISABLED_Run) {
  ASSERT_NE(std::getenv(kNameVariable), nullptr);
  SharedBoard board(std::getenv(kNameVariable), false);
  const auto rounds =
      static_cast<uint32_t>(std::strtoul(std::getenv(kRoundsVariable), nullptr, 10));
  FailureRecord record;
  EXPECT_TRUE(runRank(board.get(), 1, rounds, 60'000'000'000, record));
}

}  // namespace
}  // namespace mscclpp::test
