#pragma once

#include <mscclpp/ext/ep/buffer.hpp>

#include "group.hpp"

namespace mscclpp::ep {

/// Puts one call in its place between the caller's stream and the communication stream.
class CallOrder {
 public:
  CallOrder(Group& group, const StreamOrder& order)
      : scope_(group.device()),
        group_(group),
        order_(order),
        compute_(group.borrow(order.computeStream)) {
    group.comm().wait(order.previousEvent ? order.previousEvent : compute_.record(false));
  }
  /// The native stream that outputs belong to.
  void* owner() {
    return order_.allocateOnCommStream ? group_.comm().native() : order_.computeStream;
  }
  /// The event after everything that was enqueued; the caller's stream waits for it unless the call
  /// is asynchronous.
  Event finish() {
    const Event event = group_.comm().record(true);
    if (!order_.asyncFinish) compute_.wait(event);
    return event;
  }

 private:
  DeviceScope scope_;  // kernels are launched while this object lives
  Group& group_;
  const StreamOrder& order_;
  Stream compute_;
};

}  // namespace mscclpp::ep
