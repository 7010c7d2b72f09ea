#include <mscclpp/device/launch.hpp>

#include "intranode/combine.cuh"
#include "intranode/copy_rows.cuh"
#include "intranode/dispatch.cuh"
#include "intranode/layout.cuh"
#include "intranode/notify.cuh"

/// Launchers of the intranode kernels. Compiled by nvcc for CUDA, and through cpu_entry.cc by the
/// host compiler for the CPU platform.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {
namespace {

constexpr int kWeightThreads = 256;
constexpr int kCopyThreads = 32;

unsigned asBlocks(int blocks) {
  return static_cast<unsigned>(blocks);
}

template <class Shape>
constexpr unsigned dispatchThreads() {
  return Shape::kPipes * 64;
}
template <class Shape>
constexpr unsigned combineThreads() {
  return static_cast<unsigned>(CombineView<Shape>::warps()) * 32;
}
template <class F>
auto withDispatchShape(std::uint32_t rowBytes, F&& f) {
  return rowBytes >= kWideRowBytes ? f(WideRows{}) : f(NarrowRows{});
}
template <class F>
auto withCombineShape(bool staged, F&& f) {
  return staged ? f(Staged{}) : f(InPlace{});
}
/// The tables in shared memory grow with the ranks; parts of rows shrink to make room.
constexpr int kTableRanks = 64;

std::uint32_t dispatchPart(std::uint32_t rowBytes) {
  return withDispatchShape(rowBytes, [&](auto shape) {
    using Shape = decltype(shape);
    const DispatchView<Shape> view{kTableRanks, 0};
    return partBytes(rowBytes, Shape::kPipes * Shape::kStages, view.total());
  });
}
std::uint32_t combinePart(std::uint32_t rowBytes, bool staged) {
  return withCombineShape(staged, [&](auto shape) {
    using Shape = decltype(shape);
    const CombineView<Shape> view{kTableRanks, 0};
    return partBytes(rowBytes, view.stages(), view.total(), kReduceBytes);
  });
}

void launchLayout(const LayoutArgs& args, void* stream) {
  const int threads = kLayoutThreads;
  const int wanted = (args.tokens + threads - 1) / threads;
  const int blocks = wanted < 1 ? 1 : (wanted < 64 ? wanted : 64);
  launch<layoutKernel, kLayoutThreads>(
      {asBlocks(blocks), kLayoutThreads, LayoutHistogram::bytes(args)},
      static_cast<NativeStream>(stream), args);
}

void launchNotify(const NotifyArgs& args, int blocks, void* stream) {
  launch<notifyKernel, kNotifyThreads>({asBlocks(blocks), kNotifyThreads, sizeof(NotifyShared)},
                                       static_cast<NativeStream>(stream), args);
}

void launchDispatch(const DispatchArgs& args, int blocks, void* stream) {
  withDispatchShape(args.rowBytes, [&](auto shape) {
    using Shape = decltype(shape);
    const DispatchView<Shape> view{args.group.ranks, args.bulk ? args.partBytes : 0};
    launch<dispatchKernel<Shape>, static_cast<int>(dispatchThreads<Shape>())>(
        {asBlocks(blocks), dispatchThreads<Shape>(), view.total()},
        static_cast<NativeStream>(stream), args);
  });
}

void launchStageWeights(const CombineArgs& args, int blocks, void* stream) {
  launch<stageWeightsKernel, kWeightThreads>({asBlocks(blocks), kWeightThreads, 0},
                                             static_cast<NativeStream>(stream), args);
}

void launchCombine(const CombineArgs& args, int blocks, void* stream) {
  withCombineShape(args.staged, [&](auto shape) {
    using Shape = decltype(shape);
    const CombineView<Shape> view{args.group.ranks, args.partBytes};
    launch<combineKernel<Shape>, static_cast<int>(combineThreads<Shape>())>(
        {asBlocks(blocks), combineThreads<Shape>(), view.total()},
        static_cast<NativeStream>(stream), args);
  });
}

void launchCopyRows(const CopyRowsArgs& args, int blocks, void* stream) {
  const std::size_t shared =
      alignUp(sizeof(CopyRowsHead), 128) + kCopyStages * std::size_t{args.rowBytes};
  launch<copyRowsKernel, kCopyThreads>({asBlocks(blocks), kCopyThreads, shared},
                                       static_cast<NativeStream>(stream), args);
}

void prepareAll() {
  prepare<layoutKernel, kLayoutThreads, LayoutArgs>(kSharedBytes);
  prepare<notifyKernel, kNotifyThreads, NotifyArgs>(sizeof(NotifyShared));
  prepare<dispatchKernel<WideRows>, static_cast<int>(dispatchThreads<WideRows>()), DispatchArgs>(
      kSharedBytes);
  prepare<dispatchKernel<NarrowRows>, static_cast<int>(dispatchThreads<NarrowRows>()),
          DispatchArgs>(kSharedBytes);
  prepare<stageWeightsKernel, kWeightThreads, CombineArgs>(0);
  prepare<combineKernel<InPlace>, static_cast<int>(combineThreads<InPlace>()), CombineArgs>(
      kSharedBytes);
  prepare<combineKernel<Staged>, static_cast<int>(combineThreads<Staged>()), CombineArgs>(
      kSharedBytes);
  prepare<copyRowsKernel, kCopyThreads, CopyRowsArgs>(kSharedBytes);
}

constexpr IntranodeKernels kKernels{prepareAll,         dispatchPart,  combinePart,
                                    launchLayout,       launchNotify,  launchDispatch,
                                    launchStageWeights, launchCombine, launchCopyRows};

}  // namespace

const IntranodeKernels& intranodeKernels() {
  return kKernels;
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
