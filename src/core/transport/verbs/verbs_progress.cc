// The half of VerbsConnection that hears: completions, the peer's add records, its death and its
// good-bye.
#include <algorithm>
#include <cstddef>

#include <mscclpp/errors.hpp>

#include "core/transport/verbs/verbs_connection.hpp"

namespace mscclpp::transport::verbs {

namespace {

constexpr int kPollAtOnce = 16;
constexpr std::chrono::milliseconds kGoodbyeLimit(1000);

}  // namespace

bool VerbsConnection::pollCompletions() {
  std::array<ibv_wc, kPollAtOnce> found;
  const int count = ibv_poll_cq(completions_.get(), kPollAtOnce, found.data());
  check(count >= 0, ErrorCode::system, "ibv_poll_cq of {} failed with {}", endpoint_->nic()->name(),
        count);
  for (int i = 0; i < count; ++i) {
    const ibv_wc& completion = found[static_cast<size_t>(i)];
    if (completion.status != IBV_WC_SUCCESS) {
      onBadCompletion(completion);
      break;
    }
    if (completion.opcode == IBV_WC_RECV_RDMA_WITH_IMM) {
      onAddRecord(be32toh(completion.imm_data));
      continue;
    }
    pairs_[QueuePair::indexOf(completion.wr_id)]->retire(
        completion.wr_id, [&](uint64_t operation) { finishPart(operation); });
  }
  if (count > 0) lastSign_ = std::chrono::steady_clock::now();
  retire();
  return count > 0;
}

void VerbsConnection::finishPart(uint64_t operation) {
  if (operation != kNoOperation) --at(operation).outstanding;
}

void VerbsConnection::retire() {
  while (completed_ < next_ && operations_.front().outstanding == 0) {
    operations_.pop_front();
    ++completed_;
  }
}

void VerbsConnection::onAddRecord(uint32_t slot) {
  check(slot == recordsApplied_ % ControlBlock::kAddSlots, ErrorCode::internal,
        "add record {} came in slot {}", recordsApplied_, slot);
  const ControlBlock::AddRecord record = control_->addsIn[slot];
  endpoint_->memories().applyAdd(static_cast<uint32_t>(record.key), record.address, record.value);
  ++recordsApplied_;
  first().postReceives(1);
}

void VerbsConnection::tellApplied() {
  if (recordsTold_ == recordsApplied_ || first().room() == 0) return;
  // A write that is still under way may carry the newer number: true as well.
  __atomic_store_n(&control_->appliedOut, recordsApplied_, __ATOMIC_RELAXED);
  recordsTold_ = recordsApplied_;
  postControl(offsetof(ControlBlock, applied), &control_->appliedOut, sizeof(uint64_t));
}

bool VerbsConnection::noticeApplied() {
  const uint64_t applied = __atomic_load_n(&control_->applied, __ATOMIC_ACQUIRE);
  const bool moved = recordsAnswered_ < applied;
  for (; recordsAnswered_ < applied; ++recordsAnswered_) {
    check(!awaitingApplied_.empty(), ErrorCode::internal,
          "the peer has applied {} add records of {}", applied, recordsSent_);
    finishPart(awaitingApplied_.front());
    awaitingApplied_.pop_front();
  }
  if (moved) retire();
  return moved;
}

void VerbsConnection::postControl(uint64_t offsetThere, const uint64_t* source, uint32_t bytes) {
  first().append({.opcode = IBV_WR_RDMA_WRITE,
                  .local = reinterpret_cast<uint64_t>(source),
                  .bytes = bytes,
                  .localKey = controlRegion_->lkey,
                  .readByCpu = true,
                  .remote = theirControl_ + offsetThere,
                  .remoteKey = theirControlKey_,
                  .operation = kNoOperation});
}

void VerbsConnection::keepAlive() {
  const auto now = std::chrono::steady_clock::now();
  if (now - lastSign_ < keepAlive_ || peerHasLeft()) return;
  lastSign_ = now;
  // What is under way is answered or fails by itself.
  if (!first().idle()) return;
  postControl(offsetof(ControlBlock, goodbye), nullptr, 0);
  first().submit();
}

void VerbsConnection::lookForEvents() {
  Nic& nic = *endpoint_->nic();
  nic.pollEvents();
  if (nic.events().count() == eventsSeen_) return;
  eventsSeen_ = nic.events().count();
  for (const auto& pair : pairs_) {
    const std::string why = nic.events().failureOf(pair->address().number);
    if (!why.empty() && !peerHasLeft()) fail(fmt::format("{}: {}", nic.name(), why));
  }
}

bool VerbsConnection::peerHasLeft() const noexcept {
  return __atomic_load_n(&control_->goodbye, __ATOMIC_ACQUIRE) != 0;
}

void VerbsConnection::onBadCompletion(const ibv_wc& completion) {
  const bool left = peerHasLeft();
  // A sign of life that crossed the good-bye.
  if (closed_ || (left && completed_ == posted())) return;
  const auto pair = std::find_if(pairs_.begin(), pairs_.end(), [&](const auto& candidate) {
    return candidate->address().number == completion.qp_num;
  });
  const char* hint = "";
  if (left) {
    hint = ": it has said good-bye before";
  } else if (completion.status == IBV_WC_RETRY_EXC_ERR) {
    hint = ": it has died, or the link to it is down";
  } else if (completion.status == IBV_WC_REM_ACCESS_ERR) {
    hint = ": it has freed the memory, or is another one than was connected to";
  }
  endpoint_->nic()->pollEvents(true);
  const std::string port = endpoint_->nic()->events().portTrouble();
  fail(
      fmt::format("{} (status {}, vendor error {:#x}) on queue pair {} of {} to queue pair {} of "
                  "rank {}{}{}",
                  library().statusName(completion.status), static_cast<int>(completion.status),
                  completion.vendor_err, completion.qp_num, endpoint_->nic()->name(),
                  pair == pairs_.end() ? 0 : (*pair)->peer(), peer(), hint,
                  port.empty() ? "" : "; the port reported: " + port));
}

void VerbsConnection::close() noexcept {
  guarded([&] {
    const auto limit = std::chrono::steady_clock::now() + kGoodbyeLimit;
    bool said = false;
    while (!failed() && !peerHasLeft() && std::chrono::steady_clock::now() < limit) {
      tellApplied();
      if (!said && first().room() > 0) {
        postControl(offsetof(ControlBlock, goodbye), &control_->goodbyeOut, sizeof(uint64_t));
        said = true;
      }
      first().submit();
      pollCompletions();
      if (said && first().idle()) break;
    }
  });
  closed_ = true;
}

}  // namespace mscclpp::transport::verbs
