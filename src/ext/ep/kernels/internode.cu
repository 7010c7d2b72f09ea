#include <mscclpp/device/launch.hpp>

#include "internode/combine.cuh"
#include "internode/dispatch.cuh"

/// Launchers of the high-throughput kernels between nodes. Compiled by nvcc for CUDA, and through
/// cpu_entry_internode.cc by the host compiler for the CPU platform.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {
namespace {

constexpr int kRailDispatchThreads = kDispatchWarps * 32;
constexpr int kRailCombineThreads = kCombineWarps * 32;
#if MSCCLPP_PLATFORM_CUDA
constexpr int kRailStageThreads = 1024;
#else
constexpr int kRailStageThreads = 64;
#endif
LaunchShape shapeOf(int blocks, int threads, std::size_t shared) {
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared};
}

void launchRailDispatch(RailDispatchArgs args, int blocks, void* stream) {
  const PipeLayout pipes = RailDispatchView{args.rails.plan.members, args.rails.ins}.pipes();
  args.partBytes = pipes.part(args.dispatch.rowBytes);
  launch<railDispatchKernel, kRailDispatchThreads>(
      shapeOf(blocks, kRailDispatchThreads, pipes.total(args.partBytes)),
      static_cast<NativeStream>(stream), args);
}
void launchRailStage(const RailCombineArgs& args, int blocks, void* stream) {
  launch<stageForRails, kRailStageThreads>(shapeOf(blocks, kRailStageThreads, 0),
                                           static_cast<NativeStream>(stream), args);
}
void launchRailCombine(RailCombineArgs args, int blocks, void* stream) {
  const PipeLayout pipes = RailCombineView{args.rails.plan.members, args.rails.outs}.pipes();
  args.partBytes = pipes.part(args.combine.rowBytes);
  launch<railCombineKernel, kRailCombineThreads>(
      shapeOf(blocks, kRailCombineThreads, pipes.total(args.partBytes)),
      static_cast<NativeStream>(stream), args);
}
bool railsFit(int members, int flows) {
  return RailDispatchView{members, flows}.pipes().fits() &&
         RailCombineView{members, flows}.pipes().fits();
}
void prepareRails() {
  prepare<railDispatchKernel, kRailDispatchThreads, RailDispatchArgs>(kSharedBytes);
  prepare<stageForRails, kRailStageThreads, RailCombineArgs>(0);
  prepare<railCombineKernel, kRailCombineThreads, RailCombineArgs>(kSharedBytes);
}

constexpr InternodeKernels kKernels{prepareRails,    [] { return kRailLanes; },
                                    railsFit,        launchRailDispatch,
                                    launchRailStage, launchRailCombine};

}  // namespace

const InternodeKernels& internodeKernels() {
  return kKernels;
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
