// The few functions of libcuda that launching needs, found at run time.
#pragma once

#include <cstddef>
#include <string>

namespace fssdeploy {

// Numbers of the driver's interface that never change.
constexpr int kMaxDynamicSharedSize = 8;     // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kComputeCapabilityMajor = 75;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kComputeCapabilityMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR

struct Cuda {
  int (*init)(unsigned flags);
  int (*context)(void** current);
  int (*device)(int* current);
  int (*attribute)(int* value, int attribute, int device);
  int (*load)(void** module, const void* image);
  int (*function)(void** function, void* module, const char* name);
  int (*set)(void* function, int attribute, int value);
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra);
  int (*error_name)(int error, const char** name);
  int (*error_text)(int error, const char** text);

  // DriverError that says what was tried and what CUDA answered, unless that is success (0).
  void check(int answer, const std::string& what) const;
};

// Opens libcuda once in a process; throws DriverError every time it is missing or older than what is needed here.
const Cuda& cuda();

}  // namespace fssdeploy
