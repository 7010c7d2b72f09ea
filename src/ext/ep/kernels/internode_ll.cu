#include <mscclpp/device/launch.hpp>

#include "low_latency/combine.cuh"
#include "low_latency/combine_logfmt.cuh"
#include "low_latency/combine_source.cuh"
#include "low_latency/dispatch.cuh"

/// Launchers of the low-latency kernels. Compiled by nvcc for CUDA, and through cpu_entry_ll.cc by
/// the host compiler for the CPU platform.
namespace mscclpp::ep::MSCCLPP_PLATFORM_NS {
namespace {

/// What a block may use of a Hopper SM's shared memory.
constexpr std::size_t kLowLatencyShared = 227 * 1024;

/// One block more than items, so that one has time for its other duties.
int blocksFor(int items, int most) {
  return items + 1 < most ? items + 1 : most;
}
template <class Args>
LaunchShape shapeFor(Args& args, int items, int most, std::size_t shared) {
  const int blocks = blocksFor(items, most);
  args.group.share = kEpochStep / static_cast<std::uint64_t>(blocks);
  return {static_cast<unsigned>(blocks), kLowLatencyThreads, shared, args.group.alone};
}

using FastPath = LowLatencyPath<true, false>;
using GeneralPath = LowLatencyPath<false, false>;
using PortsPath = LowLatencyPath<false, true>;

/// FastPath is enough.
template <class Args>
bool isFast(const Args& args) {
  const LowLatencyGroup& g = args.group;
  return args.area.rowUnits <= kUnitsPerPass && args.area.topk <= kFastTopk && !g.shrink &&
         g.writes == LineWrites::whole && g.ranks <= kInlineRanks && args.waitTotals == nullptr;
}
/// Calls f with an object of the path that is taken.
template <class F>
void withPath(const LowLatencyGroup& g, bool fast, F&& f) {
  if (g.ports.channels[0] != nullptr) {
    f(PortsPath{});
  } else if (fast) {
    f(FastPath{});
  } else {
    f(GeneralPath{});
  }
}

void launchDispatch(LowLatencyDispatchArgs args, bool e4m3, int blocks, void* stream) {
  const LowLatencyPhase phase = args.group.phase;
  DispatchShared shared{args.group.ranks, idUnitsOf(args.area), true,
                        e4m3 ? e4m3Units(args.hidden) : 0};
  shared.idsHere = args.idsInShared = shared.total() <= kLowLatencyShared;
  const int peers = (args.group.ranks - 1) * args.area.maxTokens;
  const int items = phase == LowLatencyPhase::send ? args.tokens : args.tokens + peers;
  const LaunchShape shape = shapeFor(args, items, blocks, shared.total());
  const int grid = static_cast<int>(shape.blocks);
  args.rounds = (args.area.maxTokens + grid - 1) / grid;
  const auto native = static_cast<NativeStream>(stream);
  withPath(args.group, isFast(args) && args.idsInShared, [&](auto path) {
    using Path = decltype(path);
    if (e4m3) {
      launch<lowLatencyDispatchKernel<true, Path>, kLowLatencyThreads>(shape, native, args);
    } else {
      launch<lowLatencyDispatchKernel<false, Path>, kLowLatencyThreads>(shape, native, args);
    }
  });
}

template <class Args>
LaunchShape combineShape(Args& args, int blocks) {
  const int peers = (args.group.ranks - 1) * args.area.maxTokens;
  const int items = (sends(args.group.phase) ? peers : 0) + args.tokens;
  return shapeFor(args, items, blocks, args.logfmt ? sizeof(LogfmtShared) : sizeof(CombineShared));
}
void launchCombine(LowLatencyCombineArgs args, int blocks, void* stream) {
  const LaunchShape shape = combineShape(args, blocks);
  const auto native = static_cast<NativeStream>(stream);
  withPath(args.group, isFast(args), [&](auto path) {
    using Path = decltype(path);
    if (args.logfmt) {
      launch<lowLatencyLogfmtKernel<Path>, kLowLatencyThreads>(shape, native, args);
    } else {
      launch<lowLatencyCombineKernel<Path>, kLowLatencyThreads>(shape, native, args);
    }
  });
}
void launchSource(LowLatencySourceArgs args, int blocks, void* stream) {
  const LaunchShape shape = combineShape(args, blocks);
  const auto native = static_cast<NativeStream>(stream);
  withPath(args.group, isFast(args), [&](auto path) {
    launch<lowLatencySourceKernel<decltype(path)>, kLowLatencyThreads>(shape, native, args);
  });
}

template <class Path>
void preparePath() {
  prepare<lowLatencyDispatchKernel<true, Path>, kLowLatencyThreads, LowLatencyDispatchArgs>(
      kLowLatencyShared);
  prepare<lowLatencyDispatchKernel<false, Path>, kLowLatencyThreads, LowLatencyDispatchArgs>(
      kLowLatencyShared);
  prepare<lowLatencyCombineKernel<Path>, kLowLatencyThreads, LowLatencyCombineArgs>(
      sizeof(CombineShared));
  prepare<lowLatencyLogfmtKernel<Path>, kLowLatencyThreads, LowLatencyCombineArgs>(
      sizeof(LogfmtShared));
  prepare<lowLatencySourceKernel<Path>, kLowLatencyThreads, LowLatencySourceArgs>(
      sizeof(CombineShared));
}
void prepareAll() {
  preparePath<FastPath>();
  preparePath<GeneralPath>();
  preparePath<PortsPath>();
}

constexpr LowLatencyKernels kLowLatencyKernels{prepareAll, launchDispatch, launchCombine,
                                               launchSource};

}  // namespace

const LowLatencyKernels& lowLatencyKernels() {
  return kLowLatencyKernels;
}

}  // namespace mscclpp::ep::MSCCLPP_PLATFORM_NS
