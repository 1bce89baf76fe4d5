// The loops of attention over bf16 by products of pairs; scores and statistics are fp32. See pair_loops.h.

constexpr int64_t kScores = 32;          // queries whose scores are held at a time
constexpr int64_t kProbabilities = 256;  // queries whose probabilities are, in the backward pass

struct PairForward {
  Bf16 *rows, *keys_t, *values, *queries, *p;
  float *scores, *out;
  PairForward(Arena& memory, int64_t deep, int64_t wide)
      : rows(memory.take<Bf16>(wide * deep)), keys_t(memory.take<Bf16>(wide * deep)),
        values(memory.take<Bf16>(wide * deep)), queries(memory.take<Bf16>(kScores * deep)),
        p(memory.take<Bf16>(kScores * wide)), scores(memory.take<float>(kScores * wide)),
        out(memory.take<float>(kScores * deep)) {}
};

struct PairBackward {
  Bf16 *k, *v, *k_pairs;                                      // of all keys
  Bf16 *q, *g, *q_pairs, *g_pairs, *p_t, *ds_t;               // of kProbabilities queries
  Bf16 *q_t, *g_t, *ds;                                       // of kScores queries
  float *s, *t, *dq, *dk, *dv;
  PairBackward(Arena& memory, int64_t deep, int64_t wide)
      : k(memory.take<Bf16>(wide * deep)), v(memory.take<Bf16>(wide * deep)), k_pairs(memory.take<Bf16>(wide * deep)),
        q(memory.take<Bf16>(kProbabilities * deep)), g(memory.take<Bf16>(kProbabilities * deep)),
        q_pairs(memory.take<Bf16>(kProbabilities * deep)), g_pairs(memory.take<Bf16>(kProbabilities * deep)),
        p_t(memory.take<Bf16>(kProbabilities * wide)), ds_t(memory.take<Bf16>(kProbabilities * wide)),
        q_t(memory.take<Bf16>(kScores * deep)), g_t(memory.take<Bf16>(kScores * deep)),
        ds(memory.take<Bf16>(kScores * wide)), s(memory.take<float>(kScores * wide)),
        t(memory.take<float>(kScores * wide)), dq(memory.take<float>(kScores * deep)),
        dk(memory.take<float>(wide * deep)), dv(memory.take<float>(wide * deep)) {}
};

template <class T>
inline int64_t attention_scratch(int64_t dim, int64_t queries, int64_t keys) {
  Arena forward{}, backward{};
  PairForward(forward, up(dim, 32), up(keys, 32));
  PairBackward(backward, up(dim, 32), up(keys, 32));
  const char* larger = forward.at > backward.at ? forward.at : backward.at;
  return reinterpret_cast<int64_t>(larger) / 4;
}

// A row of `wide` scores -> exp2(factor * (score - largest)) as bf16, zeros behind the keys; share: 1 over its sum.
inline void softmax_row(float* scores, int64_t keys, int64_t wide, float factor, Bf16* p, float& largest, float& share) {
  float* last = scores + (keys - 1) / 16 * 16;
  const auto left = static_cast<int32_t>(keys - (last - scores));
  store(last, count(Places()) < left ? load(last) : fill(-__builtin_inff()));
  Vector most = load(scores);
  for (int64_t j = 16; j < keys; j += 16) {
    const Vector x = load(scores + j);
    most = x > most ? x : most;
  }
  largest = largest_of(most);
  Vector total = {};
  for (int64_t j = 0; j < wide; j += 32) {
    const Vector low = exp2_for_bf16((load(scores + j) - largest) * factor);
    Vector high = {};
    if (j + 16 < keys) high = exp2_for_bf16((load(scores + j + 16) - largest) * factor);
    store(p + j, low, high);
    total += low + high;
  }
  share = 1.0f / sum_of(total);
}

inline void attention_head(const Head& h, Packed<const Bf16> q, Packed<const Bf16> k, Packed<const Bf16> v,
                           Packed<Bf16> out, float* largest, float* share, float* scratch) {
  const int64_t deep = up(h.dim, 32), wide = up(h.keys, 32), columns = up(h.dim, 16), places = up(h.keys, 16);
  Arena memory{reinterpret_cast<char*>(scratch)};
  const PairForward at(memory, deep, wide);
  copy(k.data, k.stride, h.keys, h.dim, wide, deep, at.rows);
  transposed_pairs(at.rows, wide, deep, at.keys_t);
  copy(v.data, v.stride, h.keys, h.dim, wide, deep, at.rows);
  pack(at.rows, deep, wide, wide, columns, at.values);
  for (int64_t i = 0; i < h.queries; i += kScores) {
    const int64_t rows = h.queries - i < kScores ? h.queries - i : kScores, tall = up(rows, 16);
    copy(q.data + i * q.stride, q.stride, rows, h.dim, tall, deep, at.queries);
    product(by_rows(at.queries, deep), at.keys_t, 16 * deep, at.scores, wide, tall, places, deep);
    for (int64_t r = 0; r < rows; ++r) {
      largest[i + r] = share[i + r] = 0.0f;
      if (h.keys == 0) continue;
      softmax_row(at.scores + r * wide, h.keys, wide, h.scale * kLog2E, at.p + r * wide, largest[i + r], share[i + r]);
    }
    product(by_rows(at.p, wide), at.values, 16 * wide, at.out, deep, tall, columns, wide);
    narrow(at.out, deep, rows, h.dim, share + i, out.data + i * out.stride, out.stride);
  }
}

