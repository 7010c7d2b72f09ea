#include "demo_model.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include <mscclpp/device/convert.hpp>
#include <mscclpp/ext/ep/types.hpp>

#include "random.hpp"

namespace mscclpp::ep::cli {
namespace {

using device::bf16ToFloat;
using device::e4m3ToFloat;
using device::floatToBf16;
using device::floatToE4m3;

/// Independent streams of pseudo-random numbers.
enum Purpose : std::uint64_t {
  kTable = 1,
  kPosition,
  kGate,
  kPopularity,
  kScaleOf,
  kAngle,
  kShift
};

/// The router looks at this many columns: enough to tell bytes apart, and cheap on one CPU thread.
constexpr int kGateColumns = 64;
/// Spread of the logits; popularity falls with the rank in a list of experts as in Zipf's law.
constexpr float kGateSpread = 0.55f;
constexpr float kZipfExponent = 0.8f;
/// Choices of less than this share of an average expert's probability are dropped (index -1), as
/// routers with a threshold do.
constexpr float kLeastShare = 1.0f;
constexpr float kPositionWeight = 0.35f;
constexpr float kMaxE4m3 = 448.0f;
/// bf16 has 8 significant bits: rounding to nearest moves a value by at most this share of it.
constexpr float kBf16Rounding = 0x1p-8f;
constexpr float kFp32Rounding = 0x1p-24f;

std::size_t at(std::int64_t row, std::int64_t columns, std::int64_t column) {
  return static_cast<std::size_t>(row * columns + column);
}

/// fp32 sums, a column each, of rows that are rounded to bf16 on their way.
struct RowSum {
  explicit RowSum(std::size_t columns) : value(columns, 0.0f) {}
  std::vector<float> value;
  bool started = false;

  /// `magnitude`: how much has been rounded.
  void addRounded(const std::vector<float>& row, std::vector<float>& magnitude) {
    for (std::size_t c = 0; c < row.size(); ++c) {
      magnitude[c] += std::abs(row[c]);
      const float sent = bf16ToFloat(floatToBf16(row[c]));
      value[c] = started ? value[c] + sent : sent;
    }
    started = true;
  }
};

}  // namespace

DemoModel::DemoModel(const ModelShape& shape, std::string text)
    : shape_(shape), text_(std::move(text)), gateColumns_(std::min(shape.hidden, kGateColumns)) {
  const auto random = [&](Purpose purpose, std::uint64_t index) {
    return signedUnit(mixBits(shape_.seed, purpose, index));
  };
  table_.resize(at(256, shape_.hidden, 0));
  for (std::size_t i = 0; i < table_.size(); ++i) table_[i] = random(kTable, i);
  gate_.resize(at(shape_.experts, gateColumns_, 0));
  for (std::size_t i = 0; i < gate_.size(); ++i) gate_[i] = kGateSpread * random(kGate, i);
  // Which expert is how popular: a shuffled list, so that the hot ones land on any rank.
  std::vector<int> order(static_cast<std::size_t>(shape_.experts));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    return mixBits(shape_.seed, kPopularity, static_cast<std::uint64_t>(a)) <
           mixBits(shape_.seed, kPopularity, static_cast<std::uint64_t>(b));
  });
  bias_.resize(order.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    bias_[static_cast<std::size_t>(order[i])] =
        -kZipfExponent * std::log(1.0f + static_cast<float>(i));
  }
  for (std::uint64_t e = 0; e < order.size(); ++e) {
    const float angle = 3.14159265f * random(kAngle, e);
    experts_.push_back({1.0f + 0.5f * random(kScaleOf, e), std::cos(angle), std::sin(angle),
                        0.25f * random(kShift, e)});
  }
}

LayerInput DemoModel::input(int iteration, int rank) const {
  LayerInput in;
  in.rank = rank;
  embed(iteration, rank, in);
  if (shape_.fp8) quantise(in);
  route(in);
  return in;
}

void DemoModel::embed(int iteration, int rank, LayerInput& in) const {
  const int hidden = shape_.hidden;
  in.x.resize(at(shape_.tokens, hidden, 0));
  in.seen.resize(in.x.size());
  for (int t = 0; t < shape_.tokens; ++t) {
    const auto position =
        (static_cast<std::uint64_t>(iteration) * static_cast<std::uint64_t>(shape_.ranks) +
         static_cast<std::uint64_t>(rank)) *
            static_cast<std::uint64_t>(shape_.tokens) +
        static_cast<std::uint64_t>(t);
    const auto byte = static_cast<unsigned char>(text_[position % text_.size()]);
    const std::uint64_t base = mixBits(shape_.seed, kPosition, position);
    for (int c = 0; c < hidden; ++c) {
      const float place = signedUnit(mixBits(base ^ static_cast<std::uint64_t>(c)));
      const std::size_t i = at(t, hidden, c);
      in.x[i] = floatToBf16(table_[at(byte, hidden, c)] + kPositionWeight * place);
      in.seen[i] = bf16ToFloat(in.x[i]);
    }
  }
}

