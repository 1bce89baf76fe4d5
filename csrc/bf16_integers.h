// bf16 values as vectors, for processors without instructions for them. See vectors.h.

// By integer operations, which every generation has: to the nearest, ties to even; NaN stays NaN.
inline Vector load(const Bf16* p) {
  Halves x;
  __builtin_memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)  // one instruction, where GCC 12 makes four of the general form
  const Words wide = reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
  const Words wide = reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
  const Words wide = __builtin_convertvector(x, Words);
#endif
  return reinterpret_cast<Vector>(wide << 16);
}
inline void store(Bf16* p, Vector x) {
  const Words bits = reinterpret_cast<Words>(x), nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Halves halves = __builtin_convertvector(x == x ? nearest : Words{} + 0x7fc0, Halves);
  __builtin_memcpy(p, &halves, sizeof halves);
}

inline Vector exp2_for_bf16(Vector x) { return exp2(x); }
inline Vector reciprocal_for_bf16(Vector x) { return 1.0f / x; }
