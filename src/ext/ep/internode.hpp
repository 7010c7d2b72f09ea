#pragma once

#include "call_order.hpp"
#include "group.hpp"
#include "handle.hpp"

/// The parts of dispatch and combine that go between nodes. Only for groups that span several.
namespace mscclpp::ep {

/// After the counts are known: room for what this rank forwards and later adds up.
void makeRailRows(Group& group, CallOrder& order, HandleState& handle);

/// Follows a launch of the dispatch inside the node. `fresh`: `handle` is being made by this call.
void dispatchBetweenNodes(Group& group, const DispatchArgs& args, const HandleState& handle,
                          bool fresh, int blocks);

/// One wave of a combine, inside the node and between nodes.
void combineBetweenNodes(Group& group, const CombineArgs& args, const HandleState& handle,
                         int blocks);

/// Refuses rows for which the rings are too small.
void checkDispatchRing(const Group& group, const RecvLayout& row);
void checkCombineRing(const Group& group, std::uint32_t rowBytes, std::int64_t topk);

}  // namespace mscclpp::ep
