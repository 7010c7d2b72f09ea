#pragma once

#include "api.cuh"

/// Kernels of the high-throughput calls that go between nodes.
namespace mscclpp::ep {

struct RailDispatchArgs {
  DispatchArgs dispatch;
  RailArgs rails;
  DispatchSlot slot;                 ///< `members` is that of each flow's destination
  std::int32_t* railRows = nullptr;  ///< out [in-flows, railStride, members]; null: known already
  std::int64_t railStride = 0;       ///< tokens
  std::uint32_t partBytes = 0;       ///< of a row, in shared memory; set by the launcher
};

struct RailCombineArgs {
  CombineArgs combine;
  RailArgs rails;
  SumSlot slot;
  const std::int32_t* railRows = nullptr;
  std::int64_t railStride = 0;
  const std::int32_t* railTokens = nullptr;
  std::uint32_t partBytes = 0;  ///< as above
};

struct InternodeKernels {
  void (*prepare)();
  int (*lanes)();
  /// Whether a block's shared memory holds what is kept of so many ranks per node and flows.
  bool (*fits)(int members, int flows);
  void (*dispatch)(RailDispatchArgs, int blocks, void* stream);
  /// Not collective. Copies what combine reads of other ranks' tokens into the staging area: rows
  /// unless they lie in the heap, weights if there are any.
  void (*stage)(const RailCombineArgs&, int blocks, void* stream);
  void (*combine)(RailCombineArgs, int blocks, void* stream);
};

namespace cpu {
const InternodeKernels& internodeKernels();
}
namespace cuda {
const InternodeKernels& internodeKernels();
}

}  // namespace mscclpp::ep
