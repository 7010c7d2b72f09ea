# Run after a test binary is linked: a googletest binary with no test in it would pass silently.
execute_process(
  COMMAND "${BINARY}" --gtest_list_tests
  RESULT_VARIABLE result
  OUTPUT_VARIABLE output
  ERROR_VARIABLE errors
  TIMEOUT 60)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${BINARY} --gtest_list_tests failed (${result}):\n${output}\n${errors}")
endif()
if(NOT output MATCHES "\n  [A-Za-z0-9_]")
  message(FATAL_ERROR "${BINARY} has no test in it")
endif()