// Columns [0, 16 N) of p_t and ds_t, (wide, kProbabilities), from the scores s (keys, kScores) and dP^T in t: all
// transposed, keys by queries. The other ones of 32 are zero.
template <int N>
inline void softmax_backward(const Head& h, const PairBackward& at, int64_t wide, int64_t rows, const float* largest,
                             const float* share, Bf16* p_t, Bf16* ds_t) {
  alignas(64) float top[kScores] = {}, by[kScores] = {};
  for (int64_t r = 0; r < rows; ++r) top[r] = largest[r], by[r] = share[r];
  const float factor = h.scale * kLog2E;
  Vector dot[2] = {};  // of p and its gradient, by query
  for (int64_t j = 0; j < h.keys; ++j) {
    float *s = at.s + j * kScores, *t = at.t + j * kScores;
    Vector p[2] = {};
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      p[i] = exp2_for_bf16((load(s + 16 * i) - load(top + 16 * i)) * factor) * load(by + 16 * i);
      store(s + 16 * i, p[i]);
      dot[i] += p[i] * load(t + 16 * i);
    }
    store(p_t + j * kProbabilities, p[0], p[1]);
  }
  for (int64_t j = 0; j < h.keys; ++j) {
    const float *s = at.s + j * kScores, *t = at.t + j * kScores;
    Vector ds[2] = {};
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) ds[i] = load(s + 16 * i) * (load(t + 16 * i) - dot[i]) * h.scale;
    store(ds_t + j * kProbabilities, ds[0], ds[1]);
  }
  for (int64_t j = h.keys; j < wide; ++j) {
    store(p_t + j * kProbabilities, Vector{}, Vector{});
    store(ds_t + j * kProbabilities, Vector{}, Vector{});
  }
}

inline void attention_head_backward(const Head& h, Packed<const Bf16> q, Packed<const Bf16> k, Packed<const Bf16> v,
                                    Packed<const Bf16> dout, const float* largest, const float* share, Packed<Bf16> dq,
                                    Packed<Bf16> dk, Packed<Bf16> dv, float* scratch) {
  const int64_t deep = up(h.dim, 32), wide = up(h.keys, 32), columns = up(h.dim, 16), places = up(h.keys, 16);
  Arena memory{reinterpret_cast<char*>(scratch)};
  const PairBackward at(memory, deep, wide);
  copy(k.data, k.stride, h.keys, h.dim, wide, deep, at.k);
  copy(v.data, v.stride, h.keys, h.dim, wide, deep, at.v);
  pack(at.k, deep, wide, wide, columns, at.k_pairs);
  if (h.queries == 0) {
    for (int64_t i = 0; i < wide * deep; ++i) at.dk[i] = at.dv[i] = 0.0f;
  }
  for (int64_t i = 0; i < h.queries; i += kProbabilities) {
    const int64_t rows = h.queries - i < kProbabilities ? h.queries - i : kProbabilities, tall = up(rows, 32);
    copy(q.data + i * q.stride, q.stride, rows, h.dim, tall, deep, at.q);
    copy(dout.data + i * dout.stride, dout.stride, rows, h.dim, tall, deep, at.g);
    pack(at.q, deep, tall, tall, columns, at.q_pairs);
    pack(at.g, deep, tall, tall, columns, at.g_pairs);
    for (int64_t j = 0; j < tall; j += kScores) {
      const int64_t left = rows - j < kScores ? rows - j : kScores, filled = up(left, 16);
      transposed_pairs(at.q + j * deep, filled, deep, at.q_t);
      transposed_pairs(at.g + j * deep, filled, deep, at.g_t);
      product(by_rows(at.k, deep), at.q_t, 16 * deep, at.s, kScores, places, filled, deep);
      product(by_rows(at.v, deep), at.g_t, 16 * deep, at.t, kScores, places, filled, deep);
      const auto softmax = filled == kScores ? softmax_backward<2> : softmax_backward<1>;
      softmax(h, at, wide, left, largest + i + j, share + i + j, at.p_t + j, at.ds_t + j);
      transposed(at.ds_t + j, kProbabilities, wide, wide, filled, at.ds, wide);
      product(by_rows(at.ds, wide), at.k_pairs, 16 * wide, at.dq, deep, filled, columns, wide);
      narrow(at.dq, deep, left, h.dim, nullptr, dq.data + (i + j) * dq.stride, dq.stride);
    }
    product(by_rows(at.p_t, kProbabilities), at.g_pairs, 16 * tall, at.dv, deep, places, columns, tall, i > 0);
    product(by_rows(at.ds_t, kProbabilities), at.q_pairs, 16 * tall, at.dk, deep, places, columns, tall, i > 0);
  }
  narrow(at.dk, deep, h.keys, h.dim, nullptr, dk.data, dk.stride);
  narrow(at.dv, deep, h.keys, h.dim, nullptr, dv.data, dv.stride);
}
