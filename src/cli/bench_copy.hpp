#pragma once

#include <memory>

#include "bench.hpp"
#include "bench_data.hpp"
#include "bench_loop.hpp"
#include "device_memory.hpp"
#include "ext/ep/group.hpp"
#include "ext/ep/handle.hpp"

namespace mscclpp::ep::cli {

/// The roofline: the same rows to the same places as a dispatch, or read back from there as in a
/// combine, by plain copies and nothing else. Has a heap of its own.
class CopyRoofline {
 public:
  /// Collective. Rows of `rowBytes` bytes, a multiple of 16.
  CopyRoofline(const BenchOptions& options, const RankContext& context, const RankDevice& device,
               const BenchRouting& routing, std::size_t rowBytes);
  /// Collective: waits for all ranks, then unmaps their heaps. Last call.
  void close() { group_->close(); }

  std::size_t rowBytes() const { return rowBytes_; }
  /// False when the copy kernel's ring of rows does not fit into shared memory.
  bool possible() const;
  int blocks(int wanted) const { return group_->blocks(wanted); }
  /// Collective. Times and checks the copy.
  Timing measure(const DispatchHandle& handle, bool pull, int blocks, TimedLoop& loop);
  /// Enqueues a kernel that moves nothing and that all ranks leave together.
  void align(void* stream) const;

 private:
  CopyRowsArgs args(const DispatchHandle& handle, bool pull) const;
  Outputs copy(const CopyRowsArgs& args, int blocks, TimedLoop& loop) const;

  const BenchOptions& options_;
  const RankContext& context_;
  const RankDevice& device_;
  std::size_t rowBytes_;
  std::shared_ptr<Group> group_;
  Tensor far_;            ///< the heap's rows, as a tensor
  Tensor near_, pulled_;  ///< [tokens, rowBytes]: sent, and where pulled rows go
  Tensor expectedFar_;
};

}  // namespace mscclpp::ep::cli
