#include "reference.hpp"

#include <algorithm>
#include <cstring>
#include <map>

#include <mscclpp/errors.hpp>

namespace mscclpp::ep::reference {
namespace {

constexpr auto kBad = ErrorCode::invalidArgument;

std::size_t at(int row, int columns, int column) {
  return static_cast<std::size_t>(row) * static_cast<std::size_t>(columns) +
         static_cast<std::size_t>(column);
}
template <class T>
auto& item(std::vector<T>& list, int index) {
  return list.at(static_cast<std::size_t>(index));
}
template <class T>
const auto& item(const std::vector<T>& list, int index) {
  return list.at(static_cast<std::size_t>(index));
}

}  // namespace

Placement Placement::of(std::vector<int> rankOf, int ranks) {
  Placement placement;
  placement.ranks = ranks;
  placement.hostedBy.resize(static_cast<std::size_t>(ranks), 0);
  for (const int rank : rankOf) {
    check(rank >= 0 && rank < ranks, kBad, "an expert is on rank {}: ranks are 0 .. {}", rank,
          ranks - 1);
    placement.indexOf.push_back(item(placement.hostedBy, rank)++);
  }
  placement.rankOf = std::move(rankOf);
  return placement;
}

Placement Placement::blocks(int experts, int ranks) {
  check(experts % ranks == 0, kBad, "{} experts do not divide among {} ranks", experts, ranks);
  std::vector<int> rankOf;
  for (int e = 0; e < experts; ++e) rankOf.push_back(e / (experts / ranks));
  return of(std::move(rankOf), ranks);
}

int Placement::expertAt(int rank, int index) const {
  for (int e = 0; e < experts(); ++e) {
    if (item(rankOf, e) == rank && item(indexOf, e) == index) return e;
  }
  fail(kBad, "rank {} has no expert number {}", rank, index);
}

Layout layout(const Routing& routing, const Placement& placement) {
  Layout out;
  out.tokensPerRank.resize(static_cast<std::size_t>(placement.ranks), 0);
  out.tokensPerExpert.resize(static_cast<std::size_t>(placement.experts()), 0);
  out.isTokenInRank.resize(at(routing.tokens, placement.ranks, 0), 0);
  for (int t = 0; t < routing.tokens; ++t) {
    for (int k = 0; k < routing.topk; ++k) {
      const auto expert = static_cast<int>(routing.topkIdx.at(at(t, routing.topk, k)));
      if (expert == -1) continue;
      ++item(out.tokensPerExpert, expert);
      out.isTokenInRank.at(at(t, placement.ranks, item(placement.rankOf, expert))) = 1;
    }
    for (int r = 0; r < placement.ranks; ++r) {
      item(out.tokensPerRank, r) += out.isTokenInRank.at(at(t, placement.ranks, r));
    }
  }
  return out;
}

int Received::rowOf(int rank, int token) const {
  for (int row = item(rankOffset, rank); row < item(rankOffset, rank + 1); ++row) {
    if (item(rows, row).token == token) return row;
  }
  return -1;
}

Received dispatch(const std::vector<Routing>& all, const Placement& placement, int receiver) {
  Received out;
  out.tokensPerExpert.resize(static_cast<std::size_t>(item(placement.hostedBy, receiver)), 0);
  for (int source = 0; source < placement.ranks; ++source) {
    out.rankOffset.push_back(out.count());
    const Routing& routing = item(all, source);
    const Layout sent = layout(routing, placement);
    for (int t = 0; t < routing.tokens; ++t) {
      if (!sent.isTokenInRank.at(at(t, placement.ranks, receiver))) continue;
      out.rows.push_back({source, t});
      for (int k = 0; k < routing.topk; ++k) {
        const auto expert = static_cast<int>(routing.topkIdx.at(at(t, routing.topk, k)));
        const bool here = expert != -1 && item(placement.rankOf, expert) == receiver;
        out.topkIdx.push_back(here ? item(placement.indexOf, expert) : -1);
        out.topkWeights.push_back(here ? routing.topkWeights.at(at(t, routing.topk, k)) : 0.0f);
        if (here) ++item(out.tokensPerExpert, item(placement.indexOf, expert));
      }
    }
  }
  out.rankOffset.push_back(out.count());
  return out;
}

std::vector<std::uint8_t> gatherRows(const Received& received,
                                     const std::vector<std::vector<std::uint8_t>>& perRank,
                                     std::size_t rowBytes) {
  std::vector<std::uint8_t> out;
  out.reserve(received.rows.size() * rowBytes);
  for (const Source& source : received.rows) {
    const std::uint8_t* row =
        item(perRank, source.rank).data() + static_cast<std::size_t>(source.token) * rowBytes;
    out.insert(out.end(), row, row + rowBytes);
  }
  return out;
}

namespace {

/// Ranks by node: the node of `rank` first, then the others in ascending order.
std::vector<std::vector<int>> nodesFrom(const std::vector<int>* nodeOf, int rank, int ranks) {
  std::map<int, std::vector<int>> byNode;
  for (int r = 0; r < ranks; ++r) byNode[nodeOf ? item(*nodeOf, r) : 0].push_back(r);
  const int own = nodeOf ? item(*nodeOf, rank) : 0;
  std::vector<std::vector<int>> nodes = {byNode[own]};
  for (const auto& [node, members] : byNode) {
    if (node != own) nodes.push_back(members);
  }
  return nodes;
}

/// The first term is taken as it is, so that a lone -0 stays one.
struct Sum {
  float value = 0.0f;
  bool started = false;
  void add(float term) {
    value = started ? value + term : term;
    started = true;
  }
};

}  // namespace

std::vector<std::uint16_t> combine(const CombineInput& in) {
  std::vector<std::uint16_t> out;
  out.reserve(at(in.tokens, in.hidden, 0));
  const auto nodes = nodesFrom(in.nodeOf, in.rank, static_cast<int>(in.received->size()));
  for (int t = 0; t < in.tokens; ++t) {
    std::vector<std::vector<const std::uint16_t*>> terms(nodes.size());
    for (const auto* bias : {in.bias0, in.bias1}) {
      if (bias != nullptr) terms[0].push_back(bias->data() + at(t, in.hidden, 0));
    }
    for (std::size_t n = 0; n < nodes.size(); ++n) {
      for (const int r : nodes[n]) {
        const int row = item(*in.received, r).rowOf(in.rank, t);
        if (row >= 0) terms[n].push_back(item(*in.y, r).data() + at(row, in.hidden, 0));
      }
    }
    for (int c = 0; c < in.hidden; ++c) {
      Sum sum;
      for (std::size_t n = 0; n < nodes.size(); ++n) {
        Sum node;
        for (const auto* row : terms[n]) (n == 0 ? sum : node).add(bf16ToFloat(row[c]));
        if (node.started) sum.add(bf16ToFloat(floatToBf16(node.value)));
      }
      out.push_back(floatToBf16(sum.value));
    }
  }
  return out;
}

std::vector<float> combineWeights(const WeightsInput& in) {
  std::vector<float> out;
  const auto nodes = nodesFrom(in.nodeOf, in.rank, static_cast<int>(in.received->size()));
  for (int t = 0; t < in.tokens; ++t) {
    for (int k = 0; k < in.topk; ++k) {
      float sum = 0.0f;
      for (std::size_t n = 0; n < nodes.size(); ++n) {
        float node = 0.0f;
        for (const int r : nodes[n]) {
          const int row = item(*in.received, r).rowOf(in.rank, t);
          if (row >= 0) (n == 0 ? sum : node) += item(*in.weights, r).at(at(row, in.topk, k));
        }
        if (n > 0) sum += node;
      }
      out.push_back(sum);
    }
  }
  return out;
}

float bf16ToFloat(std::uint16_t value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

std::uint16_t floatToBf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7FFF;
  const std::uint32_t kept = bits >> 16, rest = bits & 0xFFFF;
  const bool up = rest > 0x8000 || (rest == 0x8000 && (kept & 1) != 0);
  return static_cast<std::uint16_t>(kept + (up ? 1 : 0));
}

const char* nameOf(Pattern pattern) {
  switch (pattern) {
    case Pattern::uniform:
      return "uniform";
    case Pattern::skewed:
      return "skewed";
    case Pattern::oneRank:
      return "oneRank";
    case Pattern::oneSender:
      return "oneSender";
    case Pattern::gaps:
      return "gaps";
    case Pattern::nothing:
      return "nothing";
    case Pattern::duplicates:
      return "duplicates";
  }
  return "unknown";
}

std::uint64_t mix(std::initializer_list<std::uint64_t> words) {
  std::uint64_t state = 0x9E3779B97F4A7C15ull;
  for (const std::uint64_t word : words) {  // splitmix64's finaliser after every word
    state += word + 0x9E3779B97F4A7C15ull;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
    state ^= state >> 31;
  }
  return state;
}

namespace {

/// Uniform in [0, 1).
double fraction(std::uint64_t bits) {
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

/// A candidate for one choice; attempts of the same choice differ in `bits`.
int drawExpert(Pattern pattern, const Placement& placement, std::uint64_t bits) {
  const int experts = placement.experts();
  const double u = fraction(bits);
  if (pattern == Pattern::skewed) return static_cast<int>(u * u * u * experts);
  if (pattern != Pattern::oneRank) return static_cast<int>(u * experts);
  const int last = placement.ranks - 1;
  return placement.expertAt(last, static_cast<int>(u * item(placement.hostedBy, last)));
}

}  // namespace

Routing makeRouting(const RoutingRequest& request, const Placement& placement) {
  const Pattern pattern = request.pattern;
  const bool silent =
      pattern == Pattern::nothing || (pattern == Pattern::oneSender && request.rank);
  Routing out;
  out.tokens = request.tokens;
  out.topk = request.topk;
  for (int t = 0; t < request.tokens; ++t) {
    std::vector<std::int64_t> taken;
    for (int k = 0; k < request.topk; ++k) {
      const auto bits = [&](std::uint64_t attempt) {
        return mix({request.seed, static_cast<std::uint64_t>(request.rank),
                    static_cast<std::uint64_t>(t), static_cast<std::uint64_t>(k), attempt});
      };
      std::int64_t expert = -1;
      // After some tries the choice stays empty: the experts may be used up (topk > experts).
      for (std::uint64_t attempt = 1; attempt <= 200 && !silent && expert == -1; ++attempt) {
        const int drawn = drawExpert(pattern, placement, bits(attempt));
        const bool again = std::find(taken.begin(), taken.end(), drawn) != taken.end();
        if (!again || pattern == Pattern::duplicates) expert = drawn;
      }
      if (pattern == Pattern::gaps && bits(1001) % 3 == 0) expert = -1;
      if (expert != -1) taken.push_back(expert);
      out.topkIdx.push_back(expert);
      out.topkWeights.push_back(static_cast<float>(1.0 - fraction(bits(1002))));
    }
  }
  return out;
}

namespace {

std::uint64_t rowBits(const RowKey& key, int row) {
  return mix({key.tensor, static_cast<std::uint64_t>(key.rank),
              static_cast<std::uint64_t>(key.firstRow + row)});
}

}  // namespace

std::vector<std::uint16_t> keyedBf16(const RowKey& key, int rows, int hidden) {
  std::vector<std::uint16_t> out;
  out.reserve(at(rows, hidden, 0));
  for (int row = 0; row < rows; ++row) {
    const std::uint64_t base = rowBits(key, row);
    for (int c = 0; c < hidden; ++c) {
      const std::uint64_t bits =
          (base + static_cast<std::uint64_t>(c) * 0xD6E8FEB86659FD93ull) * 0xBF58476D1CE4E5B9ull;
      const auto mantissa = static_cast<std::uint32_t>(bits >> 40) & 0x7F;
      auto exponent = 115 + static_cast<std::uint32_t>(bits >> 50) % 25;
      auto sign = static_cast<std::uint32_t>(bits >> 63);
      if (c % 8 == 7) {  // even ranks add about 2^30, odd ranks take about as much away
        exponent = 157;
        sign = static_cast<std::uint32_t>(key.rank) & 1;
      }
      out.push_back(static_cast<std::uint16_t>(sign << 15 | exponent << 7 | mantissa));
    }
  }
  return out;
}

std::vector<std::uint8_t> keyedBytes(const RowKey& key, int rows, int bytesPerRow) {
  std::vector<std::uint8_t> out;
  out.reserve(at(rows, bytesPerRow, 0));
  for (int row = 0; row < rows; ++row) {
    const std::uint64_t base = rowBits(key, row);
    for (int c = 0; c < bytesPerRow; ++c) {
      const std::uint64_t bits =
          (base + static_cast<std::uint64_t>(c) * 0xD6E8FEB86659FD93ull) * 0xBF58476D1CE4E5B9ull;
      out.push_back(static_cast<std::uint8_t>(bits >> 56));
    }
  }
  return out;
}

std::vector<float> keyedFloats(const RowKey& key, int rows, int columns) {
  std::vector<float> out;
  for (int row = 0; row < rows; ++row) {
    for (int c = 0; c < columns; ++c) {
      const std::uint64_t bits = mix({rowBits(key, row), static_cast<std::uint64_t>(c)});
      out.push_back(0.5f + static_cast<float>(bits >> 40) * 0x1p-24f);
    }
  }
  return out;
}

}  // namespace mscclpp::ep::reference
