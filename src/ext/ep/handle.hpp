#pragma once

#include <cstdint>
#include <vector>

#include <mscclpp/ext/ep/buffer.hpp>

#include "kernels/api.cuh"

namespace mscclpp::ep {

/// A routing. The tables are device memory of the Buffer's platform.
struct HandleState {
  std::uint64_t groupId = 0;  ///< of the Buffer that made it
  int tokens = 0;             ///< sent by this rank
  int rows = 0;               ///< received, or their bound
  int maxTokens = 0;          ///< of any rank, or a bound that all ranks share
  int maxRows = 0;            ///< likewise for received rows
  int topk = 0;
  Tensor position;       ///< i32 [tokens, ranks]
  Tensor sendCount;      ///< i32 [ranks]
  Tensor sendStart;      ///< i32 [ranks]
  Tensor rankOffset;     ///< i32 [ranks + 1]
  Tensor sourceTokens;   ///< i32 [rows]
  Tensor recvPerExpert;  ///< i32 [local experts]
  // When the group spans nodes: tokens that come through this rank.
  Tensor railTokens;  ///< i32 [in-flows]: tokens of each source
  Tensor railRows;  ///< i32 [in-flows, maxTokens, members]: their rows at this node's ranks, or -1
};

/// An explicit placement of experts, on host and device.
class ExpertMapState {
 public:
  std::uint64_t groupId = 0;
  std::uint64_t hash = 0;             ///< compared among the ranks
  std::vector<std::int32_t> firstOf;  ///< [ranks + 1] experts before each rank's
  int experts = 0;
  Tensor tables;  ///< i32: rankOf, indexOf, listed [experts each], firstOf [ranks + 1]

  ExpertArgs args(int rank) const;
};

}  // namespace mscclpp::ep
