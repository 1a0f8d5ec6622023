// What the autograd engine of a CPU build of PyTorch asks of a device, CUDA's or another, and the choice of attention kernels. No kernel, no memory.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/DispatchStub.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct Guard : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::KIND> {
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::KIND, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  void record(void** e, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override { *e = (void*)1; }
  void block(void*, const c10::Stream&) const override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  c10::Stream getDefaultStream(c10::Device) const override { return getStream(getDevice()); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(getDevice()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(KIND, Guard);
#ifdef KIND_MPS
#include <ATen/detail/MPSHooksInterface.h>
struct MPSHooks : public at::MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
using at::MPSHooksRegistry; using at::RegistererMPSHooksRegistry;
REGISTER_MPS_HOOKS(MPSHooks);
#else
struct CUDAHooks : public at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
using at::CUDAHooksRegistry; using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);
static int64_t choice(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
                      double p, bool causal, std::optional<double> scale, bool gqa) {
  bool half = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  auto d = q.sym_size(-1);
  if (half && !mask.has_value() && d <= 256) return 1;               // flash
  return 2;                                                           // memory-efficient
}
static struct Reg { Reg() { at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choice); } } reg;
#endif
