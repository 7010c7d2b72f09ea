// Messages between all ranks, checked byte by byte.
#pragma once

#include "core/connection_rank.hpp"

namespace mscclpp::test {

enum class Notify { counter, signal };

/// Every rank sends `rounds` messages of 0 to 256 KiB to every other one, announces each with a
/// counter or a signal, and checks what it gets; then all part (Rank::finish). Needs kExchangeRoom.
void exchange(Rank& rank, int rounds, Notify notify);

inline const RankSetup kExchangeRoom{.dataBytes = size_t{8} << 20};

}  // namespace mscclpp::test
