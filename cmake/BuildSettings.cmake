# Compiler settings that hold for every target of this project.

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE
      Release
      CACHE STRING "Debug or Release" FORCE)
endif()

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(THREADS_PREFER_PTHREAD_FLAG ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")

# CMake's own Release flags switch assert() off; here that is a choice (MSCCLPP_ASSERTS).
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -g1")
set(MSCCLPP_HOT_OPTIONS "") # of the sources that a test spends its time in
if(MSCCLPP_SANITIZER STREQUAL "address")
  # Takes three times as long to compile with optimisation, and most of it is compiled for longer
  # than it runs. Reports need lines only.
  set(CMAKE_CXX_FLAGS_RELEASE "-O0 -g1")
  set(MSCCLPP_HOT_OPTIONS -O1)
elseif(MSCCLPP_SANITIZER STREQUAL "thread")
  # Not less: host functions of several streams take turns on a worker's stack, each in a context of
  # its own; without optimisation their temporaries lie there and look like shared data.
  set(CMAKE_CXX_FLAGS_RELEASE "-O1 -g1")
endif()
set(CMAKE_CXX_FLAGS_DEBUG "-O0 -g")
if(NOT MSCCLPP_ASSERTS)
  string(APPEND CMAKE_CXX_FLAGS_RELEASE " -DNDEBUG")
endif()

if(NOT MSCCLPP_SANITIZER MATCHES "^(none|address|thread)$")
  message(FATAL_ERROR "MSCCLPP_SANITIZER is '${MSCCLPP_SANITIZER}': use none, address or thread")
endif()
if(MSCCLPP_SANITIZER STREQUAL "thread" AND NOT CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  # g++ 12's run time stops at 8128 fiber contexts and misses races that clang's finds.
  message(FATAL_ERROR "MSCCLPP_SANITIZER=thread needs clang++ (preset cpu-tsan uses clang++-19), "
                      "the compiler is ${CMAKE_CXX_COMPILER}")
endif()

add_library(mscclpp_build_settings INTERFACE)
target_compile_options(
  mscclpp_build_settings
  INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall>
    $<$<COMPILE_LANGUAGE:CXX>:-Wextra>
    $<$<COMPILE_LANGUAGE:CXX>:-Wshadow>
    $<$<COMPILE_LANGUAGE:CXX>:-Wnon-virtual-dtor>
    $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${MSCCLPP_WERROR}>>:-Werror>
    # clang complains about what libstdc++ 12's own std::stable_sort() calls.
    $<$<COMPILE_LANG_AND_ID:CXX,Clang>:-Wno-deprecated-declarations>
    # Kernel sources are also compiled as plain C++: they carry #pragma unroll, and they read bf16
    # buffers as 16-byte vectors.
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-unknown-pragmas>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-strict-aliasing>
    # Results must have the same bits on every CPU and on GPUs: a * b + c is fused only where the
    # source says fma().
    $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)

add_library(mscclpp_sanitizer INTERFACE)
if(MSCCLPP_SANITIZER STREQUAL "address")
  target_compile_options(
    mscclpp_sanitizer INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=all
                                -fno-omit-frame-pointer)
  add_link_options(-fsanitize=address,undefined)
elseif(MSCCLPP_SANITIZER STREQUAL "thread")
  target_compile_options(mscclpp_sanitizer INTERFACE -fsanitize=thread -fno-omit-frame-pointer)
  add_link_options(-fsanitize=thread)
endif()
