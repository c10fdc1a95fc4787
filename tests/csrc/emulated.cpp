// The GPU kernels on the CPU as a Python module: the functions of bindings_cuda.h, and the emulator's settings.
#include "../../csrc/bindings_cuda.h"
#include "../../csrc/cuda/launch.h"

PYBIND11_MODULE(slao_cuda_emulated, module) {
  slao::define_cuda(module);
  module.def("set_order", [](int blocks, bool last_thread_first) {
    slao::cuda::emulator.block_order = blocks;
    slao::cuda::emulator.last_thread_first = last_thread_first;
  });
  module.def("launches", [] { return slao::cuda::emulator.launches; });
}
