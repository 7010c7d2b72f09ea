// The same tests with mbarriers and bulk copies in software, as GPUs before sm_90 get them.
#define MSCCLPP_SOFTWARE_BULK 1
#include "device/primitives_cuda_tests.cu"  // NOLINT: on purpose, with the macro above
