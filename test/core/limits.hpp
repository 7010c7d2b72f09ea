// Tests of limits, on machines that may be busy.
#pragma once

#include <algorithm>
#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

namespace mscclpp::test {

/// Whether one rank's text is the one the test is about.
using Wanted = std::function<bool(size_t rank, const std::string& text)>;

/// `attempt` runs a group with a limit that some wait must run into, and returns one text per rank.
/// Other ranks have to be somewhere in time for that, which a busy machine may not grant them: the
/// texts then say, rightly, that more is missing, or was missing earlier. Only such an attempt
/// (`late`: all that is not wanted says so) is made again, with twice the limit.
inline void expectAtSomeLimit(
    std::chrono::milliseconds limit, const std::string& late, const Wanted& wanted,
    const std::function<std::vector<std::string>(std::chrono::milliseconds)>& attempt) {
  constexpr std::chrono::milliseconds kLargest = std::chrono::seconds(16);
  for (;; limit *= 2) {
    const std::vector<std::string> texts = attempt(limit);
    bool good = true, onlyLate = true;
    for (size_t rank = 0; rank < texts.size(); ++rank) {
      if (wanted(rank, texts[rank])) continue;
      good = false;
      onlyLate = onlyLate && texts[rank].find(late) != std::string::npos;
    }
    if (good) return;
    if (onlyLate && limit < kLargest) continue;
    for (size_t rank = 0; rank < texts.size(); ++rank) {
      if (!wanted(rank, texts[rank]))
        ADD_FAILURE() << "rank " << rank << ", limit " << limit.count() << " ms: '" << texts[rank]
                      << "'";
    }
    return;
  }
}

/// All of `parts` occur in `text`.
inline bool containsAll(const std::string& text, const std::vector<std::string>& parts) {
  return std::ranges::all_of(
      parts, [&](const std::string& part) { return text.find(part) != std::string::npos; });
}

}  // namespace mscclpp::test
