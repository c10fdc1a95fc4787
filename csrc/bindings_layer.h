// The checks before a fused layer's forward (slao_kernels/eligibility.py, plain_call) as one call. They take 3 µs in
// Python; between two GEMMs that have the caches to themselves it is 13, much of a small layer.
//
// Knows Python objects and nothing of torch but names: what they mean is said in eligibility.py, which has the same
// checks in Python for installs without this module, and the tests compare the two.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <initializer_list>

namespace slao {

namespace py = pybind11;

namespace {

// What plain_call compares with; owned for as long as the process lives.
struct Known {
  PyObject *linear = nullptr, *identity = nullptr, *parameter = nullptr, *tensor = nullptr;
  PyObject *autocast = nullptr, *transforms = nullptr, *tracing = nullptr, *modes = nullptr, *forward_ad = nullptr;
  PyObject* codes = nullptr;         // dtype -> code, of the dtypes that the core multiplies
  PyObject* dtypes = nullptr;        // set of the dtypes that a fused layer may have
  PyObject* global_hooks = nullptr;  // tuple of dictionaries
  long rank = 0;
};
Known known;

struct Names {
#define SLAO_NAME(name) PyObject* name = PyUnicode_InternFromString(#name)
  SLAO_NAME(_modules);
  SLAO_NAME(_parameters);
  SLAO_NAME(base_layer);
  SLAO_NAME(lora_A);
  SLAO_NAME(lora_B);
  SLAO_NAME(lora_dropout);
  SLAO_NAME(lora_variant);
  SLAO_NAME(scaling);
  SLAO_NAME(merged_adapters);
  SLAO_NAME(_disable_adapters);
  SLAO_NAME(_active_adapter);
  SLAO_NAME(forward);
  SLAO_NAME(_forward_hooks);
  SLAO_NAME(_forward_pre_hooks);
  SLAO_NAME(_backward_hooks);
  SLAO_NAME(_backward_pre_hooks);
  SLAO_NAME(weight);
  SLAO_NAME(bias);
  SLAO_NAME(ds_id);
  SLAO_NAME(dtype);
  SLAO_NAME(shape);
  SLAO_NAME(is_cpu);
  SLAO_NAME(device);
  SLAO_NAME(type);
  SLAO_NAME(is_contiguous);
  SLAO_NAME(_current_level);
#undef SLAO_NAME
};
const Names* names = nullptr;  // made at the first call: the interpreter has to be there

// Borrowed; null, without an exception, where there is no such entry or no dictionary.
PyObject* entry(PyObject* dict, PyObject* key) { return dict && PyDict_Check(dict) ? PyDict_GetItem(dict, key) : nullptr; }

// An object's own dictionary, borrowed.
PyObject* own(PyObject* object) {
  PyObject* dict = object ? PyObject_GenericGetDict(object, nullptr) : nullptr;
  Py_XDECREF(dict);
  return dict;
}

bool empty(PyObject* dict) { return dict && PyDict_Check(dict) && PyDict_GET_SIZE(dict) == 0; }

// Nothing has been hung on the module that its call would run.
bool untouched(PyObject* dict) {
  return dict && !entry(dict, names->forward) && empty(entry(dict, names->_forward_hooks)) &&
         empty(entry(dict, names->_forward_pre_hooks)) && empty(entry(dict, names->_backward_hooks)) &&
         empty(entry(dict, names->_backward_pre_hooks));
}

bool is_type(PyObject* object, PyObject* type) { return object && reinterpret_cast<PyObject*>(Py_TYPE(object)) == type; }

struct Owned {
  PyObject* object;
  explicit Owned(PyObject* object) : object(object) {}
  Owned(Owned&& other) : object(other.object) { other.object = nullptr; }
  ~Owned() { Py_XDECREF(object); }
};

bool is_true(PyObject* object) { return object == Py_True; }

// A tensor's dtype and sizes, whether it is on the CPU, and whether it is contiguous.
struct Sizes {
  Owned dtype, shape;
  bool cpu, contiguous;
  explicit Sizes(PyObject* tensor)
      : dtype(PyObject_GetAttr(tensor, names->dtype)), shape(PyObject_GetAttr(tensor, names->shape)) {
    cpu = is_true(Owned(PyObject_GetAttr(tensor, names->is_cpu)).object);
    contiguous = is_true(Owned(PyObject_CallMethodNoArgs(tensor, names->is_contiguous)).object);
  }
  bool fine() const { return dtype.object && shape.object && PyTuple_Check(shape.object); }
  Py_ssize_t dims() const { return PyTuple_GET_SIZE(shape.object); }
  long size(Py_ssize_t i) const {
    PyObject* number = PyTuple_GET_ITEM(shape.object, i);
    return PyLong_Check(number) ? PyLong_AsLong(number) : -1;
  }
};

bool calls_false(PyObject* function, PyObject* argument = nullptr) {
  const Owned result(argument ? PyObject_CallOneArg(function, argument) : PyObject_CallNoArgs(function));
  return result.object == Py_False || result.object == Py_None;
}

// (weight, bias, A, B, scaling, code) of a layer that nothing keeps from the fused forward, else null. code: of x's
// dtype if the core can multiply these matrices, else 0.
PyObject* plain_parts(PyObject* layer, PyObject* x) {
  const Names& n = *names;
  PyObject* merged = entry(layer, n.merged_adapters);
  if (entry(layer, n._disable_adapters) != Py_False || !merged || !PyList_Check(merged) || PyList_GET_SIZE(merged)) return nullptr;
  PyObject* adapter = entry(layer, n._active_adapter);
  if (adapter && PyList_Check(adapter) && PyList_GET_SIZE(adapter) == 1) adapter = PyList_GET_ITEM(adapter, 0);
  if (!adapter || !PyUnicode_Check(adapter)) return nullptr;
  PyObject *modules = entry(layer, n._modules), *base = entry(modules, n.base_layer);
  auto part = [&](PyObject* name) { return entry(entry(own(entry(modules, name)), n._modules), adapter); };
  PyObject *down = part(n.lora_A), *up = part(n.lora_B), *dropout = part(n.lora_dropout);
  if (!is_type(base, known.linear) || !is_type(down, known.linear) || !is_type(up, known.linear)) return nullptr;
  if (!is_type(dropout, known.identity)) return nullptr;
  PyObject *base_own = own(base), *down_own = own(down), *up_own = own(up);
  if (!untouched(base_own) || !untouched(down_own) || !untouched(up_own) || !untouched(own(dropout))) return nullptr;

  PyObject *base_parts = entry(base_own, n._parameters), *down_parts = entry(down_own, n._parameters);
  PyObject* up_parts = entry(up_own, n._parameters);
  PyObject *weight = entry(base_parts, n.weight), *bias = entry(base_parts, n.bias);
  PyObject *A = entry(down_parts, n.weight), *B = entry(up_parts, n.weight);
  if (!is_type(weight, known.parameter) || !is_type(A, known.parameter) || !is_type(B, known.parameter)) return nullptr;
  if (!is_type(x, known.tensor) || entry(down_parts, n.bias) != Py_None || entry(up_parts, n.bias) != Py_None) return nullptr;
  if (!bias || (bias != Py_None && !is_type(bias, known.parameter))) return nullptr;
  PyObject *variants = entry(layer, n.lora_variant), *scaling = entry(entry(layer, n.scaling), adapter);
  if (!variants || entry(variants, adapter) || !scaling || !(PyFloat_CheckExact(scaling) || PyLong_CheckExact(scaling))) return nullptr;
  for (PyObject* tensor : {weight, A, B})
    if (entry(own(tensor), n.ds_id)) return nullptr;

  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(known.global_hooks); ++i)
    if (!empty(PyTuple_GET_ITEM(known.global_hooks, i))) return nullptr;
  // Before any size is read: in a trace those are tensors.
  if (!calls_false(known.transforms) || !calls_false(known.tracing)) return nullptr;
  const Owned level(PyObject_GetAttr(known.forward_ad, n._current_level));
  if (!level.object || PyLong_AsLong(level.object) >= 0) return nullptr;

