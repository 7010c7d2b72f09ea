#pragma once

#include <string_view>

namespace mscclpp::ep::cli {

/// data/demo.txt, built into the program: it can be carried to another machine alone.
std::string_view defaultText();

}  // namespace mscclpp::ep::cli
