#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "expert_function.hpp"

/// The demo's mixture-of-experts layer on the host: what goes in, where it goes, what must come
/// out. Deterministic in the seed; any process can compute any rank's part.
namespace mscclpp::ep::cli {

struct ModelShape {
  int ranks = 4;
  int nodes = 1;     ///< of equally many ranks; the last may have fewer
  int tokens = 256;  ///< per rank
  int hidden = 512;
  int topk = 4;
  int experts = 32;
  bool fp8 = false;
  std::uint64_t seed = 1;

  int expertsPerRank() const { return experts / ranks; }
  int ranksPerNode() const { return (ranks + nodes - 1) / nodes; }
};

/// One rank's input of one iteration.
struct LayerInput {
  int rank = 0;
  std::vector<std::uint16_t> x;       ///< bf16 [tokens, hidden]
  std::vector<std::uint8_t> x8;       ///< with fp8: e4m3 [tokens, hidden]
  std::vector<float> scales;          ///< with fp8: [tokens, ceil(hidden / 128)]
  std::vector<std::int64_t> topkIdx;  ///< [tokens, topk], best first; -1 = dropped
  std::vector<float> topkWeights;     ///< [tokens, topk], sum 1 over a token's experts
  std::vector<float> seen;  ///< [tokens, hidden]: x as the experts see it (with fp8: dequantised)
};

/// What one token must become.
struct ExpectedRow {
  std::vector<std::uint16_t> exact;  ///< bf16, rounded wherever the library rounds
  std::vector<float> plain;          ///< fp32 sum over the choices in their order, never rounded
  std::vector<float> bound;          ///< how far roundings to bf16 may move each column
};

class DemoModel {
 public:
  DemoModel(const ModelShape& shape, std::string text);

  const std::vector<ExpertParameters>& experts() const { return experts_; }
  /// Rank `rank`'s tokens of iteration `iteration`: the text is dealt out in contiguous pieces and
  /// starts again at its end.
  LayerInput input(int iteration, int rank) const;
  /// The layer's output for token `token` of `in`, computed alone.
  void expect(const LayerInput& in, int token, ExpectedRow& out) const;

 private:
  void embed(int iteration, int rank, LayerInput& in) const;
  void quantise(LayerInput& in) const;
  void route(LayerInput& in) const;
  void routeToken(const float* x, std::int64_t* idx, float* weights) const;

  ModelShape shape_;
  std::string text_;
  std::vector<float> table_;  ///< [256, hidden]: one embedding per byte value
  std::vector<float> gate_;   ///< [experts, gateColumns_]
  std::vector<float> bias_;   ///< [experts]: makes some experts popular
  std::vector<ExpertParameters> experts_;
  int gateColumns_ = 0;
};

}  // namespace mscclpp::ep::cli
