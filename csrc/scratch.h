// Memory that one thread of a CPU op needs while it runs, freed with its owner.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace ijepa_fast {

using Scratch = std::unique_ptr<float, decltype(&std::free)>;

// At least `floats` of them, at a cache line's start. Throws std::bad_alloc.
inline Scratch scratch(int64_t floats) {
  const int64_t lines = floats / 16 + 1;
  Scratch memory(static_cast<float*>(std::aligned_alloc(64, lines * 64)), &std::free);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace ijepa_fast
