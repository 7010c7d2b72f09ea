// A transport as bad as the interface allows: it delays, reorders what has no order, moves data in
// pieces, and fails on demand. Over shm; what it does depends on a seed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <utility>

#include <mscclpp/connection.hpp>
#include <mscclpp/errors.hpp>

namespace mscclpp::test {

struct FakeBehaviour {
  uint64_t seed = 1;
  /// The connection breaks when so many operations have been carried out.
  uint64_t failAfter = UINT64_MAX;
  /// Nothing is carried out before submit().
  bool gathers = false;
  /// Nothing is carried out while this is true.
  const std::atomic<bool>* held = nullptr;
  /// Every other signal goes to the word in the device's memory.
  bool deviceSignals = false;
};

class FakeConnection final : public Connection {
 public:
  FakeConnection(std::shared_ptr<Endpoint> endpoint, int peer, const FakeBehaviour& behaviour)
      : Connection(Transport::shm, peer),
        endpoint_(std::move(endpoint)),
        inner_(endpoint_->open(peer)),
        behaviour_(behaviour),
        random_(behaviour.seed + static_cast<uint64_t>(peer)) {}

  ConnectionCapabilities capabilities() const noexcept override {
    return {.deviceSignals = behaviour_.deviceSignals};
  }
  std::string describe() const override { return "fake: " + inner_->describe(); }
  std::vector<std::byte> address() const override { return inner_->address(); }
  void connect(std::span<const std::byte> theirs) override { inner_->connect(theirs); }
  std::shared_ptr<RemoteMemory> importMemory(std::span<const std::byte> description) override {
    return inner_->importMemory(description);
  }
  bool canPost() const override {
    return failed() || gathered_.size() + waiting_.size() <
                           static_cast<size_t>(endpoint_->options().queueDepth);
  }
  uint64_t completed() const noexcept override {
    return gathered_.empty() && waiting_.empty() && !failed() ? posted() : completed_;
  }
  void close() noexcept override { inner_->close(); }

  void submit() override {
    for (; !gathered_.empty(); gathered_.pop_front()) waiting_.push_back(gathered_.front());
  }

  bool progress() override {
    if (failed()) return false;
    inner_->progress();
    if (inner_->failed()) return giveUp(inner_->failure());
    if (behaviour_.held != nullptr && behaviour_.held->load()) return false;
    if (waiting_.empty() || chance(2)) return false;
    // Any of the writes before the first add or signal, or that one when it is the first.
    const auto isAdd = [](const Operation& operation) { return operation.add; };
    const auto writes = std::find_if(waiting_.begin(), waiting_.end(), isAdd) - waiting_.begin();
    const auto chosen = waiting_.begin() + (writes > 1 ? below(writes) : 0);
    if (!carryOut(*chosen)) return true;
    waiting_.erase(chosen);
    completed_ = waiting_.empty() ? posted() - gathered_.size() : waiting_.front().number - 1;
    if (++carriedOut_ >= behaviour_.failAfter) return giveUp("the fake was told to fail");
    return true;
  }

 private:
  struct Operation {
    uint64_t number;  ///< 1 is the first that was posted
    bool add;
    Write write;
    Add counter;
  };

  void doWrite(const Write& write) override {
    post({.number = posted(), .add = false, .write = write, .counter = {}});
  }
  void doAdd(const Add& add) override {
    post({.number = posted(), .add = true, .write = {}, .counter = add});
  }
  void doSignal(SignalTarget& target) override {
    if (target.device == nullptr || target.sentToDevice == target.sentToHost) {
      ++target.sentToHost;
      return doAdd({.remote = target.host, .offset = target.hostOffset, .value = 1});
    }
    ++target.sentToDevice;
    doAdd({.remote = target.device, .offset = target.deviceOffset, .value = 1});
  }
  void post(const Operation& operation) {
    // A real queue overflows without a word; here who posts without asking is told.
    check(canPost(), ErrorCode::internal, "the fake connection is full and is posted to");
    (behaviour_.gathers ? gathered_ : waiting_).push_back(operation);
  }

  /// Whether the operation is done; a write may take several turns.
  bool carryOut(Operation& operation) {
    if (operation.add) {
      inner_->atomicAdd(operation.counter);
      return true;
    }
    Write& rest = operation.write;
    Write part = rest;
    if (rest.bytes > 1 && chance(2)) part.bytes = 1 + static_cast<uint64_t>(below(rest.bytes - 1));
    inner_->write(part);
    rest.localOffset += part.bytes;
    rest.remoteOffset += part.bytes;
    rest.bytes -= part.bytes;
    return rest.bytes == 0;
  }

  bool giveUp(const std::string& why) {
    completed_ = completed();
    fail(why);
    gathered_.clear();
    waiting_.clear();
    return true;
  }
  int64_t below(int64_t limit) {
    return std::uniform_int_distribution<int64_t>(0, limit - 1)(random_);
  }
  int64_t below(uint64_t limit) { return below(static_cast<int64_t>(limit)); }
  bool chance(int64_t oneIn) { return below(oneIn) == 0; }

  std::shared_ptr<Endpoint> endpoint_;
  std::shared_ptr<Connection> inner_;
  FakeBehaviour behaviour_;
  std::mt19937_64 random_;
  std::deque<Operation> gathered_;
  std::deque<Operation> waiting_;
  uint64_t completed_ = 0;
  uint64_t carriedOut_ = 0;
};

class FakeEndpoint final : public Endpoint {
 public:
  FakeEndpoint(std::shared_ptr<Device> device, const EndpointOptions& options,
               const FakeBehaviour& behaviour)
      : Endpoint(Transport::shm, device, options),
        inner_(Endpoint::create(Transport::shm, std::move(device), options)),
        behaviour_(behaviour) {}

  std::string describe() const override { return "fake: " + inner_->describe(); }
  std::shared_ptr<LocalMemory> registerMemory(RegisteredMemory memory) override {
    return inner_->registerMemory(std::move(memory));
  }
  std::shared_ptr<Connection> open(int peer) override {
    return std::make_shared<FakeConnection>(inner_, peer, behaviour_);
  }

 private:
  std::shared_ptr<Endpoint> inner_;
  FakeBehaviour behaviour_;
};

}  // namespace mscclpp::test
