#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

/// Dispatch and combine in one process, short, slow and without a clever line: what every result of
/// the kernels is compared with, bit for bit. Also the routings and payloads that tests and demo
/// use. Nothing here touches a device, a stream or a Buffer.
namespace mscclpp::ep::reference {

/// Which rank hosts each expert, and as its how-manieth.
struct Placement {
  int ranks = 1;
  std::vector<int> rankOf;    ///< [experts]
  std::vector<int> indexOf;   ///< [experts] among the experts of that rank
  std::vector<int> hostedBy;  ///< [ranks] experts of each rank

  int experts() const { return static_cast<int>(rankOf.size()); }
  /// Equal contiguous blocks; `experts` must be divisible by `ranks`.
  static Placement blocks(int experts, int ranks);
  /// Any placement; a rank numbers its experts in ascending order.
  static Placement of(std::vector<int> rankOf, int ranks);
  /// The expert that is number `index` of `rank`.
  int expertAt(int rank, int index) const;
};

/// The choices of one rank's tokens, row-major [tokens, topk]; -1 = no choice.
struct Routing {
  int tokens = 0;
  int topk = 0;
  std::vector<std::int64_t> topkIdx;
  std::vector<float> topkWeights;
};

/// What get_dispatch_layout returns on one rank.
struct Layout {
  std::vector<std::int32_t> tokensPerRank;
  std::vector<std::int32_t> tokensPerExpert;
  std::vector<std::uint8_t> isTokenInRank;  ///< [tokens, ranks]
};
Layout layout(const Routing& routing, const Placement& placement);

/// Where a received row came from.
struct Source {
  int rank = 0;
  int token = 0;
};

/// What one rank receives, without the rows themselves.
struct Received {
  std::vector<Source> rows;              ///< ascending by (rank, token)
  std::vector<std::int32_t> rankOffset;  ///< [ranks + 1] first row of every source rank
  std::vector<std::int64_t> topkIdx;     ///< [rows, topk] local numbering, -1 elsewhere
  std::vector<float> topkWeights;        ///< [rows, topk] 0 where topkIdx is -1
  std::vector<int> tokensPerExpert;      ///< [local experts]

  int count() const { return static_cast<int>(rows.size()); }
  /// The row of (rank, token), or -1.
  int rowOf(int rank, int token) const;
};
/// `all`: the routing of every rank.
Received dispatch(const std::vector<Routing>& all, const Placement& placement, int receiver);

/// Rows of `rowBytes` bytes picked from every rank's [tokens, rowBytes] in the order of `received`.
std::vector<std::uint8_t> gatherRows(const Received& received,
                                     const std::vector<std::vector<std::uint8_t>>& perRank,
                                     std::size_t rowBytes);

/// Everything that combine adds for the tokens of one rank.
struct CombineInput {
  int rank = 0;    ///< whose tokens
  int tokens = 0;  ///< of that rank
  int hidden = 0;
  const std::vector<Received>* received = nullptr;             ///< [ranks]
  const std::vector<std::vector<std::uint16_t>>* y = nullptr;  ///< [ranks] bf16 [rows, hidden]
  const std::vector<std::uint16_t>* bias0 = nullptr;           ///< optional, bf16 [tokens, hidden]
  const std::vector<std::uint16_t>* bias1 = nullptr;
  const std::vector<int>* nodeOf = nullptr;  ///< [ranks]; null: all ranks share a node
};
/// bf16 [tokens, hidden]: bias0, bias1, then the rows of the own node's ranks, ascending, added in
/// fp32 in this order; then the sums of the other nodes, ascending, each made the same way and
/// rounded to bf16; rounded at the end. +0 where nothing is added.
std::vector<std::uint16_t> combine(const CombineInput& input);
/// What combineWeights() adds for the tokens of one rank.
struct WeightsInput {
  int rank = 0;    ///< whose tokens
  int tokens = 0;  ///< of that rank
  int topk = 0;
  const std::vector<Received>* received = nullptr;           ///< [ranks]
  const std::vector<std::vector<float>>* weights = nullptr;  ///< [ranks] f32 [rows, topk]
  const std::vector<int>* nodeOf = nullptr;                  ///< as in CombineInput
};
/// f32 [tokens, topk]: the sum over ranks in the order of combine(), from +0, nodes' sums too.
std::vector<float> combineWeights(const WeightsInput& input);

float bf16ToFloat(std::uint16_t value);
/// Rounds to nearest even; every NaN becomes 0x7FFF.
std::uint16_t floatToBf16(float value);

/// How a generator chooses experts.
enum class Pattern {
  uniform,     ///< distinct experts, all equally likely
  skewed,      ///< distinct experts, low numbers far more likely (as trained routers are)
  oneRank,     ///< every choice on the last rank's experts
  oneSender,   ///< only the first rank's tokens choose; all others are -1
  gaps,        ///< uniform, and a third of the choices is -1
  nothing,     ///< all -1
  duplicates,  ///< the same expert may come several times for one token
};
const char* nameOf(Pattern pattern);
constexpr Pattern kPatterns[] = {Pattern::uniform,   Pattern::skewed, Pattern::oneRank,
                                 Pattern::oneSender, Pattern::gaps,   Pattern::nothing,
                                 Pattern::duplicates};

struct RoutingRequest {
  Pattern pattern = Pattern::uniform;
  int tokens = 0;
  int topk = 1;
  int rank = 0;            ///< of the sender
  std::uint64_t seed = 1;  ///< same request, same routing
};
/// Weights are in (0, 1], all different.
Routing makeRouting(const RoutingRequest& request, const Placement& placement);

/// Mixes any number of words into 64 bits that look random; the basis of all keyed data here.
std::uint64_t mix(std::initializer_list<std::uint64_t> words);

/// Names a tensor's rows: a stale, shifted or foreign row never has the right content.
struct RowKey {
  std::uint64_t tensor = 0;  ///< which tensor, which iteration
  int rank = 0;
  int firstRow = 0;  ///< a part of the tensor: rows firstRow .. firstRow + rows - 1
};
/// bf16 [rows, hidden], finite, magnitudes from 2^-12 to 2^12 and, in every eighth column, large
/// ones that cancel: a sum in another order has other bits.
std::vector<std::uint16_t> keyedBf16(const RowKey& key, int rows, int hidden);
/// Any bytes.
std::vector<std::uint8_t> keyedBytes(const RowKey& key, int rows, int bytesPerRow);
/// f32 in [0.5, 1.5).
std::vector<float> keyedFloats(const RowKey& key, int rows, int columns);

}  // namespace mscclpp::ep::reference
