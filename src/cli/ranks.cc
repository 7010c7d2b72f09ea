#include "ranks.hpp"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>

#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/format.hpp>

#include "exit_code.hpp"

namespace mscclpp::ep::cli {
namespace {

/// How long ranks may take to find each other: they are all of this machine.
constexpr std::chrono::seconds kJoinLimit{100};

/// What a member is told over its standard input. Not by an argument: others can read those, and
/// the id carries the group's secret.
struct Membership {
  std::int32_t rank;
  std::int32_t ranks;
  UniqueId id;
};

void printError(int rank, const char* what) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  std::fputs(fmt::format("mscclpp-ep: rank {}: {}\n", rank, what).c_str(), stderr);
}

/// Joins the group and works. Never throws.
int runRank(int rank, int ranks, const UniqueId& id, const RankWork& work) {
  try {
    RankContext context;
    context.rank = rank;
    context.ranks = ranks;
    context.bootstrap = std::make_shared<TcpBootstrap>(rank, ranks, id, kJoinLimit);
    const int code = work(context);
    context.bootstrap->barrier();  // nobody leaves while others still need rank 0
    return code;
  } catch (const std::exception& error) {
    printError(rank, error.what());
    return kRuntimeError;
  }
}

UniqueId makeId() {
  // All ranks are of this machine: nobody else needs to reach the socket.
  return TcpBootstrap::createUniqueId(env().socketInterface.empty() ? "127.0.0.1" : "");
}

int runThreads(int ranks, const RankWork& work) {
  const UniqueId id = makeId();
  std::vector<int> codes(static_cast<std::size_t>(ranks), kSuccess);
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back(
        [&, r] { codes[static_cast<std::size_t>(r)] = runRank(r, ranks, id, work); });
  }
  for (std::thread& thread : threads) thread.join();
  return *std::max_element(codes.begin(), codes.end());
}

void writeAll(int descriptor, const void* data, std::size_t bytes) {
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t done = write(descriptor, at, bytes);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) throw SystemError(errno, "writing to a member process");
    at += done;
    bytes -= static_cast<std::size_t>(done);
  }
}

Membership readMembership() {
  Membership membership{};
  std::size_t have = 0;
  while (have < sizeof(membership)) {
    const ssize_t got =
        read(STDIN_FILENO, reinterpret_cast<char*>(&membership) + have, sizeof(membership) - have);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw SystemError(errno, "reading this process's rank from standard input");
    check(got > 0, ErrorCode::invalidState,
          "--member is for processes that mscclpp-ep starts itself: use --processes");
    have += static_cast<std::size_t>(got);
  }
  return membership;
}

/// Starts one member and hands it its rank.
pid_t startMember(const std::vector<std::string>& arguments, const Membership& membership) {
  std::array<int, 2> pipe{};
  if (pipe2(pipe.data(), O_CLOEXEC) != 0) throw SystemError(errno, "pipe2");
  std::vector<std::string> words{"mscclpp-ep"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  words.emplace_back("--member");
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, pipe[0], STDIN_FILENO);
  pid_t pid = -1;
  const int failure = posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(pipe[0]);
  if (failure == 0) {
    runNoThrow("starting a rank", [&] { writeAll(pipe[1], &membership, sizeof(membership)); });
  }
  close(pipe[1]);
  if (failure != 0) throw SystemError(failure, "posix_spawn of /proc/self/exe");
  return pid;
}

int awaitMember(int rank, pid_t pid) {
  int status = 0;
  while (waitpid(pid, &status, 0) < 0) {
    if (errno != EINTR) throw SystemError(errno, "waitpid");
  }
  if (WIFEXITED(status)) return WEXITSTATUS(status);
  printError(rank, fmt::format("process {} was ended by signal {} ({})", pid, WTERMSIG(status),
                               strsignal(WTERMSIG(status)))
                       .c_str());
  return kRuntimeError;
}

/// This process is rank 0, the others are started.
int runProcesses(const RankOptions& options, const RankWork& work) {
  signal(SIGPIPE, SIG_IGN);  // a member that dies early is an exit code, not a signal for us
  const UniqueId id = makeId();
  std::vector<pid_t> members;
  for (int r = 1; r < options.ranks; ++r) {
    members.push_back(startMember(options.arguments, {r, options.ranks, id}));
  }
  int code = runRank(0, options.ranks, id, work);
  for (std::size_t i = 0; i < members.size(); ++i) {
    code = std::max(code, awaitMember(static_cast<int>(i) + 1, members[i]));
  }
  return code;
}

}  // namespace

int runRanks(const RankOptions& options, const RankWork& work) {
  if (options.member) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);  // no rank is left behind when rank 0 is killed
    const Membership membership = readMembership();
    return runRank(membership.rank, membership.ranks, membership.id, work);
  }
  return options.processes ? runProcesses(options, work) : runThreads(options.ranks, work);
}

}  // namespace mscclpp::ep::cli
