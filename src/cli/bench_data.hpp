#pragma once

#include <cstdint>
#include <vector>

#include "bench.hpp"

/// Routing and contents of the benchmark: pseudo-random, and known to every rank, so that each can
/// say what it must receive.
namespace mscclpp::ep::cli {

/// Kinds of rows; each has contents of its own.
enum class RowKind : std::uint64_t {
  bf16 = 1,
  fp8 = 2,
  scales = 3,
  copy = 4,
  poolOutput = 5,
  plainOutput = 6
};

struct BenchRouting {
  BenchRouting(const BenchOptions& options);

  /// Ranks that token `token` of rank `source` goes to, ascending.
  const std::vector<int>& targets(int source, int token) const {
    return targets_[static_cast<std::size_t>(source) * static_cast<std::size_t>(tokens_) +
                    static_cast<std::size_t>(token)];
  }
  /// The rows that `rank` receives, in order: (source, token).
  struct Row {
    int source, token;
  };
  std::vector<Row> rowsOf(int rank) const;
  std::int64_t rowCount(int rank) const { return rowCounts_[static_cast<std::size_t>(rank)]; }
  std::int64_t maxRows() const;

  std::vector<std::int64_t> topkIdx(int rank) const;

 private:
  const BenchOptions& options_;
  int tokens_;
  std::vector<std::vector<int>> targets_;
  std::vector<std::int64_t> rowCounts_;
};

class BenchData {
 public:
  BenchData(const BenchOptions& options, const BenchRouting& routing, int rank)
      : options_(options), routing_(routing), rank_(rank) {}

  /// The contents of this rank's tokens: [tokens, rowBytes].
  std::vector<char> sent(RowKind kind, std::size_t rowBytes) const;
  /// What this rank receives when everybody sends sent(): [rows, rowBytes].
  std::vector<char> received(RowKind kind, std::size_t rowBytes) const;
  /// Experts' output of this rank: bf16 [rows, hidden], different on every rank.
  std::vector<char> output(RowKind kind) const;
  /// What combine makes of all ranks' output(): bf16 [tokens, hidden].
  std::vector<char> combined(RowKind kind, const Topology& topology) const;

 private:
  void fill(RowKind kind, std::uint64_t key, char* row, std::size_t bytes) const;
  std::uint64_t outputKey(int expertRank, int source, int token) const;

  const BenchOptions& options_;
  const BenchRouting& routing_;
  int rank_;
};

}  // namespace mscclpp::ep::cli
