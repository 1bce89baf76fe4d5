// Which of the loops this machine runs. No torch headers.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define IJEPA_FAST_X86
#if __has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)  // GCC's, Clang's: the compiler knows AMX
#define IJEPA_FAST_AMX
#endif
#endif

namespace ijepa_fast {

// Each can run what those before it can. v3 and v4 are the generations of x86-64 with AVX2 and with AVX-512; amx has tiles
// of bf16, too.
enum class Kind { any, v3, v4, amx };

struct Processor {
  Kind kind;
  const char* complaint;  // what the user should know about the choice, or ""
};

// The best kind that this build, the processor and its operating system have, looked up once; no better than what
// IJEPA_FAST_CPU_LOOPS names (any, v3, v4, amx), and than PyTorch's ATEN_CPU_CAPABILITY (default, avx2).
const Processor& processor();
const char* name_of(Kind kind);

}  // namespace ijepa_fast
