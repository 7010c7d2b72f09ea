#include <mscclpp/device/launch.hpp>

#include "internode/combine.cuh"
#include "internode/dispatch.cuh"

/// Launchers of the high-throughput kernels between nodes. Compiled by nvcc for CUDA, and through
/// cpu_entry_internode.cc by the host compiler for the CPU platform.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {
namespace {

constexpr int kRailDispatchThreads = (kSendWarps + kForwardWarps) * 32;
constexpr int kRailCombineThreads = (kSumWarps + kHomeWarps) * 32;
constexpr int kRailStageThreads = 256;
/// Of a block's shared memory; its tables grow with ranks per node and nodes.
constexpr std::size_t kRailSharedBytes = 96 * 1024;

LaunchShape shapeOf(int blocks, int threads, std::size_t shared) {
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared};
}

void launchRailDispatch(const RailDispatchArgs& args, int blocks, void* stream) {
  const auto members = static_cast<std::size_t>(args.rails.plan.members);
  launch<railDispatchKernel, kRailDispatchThreads>(
      shapeOf(blocks, kRailDispatchThreads,
              alignUp(sizeof(RailShared), 128) + members * sizeof(RecvTarget)),
      static_cast<NativeStream>(stream), args);
}
void launchRailStage(const RailCombineArgs& args, int blocks, void* stream) {
  launch<stageForRails, kRailStageThreads>(shapeOf(blocks, kRailStageThreads, 0),
                                           static_cast<NativeStream>(stream), args);
}
void launchRailCombine(const RailCombineArgs& args, int blocks, void* stream) {
  const RailCombineView view{args.rails.plan.members, args.rails.outs};
  launch<railCombineKernel, kRailCombineThreads>(shapeOf(blocks, kRailCombineThreads, view.total()),
                                                 static_cast<NativeStream>(stream), args);
}
void prepareRails() {
  prepare<railDispatchKernel, kRailDispatchThreads, RailDispatchArgs>(kRailSharedBytes);
  prepare<stageForRails, kRailStageThreads, RailCombineArgs>(0);
  prepare<railCombineKernel, kRailCombineThreads, RailCombineArgs>(kRailSharedBytes);
}

constexpr InternodeKernels kKernels{
    prepareRails,       [] { return kRailLanes; }, [] { return 1; }, [] { return kHomeWarps; },
    launchRailDispatch, launchRailStage,           launchRailCombine};

}  // namespace

const InternodeKernels& internodeKernels() {
  return kKernels;
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
