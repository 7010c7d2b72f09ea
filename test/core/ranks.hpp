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

inline constexpr std::chrono::milliseconds kLongTimeout = std::chrono::seconds(60);

}  // namespace mscclpp::test
