# Everything comes from the distribution; tools/setup.sh installs what tools/packages.txt lists.

set(_hint "run tools/setup.sh, or install the package of tools/packages.txt yourself")
macro(mscclpp_need name package)
  find_package(${name} ${ARGN} QUIET)
  if(NOT ${name}_FOUND)
    message(FATAL_ERROR "${name} was not found (Debian package ${package}): ${_hint}")
  endif()
endmacro()

mscclpp_need(Threads libc6-dev)
# Only two assembler routines of Boost.Context are used: the static library saves a run-time
# dependency of the Python wheel.
set(Boost_USE_STATIC_LIBS ON)
mscclpp_need(Boost libboost-context-dev 1.74 CONFIG COMPONENTS context)
find_path(ASIO_INCLUDE_DIR asio.hpp) # header-only, ships no CMake package
if(NOT ASIO_INCLUDE_DIR)
  message(FATAL_ERROR "asio.hpp was not found (Debian package libasio-dev): ${_hint}")
endif()
if(MSCCLPP_USE_VERBS)
  find_path(VERBS_INCLUDE_DIR infiniband/verbs.h)
  if(NOT VERBS_INCLUDE_DIR)
    message(
      FATAL_ERROR "infiniband/verbs.h was not found (Debian package libibverbs-dev): ${_hint}; "
                  "or build without the transport verbs: -DMSCCLPP_USE_VERBS=OFF")
  endif()
endif()
# fmt and spdlog as shared libraries: as headers only, fmt is compiled anew with every source file,
# which is most of a build's time. The wheel brings them along (python/CMakeLists.txt).
mscclpp_need(fmt libfmt-dev)
mscclpp_need(spdlog libspdlog-dev)
if(MSCCLPP_BUILD_CLI AND MSCCLPP_BUILD_EXT_EP)
  mscclpp_need(CLI11 libcli11-dev)
  mscclpp_need(nlohmann_json nlohmann-json3-dev)
endif()
if(MSCCLPP_BUILD_BENCHMARKS)
  mscclpp_need(benchmark libbenchmark-dev)
endif()
if(MSCCLPP_BUILD_TESTS OR MSCCLPP_BUILD_BENCHMARKS)
  mscclpp_need(GTest libgtest-dev)
  if(NOT TARGET GTest::gmock)
    message(FATAL_ERROR "GTest::gmock was not found (Debian package libgmock-dev): ${_hint}")
  endif()
endif()
