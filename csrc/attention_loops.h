// The loops of attention. See vectors.h and product_loops.h.

// A square of vectors, in registers: every pass deals the two halves out in turns.
inline void transpose(Vector (&x)[kWidth]) {
#pragma GCC unroll 8
  for (int pass = 1; pass < kWidth; pass *= 2) {
    Vector y[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      y[2 * i] = in_turns<0>(x[i], x[i + kWidth / 2], Places());
      y[2 * i + 1] = in_turns<kWidth / 2>(x[i], x[i + kWidth / 2], Places());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) x[i] = y[i];
  }
}

// (rows, dim) -> (dim, padded rows), zeros behind.
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t dim, float* to) {
  const int64_t width = padded(rows);
  for (int64_t r = 0; r < rows; r += kWidth) {
    for (int64_t d = 0; d < dim; d += kWidth) {
      Vector x[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) x[i] = r + i < rows ? load(from + (r + i) * stride + d) : Vector{};
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (d + i) * width + r, x[i]);
    }
  }
}

// A row of scores -> exp2(factor * (score - largest)); share: 1 over its sum.
inline void softmax_row(float* scores, int64_t keys, float factor, float& largest, float& share) {
  const int64_t width = padded(keys);
  float* last = scores + width - kWidth;
  store(last, count(Places()) < static_cast<int32_t>(keys - width + kWidth) ? load(last) : fill(-3.0e38f));
  Vector most = load(scores);
  for (int64_t j = kWidth; j < width; j += kWidth) {
    const Vector x = load(scores + j);
    most = x > most ? x : most;
  }
  largest = largest_of(most);
  Vector total = {};
  for (int64_t j = 0; j < width; j += kWidth) {
    const Vector p = exp2((load(scores + j) - largest) * factor);
    store(scores + j, p);
    total += p;
  }
  share = 1.0f / sum_of(total);
}

inline void attention(const AttentionShape& shape, const AttentionInput<float>& in, Packed<float> out,
                      float* statistics, int64_t sequence, int64_t head, float* scratch) {
  const int64_t q0 = shape.cu_seqlens_q[sequence], k0 = shape.cu_seqlens_k[sequence], dim = shape.dim;
  const int64_t queries = shape.cu_seqlens_q[sequence + 1] - q0, keys = shape.cu_seqlens_k[sequence + 1] - k0;
  const float* q = in.q.data + q0 * in.q.stride + head * dim;
  const float* k = in.k.data + k0 * in.k.stride + head * dim;
  const float* v = in.v.data + k0 * in.v.stride + head * dim;
  float* o = out.data + q0 * out.stride + head * dim;
  float *largest = statistics + head * shape.tokens + q0, *share = largest + shape.heads * shape.tokens;
  const int64_t width = padded(keys);
  float* keys_t = scratch;                  // (dim, width)
  float* scores = keys_t + dim * width;     // (kQueries, width)
  transpose(k, in.k.stride, keys, dim, keys_t);
  for (int64_t i = 0; i < queries; i += kQueries) {
    const int64_t rows = queries - i < kQueries ? queries - i : kQueries;
    product({q + i * in.q.stride, in.q.stride, 1}, keys_t, width, scores, width, rows, width, dim);
    for (int64_t r = 0; r < rows; ++r) {
      largest[i + r] = share[i + r] = 0.0f;
      if (keys > 0) softmax_row(scores + r * width, keys, shape.scale * kLog2E, largest[i + r], share[i + r]);
    }
    product({scores, width, 1}, v, in.v.stride, o + i * out.stride, out.stride, rows, dim, keys);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = o + (i + r) * out.stride;
      for (int64_t d = 0; d < dim; d += kWidth) store(row + d, load(row + d) * share[i + r]);
    }
  }
}

inline void attention_backward(const AttentionShape& shape, const AttentionInput<float>& in, Packed<const float> dout,
                               const float* statistics, const AttentionGradient<float>& gradient, int64_t sequence,
                               int64_t head, float* scratch) {
  const int64_t q0 = shape.cu_seqlens_q[sequence], k0 = shape.cu_seqlens_k[sequence], dim = shape.dim;
  const int64_t queries = shape.cu_seqlens_q[sequence + 1] - q0, keys = shape.cu_seqlens_k[sequence + 1] - k0;
  const float* q = in.q.data + q0 * in.q.stride + head * dim;
  const float* k = in.k.data + k0 * in.k.stride + head * dim;
  const float* v = in.v.data + k0 * in.v.stride + head * dim;
  const float* d_o = dout.data + q0 * dout.stride + head * dim;
  float* dq = gradient.q.data + q0 * gradient.q.stride + head * dim;
  float* dk = gradient.k.data + k0 * gradient.k.stride + head * dim;
  float* dv = gradient.v.data + k0 * gradient.v.stride + head * dim;
  const float *largest = statistics + head * shape.tokens + q0, *share = largest + shape.heads * shape.tokens;
  const int64_t width = padded(keys);
  float* keys_t = scratch;                        // (dim, width)
  float* values_t = keys_t + dim * width;         // (dim, width)
  float* p = values_t + dim * width;              // (kQueries, width)
  float* ds = p + kQueries * width;               // (kQueries, width)
  transpose(k, in.k.stride, keys, dim, keys_t);
  transpose(v, in.v.stride, keys, dim, values_t);
  for (int64_t j = 0; queries == 0 && j < keys; ++j) {
    for (int64_t d = 0; d < dim; d += kWidth) {
      store(dk + j * gradient.k.stride + d, Vector{});
      store(dv + j * gradient.v.stride + d, Vector{});
    }
  }
  for (int64_t i = 0; i < queries; i += kQueries) {
    const int64_t rows = queries - i < kQueries ? queries - i : kQueries;
    const float* d_out = d_o + i * dout.stride;
    product({q + i * in.q.stride, in.q.stride, 1}, keys_t, width, p, width, rows, width, dim);
    product({d_out, dout.stride, 1}, values_t, width, ds, width, rows, width, dim);
    for (int64_t r = 0; r < rows; ++r) {
      float *p_row = p + r * width, *ds_row = ds + r * width;
      Vector dot = {};  // of p and its gradient: more exact than that of out and dout, which it equals
      for (int64_t j = 0; j < width; j += kWidth) {
        const Vector value = exp2((load(p_row + j) - largest[i + r]) * (shape.scale * kLog2E)) * share[i + r];
        store(p_row + j, value);
        dot += value * load(ds_row + j);  // gradients of padding are zero
      }
      const float delta = sum_of(dot);
      for (int64_t j = 0; j < width; j += kWidth) {
        store(ds_row + j, load(p_row + j) * (load(ds_row + j) - delta) * shape.scale);
      }
    }
    product({p, 1, width}, d_out, dout.stride, dv, gradient.v.stride, keys, dim, rows, i > 0);
    product({ds, 1, width}, q + i * in.q.stride, in.q.stride, dk, gradient.k.stride, keys, dim, rows, i > 0);
    product({ds, width, 1}, k, in.k.stride, dq + i * gradient.q.stride, gradient.q.stride, rows, dim, keys);
  }
}
