// The vector loops of one instruction set against plain loops in float64:
// products, sampling and its gradients, conversions. ISA names the namespace,
// KERNELS the source file. Prints what is wrong; exit status 1 if anything is.

#include KERNELS

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using namespace mlx_deform;
using namespace mlx_deform::cpu;

namespace {

std::mt19937 rng(0);
int failures = 0;

double number() {
  return std::normal_distribution<double>()(rng);
}

template <typename R>
std::vector<R> numbers(int64_t n, double scale = 1) {
  std::vector<R> out(n);
  for (R& x : out) {
    x = R(scale * number());
  }
  return out;
}

// NaN never passes.
void expect(double got, double want, double allowed, const char* what) {
  const bool close = got == want || std::abs(got - want) <= allowed;
  if (!close && ++failures <= 20) {
    std::printf("%s: got %.9g, want %.9g +- %.2g\n", what, got, want, allowed);
  }
}

template <typename R>
constexpr double epsilon = sizeof(R) == 4 ? 0x1p-24 : 0x1p-53;

#if defined(HAS_PRODUCTS)
// `multiply` takes the place of own.multiply.
template <typename R, typename F>
void check_products(
    const Products<R>& own,
    int m,
    int n,
    int k,
    const F& multiply) {
  const int ld = n + 64 / int(sizeof(R)); // room for whole vectors
  const R untouched = R(77);
  for (const bool accumulate : {false, true}) {
    for (const bool transposed : {false, true}) {
      // a (m x k), or (k x m) where it is packed.
      const std::vector<R> a = numbers<R>(int64_t(m) * k);
      const std::vector<R> b = numbers<R>(int64_t(k) * ld);
      std::vector<R> c(int64_t(m) * ld, untouched);
      if (transposed) {
        std::vector<R> packed(own.packed_transposed_size(k, m));
        own.pack_transposed(a.data(), m, k, m, packed.data());
        own.multiply_transposed(
            m, n, k, packed.data(), b.data(), ld, c.data(), ld, accumulate);
      } else {
        std::vector<R> packed(own.packed_size(k, n));
        own.pack(b.data(), ld, 1, k, n, packed.data());
        multiply(
            PackedProduct<R>{
                m,
                n,
                k,
                a.data(),
                k,
                packed.data(),
                int64_t(k) * own.panel,
                c.data(),
                ld,
                accumulate});
      }
      for (int i = 0; i < m; ++i) {
        for (int j = 0; j < ld; ++j) {
          double want = untouched, size = 0;
          if (j < n) {
            want = accumulate ? want : 0;
            size = std::abs(want);
            for (int q = 0; q < k; ++q) {
              const double x = transposed ? a[q * m + i] : a[i * k + q];
              want += x * b[q * ld + j];
              size += std::abs(x * b[q * ld + j]);
            }
          }
          expect(
              c[i * ld + j],
              want,
              (k + 2) * epsilon<R> * size,
              transposed ? "multiply_transposed" : "multiply");
        }
      }
    }
  }
}
#endif

double value_of(float x) {
  return x;
}
double value_of(double x) {
  return x;
}
double value_of(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
double value_of(Float16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
      : exponent ? std::ldexp(1024 + mantissa, exponent - 25)
                 : std::ldexp(mantissa, -24);
  return x.bits >> 15 ? -size : size;
}

// Every half there and back, and numbers between them to the nearest, ties to
// even.
template <typename T>
void check_half(const TileKernels<T, float>& kernels, int mantissa_bits) {
  std::vector<T> halves(65536), back(65536);
  std::vector<float> floats(65536);
  for (int i = 0; i < 65536; ++i) {
    halves[i].bits = uint16_t(i);
  }
  kernels.to_compute(halves.data(), floats.data(), 65536);
  kernels.from_compute(floats.data(), back.data(), 65536);
  for (int i = 0; i < 65536; ++i) {
    const double x = value_of(halves[i]);
    if (std::isnan(x)) {
      expect(
          std::isnan(floats[i]) && std::isnan(value_of(back[i])), 1, 0, "NaN");
    } else {
      expect(floats[i], x, 0, "to_compute");
      expect(back[i].bits, i, 0, "there and back");
    }
  }
  for (const int n : {1, 5, 16, 1003}) {
    std::vector<float> x(n);
    for (float& v : x) {
      v = float(std::ldexp(
          1 + (rng() % (4 << mantissa_bits)) / double(4 << mantissa_bits),
          int(rng() % 20) - 10));
    }
    std::vector<T> y(n + 1, T{0x1234});
    kernels.from_compute(x.data(), y.data(), n);
    for (int i = 0; i < n; ++i) {
      const double unit = std::ldexp(1, std::ilogb(x[i]) - mantissa_bits);
      // nearbyint rounds ties to even.
      expect(value_of(y[i]), std::nearbyint(x[i] / unit) * unit, 0, "rounded");
    }
    expect(y[n].bits, 0x1234, 0, "beyond the last");
  }
}

// The bilinear weight of a pixel for a sample `d` away from it, and its slope.
double hat(double d) {
  return std::max(0.0, 1 - std::abs(d));
}
double slope(double d) {
  return std::abs(d) >= 1 ? 0 : d < 0 ? 1 : -1;
}

// A small convolution, its samples planned.
template <typename T, typename R>
struct Problem {
  DeformConv2dParams p{};
  Block block;
  std::vector<R> offset, mask;
  std::vector<T> image, zeros;
  std::vector<SampleBlock<R>> plan;
  static constexpr int taps = 6, pixels = 20;

  Problem(const TileKernels<T, R>& kernels, int C, int DG)
      : block{0, pixels, 0, taps, 0, C}, zeros(C) {
    p.N = 1, p.H = 5, p.W = 6, p.C = C, p.Ho = 5, p.Wo = 4, p.O = 1;
    p.kH = 2, p.kW = 3, p.G = 1, p.DG = DG;
    p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = p.pad_h = 1;
    const int64_t samples = int64_t(pixels) * taps * DG;
    offset = numbers<R>(2 * samples, 1.5);
    mask = numbers<R>(samples);
    const std::vector<R> exact = numbers<R>(p.H * p.W * C);
    image.resize(exact.size());
    kernels.from_compute(exact.data(), image.data(), int64_t(image.size()));
    plan.resize(SampleBlock<R>::blocks(samples));
    kernels.plan(p, block, offset.data(), mask.data(), plan.data());
  }

  Columns<R> columns(R* data) const {
    return {block, block, plan.data(), data, taps * p.C, p.C};
  }
};

template <typename T, typename R>
void check_sampling(const TileKernels<T, R>& kernels, int C, int DG) {
  const Problem<T, R> problem(kernels, C, DG);
  const auto& [p, block, offset, mask, image, zeros, plan] = problem;
  const int taps = problem.taps, pixels = problem.pixels, width = C / DG;
  const int64_t samples = int64_t(pixels) * taps * DG;
  const std::vector<R> cotangent = numbers<R>(int64_t(pixels) * taps * C);
  std::vector<R> columns(cotangent.size()), grad_offset(2 * samples);
  std::vector<R> grad_mask(samples), grad_image(image.size(), R(0));
  std::vector<R> sink(width);
  kernels.sample(
      p, image.data(), zeros.data(), problem.columns(columns.data()));
  kernels.offset_grad(
      p,
      block,
      plan.data(),
      image.data(),
      zeros.data(),
      cotangent.data(),
      grad_offset.data(),
      grad_mask.data());
  kernels.scatter(
      p,
      block,
      plan.data(),
      cotangent.data(),
      0,
      int64_t(image.size()),
      sink.data(),
      grad_image.data());

  std::vector<double> want_image(image.size());
  // Positions of size 8 lose that many units; sums are of few, normal numbers.
  const double allowed = 512 * epsilon<R> * std::sqrt(double(C));
  for (int q = 0; q < pixels; ++q) {
    for (int k = 0; k < taps; ++k) {
      for (int dg = 0; dg < DG; ++dg) {
        const int64_t at = (int64_t(q) * DG + dg) * taps + k;
        const double y = q / p.Wo - p.pad_h + k / p.kW + offset[2 * at];
        const double x = q % p.Wo + k % p.kW + offset[2 * at + 1];
        double want_mask = 0, want_y = 0, want_x = 0;
        for (int c = dg * width; c < (dg + 1) * width; ++c) {
          const int64_t column = (int64_t(q) * taps + k) * C + c;
          const double g = cotangent[column];
          double value = 0;
          for (int i = 0; i < p.H * p.W; ++i) {
            const double dy = y - i / p.W, dx = x - i % p.W;
            const double pixel = value_of(image[i * C + c]);
            value += hat(dy) * hat(dx) * pixel;
            want_y += mask[at] * g * slope(dy) * hat(dx) * pixel;
            want_x += mask[at] * g * hat(dy) * slope(dx) * pixel;
            want_image[i * C + c] += mask[at] * g * hat(dy) * hat(dx);
          }
          want_mask += g * value;
          expect(columns[column], mask[at] * value, allowed, "sample");
        }
        expect(grad_mask[at], want_mask, allowed, "grad_mask");
        expect(grad_offset[2 * at], want_y, allowed, "grad_offset y");
        expect(grad_offset[2 * at + 1], want_x, allowed, "grad_offset x");
      }
    }
  }
  for (size_t i = 0; i < image.size(); ++i) {
    expect(grad_image[i], want_image[i], 4 * allowed, "grad_image");
  }
}

#if defined(HAS_PRODUCTS)
void check_all_products(const auto& check) {
  for (const int m : {1, 2, 3, 5, 7, 8, 11, 12, 13, 29}) {
    for (const int n : {1, 4, 5, 12, 15, 16, 17, 31, 32, 33, 48, 50}) {
      for (const int k : {1, 2, 7, 8, 19}) {
        check(m, n, k);
      }
    }
  }
}

// Both at once give what each gives by itself.
template <typename T, typename R>
void check_beside(
    const TileKernels<T, R>& kernels,
    const Products<R>& own,
    int C,
    int DG) {
  const Problem<T, R> problem(kernels, C, DG);
  std::vector<R> want(problem.pixels * problem.taps * C), got(want.size());
  const T *image = problem.image.data(), *zeros = problem.zeros.data();
  kernels.sample(problem.p, image, zeros, problem.columns(want.data()));
  const auto both = [&](const PackedProduct<R>& product) {
    std::fill(got.begin(), got.end(), R(NAN));
    const Columns<R> columns = problem.columns(got.data());
    kernels.sample_beside(problem.p, image, zeros, columns, product);
    for (size_t i = 0; i < got.size(); ++i) {
      expect(got[i], want[i], 0, "sample_beside");
    }
  };
  check_all_products(
      [&](int m, int n, int k) { check_products(own, m, n, k, both); });
  // Few samples a pause, and many.
  check_products(own, 3 * own.strip, 3 * own.panel, 100, both);
}

template <typename T, typename R>
void check_all_beside(
    const TileKernels<T, R>& kernels,
    const Products<R>& own) {
  if (kernels.sample_beside) {
    check_beside(kernels, own, 16, 1);
    check_beside(kernels, own, 37, 1);
    check_beside(kernels, own, 96, 2);
    check_beside(kernels, own, 80, 1);
    check_beside(kernels, own, 128, 1); // in pieces
    check_beside(kernels, own, 256, 2);
  }
}
#endif

template <typename T, typename R>
void check_all_sampling(const TileKernels<T, R>& kernels) {
  for (const int C : {1, 3, 16, 24, 37, 64}) {
    check_sampling(kernels, C, 1);
  }
  check_sampling(kernels, 10, 2);
  check_sampling(kernels, 48, 3);
}

} // namespace

int main() {
#if defined(HAS_PRODUCTS)
  check_all_products([](int m, int n, int k) {
    const auto check = [&](const auto& own) {
      check_products(own, m, n, k, own.multiply);
    };
    check(ISA::products_float32);
    check(ISA::products_float64);
  });
  check_all_beside(ISA::kernels_float32, ISA::products_float32);
  check_all_beside(ISA::kernels_float64, ISA::products_float64);
  check_all_beside(ISA::kernels_float16, ISA::products_float32);
  check_all_beside(ISA::kernels_bfloat16, ISA::products_float32);
#endif
  check_half(ISA::kernels_float16, 10);
  check_half(ISA::kernels_bfloat16, 7);
  check_all_sampling(ISA::kernels_float32);
  check_all_sampling(ISA::kernels_float64);
  check_all_sampling(ISA::kernels_float16);
  check_all_sampling(ISA::kernels_bfloat16);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
