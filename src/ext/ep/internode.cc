#include "internode.hpp"

#include <algorithm>

#include <mscclpp/errors.hpp>

#include "tensors.hpp"

namespace mscclpp::ep {
namespace {

SumSlot sumSlot(std::uint32_t rowBytes, std::int64_t topk) {
  return {rowBytes, static_cast<std::uint64_t>(topk)};
}
DispatchSlot dispatchSlot(const RecvLayout& row, int members) {
  return {static_cast<std::uint32_t>(members), row.rowBytes, row.scaleBytes, row.topk};
}

/// A flow has so many rings, of `ringBytes`.
void checkRing(const Group& group, std::size_t slotBytes, std::uint64_t ringBytes, int rings,
               const char* call) {
  const RailPlan& plan = group.railPlan();
  check(ringBytes >= slotBytes, ErrorCode::invalidArgument,
        "{}: a ring between nodes has {} bytes, and a row of {} bytes must fit: pass "
        "num_rdma_bytes "
        "= {} or more ({} areas, {} flows, rings of a flow: {}){}",
        call, ringBytes, slotBytes,
        slotBytes * kRailAreas * static_cast<std::uint64_t>(plan.rings) *
            static_cast<std::uint64_t>(rings),
        kRailAreas, plan.rings, rings,
        group.options().lowLatencyMode
            ? ". In low_latency_mode the rings have a quarter of num_nvl_bytes: raise that instead"
            : "");
}

}  // namespace

void makeRailRows(Group& group, CallOrder& order, HandleState& handle) {
  const std::int64_t members = static_cast<std::int64_t>(
      group.topology().members(group.topology().nodeOf(group.rank())).size());
  handle.railRows =
      ordinary(group, order, DType::i32, {group.rails().ins, handle.maxTokens, members});
  group.device().fill(handle.railRows.data, 0xFF, handle.railRows.bytes(), group.comm());
}

void dispatchBetweenNodes(Group& group, const DispatchArgs& args, const HandleState& handle,
                          bool fresh, int blocks) {
  RailDispatchArgs rail;
  rail.dispatch = args;
  rail.rails = group.rails();
  rail.slot = {1, args.rowBytes, static_cast<std::uint64_t>(args.scaleCount) * 4,
               static_cast<std::uint64_t>(args.topk)};
  if (fresh) rail.railRows = handle.railRows.as<std::int32_t>();
  rail.railStride = handle.maxTokens;
  group.internodeKernels().dispatch(rail, blocks, group.comm().native());
}

void combineBetweenNodes(Group& group, const CombineArgs& args, const HandleState& handle,
                         int blocks) {
  RailCombineArgs rail;
  rail.combine = args;
  rail.rails = group.rails();
  rail.slot = sumSlot(args.rowBytes, args.topk);
  rail.railRows = handle.railRows.as<const std::int32_t>();
  rail.railStride = handle.maxTokens;
  rail.railTokens = handle.railTokens.as<const std::int32_t>();
  if (args.staged || args.topk > 0) {
    group.internodeKernels().stage(rail, blocks, group.comm().native());
  }
  group.internodeKernels().combine(rail, blocks, group.comm().native());
}

void checkDispatchRing(const Group& group, const RecvLayout& row) {
  if (group.topology().nodes() == 1) return;
  const RailPlan& plan = group.railPlan();
  checkRing(group, dispatchSlot(row, plan.members).bytes(), plan.flowRingBytes(), 1, "dispatch");
}

void checkCombineRing(const Group& group, std::uint32_t rowBytes, std::int64_t topk) {
  if (group.topology().nodes() == 1) return;
  const RailPlan& plan = group.railPlan();
  checkRing(group, sumSlot(rowBytes, topk).bytes(), plan.ringBytes, plan.lanes, "combine");
}

}  // namespace mscclpp::ep
