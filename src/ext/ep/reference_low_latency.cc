#include "reference_low_latency.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include <mscclpp/device/convert.hpp>

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

std::vector<std::uint16_t> lowLatencyCombine(const std::vector<LowLatencyReceived>& received,
                                             const std::vector<std::vector<std::uint16_t>>& y,
                                             const Routing& routing, const Placement& placement,
                                             int home, int hidden) {
  const auto sumOn = [&](int rank, int token, int column) {
    float sum = 0.0f;
    for (int k = 0; k < routing.topk; ++k) {
      const int slot = received[index(rank)].slotOf(home, token, k);
      if (slot < 0) continue;
      const std::size_t at = index(slot) * index(hidden) + index(column);
      sum = std::fma(routing.topkWeights[index(token * routing.topk + k)],
                     bf16ToFloat(y[index(rank)][at]), sum);
    }
    return sum;
  };
  std::vector<std::uint16_t> out;
  for (int t = 0; t < routing.tokens; ++t) {
    std::vector<int> others;
    for (int k = 0; k < routing.topk; ++k) {
      const std::int64_t expert = choice(routing, t, k);
      if (expert < 0) continue;
      const int rank = placement.rankOf[static_cast<std::size_t>(expert)];
      if (rank != home && std::ranges::find(others, rank) == others.end()) others.push_back(rank);
    }
    std::ranges::sort(others);
    for (int c = 0; c < hidden; ++c) {
      float sum = sumOn(home, t, c);
      for (const int rank : others) sum += bf16ToFloat(floatToBf16(sumOn(rank, t, c)));
      out.push_back(floatToBf16(sum));
    }
  }
  return out;
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
