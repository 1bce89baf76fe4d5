// The loops of bias + GELU, of residual + LayerNorm and of sums, over rows [begin, end). See vectors.h.

// Phi and phi of the standard normal distribution; the polynomial is that of kernels/bias_gelu/kernel.py.
struct Normal {
  Vector below, density;
};
template <class T>
inline Normal normal(Vector u) {
  constexpr bool kFp32 = sizeof(T) == sizeof(float);
  const Vector size = u < 0.0f ? -u : u;
  const Vector power = size * size * (-0.5f * kLog2E), exponential = kFp32 ? exp2(power) : exp2_for_bf16(power);
  const Vector below = 1.0f + 0.278f * size, t = kFp32 ? 1.0f / below : reciprocal_for_bf16(below);
  Vector p = 0.41636395152f - t * 0.10995696076f;
  p = -0.27688142763f + t * p;
  p = 0.29669784748f + t * p;
  p = 0.05662099037f + t * p;
  p = 0.11715561388f + t * p;
  const Vector tail = t * p * exponential;
  return {u < 0.0f ? tail : 1.0f - tail, 0.3989422804f * exponential};
}

template <class T>
inline void bias_gelu(const BiasGelu<T>& x, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t f = 0; f < x.width; f += kWidth) {
      const Vector u = load(x.x + row * x.width + f) + load(x.bias + f);
      store(x.y + row * x.width + f, u * normal<T>(u).below);
    }
  }
}

template <class T>
inline void bias_gelu_backward(const BiasGelu<T>& x, int64_t begin, int64_t end, float* dbias) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t f = 0; f < x.width; f += kWidth) {
      const Vector u = load(x.x + row * x.width + f) + load(x.bias + f);
      const Normal n = normal<T>(u);
      const Vector dx = load(x.dy + row * x.width + f) * (n.below + u * n.density);
      store(x.dx + row * x.width + f, dx);
      store(dbias + f, load(dbias + f) + dx);
    }
  }
}

template <class T>
inline void layer_norm(const LayerNorm<T>& x, int64_t begin, int64_t end) {
  const float share = 1.0f / static_cast<float>(x.width);
  for (int64_t row = begin; row < end; ++row) {
    const T* s = x.x + row * x.width;
    Vector total = {};
    if (x.residual) {
      const T *a = s, *b = x.residual + row * x.width;
      T* sum = x.s + row * x.width;
      for (int64_t f = 0; f < x.width; f += kWidth) {
        store(sum + f, load(a + f) + load(b + f));
        total += load(sum + f);  // as rounded: what the backward pass will see
      }
      s = sum;
    } else {
      for (int64_t f = 0; f < x.width; f += kWidth) total += load(s + f);
    }
    const float mean = sum_of(total) * share;
    Vector squares = {};
    for (int64_t f = 0; f < x.width; f += kWidth) {
      const Vector centred = load(s + f) - mean;
      squares += centred * centred;
    }
    const float rstd = 1.0f / __builtin_sqrtf(sum_of(squares) * share + x.eps);
    x.mean[row] = mean;
    x.rstd[row] = rstd;
    for (int64_t f = 0; f < x.width; f += kWidth) {
      store(x.y + row * x.width + f, (load(s + f) - mean) * rstd * load(x.weight + f) + load(x.bias + f));
    }
  }
}

// dparameters: dweight (width), then dbias (width).
template <class T>
inline void layer_norm_backward(const LayerNormGradient<T>& x, int64_t begin, int64_t end, float* dparameters) {
  const float share = 1.0f / static_cast<float>(x.width);
  float *dweight = dparameters, *dbias = dparameters + x.width;
  for (int64_t row = begin; row < end; ++row) {
    const T *dy = x.dy + row * x.width, *s = x.s + row * x.width;
    const float mean = x.mean[row], rstd = x.rstd[row];
    Vector sum = {}, dot = {};
    for (int64_t f = 0; f < x.width; f += kWidth) {
      const Vector upstream = load(dy + f), normalised = (load(s + f) - mean) * rstd;
      const Vector g = upstream * load(x.weight + f);
      sum += g;
      dot += g * normalised;
      store(dweight + f, load(dweight + f) + upstream * normalised);
      store(dbias + f, load(dbias + f) + upstream);
    }
    const float mean_g = sum_of(sum) * share, mean_dot = sum_of(dot) * share;
    const T* ds = x.ds ? x.ds + row * x.width : nullptr;
    for (int64_t f = 0; f < x.width; f += kWidth) {
      const Vector normalised = (load(s + f) - mean) * rstd;
      const Vector dx = (load(dy + f) * load(x.weight + f) - mean_g - normalised * mean_dot) * rstd;
      store(x.dx + row * x.width + f, ds ? dx + load(ds + f) : dx);
    }
  }
}

template <class T>
inline void column_sums(const T* x, int64_t width, int64_t begin, int64_t end, float* sums) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t f = 0; f < width; f += kWidth) store(sums + f, load(sums + f) + load(x + row * width + f));
  }
}
