// bf16 values as vectors, by AVX512_BF16 and for its precision. See vectors.h.

// To the nearest, ties to even; NaN stays NaN, numbers below 2^-126 become zero.
inline Vector load(const Bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vector>(_mm512_slli_epi32(wide, 16));
}
inline void store(Bf16* p, Vector x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

// 2^x to 3e-6 of its value, which bf16 cannot tell from exact: a minimax polynomial on [0, 1).
inline Vector exp2_for_bf16(Vector x) {
  const Vector f = (Vector)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
  Vector p = fill(1.3534168e-2f);
  p = p * f + 5.2011461e-2f;
  p = p * f + 2.4144276e-1f;
  p = p * f + 6.9300383e-1f;
  p = p * f + 1.0000026f;
  return (Vector)_mm512_scalef_ps((__m512)p, (__m512)x);
}
// 1 / x for x >= 1, not zero but 1e-18 for infinity: one step of Newton's method from 14 bits.
inline Vector reciprocal_for_bf16(Vector x) {
  const Vector finite = x < 1e18f ? x : fill(1e18f), nearly = (Vector)_mm512_rcp14_ps((__m512)finite);
  return nearly * (2.0f - finite * nearly);
}
