// What the driver of this machine takes.
#include "device.h"
#include "launch.h"

namespace slao::cuda {

bool takes_many() { return driver_version() >= 12010; }

}  // namespace slao::cuda
