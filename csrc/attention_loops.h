// The loops of attention. See vectors.h and product_loops.h.

constexpr int64_t kQueries = 96;  // rows of the score matrix held at a time

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

inline void attention_head(const Head& h, Packed<const float> q, Packed<const float> k, Packed<const float> v,
                           Packed<float> out, float* largest, float* share, float* scratch) {
  const int64_t queries = h.queries, keys = h.keys, dim = h.dim;
  const int64_t width = padded(keys);
  float* keys_t = scratch;                  // (dim, width)
  float* scores = keys_t + dim * width;     // (kQueries, width)
  transpose(k.data, k.stride, keys, dim, keys_t);
  for (int64_t i = 0; i < queries; i += kQueries) {
    const int64_t rows = queries - i < kQueries ? queries - i : kQueries;
    product({q.data + i * q.stride, q.stride, 1}, keys_t, width, scores, width, rows, width, dim);
    for (int64_t r = 0; r < rows; ++r) {
      largest[i + r] = share[i + r] = 0.0f;
      if (keys > 0) softmax_row(scores + r * width, keys, h.scale * kLog2E, largest[i + r], share[i + r]);
    }
    product({scores, width, 1}, v.data, v.stride, out.data + i * out.stride, out.stride, rows, dim, keys);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = out.data + (i + r) * out.stride;
      for (int64_t d = 0; d < dim; d += kWidth) store(row + d, load(row + d) * share[i + r]);
    }
  }
}

inline void attention_head_backward(const Head& h, Packed<const float> q, Packed<const float> k, Packed<const float> v,
                                    Packed<const float> dout, const float* largest, const float* share, Packed<float> dq,
                                    Packed<float> dk, Packed<float> dv, float* scratch) {
  const int64_t queries = h.queries, keys = h.keys, dim = h.dim;
  const int64_t width = padded(keys);
  float* keys_t = scratch;                        // (dim, width)
  float* values_t = keys_t + dim * width;         // (dim, width)
  float* p = values_t + dim * width;              // (kQueries, width)
  float* ds = p + kQueries * width;               // (kQueries, width)
  transpose(k.data, k.stride, keys, dim, keys_t);
  transpose(v.data, v.stride, keys, dim, values_t);
  for (int64_t j = 0; queries == 0 && j < keys; ++j) {
    for (int64_t d = 0; d < dim; d += kWidth) {
      store(dk.data + j * dk.stride + d, Vector{});
      store(dv.data + j * dv.stride + d, Vector{});
    }
  }
  for (int64_t i = 0; i < queries; i += kQueries) {
    const int64_t rows = queries - i < kQueries ? queries - i : kQueries;
    const float* d_out = dout.data + i * dout.stride;
    product({q.data + i * q.stride, q.stride, 1}, keys_t, width, p, width, rows, width, dim);
    product({d_out, dout.stride, 1}, values_t, width, ds, width, rows, width, dim);
    for (int64_t r = 0; r < rows; ++r) {
      float *p_row = p + r * width, *ds_row = ds + r * width;
      Vector dot = {};  // of p and its gradient: more exact than that of out and dout, which it equals
      for (int64_t j = 0; j < width; j += kWidth) {
        const Vector value = exp2((load(p_row + j) - largest[i + r]) * (h.scale * kLog2E)) * share[i + r];
        store(p_row + j, value);
        dot += value * load(ds_row + j);  // gradients of padding are zero
      }
      const float delta = sum_of(dot);
      for (int64_t j = 0; j < width; j += kWidth) {
        store(ds_row + j, load(p_row + j) * (load(ds_row + j) - delta) * h.scale);
      }
    }
    product({p, 1, width}, d_out, dout.stride, dv.data, dv.stride, keys, dim, rows, i > 0);
    product({ds, 1, width}, q.data + i * q.stride, q.stride, dk.data, dk.stride, keys, dim, rows, i > 0);
    product({ds, width, 1}, k.data, k.stride, dq.data + i * dq.stride, dq.stride, rows, dim, keys);
  }
}

