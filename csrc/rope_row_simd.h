// Rotates one row of rotary features; compiled once per instruction set by common/simd_targets.h: no include guard, no includes.

// x may be y. cos and sin as fill_coefficients (rope_cpu.h) lays them out.
template <typename T>
static void rope_row(const T* x, T* y, int rotary, bool interleaved, const typename Lane<T>::State* cos,
                     const typename Lane<T>::State* sin) {
  using L = Lane<T>;
  using S = Lane<typename L::State>;
  constexpr int n = L::kLanes;
  const int half = rotary / 2;
  int i = 0;
  if (interleaved) {
    for (; i + n <= rotary; i += n) {
      const auto v = L::read(x + i);
      L::write(y + i, v * S::read(cos + i) + L::swap_neighbours(v) * S::read(sin + i));
    }
    for (; i < rotary; i += 2) {
      const auto a = L::read1(x + i), b = L::read1(x + i + 1);
      L::write1(y + i, a * cos[i] + b * sin[i]);
      L::write1(y + i + 1, b * cos[i + 1] + a * sin[i + 1]);
    }
    return;
  }
  for (; i + n <= half; i += n) {
    const auto a = L::read(x + i), b = L::read(x + half + i), c = S::read(cos + i), s = S::read(sin + i);
    L::write(y + i, a * c - b * s);
    L::write(y + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    const auto a = L::read1(x + i), b = L::read1(x + half + i);
    L::write1(y + i, a * cos[i] - b * sin[i]);
    L::write1(y + half + i, b * cos[i] + a * sin[i]);
  }
}
