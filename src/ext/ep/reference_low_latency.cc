#include "reference_low_latency.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include <mscclpp/device/convert.hpp>

#include "plan/logfmt.hpp"

namespace mscclpp::ep::reference {
namespace {

std::size_t index(int i) {
  return static_cast<std::size_t>(i);
}
std::int64_t choice(const Routing& routing, int token, int k) {
  return routing.topkIdx[index(token * routing.topk + k)];
}

}  // namespace

Placement lowLatencyPlacement(int experts, int ranks) {
  const int perRank = (experts + ranks - 1) / ranks;
  std::vector<int> rankOf;
  for (int e = 0; e < experts; ++e) rankOf.push_back(e / perRank);
  return Placement::of(std::move(rankOf), ranks);
}

int LowLatencyReceived::slotOf(int rank, int token, int k) const {
  return slots[index((rank * maxTokens + token) * topk + k)];
}

LowLatencyReceived lowLatencyDispatch(const std::vector<Routing>& all, const Placement& placement,
                                      int maxTokens, int receiver) {
  LowLatencyReceived out;
  out.ranks = placement.ranks;
  out.localExperts = (placement.experts() + out.ranks - 1) / out.ranks;
  out.maxTokens = maxTokens;
  out.topk = all.at(0).topk;
  const int rows = out.ranks * maxTokens;
  out.count.resize(index(out.localExperts), 0);
  out.layoutRange.resize(index(out.localExperts * out.ranks), 0);
  out.slots.resize(index(out.ranks * maxTokens * out.topk), -1);
  out.sourceOf.resize(index(out.localExperts * rows), Source{-1, -1});
  for (int r = 0; r < out.ranks; ++r) {
    const std::vector<std::int32_t> before = out.count;
    const Routing& routing = all[index(r)];
    for (int t = 0; t < routing.tokens; ++t) {
      for (int k = 0; k < routing.topk; ++k) {
        const std::int64_t expert = choice(routing, t, k);
        if (expert < 0 || placement.rankOf[static_cast<std::size_t>(expert)] != receiver) continue;
        const int local = placement.indexOf[static_cast<std::size_t>(expert)];
        const int slot = local * rows + out.count[index(local)]++;
        out.slots[index((r * maxTokens + t) * out.topk + k)] = slot;
        out.sourceOf[index(slot)] = {r, t};
      }
    }
    for (int e = 0; e < out.localExperts; ++e) {
      out.layoutRange[index(e * out.ranks + r)] = static_cast<std::int64_t>(before[index(e)])
                                                      << 32 |
                                                  (out.count[index(e)] - before[index(e)]);
    }
  }
  return out;
}

QuantisedRow quantise(const std::uint16_t* row, int hidden, bool roundScale) {
  QuantisedRow out;
  for (int begin = 0; begin < hidden; begin += 128) {
    const int end = std::min(begin + 128, hidden);
    float largest = 1e-4f;
    for (int i = begin; i < end; ++i) largest = std::max(largest, std::fabs(bf16ToFloat(row[i])));
    float scale = largest * (1.0f / 448.0f), forward = 448.0f / largest;
    if (roundScale) {
      int exponent = 0;
      const float fraction = std::frexp(scale, &exponent);  // in [0.5, 1)
      scale = std::ldexp(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
      forward = 1.0f / scale;
    }
    out.scales.push_back(scale);
    for (int i = begin; i < end; ++i) {
      out.values.push_back(device::floatToE4m3(bf16ToFloat(row[i]) * forward));
    }
  }
  return out;
}

std::vector<std::int32_t> packScales(const std::vector<float>& scales) {
  std::vector<std::int32_t> out((scales.size() + 3) / 4, 0);
  for (std::size_t i = 0; i < scales.size(); ++i) {
    const std::uint32_t exponent = std::bit_cast<std::uint32_t>(scales[i]) >> 23;
    out[i / 4] = static_cast<std::int32_t>(static_cast<std::uint32_t>(out[i / 4]) |
                                           exponent << (8 * (i % 4)));
  }
  return out;
}

namespace {

/// A sum as it arrives at the token's home.
using Way = std::vector<float> (*)(const std::vector<float>& sum);

struct Combine {
  const std::vector<LowLatencyReceived>& received;
  const std::vector<std::vector<std::uint16_t>>& y;
  const Routing& routing;
  const Placement& placement;
  int home, hidden;

  std::vector<float> sumOn(int rank, int token) const {
    std::vector<float> sum(index(hidden), 0.0f);
    for (int k = 0; k < routing.topk; ++k) {
      const int slot = received[index(rank)].slotOf(home, token, k);
      if (slot < 0) continue;
      const float weight = routing.topkWeights[index(token * routing.topk + k)];
      for (std::size_t c = 0; c < sum.size(); ++c) {
        const std::uint16_t value = y[index(rank)][index(slot) * index(hidden) + c];
        sum[c] = std::fma(weight, bf16ToFloat(value), sum[c]);
      }
    }
    return sum;
  }
  std::vector<int> othersOf(int token) const {
    std::vector<int> others;
    for (int k = 0; k < routing.topk; ++k) {
      const std::int64_t expert = choice(routing, token, k);
      if (expert < 0) continue;
      const int rank = placement.rankOf[static_cast<std::size_t>(expert)];
      if (rank != home && std::ranges::find(others, rank) == others.end()) others.push_back(rank);
    }
    std::ranges::sort(others);
    return others;
  }
  std::vector<std::uint16_t> run(Way way) const {
    std::vector<std::uint16_t> out;
    for (int t = 0; t < routing.tokens; ++t) {
      std::vector<float> sum = sumOn(home, t);
      for (const int rank : othersOf(t)) {
        const std::vector<float> come = way(sumOn(rank, t));
        for (std::size_t c = 0; c < sum.size(); ++c) sum[c] += come[c];
      }
      for (const float value : sum) out.push_back(floatToBf16(value));
    }
    return out;
  }
};

std::vector<float> asBf16(const std::vector<float>& sum) {
  std::vector<float> out;
  for (const float value : sum) out.push_back(bf16ToFloat(floatToBf16(value)));
  return out;
}

}  // namespace

std::vector<float> asLogfmt(const std::vector<float>& row) {
  std::vector<float> out;
  for (std::size_t begin = 0; begin < row.size(); begin += logfmt::kGroupValues) {
    const std::size_t end = std::min(row.size(), begin + logfmt::kGroupValues);
    logfmt::Extremes extremes;
    for (std::size_t i = begin; i < end; ++i) {
      extremes.include(std::bit_cast<std::uint32_t>(row[i]));
    }
    const std::uint32_t scale = logfmt::scaleOf(extremes);
    const auto encoder = logfmt::Encoder::make(scale);
    const auto decoder = logfmt::Decoder::make(scale);
    for (std::size_t i = begin; i < end; ++i) {
      const std::uint32_t code = encoder.code(std::bit_cast<std::uint32_t>(row[i]));
      out.push_back(std::bit_cast<float>(decoder.valueBits(code)));
    }
  }
  return out;
}

std::vector<std::uint16_t> lowLatencyCombine(const std::vector<LowLatencyReceived>& received,
                                             const std::vector<std::vector<std::uint16_t>>& y,
                                             const Routing& routing, const Placement& placement,
                                             int home, int hidden) {
  return Combine{received, y, routing, placement, home, hidden}.run(asBf16);
}
std::vector<std::uint16_t> lowLatencyCombineLogfmt(const std::vector<LowLatencyReceived>& received,
                                                   const std::vector<std::vector<std::uint16_t>>& y,
                                                   const Routing& routing,
                                                   const Placement& placement, int home,
                                                   int hidden) {
  return Combine{received, y, routing, placement, home, hidden}.run(asLogfmt);
}
std::vector<std::uint16_t> lowLatencyCombineAtSource(
    const std::vector<LowLatencyReceived>& received,
    const std::vector<std::vector<std::uint16_t>>& y, const Routing& routing,
    const Placement& placement, int home, int hidden) {
  std::vector<std::uint16_t> out;
  std::vector<float> sum(index(hidden));
  for (int t = 0; t < routing.tokens; ++t) {
    std::ranges::fill(sum, 0.0f);
    for (int k = 0; k < routing.topk; ++k) {
      const std::int64_t expert = choice(routing, t, k);
      if (expert < 0) continue;
      const std::size_t rank = index(placement.rankOf[static_cast<std::size_t>(expert)]);
      const int slot = received[rank].slotOf(home, t, k);
      if (slot < 0) continue;
      const std::uint16_t* const row = y[rank].data() + index(slot) * index(hidden);
      const float weight = routing.topkWeights[index(t * routing.topk + k)];
      for (std::size_t c = 0; c < sum.size(); ++c) {
        sum[c] = std::fma(weight, bf16ToFloat(row[c]), sum[c]);
      }
    }
    for (const float value : sum) out.push_back(floatToBf16(value));
  }
  return out;
}

}  // namespace mscclpp::ep::reference
