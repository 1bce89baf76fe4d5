// Attention, head by head of every sequence: attention_loops.h or pair_attention.h computes one of them.

template <class T>
inline Packed<T> head_of(Packed<T> x, int64_t row, int64_t value) {
  return {x.data + row * x.stride + value, x.stride};
}

template <class T>
inline void attention(const AttentionShape& shape, const AttentionInput<T>& in, Packed<T> out, float* statistics,
                      int64_t begin, int64_t end, float* scratch) {
  [[maybe_unused]] const Tiles tiles;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sequence = i / shape.heads, head = i % shape.heads, at = head * shape.dim;
    const int64_t q0 = shape.cu_seqlens_q[sequence], k0 = shape.cu_seqlens_k[sequence];
    const Head h{shape.cu_seqlens_q[sequence + 1] - q0, shape.cu_seqlens_k[sequence + 1] - k0, shape.dim, shape.scale};
    float *largest = statistics + head * shape.tokens + q0, *share = largest + shape.heads * shape.tokens;
    attention_head(h, head_of(in.q, q0, at), head_of(in.k, k0, at), head_of(in.v, k0, at), head_of(out, q0, at), largest,
                   share, scratch);
  }
}

template <class T>
inline void attention_backward(const AttentionShape& shape, const AttentionInput<T>& in, Packed<const T> dout,
                               const float* statistics, const AttentionGradient<T>& to, int64_t begin, int64_t end,
                               float* scratch) {
  [[maybe_unused]] const Tiles tiles;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sequence = i / shape.heads, head = i % shape.heads, at = head * shape.dim;
    const int64_t q0 = shape.cu_seqlens_q[sequence], k0 = shape.cu_seqlens_k[sequence];
    const Head h{shape.cu_seqlens_q[sequence + 1] - q0, shape.cu_seqlens_k[sequence + 1] - k0, shape.dim, shape.scale};
    const float *largest = statistics + head * shape.tokens + q0, *share = largest + shape.heads * shape.tokens;
    attention_head_backward(h, head_of(in.q, q0, at), head_of(in.k, k0, at), head_of(in.v, k0, at),
                            head_of(dout, q0, at), largest, share, head_of(to.q, q0, at), head_of(to.k, k0, at),
                            head_of(to.v, k0, at), scratch);
  }
}
