# Test registration. One googletest binary per call, one ctest entry per test in it.

if(NOT MSCCLPP_BUILD_TESTS)
  return()
endif()

enable_testing()
include(GoogleTest)

set(MSCCLPP_TEST_LABELS cpu mp gpu chaos slow vm)

# Sanitizer options of every test. Prepended: options that are already set in the environment win.
set(MSCCLPP_TEST_ENVIRONMENT "")
if(MSCCLPP_SANITIZER STREQUAL "address")
  set(MSCCLPP_TEST_ENVIRONMENT
      "ASAN_OPTIONS=path_list_prepend:detect_stack_use_after_return=0"
      "UBSAN_OPTIONS=path_list_prepend:print_stacktrace=1")
elseif(MSCCLPP_SANITIZER STREQUAL "thread")
  # By default every process sleeps one second at its end, and a failing one twice that.
  set(MSCCLPP_TEST_ENVIRONMENT "TSAN_OPTIONS=path_list_prepend:atexit_sleep_ms=0")
endif()

add_custom_target(mscclpp_gpu_tests)
add_custom_target(mscclpp_vm_tests)

# mscclpp_add_test(NAME <name> SOURCES ... [LIBS ...] LABELS ... [TIMEOUT <seconds>]
#                  [PROCESSORS <n>] [RANKS_ARE_PROCESSES] [ARGS ...])
# SOURCES of *.cu are compiled by nvcc; a test that has one exists only when the CUDA half is built.
# LABELS: cpu (no GPU needed), mp (starts processes), gpu (needs a GPU), chaos (reads
# MSCCLPP_TEST_SEEDS; run again by `make test-chaos`), slow (left out under sanitizers).
# RANKS_ARE_PROCESSES: kernels reuse memory that a proxy has sent from, after an acknowledgement that
# another process makes. ThreadSanitizer sees one process: it is told not to look at the proxy's
# memmove. Ranks that are threads run the same code without that.
# A binary without a test fails the build. Targets mscclpp_gpu_tests, mscclpp_vm_tests: all that are
# labelled gpu, and all that the virtual machine runs.
function(mscclpp_add_test)
  cmake_parse_arguments(arg "RANKS_ARE_PROCESSES" "NAME;TIMEOUT;PROCESSORS" "SOURCES;LIBS;LABELS;ARGS"
                        ${ARGN})
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "mscclpp_add_test(${arg_NAME}): unknown ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT arg_LABELS)
    message(FATAL_ERROR "mscclpp_add_test(${arg_NAME}): LABELS must be some of ${MSCCLPP_TEST_LABELS}")
  endif()
  foreach(label IN LISTS arg_LABELS)
    if(NOT label IN_LIST MSCCLPP_TEST_LABELS)
      message(FATAL_ERROR "mscclpp_add_test(${arg_NAME}): label '${label}' is none of "
                          "${MSCCLPP_TEST_LABELS}")
    endif()
  endforeach()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()
  if(NOT arg_PROCESSORS)
    set(arg_PROCESSORS 1)
  endif()
  if("${arg_SOURCES}" MATCHES "\\.cu(;|$)" AND NOT MSCCLPP_HAVE_CUDA)
    return()
  endif()
  add_executable(${arg_NAME} ${arg_SOURCES})
  target_link_libraries(${arg_NAME} PRIVATE ${arg_LIBS} GTest::gmock GTest::gtest_main)
  target_include_directories(${arg_NAME} PRIVATE "${PROJECT_SOURCE_DIR}/test")
  mscclpp_configure_target(${arg_NAME})
  if("gpu" IN_LIST arg_LABELS)
    add_dependencies(mscclpp_gpu_tests ${arg_NAME})
  endif()
  add_custom_command(
    TARGET ${arg_NAME}
    POST_BUILD
    COMMAND ${CMAKE_COMMAND} -DBINARY=$<TARGET_FILE:${arg_NAME}> -P
            "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/CheckHasTests.cmake"
    VERBATIM)

  gtest_discover_tests(
    ${arg_NAME}
    TEST_PREFIX "${arg_NAME}."
    TEST_LIST ${arg_NAME}_found
    EXTRA_ARGS ${arg_ARGS}
    NO_PRETTY_VALUES # names as in googletest: the values may hold addresses, which change
    DISCOVERY_MODE PRE_TEST
    DISCOVERY_TIMEOUT 60)
  set(environment ${MSCCLPP_TEST_ENVIRONMENT})
  if(arg_RANKS_ARE_PROCESSES AND MSCCLPP_SANITIZER STREQUAL "thread")
    list(APPEND environment "TSAN_OPTIONS=path_list_prepend:ignore_interceptors_accesses=1")
  endif()
  # Not through gtest_discover_tests(PROPERTIES): it keeps only the first of several labels. This
  # file is read when ctest starts, so that many seeds get more time.
  set(properties_file "${CMAKE_CURRENT_BINARY_DIR}/${arg_NAME}_properties.cmake")
  file(
    CONFIGURE
    OUTPUT "${properties_file}"
    CONTENT
      [=[
set(timeout @arg_TIMEOUT@)
if("@arg_LABELS@" MATCHES "chaos" AND "$ENV{MSCCLPP_TEST_SEEDS}" GREATER 200)
  math(EXPR timeout "@arg_TIMEOUT@ * $ENV{MSCCLPP_TEST_SEEDS} / 200")
endif()
foreach(test IN LISTS @arg_NAME@_found)
  set_tests_properties(
    "${test}"
    PROPERTIES LABELS "@arg_LABELS@" TIMEOUT "${timeout}" PROCESSORS "@arg_PROCESSORS@"
               ENVIRONMENT_MODIFICATION "@environment@")
endforeach()
]=]
    @ONLY)
  set_property(
    DIRECTORY
    APPEND
    PROPERTY TEST_INCLUDE_FILES "${properties_file}")
endfunction()

# mscclpp_add_vm_test(NAME <name> TARGET <test binary> [ARGS ...])
# Runs a test binary once more, in the virtual machine that has RDMA devices (tools/rxe_vm): one
# ctest entry, label vm. Skipped, with the reason, where that cannot run; with CI=true it fails then.
function(mscclpp_add_vm_test)
  cmake_parse_arguments(arg "" "NAME;TARGET" "ARGS" ${ARGN})
  add_test(NAME ${arg_NAME} COMMAND "${PROJECT_SOURCE_DIR}/tools/rxe_vm/run.py"
                                    $<TARGET_FILE:${arg_TARGET}> ${arg_ARGS})
  add_dependencies(mscclpp_vm_tests ${arg_TARGET})
  set_tests_properties(${arg_NAME} PROPERTIES LABELS vm SKIP_RETURN_CODE 77 TIMEOUT 600 PROCESSORS 2)
endfunction()
