// Makes the library importable as ijepa_fast._C: importing it registers the implementations. It holds nothing else but
// the name of the loops that this machine runs, and what the user should know about that choice, or "".
#include "processor.h"

#include <Python.h>

extern "C" PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  const ijepa_fast::Processor& processor = ijepa_fast::processor();
  if (module) PyModule_AddStringConstant(module, "LOOPS", ijepa_fast::name_of(processor.kind));
  if (module) PyModule_AddStringConstant(module, "COMPLAINT", processor.complaint);
  return module;
}
