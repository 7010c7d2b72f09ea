#pragma once

#include <vector>

#include <mscclpp/ext/ep/buffer.hpp>

#include "call_shape.hpp"
#include "group.hpp"
#include "handle.hpp"

/// Refuses bad requests on the host, before any rank enters a collective. Every message has the
/// value, what is allowed, and what to do.
namespace mscclpp::ep {

/// What a checked dispatch request means.
struct DispatchShape {
  int tokens = 0;
  std::int64_t hidden = 0;
  std::uint32_t rowBytes = 0;
  int scaleCount = 0;
  int topk = 0;
  int experts = 0;
  CallShape call;
  RecvLayout row;                 ///< a received row's parts; `rows` is not set
  std::uint64_t stagingRows = 0;  ///< rows that fit into the staging area, 1 or more
};

void checkOnDevice(const Tensor& tensor, const char* name, const Group& group);
/// Present, on this device, dense, of this type and shape (-1 = any extent).
void checkTensor(const Tensor& tensor, const char* name, DType dtype,
                 const std::vector<std::int64_t>& shape, const Group& group);
void checkAligned(const Tensor& tensor, const char* name, std::size_t alignment);
int checkLayout(const LayoutRequest& request, const Group& group);
DispatchShape checkDispatch(const DispatchRequest& request, const Group& group);
/// Returns the row size in bytes.
std::uint32_t checkCombine(const CombineRequest& request, const Group& group);

/// The experts' placement for `experts` experts: the map if there is one, else equal blocks.
ExpertArgs expertArgs(int experts, const ExpertMap& map, const Group& group);

}  // namespace mscclpp::ep
