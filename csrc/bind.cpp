// The only file that knows Python. Tensors arrive as addresses, sizes and strides; vitprune/native/ checks them.
#include <pybind11/pybind11.h>

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
                                        py::tuple strides, long long units, int unit_bytes, int score_type,
                                        int rows) {
  SelectTokensParams p{};
  p.x = pointer<void>(x);
  p.scores = pointer<void>(scores);
  p.tokens = pointer<void>(tokens);
  p.ids = pointer<long long>(ids);
  p.B = sizes[0].cast<int>(), p.P = sizes[1].cast<int>(), p.N = sizes[2].cast<int>(), p.K = sizes[3].cast<int>();
  p.x_batch = strides[0].cast<long long>(), p.x_token = strides[1].cast<long long>();
  p.x_unit = strides[2].cast<long long>();
  p.score_batch = strides[3].cast<long long>(), p.score_token = strides[4].cast<long long>();
  p.units = units, p.unit_bytes = unit_bytes, p.score_type = score_type, p.rows = rows;
  return p;
}

PolicyAttentionParams policy_attention_params(py::tuple addresses, py::tuple sizes, py::tuple strides, float scale, float eps,
                                              bool bfloat16) {
  PolicyAttentionParams p{};
  int i = 0;
  auto next = [&] { return pointer<void>(addresses[i++].cast<Address>()); };
  p.q = next(), p.k = next(), p.v = next(), p.policy = static_cast<float *>(next()), p.out = next();
  p.m = static_cast<float *>(next()), p.z = static_cast<float *>(next());
  p.dout = next(), p.dqkv = next();
  p.dpolicy = static_cast<float *>(next()), p.delta = static_cast<float *>(next());
  p.dm = static_cast<float *>(next()), p.top = static_cast<int *>(next());
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

SlicedProductParams sliced_product_params(py::tuple addresses, py::tuple strides, py::tuple sizes, int width, int shift, py::tuple live,
                                          int epilogue) {
  SlicedProductParams p{};
  int i = 0;
  auto next = [&] { return pointer<void>(addresses[i++].cast<Address>()); };
  p.a = next(), p.b = next(), p.c = next(), p.bias = next(), p.other = next(), p.live = static_cast<int *>(next());
  i = 0;
  for (auto *stride : {&p.a_row, &p.b_row, &p.c_row, &p.c_column, &p.other_row, &p.other_column}) *stride = strides[i++].cast<long long>();
  p.M = sizes[0].cast<int>(), p.N = sizes[1].cast<int>(), p.K = sizes[2].cast<int>();
  p.width = width, p.shift = shift, p.epilogue = epilogue;
  i = 0;
  for (auto *flag : {&p.live_rows, &p.live_columns, &p.full_columns, &p.live_depth}) *flag = live[i++].cast<int>();
  return p;
}

CompactTokensParams compact_tokens_params(py::tuple addresses, py::tuple strides, long long units, long long R, unsigned long long fill,
                                          int unit_bytes, int B, int N, int chunk) {
  CompactTokensParams p{};
  p.from = pointer<void>(addresses[0].cast<Address>()), p.to = pointer<void>(addresses[1].cast<Address>());
  p.keep = pointer<unsigned char>(addresses[2].cast<Address>()), p.cu_seqlens = pointer<int>(addresses[3].cast<Address>());
  p.from_batch = strides[0].cast<long long>(), p.from_row = strides[1].cast<long long>();
  p.from_unit = strides[2].cast<long long>(), p.cu_stride = strides[3].cast<long long>();
  p.units = units, p.R = R, p.fill = fill, p.unit_bytes = unit_bytes, p.B = B, p.N = N, p.chunk = chunk;
  return p;
}

AddNormParams add_norm_params(py::tuple addresses, py::tuple strides, py::tuple sizes, float eps, int lanes, bool wide_vectors) {
  AddNormParams p{};
  int i = 0;
  auto next = [&] { return pointer<void>(addresses[i++].cast<Address>()); };
  p.x = next(), p.residual = next(), p.weight = next(), p.bias = next(), p.gamma = next(), p.s = next(), p.y = next();
  p.ds = next(), p.dy = next(), p.dx = next(), p.dresidual = next(), p.partial = static_cast<float *>(next());
  p.dweight = next(), p.dbias = next(), p.dgamma = next();
  i = 0;
  for (auto *stride : {&p.x_batch, &p.x_row, &p.residual_batch, &p.residual_row, &p.s_batch, &p.s_row, &p.ds_batch, &p.ds_row, &p.dy_batch,
                       &p.dy_row}) *stride = strides[i++].cast<long long>();
  p.R = sizes[0].cast<long long>(), p.N = sizes[1].cast<long long>(), p.C = sizes[2].cast<int>(), p.P = sizes[3].cast<int>();
  p.eps = eps, p.lanes = lanes, p.wide_vectors = wide_vectors;
  return p;
}

// An operator's struct, and its launch by value.
template <typename Params, typename Make>
void bind(py::module_ &m, const char *name, Make make) {
  py::class_<Params>(m, name).def(py::init(make));
  m.def("launch", [](const Kernel *kernel, unsigned x, unsigned y, unsigned threads, Address stream, const Params &params) {
    launch_kernel(kernel, {x, y, threads}, pointer<void>(stream), &params);
  }, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  py::class_<Kernel, std::unique_ptr<Kernel, py::nodelete>>(m, "Kernel");
  m.def("load_kernel", [](py::bytes image, const std::string &name, int device) {
    return load_kernel(image, name, device);
  }, py::return_value_policy::reference);
  m.def("driver_version", &driver_version);

  bind<SelectTokensParams>(m, "SelectTokensParams", &select_tokens_params);
  m.def("select_tokens_cpu", &select_tokens_cpu, py::call_guard<py::gil_scoped_release>());
  bind<PolicyAttentionParams>(m, "PolicyAttentionParams", &policy_attention_params);
  m.def("policy_attention_cpu", &policy_attention_cpu, py::call_guard<py::gil_scoped_release>());
  bind<ShortAttentionParams>(m, "ShortAttentionParams", &short_attention_params);
  bind<CompactTokensParams>(m, "CompactTokensParams", &compact_tokens_params);
  bind<AddNormParams>(m, "AddNormParams", &add_norm_params);
  bind<SlicedProductParams>(m, "SlicedProductParams", &sliced_product_params);
  m.def("short_attention_cpu", &short_attention_cpu, py::call_guard<py::gil_scoped_release>());
}
