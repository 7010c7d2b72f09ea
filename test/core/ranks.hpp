// Ranks as threads of the test's own process.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>

namespace mscclpp::test {

/// Runs `body` for every rank on a thread of its own, started in the order given (all, by default
/// ascending), and returns what each threw ("" for nothing).
inline std::vector<std::string> failuresOfRanks(int ranks, const std::function<void(int)>& body,
                                                std::vector<int> order = {}) {
  if (order.empty()) {
    for (int rank = 0; rank < ranks; ++rank) order.push_back(rank);
  }
  std::vector<std::string> failures(static_cast<size_t>(ranks));
  std::vector<std::thread> threads;
  for (const int rank : order) {
    threads.emplace_back([&, rank] {
      try {
        body(rank);
      } catch (const std::exception& error) {
        failures[static_cast<size_t>(rank)] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return failures;
}

/// As above; every failure fails the test.
inline void runRanks(int ranks, const std::function<void(int)>& body, std::vector<int> order = {}) {
  const auto failures = failuresOfRanks(ranks, body, std::move(order));
  for (size_t rank = 0; rank < failures.size(); ++rank) {
    EXPECT_EQ(failures[rank], "") << "on rank " << rank;
  }
}

/// What `action` throws must be of class E, have `code`, and its text contain all of `parts`.
template <class E = Error>
void expectError(ErrorCode code, const std::vector<std::string>& parts,
                 const std::function<void()>& action) {
  try {
    action();
    ADD_FAILURE() << "nothing was thrown; expected " << toString(code);
  } catch (const E& error) {
    EXPECT_EQ(toString(error.code()), toString(code)) << error.what();
    for (const std::string& part : parts) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
          << "'" << part << "' is missing in: " << error.what();
    }
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another class was thrown: " << error.what();
  }
}

/// For what must not take long: only a hang runs into it.
inline constexpr std::chrono::milliseconds kLongTimeout = std::chrono::seconds(60);

/// "code: text" of what `action` throws, "TimeoutError: text" for that class, "" for nothing.
inline std::string errorOf(const std::function<void()>& action) {
  try {
    action();
  } catch (const TimeoutError& error) {
    return std::string("TimeoutError: ") + error.what();
  } catch (const Error& error) {
    return std::string(toString(error.code())) + ": " + error.what();
  } catch (const std::exception& error) {
    return std::string("exception: ") + error.what();
  }
  return "";
}

/// One of every call, with values that tell rank and round. All ranks may leave afterwards.
inline void exercise(Bootstrap& group, int rounds = 3) {
  const int size = group.size();
  const int rank = group.rank();
  for (int round = 0; round < rounds; ++round) {
    std::vector<int> values(static_cast<size_t>(size), -1);
    values[static_cast<size_t>(rank)] = round * 1000 + rank;
    group.allGather(values);
    for (int i = 0; i < size; ++i) ASSERT_EQ(values[static_cast<size_t>(i)], round * 1000 + i);
    group.barrier();
    const int next = (rank + 1) % size;
    const int previous = (rank + size - 1) % size;
    const int sent = round * 1000 + rank;
    int received = -1;
    group.send(&sent, sizeof(sent), next, round);
    group.recv(&received, sizeof(received), previous, round);
    ASSERT_EQ(received, round * 1000 + previous);
  }
  group.barrier();  // rank 0 passes messages on: it must not leave while one is on its way
}

}  // namespace mscclpp::test
