#pragma once

#include <memory>

#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>

#include "group.hpp"

namespace mscclpp::ep {

struct Buffer::Impl {
  std::shared_ptr<Group> group;  ///< null after destroy()

  /// The group, fit for a call. Throws when it was destroyed or a kernel has reported a failure.
  Group& alive() const {
    check(group != nullptr, ErrorCode::invalidState,
          "the Buffer was destroyed: make a new one to dispatch or combine");
    group->raiseIfFailed();
    return *group;
  }
};

}  // namespace mscclpp::ep
