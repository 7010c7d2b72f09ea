#pragma once

#include <mscclpp/ext/ep/buffer.hpp>

#include "group.hpp"

namespace mscclpp::ep {

/// Which stream a call's kernels run on.
enum class CallStream {
  communication,  ///< the group's own
  /// The caller's, where it does not ask for more: nothing has to wait on another stream then. Else
  /// the group's own.
  caller
};

/// Puts one call in its place between the caller's stream and the group's other work.
class CallOrder {
 public:
  CallOrder(Group& group, const StreamOrder& order, CallStream where = CallStream::communication)
      : scope_(group.device()),
        group_(group),
        order_(order),
        compute_(group.borrow(order.computeStream)),
        direct_(where == CallStream::caller && mayRunDirectly()) {
    if (direct_) {
      group.enterCaller(compute_);
    } else {
      group.enterComm();
      group.comm().wait(order.previousEvent ? order.previousEvent : compute_.record(false));
    }
  }
  /// What the call's work is enqueued on.
  Stream& stream() { return direct_ ? compute_ : group_.comm(); }
  /// The native stream that outputs belong to.
  void* owner() {
    return order_.allocateOnCommStream ? group_.comm().native() : order_.computeStream;
  }
  /// The event after everything that was enqueued; the caller's stream waits for it unless the call
  /// is asynchronous. Null when that stream itself did the work.
  Event finish() {
    if (direct_) return {};
    const Event event = group_.comm().record(true);
    if (!order_.asyncFinish) compute_.wait(event);
    return event;
  }

 private:
  /// On the CPU platform a null stream is the host, which would do the work itself.
  bool mayRunDirectly() const {
    return !order_.asyncFinish && !order_.previousEvent && !order_.allocateOnCommStream &&
           (group_.options().platform == Platform::cuda || order_.computeStream != nullptr);
  }

  DeviceScope scope_;  // kernels are launched while this object lives
  Group& group_;
  const StreamOrder& order_;
  Stream compute_;
  bool direct_;
};

}  // namespace mscclpp::ep