  const Sizes sx(x), sw(weight), sa(A), sb(B);
  if (!sx.fine() || !sw.fine() || !sa.fine() || !sb.fine() || sw.dtype.object != sx.dtype.object) return nullptr;
  for (const Sizes* s : {&sx, &sa, &sb})
    if (PySet_Contains(known.dtypes, s->dtype.object) != 1) return nullptr;
  if (sx.dims() == 0 || sw.dims() != 2 || sa.dims() != 2 || sb.dims() != 2) return nullptr;
  const long k = sw.size(1), r = sa.size(0);
  if (sx.size(sx.dims() - 1) != k || sa.size(1) != k || sb.size(0) != sw.size(0) || sb.size(1) != r) return nullptr;
  bool served = sx.contiguous && sa.contiguous && sb.contiguous && r > 0 && r <= known.rank && sa.dtype.object == sb.dtype.object;
  if (bias != Py_None) {
    const Sizes s(bias);
    if (!s.fine() || s.dtype.object != sx.dtype.object || s.dims() != 1 || s.size(0) != sw.size(0)) return nullptr;
    served = served && s.contiguous;
  }
  const Owned device(PyObject_GetAttr(x, n.device));
  if (!device.object) return nullptr;
  const Owned type(PyObject_GetAttr(device.object, n.type));
  if (!type.object || PyUnicode_CompareWithASCIIString(type.object, "meta") == 0) return nullptr;
  if (!(sx.cpu && sw.cpu && sa.cpu && sb.cpu))
    for (PyObject* tensor : {weight, A, B}) {
      const Owned other(PyObject_GetAttr(tensor, n.device));
      if (!other.object || PyObject_RichCompareBool(device.object, other.object, Py_EQ) != 1) return nullptr;
      served = false;
    }
  if (!calls_false(known.autocast, type.object)) return nullptr;

