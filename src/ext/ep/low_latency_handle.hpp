#pragma once

#include <mscclpp/ext/ep/low_latency.hpp>

namespace mscclpp::ep {

struct LowLatencyHandleState {
  std::uint64_t groupId = 0;  ///< of the Buffer that made it
  int maxTokens = 0;
  int hidden = 0;
  int topk = 0;
  int experts = 0;
  Tensor sourceInfo, layoutRange;
  Tensor slots;         ///< i32 [ranks, maxTokens, topk]
  Tensor sourceTokens;  ///< i32 [ranks]
  Tensor rowTable;      ///< i32 [2, ranks, maxTokens + 2]: see RowTable
};

}  // namespace mscclpp::ep
