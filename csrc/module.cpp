// Makes the library importable as ijepa_fast._C: importing it registers the implementations, and it holds nothing else.
#include <Python.h>

extern "C" PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
