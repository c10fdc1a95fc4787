// What the driver of this machine takes.
#include "device.h"
#include "launch.h"

namespace slao::cuda {

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version));
  return version;
}

}  // namespace slao::cuda
