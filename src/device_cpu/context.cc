#include "device_cpu/context.hpp"

#include <pthread.h>

#include <boost/context/detail/fcontext.hpp>

#include "device_cpu/sanitizer.hpp"

namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

struct Jump {
  Context* from;
  ContextEntry entry;
};

void start(boost::context::detail::transfer_t transfer) {
  const Jump how = *static_cast<Jump*>(transfer.data);
  how.from->sp = transfer.fctx;
  finishSwitch(nullptr);
  how.entry();
  __builtin_trap();
}

}  // namespace

void jump(Context& from, Context& to, ContextEntry entry) {
  startSwitch(&from.fakeStack, to.stackBottom, to.stackSize);
  if (kRaceDetector && to.race != from.race) raceSwitch(to.race);
  if (to.sp == nullptr) {
    to.sp = boost::context::detail::make_fcontext(static_cast<char*>(to.stackBottom) + to.stackSize,
                                                  to.stackSize, start);
  }
  Jump how{&from, entry};
  const auto back = boost::context::detail::jump_fcontext(to.sp, &how);
  // Somebody jumped here: remember where it stopped.
  static_cast<Jump*>(back.data)->from->sp = back.fctx;
  finishSwitch(from.fakeStack);
}

void adoptThread(Context& context) {
  context = Context{};
  context.race = raceCurrent();
  if (!kAddressSanitizer) return;
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &context.stackBottom, &context.stackSize);
  pthread_attr_destroy(&attributes);
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
