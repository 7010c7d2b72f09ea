# Decides whether the CUDA half is built and sets MSCCLPP_HAVE_CUDA (ON or OFF).
#
# A binary built with CUDA must start on a machine that has no driver and no toolkit: the CUDA run
# time is linked statically and the driver's entry points are looked up at run time, so nothing
# here may link CUDA::cuda_driver.

set(MSCCLPP_HAVE_CUDA OFF)
if(NOT MSCCLPP_USE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "MSCCLPP_USE_CUDA is '${MSCCLPP_USE_CUDA}': use AUTO, ON or OFF")
endif()

if(MSCCLPP_USE_CUDA STREQUAL "OFF")
  message(STATUS "Platforms: CPU only (MSCCLPP_USE_CUDA=OFF)")
  return()
endif()

find_program(
  MSCCLPP_NVCC nvcc
  HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH
  PATHS /usr/local/cuda
  PATH_SUFFIXES bin)
if(NOT MSCCLPP_NVCC)
  if(MSCCLPP_USE_CUDA STREQUAL "ON")
    message(
      FATAL_ERROR
        "MSCCLPP_USE_CUDA=ON, but no nvcc was found in PATH, CUDA_HOME or /usr/local/cuda. "
        "Install the CUDA toolkit, set CUDA_HOME, or configure with -DMSCCLPP_USE_CUDA=OFF.")
  endif()
  message(STATUS "Platforms: CPU only (no nvcc found; set CUDA_HOME or -DMSCCLPP_USE_CUDA=ON)")
  return()
endif()

# Without a wish: the GPUs of this machine, or 90a when there are none.
if(NOT MSCCLPP_CUDA_ARCHS)
  set(MSCCLPP_CUDA_ARCHS 90a)
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE capabilities
    RESULT_VARIABLE result
    ERROR_QUIET)
  if(result EQUAL 0 AND capabilities MATCHES "[0-9]\\.[0-9]")
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" MSCCLPP_CUDA_ARCHS "${capabilities}")
    list(REMOVE_DUPLICATES MSCCLPP_CUDA_ARCHS)
    list(TRANSFORM MSCCLPP_CUDA_ARCHS REPLACE "\\." "")
    list(TRANSFORM MSCCLPP_CUDA_ARCHS REPLACE "^(9|[1-9][0-9])0$" "\\10a")
  endif()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER "${MSCCLPP_NVCC}")
endif()
# "-real" compiles for exactly these GPUs, with no PTX for later ones: 90a and 100a code has
# instructions that later GPUs do not run.
list(TRANSFORM MSCCLPP_CUDA_ARCHS APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
if(NOT MSCCLPP_ASSERTS)
  string(APPEND CMAKE_CUDA_FLAGS_RELEASE " -DNDEBUG")
endif()
enable_language(CUDA)
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  # CMake 3.25.1 does not know that nvcc has C++20.
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
find_package(CUDAToolkit REQUIRED)

set(MSCCLPP_HAVE_CUDA ON)
target_compile_options(
  mscclpp_build_settings
  INTERFACE
    $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo>
    # The same bits as the CPU build: fused only where the source says fma().
    $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wno-unknown-pragmas>
    $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${MSCCLPP_WERROR}>>:-Werror=all-warnings>)
message(STATUS "Platforms: CPU and CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${MSCCLPP_CUDA_ARCHS}")
