#include <utility>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>

namespace mscclpp {

void Bootstrap::checkElements(size_t elements) const {
  check(elements == static_cast<size_t>(size()), ErrorCode::invalidArgument,
        "allGather: the vector has {} elements: it needs one for each of the {} ranks", elements,
        size());
}

void Bootstrap::checkPeer(const char* what, int peer) const {
  check(peer >= 0 && peer < size(), ErrorCode::invalidArgument,
        "{}: peer {} is no rank of this group: ranks are 0 to {}", what, peer, size() - 1);
}

CallbackBootstrap::CallbackBootstrap(int rank, int size,
                                     std::function<void(void*, size_t)> allGather,
                                     std::function<void()> barrier)
    : rank_(rank), size_(size), allGather_(std::move(allGather)), barrier_(std::move(barrier)) {
  check(size >= 1 && rank >= 0 && rank < size, ErrorCode::invalidArgument,
        "CallbackBootstrap: rank {} of {}: rank must be at least 0 and below size", rank, size);
  check(static_cast<bool>(allGather_), ErrorCode::invalidArgument,
        "CallbackBootstrap: the allGather callback is empty");
}

void CallbackBootstrap::allGather(void* data, size_t bytesPerRank) {
  if (bytesPerRank == 0) return barrier();
  allGather_(data, bytesPerRank);
}

void CallbackBootstrap::barrier() {
  if (barrier_) return barrier_();
  std::vector<char> tokens(static_cast<size_t>(size_));
  allGather_(tokens.data(), 1);
}

void CallbackBootstrap::send(const void*, size_t, int, int) {
  fail(ErrorCode::unsupported,
       "a CallbackBootstrap cannot send: use a collective, or a TcpBootstrap");
}

void CallbackBootstrap::recv(void*, size_t, int, int) {
  fail(ErrorCode::unsupported,
       "a CallbackBootstrap cannot receive: use a collective, or a TcpBootstrap");
}

}  // namespace mscclpp
