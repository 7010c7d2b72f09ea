#pragma once

#include <map>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <mscclpp/ext/ep/buffer.hpp>

#include "bench.hpp"
#include "bench_copy.hpp"
#include "bench_data.hpp"
#include "bench_loop.hpp"
#include "device_memory.hpp"
#include "progress.hpp"

namespace mscclpp::ep::cli {

/// One rank of the benchmark. All ranks do the same in the same order.
class BenchRank {
 public:
  BenchRank(const BenchOptions& options, const RankContext& context);
  BenchReport run();

 private:
  /// Tensors of one case that is asked for: inputs, and what must come out.
  struct Case {
    Tensor x, scales;  ///< dispatch: input. combine: x is the experts' output
    Tensor expected, expectedScales;
    std::size_t rowBytes = 0;  ///< what a row moves, scales included
  };

  void makeBuffer();
  void makeHandle();
  Case makeCase(BenchCase which) const;
  Case makeDispatchCase(bool fp8) const;
  Case makeCombineCase(RowKind kind, bool inPool) const;
  Outputs call(BenchCase which, const Case& data, int blocks) const;
  Outputs callDispatch(bool cached, const Case& data, int blocks) const;
  Outputs callCombine(const Case& data, int blocks) const;
  Outputs callLayout() const;
  void poison(const Case& data) const;
  BenchLine measure(BenchCase which, const Case& data, int blocks);
  CopyRoofline& copyOf(std::size_t rowBytes);
  Timing roofline(BenchCase which, const Case& data, int blocks);
  Timing transport(std::size_t rowBytes, BenchLine& line);

  const BenchOptions& options_;
  const RankContext& context_;
  Progress progress_;
  RankDevice device_;
  BenchRouting routing_;
  BenchData data_;
  std::unique_ptr<Buffer> buffer_;
  std::optional<TimedLoop> loop_;
  /// A roofline by its row size; what it measured by (row size, pull, blocks).
  std::map<std::size_t, std::unique_ptr<CopyRoofline>> copies_;
  std::map<std::tuple<std::size_t, bool, int>, Timing> copyTimes_;
  /// What the transport between nodes did by itself, and bytes, by row size.
  std::map<std::size_t, std::pair<Timing, double>> transports_;
  StreamOrder order_;
  Tensor topkIdx_, topkWeights_, expectedCounts_;
  LayoutResult layout_;
  DispatchHandle handle_;
};

}  // namespace mscclpp::ep::cli
