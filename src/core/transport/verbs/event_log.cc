#include "core/transport/verbs/event_log.hpp"

#include <mscclpp/format.hpp>

namespace mscclpp::transport::verbs {

void EventLog::note(const ibv_async_event& event, int port, const std::string& text) {
  const std::lock_guard lock(mutex_);
  switch (event.event_type) {
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
      queuePairFailures_[event.element.qp->qp_num] = text;
      break;
    case IBV_EVENT_CQ_ERR:
    case IBV_EVENT_DEVICE_FATAL:
      deviceFailure_ = text;
      break;
    case IBV_EVENT_PORT_ERR:
      if (event.element.port_num == port) portTrouble_ = text;
      break;
    case IBV_EVENT_PORT_ACTIVE:
      if (event.element.port_num == port) portTrouble_.clear();
      break;
    default:
      break;
  }
  count_.fetch_add(1, std::memory_order_release);
}

std::string EventLog::failureOf(uint32_t queuePair) const {
  const std::lock_guard lock(mutex_);
  if (!deviceFailure_.empty()) return "the device reported: " + deviceFailure_;
  const auto found = queuePairFailures_.find(queuePair);
  if (found == queuePairFailures_.end()) return {};
  return fmt::format("queue pair {} reported: {}", queuePair, found->second);
}

void EventLog::forget(uint32_t queuePair) noexcept {
  const std::lock_guard lock(mutex_);
  queuePairFailures_.erase(queuePair);
}

std::string EventLog::portTrouble() const {
  const std::lock_guard lock(mutex_);
  return portTrouble_;
}

}  // namespace mscclpp::transport::verbs