// bf16 by way of fp32 copies, whose heads zeros fill to full vectors.
inline Packed<float> widened(Packed<const Bf16> x, int64_t rows, int64_t dim, float*& scratch) {
  const Packed<float> wide{scratch, padded(dim)};
  scratch += rows * wide.stride;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t d = 0;
    for (; d + kWidth <= dim; d += kWidth) store(wide.data + r * wide.stride + d, load(x.data + r * x.stride + d));
    if (d < dim) {
      Bf16 values[kWidth] = {};
      for (int64_t i = 0; i < kWidth && d + i < dim; ++i) values[i] = x.data[r * x.stride + d + i];
      store(wide.data + r * wide.stride + d, load(values));
    }
  }
  return wide;
}
inline Packed<float> unwritten(int64_t rows, int64_t dim, float*& scratch) {
  const Packed<float> wide{scratch, padded(dim)};
  scratch += rows * wide.stride;
  return wide;
}
inline Packed<const float> read(Packed<float> x) { return {x.data, x.stride}; }
inline void narrow(Packed<float> x, int64_t rows, int64_t dim, Packed<Bf16> to) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t d = 0;
    for (; d + kWidth <= dim; d += kWidth) store(to.data + r * to.stride + d, load(x.data + r * x.stride + d));
    if (d < dim) {
      Bf16 values[kWidth];
      store(values, load(x.data + r * x.stride + d));
      for (int64_t i = 0; i < kWidth && d + i < dim; ++i) to.data[r * to.stride + d + i] = values[i];
    }
  }
}

inline void attention_head(const Head& h, Packed<const Bf16> q, Packed<const Bf16> k, Packed<const Bf16> v,
                           Packed<Bf16> out, float* largest, float* share, float* scratch) {
  const Packed<float> wide_q = widened(q, h.queries, h.dim, scratch), wide_k = widened(k, h.keys, h.dim, scratch);
  const Packed<float> wide_v = widened(v, h.keys, h.dim, scratch), wide_out = unwritten(h.queries, h.dim, scratch);
  const Head wide{h.queries, h.keys, padded(h.dim), h.scale};
  attention_head(wide, read(wide_q), read(wide_k), read(wide_v), wide_out, largest, share, scratch);
  narrow(wide_out, h.queries, h.dim, out);
}

inline void attention_head_backward(const Head& h, Packed<const Bf16> q, Packed<const Bf16> k, Packed<const Bf16> v,
                                    Packed<const Bf16> dout, const float* largest, const float* share, Packed<Bf16> dq,
                                    Packed<Bf16> dk, Packed<Bf16> dv, float* scratch) {
  const Packed<float> wide_q = widened(q, h.queries, h.dim, scratch), wide_k = widened(k, h.keys, h.dim, scratch);
  const Packed<float> wide_v = widened(v, h.keys, h.dim, scratch), wide_dout = widened(dout, h.queries, h.dim, scratch);
  const Packed<float> wide_dq = unwritten(h.queries, h.dim, scratch), wide_dk = unwritten(h.keys, h.dim, scratch);
  const Packed<float> wide_dv = unwritten(h.keys, h.dim, scratch);
  const Head wide{h.queries, h.keys, padded(h.dim), h.scale};
  attention_head_backward(wide, read(wide_q), read(wide_k), read(wide_v), read(wide_dout), largest, share, wide_dq,
                          wide_dk, wide_dv, scratch);
  narrow(wide_dq, h.queries, h.dim, dq);
  narrow(wide_dk, h.keys, h.dim, dk);
  narrow(wide_dv, h.keys, h.dim, dv);
}

template <class T>
inline int64_t attention_scratch(int64_t dim, int64_t queries, int64_t keys) {
  const int64_t own = 2 * (padded(dim) + kQueries) * padded(keys);
  return sizeof(T) == sizeof(float) ? own : own + (3 * queries + 4 * keys) * padded(dim);
}
