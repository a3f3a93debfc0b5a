// The only file that knows Python. Tensors arrive as addresses, sizes and strides; vitprune/native.py checks them.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "cpu/policy_attention.h"
#include "cpu/select_tokens.h"
#include "cpu/short_attention.h"
#include "launch.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <typename T>
T *pointer(Address address) {
  return reinterpret_cast<T *>(address);
}

SelectTokensParams select_tokens_params(Address x, Address scores, Address tokens, Address ids, py::tuple sizes,
                                        py::tuple strides, long long units, int unit_bytes, int score_type) {
  SelectTokensParams p{};
  p.x = pointer<void>(x);
  p.scores = pointer<void>(scores);
  p.tokens = pointer<void>(tokens);
  p.ids = pointer<long long>(ids);
  p.B = sizes[0].cast<int>(), p.P = sizes[1].cast<int>(), p.N = sizes[2].cast<int>(), p.K = sizes[3].cast<int>();
  p.x_batch = strides[0].cast<long long>(), p.x_token = strides[1].cast<long long>();
  p.x_unit = strides[2].cast<long long>();
  p.score_batch = strides[3].cast<long long>(), p.score_token = strides[4].cast<long long>();
  p.units = units, p.unit_bytes = unit_bytes, p.score_type = score_type;
  return p;
}

void select_tokens_cuda(const Kernel *kernel, Address stream, SelectTokensParams p, int processors) {
  constexpr int max_rows = 256;  // MAX_ROWS of csrc/cuda/select_tokens.cu
  const int rows = p.P + p.K;
  // Two blocks for each multiprocessor, and at least a row for each of a block's warps.
  const int tiles = std::max(1, 2 * processors / p.B), threads = p.N <= 256 ? 256 : 1024;
  p.rows = std::min(max_rows, std::max((rows + tiles - 1) / tiles, threads / 32));
  const Grid grid{unsigned(p.B), unsigned((rows + p.rows - 1) / p.rows), unsigned(threads), 0};
  launch_kernel(kernel, grid, pointer<void>(stream), &p);
}

PolicyAttentionParams policy_attention_params(py::tuple addresses, py::tuple sizes, py::tuple strides, float scale, float eps,
                                              bool bfloat16) {
  PolicyAttentionParams p{};
  int i = 0;
  auto next = [&] { return pointer<void>(addresses[i++].cast<Address>()); };
  p.q = next(), p.k = next(), p.v = next(), p.policy = static_cast<float *>(next()), p.out = next();
  p.m = static_cast<float *>(next()), p.z = static_cast<float *>(next());
  p.dout = next(), p.dq = next(), p.dk = next(), p.dv = next(), p.dpolicy = static_cast<float *>(next());
  p.B = sizes[0].cast<int>(), p.H = sizes[1].cast<int>(), p.N = sizes[2].cast<int>(), p.D = sizes[3].cast<int>();
  i = 0;
  for (auto *of : {p.q_strides, p.k_strides, p.v_strides, p.out_strides, p.dout_strides})
    for (int axis = 0; axis < 4; axis++) of[axis] = strides[i++].cast<long long>();
  p.scale = scale, p.eps = eps, p.bfloat16 = bfloat16;
  return p;
}

ShortAttentionParams short_attention_params(Address qkv, Address out, Address cu_seqlens, py::tuple sizes, long long qkv_row,
                                            float scale, bool bfloat16) {
  ShortAttentionParams p{};
  p.qkv = pointer<void>(qkv), p.out = pointer<void>(out), p.cu_seqlens = pointer<int>(cu_seqlens);
  p.B = sizes[0].cast<int>(), p.H = sizes[1].cast<int>(), p.N = sizes[2].cast<int>(), p.D = sizes[3].cast<int>();
  p.T = sizes[4].cast<long long>();
  p.qkv_row = qkv_row, p.scale = scale, p.bfloat16 = bfloat16;
  return p;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  py::class_<Kernel, std::unique_ptr<Kernel, py::nodelete>>(m, "Kernel");
  m.def("load_kernel", [](py::bytes image, const std::string &name, int device) {
    return load_kernel(image, name, device);
  }, py::return_value_policy::reference);
  m.def("driver_version", &driver_version);

  py::class_<SelectTokensParams>(m, "SelectTokensParams").def(py::init(&select_tokens_params));
  m.def("select_tokens_cpu", &select_tokens_cpu, py::call_guard<py::gil_scoped_release>());
  py::class_<PolicyAttentionParams>(m, "PolicyAttentionParams").def(py::init(&policy_attention_params));
  m.def("policy_attention_cpu", &policy_attention_cpu, py::call_guard<py::gil_scoped_release>());
  py::class_<ShortAttentionParams>(m, "ShortAttentionParams").def(py::init(&short_attention_params));
  m.def("short_attention_cpu", &short_attention_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("select_tokens_cuda", &select_tokens_cuda, py::call_guard<py::gil_scoped_release>());
}