  const Owned modes(PyObject_CallNoArgs(known.modes));  // dispatch modes want to see operators
  served = served && modes.object && PyLong_AsLong(modes.object) == 0;
  long code = 0;
  if (served) {
    PyObject* own_code = PyDict_GetItem(known.codes, sx.dtype.object);
    PyObject* other = PyDict_GetItem(known.codes, sa.dtype.object);
    code = own_code ? PyLong_AsLong(own_code) : 0;
    // fp32 adapters of a bf16 layer are rounded as they are read.
    if (sa.dtype.object != sx.dtype.object && (!other || PyLong_AsLong(other) != 1)) code = 0;
  }
  const Owned number(PyLong_FromLong(code));
  return PyTuple_Pack(6, weight, bias, A, B, scaling, number.object);
}

PyObject* plain_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !names || !PyDict_Check(arguments[0])) {
    PyErr_SetString(PyExc_TypeError, "plain_call(layer.__dict__, x), after plain_setup");
    return nullptr;
  }
  PyObject* found = plain_parts(arguments[0], arguments[1]);
  if (found) return found;
  PyErr_Clear();  // whatever could not be read is for the checks in Python to name
  Py_RETURN_NONE;
}

PyMethodDef plain_methods[] = {
    {"plain_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain_call)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

void plain_setup(const py::dict& objects, int rank) {
  auto keep = [&](const char* name) { return py::object(objects[name]).release().ptr(); };
  known = {keep("linear"),  keep("identity"),   keep("parameter"), keep("tensor"), keep("autocast"),     keep("transforms"),
           keep("tracing"), keep("modes"), keep("forward_ad"), keep("codes"),     keep("dtypes"), keep("global_hooks"), rank};
  static const Names all;
  names = &all;
}

}  // namespace

inline void define_layer(py::module_& module) {
  PyModule_AddFunctions(module.ptr(), plain_methods);
  module.def("plain_setup", &plain_setup);
}

}  // namespace slao
