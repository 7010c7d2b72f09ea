#pragma once

#include <memory>
#include <vector>

#include "call_order.hpp"
#include "group.hpp"

namespace mscclpp::ep {

/// A contiguous tensor over `owner`'s memory at byte `offset`.
inline Tensor viewOf(const std::shared_ptr<void>& owner, std::size_t offset, DType dtype,
                     std::vector<std::int64_t> shape, const Group& group) {
  Tensor tensor;
  tensor.present = true;
  tensor.data = owner ? static_cast<char*>(owner.get()) + offset : nullptr;
  tensor.dtype = dtype;
  tensor.shape = std::move(shape);
  tensor.platform = group.options().platform;
  tensor.deviceIndex = group.options().deviceIndex;
  tensor.owner = owner;
  return tensor;
}

/// A tensor in ordinary memory, for the communication to write and the call's owner to use.
inline Tensor ordinary(Group& group, CallOrder& order, DType dtype,
                       std::vector<std::int64_t> shape) {
  Tensor tensor = viewOf(nullptr, 0, dtype, std::move(shape), group);
  tensor.owner = group.allocate(tensor.bytes(), order.stream(), order.owner());
  tensor.data = tensor.owner.get();
  return tensor;
}

/// Several small tables in one allocation.
class TableArena {
 public:
  TableArena(Group& group, CallOrder& order, std::size_t bytes)
      : group_(group), memory_(group.allocate(bytes, order.stream(), order.owner())) {}
  static std::size_t bytesFor(std::int64_t elements) {
    return alignUp(static_cast<std::size_t>(elements) * 4, kTensorAlign);
  }
  Tensor i32(std::vector<std::int64_t> shape) {
    Tensor tensor = viewOf(memory_, used_, DType::i32, std::move(shape), group_);
    used_ += bytesFor(tensor.elements());
    return tensor;
  }

 private:
  Group& group_;
  std::shared_ptr<void> memory_;
  std::size_t used_ = 0;
};

}  // namespace mscclpp::ep
