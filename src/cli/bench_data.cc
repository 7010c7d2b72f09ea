#include "bench_data.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include <mscclpp/device/convert.hpp>

#include "random.hpp"

namespace mscclpp::ep::cli {
namespace {

/// Distinct experts, all equally likely: the first topk of a shuffled list.
void chooseExperts(const BenchOptions& options, int rank, int token,
                   std::vector<std::int64_t>& list) {
  std::uint64_t random = mixBits(options.seed, static_cast<std::uint64_t>(rank) + 1,
                                 static_cast<std::uint64_t>(token));
  for (std::size_t k = 0; k < static_cast<std::size_t>(options.topk); ++k) {
    random = mixBits(random);
    std::swap(list[k], list[k + random % (list.size() - k)]);
  }
}

std::uint64_t tokenKey(int source, int token) {
  return static_cast<std::uint64_t>(source) << 32 | static_cast<std::uint64_t>(token);
}

}  // namespace

BenchRouting::BenchRouting(const BenchOptions& options)
    : options_(options),
      tokens_(options.tokens),
      rowCounts_(static_cast<std::size_t>(options.ranks), 0) {
  const int perRank = options.experts / options.ranks;
  for (int source = 0; source < options.ranks; ++source) {
    const std::vector<std::int64_t> idx = topkIdx(source);
    for (std::size_t t = 0; t < static_cast<std::size_t>(tokens_); ++t) {
      std::vector<int> ranks;
      for (std::size_t k = 0; k < static_cast<std::size_t>(options.topk); ++k) {
        const std::int64_t expert = idx[t * static_cast<std::size_t>(options.topk) + k];
        ranks.push_back(static_cast<int>(expert) / perRank);
      }
      std::sort(ranks.begin(), ranks.end());
      ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
      for (const int r : ranks) ++rowCounts_[static_cast<std::size_t>(r)];
      targets_.push_back(std::move(ranks));
    }
  }
}

std::vector<std::int64_t> BenchRouting::topkIdx(int rank) const {
  std::vector<std::int64_t> list(static_cast<std::size_t>(options_.experts));
  std::vector<std::int64_t> idx;
  std::iota(list.begin(), list.end(), std::int64_t{0});
  for (int t = 0; t < tokens_; ++t) {
    chooseExperts(options_, rank, t, list);
    idx.insert(idx.end(), list.begin(), list.begin() + options_.topk);
  }
  return idx;
}

std::vector<BenchRouting::Row> BenchRouting::rowsOf(int rank) const {
  std::vector<Row> rows;
  for (int source = 0; source < options_.ranks; ++source) {
    for (int t = 0; t < tokens_; ++t) {
      const std::vector<int>& to = targets(source, t);
      if (std::binary_search(to.begin(), to.end(), rank)) rows.push_back({source, t});
    }
  }
  return rows;
}

std::int64_t BenchRouting::maxRows() const {
  return *std::max_element(rowCounts_.begin(), rowCounts_.end());
}

/// bf16 values between 2^-7 and 2 in size, so that sums never overflow; any bits elsewhere.
void BenchData::fill(RowKind kind, std::uint64_t key, char* row, std::size_t bytes) const {
  const bool floats =
      kind == RowKind::bf16 || kind == RowKind::poolOutput || kind == RowKind::plainOutput;
  std::uint64_t state = mixBits(options_.seed, static_cast<std::uint64_t>(kind), key) | 1u;
  for (std::size_t i = 0; i < bytes; i += 8) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    std::uint64_t word = state ^ (state >> 29);
    if (floats) word = (word & 0x83ff'83ff'83ff'83ffull) | 0x3c00'3c00'3c00'3c00ull;
    std::memcpy(row + i, &word, std::min<std::size_t>(8, bytes - i));
  }
}

std::uint64_t BenchData::outputKey(int expertRank, int source, int token) const {
  return mixBits(static_cast<std::uint64_t>(expertRank), tokenKey(source, token));
}

std::vector<char> BenchData::sent(RowKind kind, std::size_t rowBytes) const {
  std::vector<char> rows(static_cast<std::size_t>(options_.tokens) * rowBytes);
  for (int t = 0; t < options_.tokens; ++t) {
    fill(kind, tokenKey(rank_, t), rows.data() + static_cast<std::size_t>(t) * rowBytes, rowBytes);
  }
  return rows;
}

std::vector<char> BenchData::received(RowKind kind, std::size_t rowBytes) const {
  std::vector<char> rows(static_cast<std::size_t>(routing_.rowCount(rank_)) * rowBytes);
  char* at = rows.data();
  for (const BenchRouting::Row& row : routing_.rowsOf(rank_)) {
    fill(kind, tokenKey(row.source, row.token), at, rowBytes);
    at += rowBytes;
  }
  if (options_.plantError && !rows.empty()) rows[rows.size() / 2] ^= 1;
  return rows;
}

std::vector<char> BenchData::output(RowKind kind) const {
  const std::size_t rowBytes = static_cast<std::size_t>(options_.hidden) * 2;
  std::vector<char> rows(static_cast<std::size_t>(routing_.rowCount(rank_)) * rowBytes);
  char* at = rows.data();
  for (const BenchRouting::Row& row : routing_.rowsOf(rank_)) {
    fill(kind, outputKey(rank_, row.source, row.token), at, rowBytes);
    at += rowBytes;
  }
  return rows;
}

std::vector<char> BenchData::combined(RowKind kind, const Topology& topology) const {
  const auto hidden = static_cast<std::size_t>(options_.hidden);
  std::vector<char> rows(static_cast<std::size_t>(options_.tokens) * hidden * 2);
  std::vector<std::uint16_t> one(hidden);
  std::vector<float> sum(hidden);
  const auto addNode = [&](int token, int node, bool first) {
    std::vector<float> part(hidden);
    bool any = false;
    for (const int r : routing_.targets(rank_, token)) {
      if (topology.nodeOf(r) != node) continue;
      fill(kind, outputKey(r, rank_, token), reinterpret_cast<char*>(one.data()), hidden * 2);
      for (std::size_t c = 0; c < hidden; ++c) {
        const float value = device::bf16ToFloat(one[c]);
        part[c] = any ? part[c] + value : value;
      }
      any = true;
    }
    for (std::size_t c = 0; any && c < hidden; ++c) {
      const bool crosses = node != topology.nodeOf(rank_);
      const float value = crosses ? device::bf16ToFloat(device::floatToBf16(part[c])) : part[c];
      sum[c] = first ? value : sum[c] + value;
    }
    return any;
  };
  // The own node's rows, then other nodes' sums, each rounded once for the way.
  std::vector<int> nodes{topology.nodeOf(rank_)};
  for (int node = 0; node < topology.nodes(); ++node) {
    if (node != nodes[0]) nodes.push_back(node);
  }
  for (int t = 0; t < options_.tokens; ++t) {
    bool first = true;
    for (const int node : nodes) first = !addNode(t, node, first) && first;
    for (std::size_t c = 0; c < hidden; ++c) one[c] = device::floatToBf16(first ? 0.0f : sum[c]);
    std::memcpy(rows.data() + static_cast<std::size_t>(t) * hidden * 2, one.data(), hidden * 2);
  }
  if (options_.plantError && !rows.empty()) rows[rows.size() / 2] ^= 1;
  return rows;
}

}  // namespace mscclpp::ep::cli
