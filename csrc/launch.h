// The CUDA driver, opened at run time: nothing of CUDA is linked. Every failure throws std::runtime_error with the
// operator's name and the driver's own words.
#pragma once
#include <string>

// A kernel loaded into the primary context of one device; lives until the process ends.
struct Kernel {
  std::string name;
  void *context, *function;
};

// image: a cubin or PTX; device: the driver's ordinal, which follows CUDA_VISIBLE_DEVICES as torch's does.
Kernel *load_kernel(const std::string &image, const std::string &name, int device);

struct Grid {
  unsigned x, y, threads;
};

// params: the operator's struct, passed to the kernel by value.
void launch_kernel(const Kernel *kernel, Grid grid, void *stream, const void *params);

// The driver's CUDA version (13000 for 13.0), or 0 where there is no driver.
int driver_version();