/// The sender's cast: every 128 columns share the scale that takes their largest value to 448.
void DemoModel::quantise(LayerInput& in) const {
  const int hidden = shape_.hidden, blocks = scalesPerRow(hidden);
  in.x8.resize(in.x.size());
  in.scales.resize(at(shape_.tokens, blocks, 0));
  for (int t = 0; t < shape_.tokens; ++t) {
    for (int b = 0; b < blocks; ++b) {
      const std::size_t begin = at(t, hidden, b * kScaleBlock);
      const std::size_t end = at(t, hidden, std::min((b + 1) * kScaleBlock, hidden));
      float largest = 0;
      for (std::size_t i = begin; i < end; ++i) largest = std::max(largest, std::abs(in.seen[i]));
      const float scale = largest > 0 ? largest / kMaxE4m3 : 1.0f;
      in.scales[at(t, blocks, b)] = scale;
      for (std::size_t i = begin; i < end; ++i) {
        in.x8[i] = floatToE4m3(in.seen[i] / scale);
        in.seen[i] = e4m3ToFloat(in.x8[i]) * scale;
      }
    }
  }
}

void DemoModel::route(LayerInput& in) const {
  in.topkIdx.resize(at(shape_.tokens, shape_.topk, 0));
  in.topkWeights.resize(in.topkIdx.size());
  for (int t = 0; t < shape_.tokens; ++t) {
    routeToken(&in.seen[at(t, shape_.hidden, 0)], &in.topkIdx[at(t, shape_.topk, 0)],
               &in.topkWeights[at(t, shape_.topk, 0)]);
  }
}

void DemoModel::routeToken(const float* x, std::int64_t* idx, float* weights) const {
  const auto experts = static_cast<std::size_t>(shape_.experts);
  std::vector<float> probability(experts);
  float highest = -INFINITY, sum = 0;
  for (std::size_t e = 0; e < experts; ++e) {
    float logit = bias_[e];
    const float* gate = &gate_[e * static_cast<std::size_t>(gateColumns_)];
    for (int c = 0; c < gateColumns_; ++c) logit += gate[c] * x[c];
    probability[e] = logit;
    highest = std::max(highest, logit);
  }
  for (float& p : probability) sum += p = std::exp(p - highest);
  std::vector<int> order(experts);
  std::iota(order.begin(), order.end(), 0);
  const auto p = [&](int e) { return probability[static_cast<std::size_t>(e)] / sum; };
  std::partial_sort(order.begin(), order.begin() + shape_.topk, order.end(),
                    [&](int a, int b) { return p(a) > p(b) || (p(a) == p(b) && a < b); });
  const float least = kLeastShare / static_cast<float>(shape_.experts);
  float kept = 0;
  for (int k = 0; k < shape_.topk; ++k) {
    const int e = order[static_cast<std::size_t>(k)];
    const bool keep = k == 0 || p(e) >= least;
    idx[k] = keep ? e : -1;
    weights[k] = keep ? p(e) : 0.0f;
    kept += weights[k];
  }
  for (int k = 0; k < shape_.topk; ++k) weights[k] /= kept;
}

void DemoModel::expect(const LayerInput& in, int token, ExpectedRow& out) const {
  const int hidden = shape_.hidden;
  const auto columns = static_cast<std::size_t>(hidden);
  out.plain.assign(columns, 0.0f);
  out.bound.assign(columns, 0.0f);
  out.exact.assign(columns, 0);
  std::vector<float> partial(columns), magnitude(columns, 0.0f);
  const float* x = &in.seen[at(token, hidden, 0)];
  const std::int64_t* idx = &in.topkIdx[at(token, shape_.topk, 0)];
  const float* weights = &in.topkWeights[at(token, shape_.topk, 0)];
  const auto addExpert = [&](int k, std::vector<float>& sum) {
    const ExpertParameters& expert = experts_[static_cast<std::size_t>(idx[k])];
    for (std::size_t c = 0; c < columns; c += 2) {
      float even = x[c], odd = x[c + 1];
      cpu::applyExpert(expert, even, odd);
      sum[c] += weights[k] * even;
      sum[c + 1] += weights[k] * odd;
    }
  };
  for (int k = 0; k < shape_.topk; ++k) {
    if (idx[k] >= 0) addExpert(k, out.plain);
  }
  RowSum total(columns);
  const auto addRank = [&](int r, RowSum& sum) {
    const auto isHere = [&](int k) { return idx[k] >= 0 && idx[k] / shape_.expertsPerRank() == r; };
    std::fill(partial.begin(), partial.end(), 0.0f);
    bool any = false;
    for (int k = 0; k < shape_.topk; ++k) {
      if (isHere(k)) addExpert(k, partial), any = true;
    }
    if (any) sum.addRounded(partial, magnitude);  // the experts' rank rounds once
  };
  const int perNode = shape_.ranksPerNode(), own = in.rank / perNode;
  const auto addNode = [&](int node, RowSum& sum) {
    const int end = std::min((node + 1) * perNode, shape_.ranks);
    for (int r = node * perNode; r < end; ++r) addRank(r, sum);
  };
  addNode(own, total);
  for (int node = 0; node < shape_.nodes; ++node) {
    RowSum sum(columns);
    if (node != own) addNode(node, sum);
    if (sum.started) total.addRounded(sum.value, magnitude);  // so does another node
  }
  for (std::size_t c = 0; c < columns; ++c) {
    out.exact[c] = floatToBf16(total.value[c]);  // combine rounds once more
    // Experts give values in (-1, 1) and weights sum to 1: an fp32 sum of n terms is off by less
    // than n roundings of 1. The factor covers what roundings do to each other.
    const auto terms = static_cast<float>(shape_.topk + shape_.ranks);
    out.bound[c] =
        1.01f * kBf16Rounding * (magnitude[c] + std::abs(total.value[c])) + terms * kFp32Rounding;
  }
}

}  // namespace mscclpp::ep::cli
