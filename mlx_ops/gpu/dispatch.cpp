#include "mlx_ops/gpu/dispatch.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>

namespace mlx_deform::gpu {

namespace {

// Enough threads for every GPU to hide latency, and few enough for any
// register count to be likely to fit.
constexpr int64_t kGroupThreads = 256;
constexpr int64_t kSimdLanes = 32;
constexpr int64_t kVectorBytes = 16; // the widest access of a thread
constexpr int64_t kLineBytes = 128; // a cache line
constexpr int64_t kVectorsPerThread = 4; // that share a sample's arithmetic
constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxGrid = kMaxInt32; // kernels read positions as int

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message << "[mlx_deform] ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

int64_t product(std::initializer_list<int64_t> factors) {
  int64_t out = 1;
  for (int64_t factor : factors) {
    if (__builtin_mul_overflow(out, factor, &out)) {
      refuse("the number of elements must fit into 64 bits");
    }
  }
  return out;
}

int64_t sum(std::initializer_list<int64_t> terms) {
  int64_t out = 0;
  for (int64_t term : terms) {
    if (__builtin_add_overflow(out, term, &out)) {
      refuse("the number of elements must fit into 64 bits");
    }
  }
  return out;
}

int64_t ceil_div(int64_t a, int64_t b) {
  return a / b + (a % b != 0);
}

int64_t power_of_two_from(int64_t n) {
  int64_t out = 1;
  while (out < n) {
    out *= 2;
  }
  return out;
}

int64_t itemsize_of(const std::string& dtype) {
  if (dtype == "float32") {
    return 4;
  }
  if (dtype == "float16" || dtype == "bfloat16") {
    return 2;
  }
  refuse("dtype must be float32, float16 or bfloat16; got ", dtype);
}

int64_t taps(const DeformConv2dParams& p) {
  return product({p.kH, p.kW});
}

int64_t samples_per_pixel(const DeformConv2dParams& p) {
  return product({taps(p), p.DG});
}

int64_t all_pixels(const DeformConv2dParams& p) {
  return product({p.N, p.Ho, p.Wo});
}

int64_t chunk_pixels(const DeformConv2dParams& p) {
  return p.pixel_end - p.pixel_begin;
}

void check(const DeformConv2dParams& p) {
  const std::pair<const char*, int64_t> sizes[] = {
      {"N", p.N},
      {"H", p.H},
      {"W", p.W},
      {"C", p.C},
      {"Ho", p.Ho},
      {"Wo", p.Wo},
      {"column_group", p.column_group},
      {"column_pixel", p.column_pixel},
      {"column_tap", p.column_tap}};
  for (const auto& [name, value] : sizes) {
    if (value < 0) {
      refuse(name, " must not be negative; got ", value);
    }
  }
  const std::pair<const char*, int64_t> counts[] = {
      {"kH", p.kH}, {"kW", p.kW}, {"G", p.G}, {"DG", p.DG}};
  for (const auto& [name, value] : counts) {
    if (value < 1) {
      refuse(name, " must be at least 1; got ", value);
    }
  }
  if (p.C % p.G != 0 || p.C % p.DG != 0) {
    refuse("G and DG must divide C; got C ", p.C, ", G ", p.G, ", DG ", p.DG);
  }
  if (p.pixel_begin < 0 || p.pixel_begin > p.pixel_end ||
      p.pixel_end > all_pixels(p)) {
    refuse(
        "the pixels must lie in [0, ",
        all_pixels(p),
        "]; got [",
        p.pixel_begin,
        ", ",
        p.pixel_end,
        ")");
  }
}

void check_grid(const Launch& launch) {
  for (int64_t threads : launch.grid) {
    if (threads > kMaxGrid) {
      refuse(
          "a launch must have fewer than 2^31 threads along each axis; got ",
          threads,
          ": work in smaller chunks");
    }
  }
}

// The elements of the largest array that a kernel may index.
int64_t largest_array(const DeformConv2dParams& p) {
  const int64_t columns = chunk_pixels(p) == 0
      ? 0
      : sum(
            {product({p.G - 1, p.column_group}),
             product({chunk_pixels(p) - 1, p.column_pixel}),
             product({taps(p) - 1, p.column_tap}),
             p.C / p.G});
  return std::max(
      {product({p.N, p.H, p.W, p.C}),
       product({2, all_pixels(p), samples_per_pixel(p)}),
       columns});
}

// Positions run up to `largest`, unless the caller insists.
int index_bits_for(int64_t largest, const PlanOptions& options) {
  switch (options.index_bits) {
    case 0:
      return largest <= kMaxInt32 ? 32 : 64;
    case 64:
      return 64;
    case 32:
      if (largest > kMaxInt32) {
        refuse("32-bit positions must hold every index; got ", largest);
      }
      return 32;
    default:
      refuse("index_bits must be 0, 32 or 64; got ", options.index_bits);
  }
}

// A vector must not straddle a weight group or an offset group, and must start
// at a multiple of its size in the input and in the columns.
bool vector_fits(
    int64_t width,
    const DeformConv2dParams& p,
    int64_t itemsize,
    const PlanOptions& options) {
  if (width == 1) {
    return true;
  }
  const int64_t bytes = width * itemsize;
  int64_t common = std::gcd(int64_t(p.C / p.G), int64_t(p.C / p.DG));
  common = std::gcd(common, std::gcd(p.column_pixel, p.column_tap));
  common = std::gcd(common, p.G > 1 ? p.column_group : 0);
  return bytes <= kVectorBytes && options.alignment % bytes == 0 &&
      common % width == 0;
}

int64_t vector_width_for(
    const DeformConv2dParams& p,
    int64_t itemsize,
    const PlanOptions& options) {
  if (options.vector_width != 0) {
    const int64_t width = options.vector_width;
    const bool known = width == 1 || width == 4 || width == 8;
    if (!known || !vector_fits(width, p, itemsize, options)) {
      refuse(
          "the vector width must be 1, 4 or 8 and fit the channels; got ",
          width);
    }
    return width;
  }
  for (int64_t width : {8, 4}) {
    if (vector_fits(width, p, itemsize, options)) {
      return width;
    }
  }
  return 1;
}

// Threads that share a sample with `vectors` vectors of `bytes` each: a thread
// takes up to four vectors, to share the sample's arithmetic among them, but
// neighbouring threads still cover a cache line where the channels fill one.
int64_t lanes_for(int64_t vectors, int64_t bytes) {
  const int64_t wanted =
      power_of_two_from(ceil_div(vectors, kVectorsPerThread));
  return std::clamp(
      wanted, std::min(kLineBytes / bytes, kSimdLanes), kSimdLanes);
}

FunctionConstant flag(const std::string& name, int index, bool value) {
  return {name, index, true, value ? 1 : 0};
}

void name_kernel(
    Launch& launch,
    const std::string& stem,
    int64_t vector_width = 0) {
  launch.stem = launch.kernel = stem;
  if (vector_width != 0) {
    launch.kernel += "_v" + std::to_string(vector_width);
  }
  launch.kernel += "_i" + std::to_string(launch.library.index_bits) + "_" +
      launch.library.dtype;
}

// One row of threads a sample, all samples of a pixel side by side:
// neighbouring samples are neighbours in the columns and close in the image.
void set_sample_grid(
    Launch& launch,
    const DeformConv2dParams& p,
    int64_t lanes) {
  const int64_t samples = samples_per_pixel(p);
  const int64_t pixels = chunk_pixels(p);
  launch.grid = {p.C == 0 ? 0 : lanes, samples, pixels};
  // Groups of equal size: of 9 samples, 8 a group at most, 5 and 4 and not 8
  // and 1.
  const int64_t rows =
      ceil_div(samples, ceil_div(samples, kGroupThreads / lanes));
  launch.group = {
      lanes,
      rows,
      std::clamp<int64_t>(
          kGroupThreads / (lanes * rows), 1, std::max<int64_t>(pixels, 1))};
  check_grid(launch);
}

// `tasks` SIMD groups in whole threadgroups of up to eight.
int64_t group_threads_for(int64_t tasks) {
  return std::min(kGroupThreads, kSimdLanes * power_of_two_from(tasks));
}

} // namespace

Launch plan_im2col(
    const DeformConv2dParams& p,
    const std::string& dtype,
    const PlanOptions& options) {
  check(p);
  const int64_t itemsize = itemsize_of(dtype);
  const int64_t width = vector_width_for(p, itemsize, options);
  const int64_t vectors = p.C / p.DG / width;

  Launch out;
  out.library = {dtype, index_bits_for(largest_array(p), options)};
  out.vector_width = int(width);
  name_kernel(out, "deform_im2col", width);
  out.constants = {flag("has_mask", 0, p.has_mask)};
  out.buffers = {{"input", 0, false}, {"offset", 1, false}};
  if (p.has_mask) {
    out.buffers.push_back({"mask", 2, false});
  }
  out.buffers.push_back({"columns", 3, true});
  out.buffers.push_back({"params", 4, false});
  const int64_t lanes = lanes_for(vectors, width * itemsize);
  set_sample_grid(out, p, std::clamp<int64_t>(vectors, 1, lanes));
  return out;
}

Launch plan_col2im(
    const DeformConv2dParams& p,
    const std::string& dtype,
    bool deterministic,
    const PlanOptions& options) {
  check(p);
  itemsize_of(dtype);
  if (options.vector_width > 1) {
    refuse(
        "col2im takes single channels; got a vector width of ",
        options.vector_width);
  }

  Launch out;
  out.library = {dtype, index_bits_for(largest_array(p), options)};
  name_kernel(out, deterministic ? "deform_col2im_ordered" : "deform_col2im");
  out.constants = {flag("has_mask", 0, p.has_mask)};
  out.buffers = {{"grad_columns", 0, false}, {"offset", 1, false}};
  if (p.has_mask) {
    out.buffers.push_back({"mask", 2, false});
  }
  out.buffers.push_back({"grad_input", 3, true});
  out.buffers.push_back({"params", 4, false});

  const int64_t channels = p.C / p.DG;
  if (!deterministic) {
    const int64_t lanes = lanes_for(channels, sizeof(float));
    set_sample_grid(out, p, std::clamp<int64_t>(channels, 1, lanes));
    return out;
  }
  // A SIMD group for every 32 channels of an offset group and every image row.
  const int64_t tasks = product({p.DG, ceil_div(channels, kSimdLanes)});
  const int64_t threads = group_threads_for(tasks);
  const int64_t rows = chunk_pixels(p) == 0 ? 0 : product({p.N, p.H});
  out.group = {threads, 1, 1};
  out.grid = {ceil_div(tasks * kSimdLanes, threads) * threads, rows, 1};
  check_grid(out);
  return out;
}

Launch plan_offset_grad(
    const DeformConv2dParams& p,
    const std::string& dtype,
    bool wants_offset,
    bool wants_mask,
    const PlanOptions& options) {
  check(p);
  if (wants_mask && !p.has_mask) {
    refuse("grad_mask must not be asked for without a mask");
  }
  if (options.groups_per_row < 1) {
    refuse("groups_per_row must be at least 1; got ", options.groups_per_row);
  }
  const int64_t itemsize = itemsize_of(dtype);
  const int64_t width = vector_width_for(p, itemsize, options);
  const int64_t vectors = p.C / p.DG / width;
  const int64_t lanes = std::min(
      lanes_for(vectors, width * itemsize), power_of_two_from(vectors));

  const int64_t samples = product({chunk_pixels(p), samples_per_pixel(p)});
  const int64_t simd_groups = ceil_div(samples, kSimdLanes / lanes);
  const int64_t threads = group_threads_for(std::min(simd_groups, kSimdLanes));
  const int64_t groups = ceil_div(simd_groups, threads / kSimdLanes);
  const int64_t row = std::min(groups, options.groups_per_row);
  const int64_t rows = row == 0 ? 0 : ceil_div(groups, row);
  // Rows are filled up, so the samples' numbers run a little further.
  const int64_t slots = product({row, rows, threads / lanes});

  Launch out;
  out.library = {
      dtype, index_bits_for(std::max(largest_array(p), slots), options)};
  out.vector_width = int(width);
  name_kernel(out, "deform_offset_grad", width);
  out.constants = {
      flag("has_mask", 0, p.has_mask),
      flag("wants_offset", 1, wants_offset),
      flag("wants_mask", 2, wants_mask),
      {"segment_lanes", 3, false, int(lanes)}};
  out.buffers = {{"input", 0, false}, {"offset", 1, false}};
  if (p.has_mask) {
    out.buffers.push_back({"mask", 2, false});
  }
  out.buffers.push_back({"grad_columns", 3, false});
  if (wants_offset) {
    out.buffers.push_back({"grad_offset", 4, true});
  }
  if (wants_mask) {
    out.buffers.push_back({"grad_mask", 5, true});
  }
  out.buffers.push_back({"params", 6, false});
  out.group = {threads, 1, 1};
  if (wants_offset || wants_mask) {
    out.grid = {product({row, threads}), rows, 1};
  }
  check_grid(out);
  return out;
}

Launch plan_column_product(
    const DeformConv2dParams& p,
    const std::string& dtype,
    const PlanOptions& options) {
  check(p);
  itemsize_of(dtype);
  if (p.O < 0 || p.O % p.G != 0) {
    refuse("G must divide O; got O ", p.O, ", G ", p.G);
  }
  constexpr int64_t tile = 64; // pixels, and columns, of a threadgroup
  const int64_t width = product({taps(p), p.C / p.G});
  const int64_t largest = std::max(
      {largest_array(p), product({all_pixels(p), p.O}), product({p.O, width})});

  Launch out;
  out.library = {dtype, index_bits_for(largest, options)};
  name_kernel(out, "deform_column_product");
  out.buffers = {
      {"cotangent", 0, false},
      {"weight", 1, false},
      {"grad_columns", 2, true},
      {"params", 3, false}};
  out.group = {kGroupThreads, 1, 1};
  out.grid = {
      product({ceil_div(width, tile), kGroupThreads}),
      ceil_div(chunk_pixels(p), tile),
      p.G};
  check_grid(out);
  return out;
}

Launch plan_zero_fill(int64_t size) {
  if (size < 0) {
    refuse("size must not be negative; got ", size);
  }
  Launch out;
  out.library = {"float32", 32};
  out.stem = "zero_fill";
  out.kernel = "zero_fill_float32";
  out.buffers = {{"out", 0, true}, {"size", 1, false}};
  out.group = {kGroupThreads, 1, 1};
  // Four words a thread hide the cost of starting it.
  const int64_t threads = size == 0 ? 0 : size / 4 + 1;
  out.grid = {std::min(threads, int64_t(1) << 24), 1, 1};
  return out;
}

std::array<int64_t, 3> fit_group(const Launch& launch, int64_t max_threads) {
  std::array<int64_t, 3> out = launch.group;
  while (out[0] * out[1] * out[2] > max_threads) {
    // A row of threads stays whole, but for whole SIMD groups.
    int64_t& axis = out[2] > 1 ? out[2] : out[1] > 1 ? out[1] : out[0];
    if (&axis == &out[0] && (axis <= kSimdLanes || axis % 2 != 0)) {
      break;
    }
    axis /= 2;
  }
  return out;
}

std::string library_header(const Library& library) {
  const int64_t itemsize = itemsize_of(library.dtype);
  if (library.index_bits != 32 && library.index_bits != 64) {
    refuse("index_bits must be 32 or 64; got ", library.index_bits);
  }
  const std::string& dtype = library.dtype;
  const bool wide = library.index_bits == 64;
  std::ostringstream out;
  out << "#define MLX_DEFORM_T "
      << (dtype == "float32"       ? "float"
              : dtype == "float16" ? "half"
                                   : "bfloat")
      << "\n#define MLX_DEFORM_T_NAME " << dtype
      << "\n#define MLX_DEFORM_T_BYTES " << itemsize
      << "\n#define MLX_DEFORM_INDEX " << (wide ? "long" : "int")
      << "\n#define MLX_DEFORM_INDEX_NAME " << (wide ? "i64" : "i32") << "\n";
  return out.str();
}

std::string library_name(
    const Library& library,
    const std::string& source_hash) {
  return "mlx_deform_i" + std::to_string(library.index_bits) + "_" +
      library.dtype + "_" + source_hash;
}

std::string hash_of(const std::string& source) {
  uint64_t hash = 0xcbf29ce484222325; // FNV-1a
  for (unsigned char c : source) {
    hash = (hash ^ c) * 0x100000001b3;
  }
  std::ostringstream out;
  out << std::hex << hash;
  return out.str();
}

std::vector<Chunk>
plan_chunks(const DeformConv2dParams& p, int64_t itemsize, int64_t budget) {
  if (itemsize < 1 || budget < 1) {
    refuse(
        "itemsize and budget must be positive; got ",
        itemsize,
        " and ",
        budget);
  }
  DeformConv2dParams whole = p;
  whole.pixel_begin = whole.pixel_end = 0;
  check(whole);
  const int64_t pixels = all_pixels(p);
  if (pixels == 0) {
    return {};
  }
  const int64_t pixel_bytes = product({taps(p), p.C, itemsize});
  // A launch counts pixels along an axis of the grid.
  const int64_t fitting = std::clamp<int64_t>(
      budget / std::max<int64_t>(pixel_bytes, 1), 1, kMaxGrid);
  const int64_t unit = p.Wo <= fitting ? p.Wo : 1;
  const int64_t units = pixels / unit;
  const int64_t count = ceil_div(units, fitting / unit);

  std::vector<Chunk> out;
  int64_t begin = 0;
  for (int64_t i = 0; i < count; ++i) {
    // The first units % count chunks have one unit more.
    const int64_t end =
        begin + (units / count + (i < units % count ? 1 : 0)) * unit;
    out.push_back({begin, end});
    begin = end;
  }
  return out;
}

int64_t column_budget() {
  const char* text = std::getenv("MLX_DEFORM_COLUMN_BUDGET_MB");
  if (text == nullptr || *text == '\0') {
    return int64_t(64) << 20;
  }
  char* end = nullptr;
  const double megabytes = std::strtod(text, &end);
  if (end == text || *end != '\0' || !(megabytes > 0 && megabytes <= 1e12)) {
    refuse("MLX_DEFORM_COLUMN_BUDGET_MB must be a positive number; got ", text);
  }
  return std::max<int64_t>(int64_t(megabytes * (int64_t(1) << 20)), 1);
}

bool environment_flag(const char* name) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' && std::string(text) != "0";
}

} // namespace mlx_deform::gpu
