#include "processor.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string_view>

#ifdef IJEPA_FAST_X86
#include <cpuid.h>
#endif
#if defined(IJEPA_FAST_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ijepa_fast {
namespace {

constexpr std::string_view kNames[] = {"any", "v3", "v4", "amx"};

#ifdef IJEPA_FAST_X86
bool bit(int leaf, int subleaf, int word, int position) {
  unsigned words[4];  // eax, ebx, ecx, edx
  return __get_cpuid_count(leaf, subleaf, &words[0], &words[1], &words[2], &words[3]) && words[word] >> position & 1;
}

// Whether the tiles can be used, or why not. Linux gives their registers to a process that asks for them.
const char* no_tiles() {
#if !defined(IJEPA_FAST_AMX)
  return "the processor has AMX, but the compiler that built ijepa_fast._C does not know it";
#elif !defined(__linux__)
  return "the processor has AMX, but only Linux's tiles are known here";
#else
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return nullptr;
  return "the processor has AMX, but the operating system or a container does not permit its tiles";
#endif
}

Processor best() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return {Kind::any, ""};
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd")) {
    return {Kind::v3, ""};
  }
  const bool avx512_bf16 = bit(7, 1, 0, 5), amx_tile = bit(7, 0, 3, 24), amx_bf16 = bit(7, 0, 3, 22);
  if (!avx512_bf16 || !amx_tile || !amx_bf16) return {Kind::v4, ""};
  if (const char* why = no_tiles()) return {Kind::v4, why};
  return {Kind::amx, ""};
}
#else
Processor best() { return {Kind::any, ""}; }
#endif

Processor chosen() {
  Processor best = ijepa_fast::best();
  if (const char* pytorch = std::getenv("ATEN_CPU_CAPABILITY")) {
    if (std::string_view(pytorch) == "default") best.kind = Kind::any;
    if (std::string_view(pytorch) == "avx2") best.kind = std::min(best.kind, Kind::v3);
  }
  if (const char* wanted = std::getenv("IJEPA_FAST_CPU_LOOPS")) {
    const auto* name = std::find(std::begin(kNames), std::end(kNames), wanted);
    if (name == std::end(kNames)) {
      best.complaint = "IJEPA_FAST_CPU_LOOPS is none of any, v3, v4 and amx, and is ignored";
    } else {
      best.kind = std::min(best.kind, static_cast<Kind>(name - std::begin(kNames)));
    }
  }
  return best;
}

}  // namespace

const Processor& processor() {
  static const Processor result = chosen();
  return result;
}

const char* name_of(Kind kind) { return kNames[static_cast<int>(kind)].data(); }

}  // namespace ijepa_fast
