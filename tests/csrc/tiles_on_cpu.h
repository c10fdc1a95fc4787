// AMX tiles in plain C++, for csrc/cpu/lora_linear/amx.h on processors without them: the loops' logic (which tile, which
// rows, which columns) is run; the instructions themselves are not. Included inside a namespace.

struct TileFile {
  uint8_t bytes[8][16][64];
  int rows[8], width[8];  // bytes of a row; 0 rows: not configured
};
inline thread_local TileFile tile_file;

inline void tile_configure(int rows, int depth) {
  std::memset(&tile_file, 0, sizeof tile_file);
  for (int t = 0; t < 8; ++t) {
    tile_file.width[t] = t == 4 || t == 5 ? 2 * depth : 64;
    tile_file.rows[t] = t < 6 ? rows : depth / 2;
  }
}
inline void tile_release() { std::memset(&tile_file, 0, sizeof tile_file); }

// A tile that is not configured is an illegal instruction.
inline void tile_needed(int t) {
  if (tile_file.rows[t] == 0) __builtin_trap();
}
template <int T> inline void tile_zero() {
  tile_needed(T);
  std::memset(tile_file.bytes[T], 0, sizeof tile_file.bytes[T]);
}
template <int T> inline void tile_load(const void* p, int64_t stride) {
  tile_zero<T>();
  for (int i = 0; i < tile_file.rows[T]; ++i)
    std::memcpy(tile_file.bytes[T][i], (const char*)p + i * stride, tile_file.width[T]);
}
template <int T> inline void tile_store(void* p, int64_t stride) {
  tile_needed(T);
  for (int i = 0; i < tile_file.rows[T]; ++i)
    std::memcpy((char*)p + i * stride, tile_file.bytes[T][i], tile_file.width[T]);
}
template <int C, int A, int B> inline void tile_multiply_add() {
  for (int t : {C, A, B}) tile_needed(t);
  if (tile_file.rows[A] != tile_file.rows[C] || tile_file.width[A] != 4 * tile_file.rows[B]) __builtin_trap();
  const auto c = (float(*)[16])tile_file.bytes[C];
  const auto a = (const bf16(*)[32])tile_file.bytes[A], b = (const bf16(*)[32])tile_file.bytes[B];
  for (int m = 0; m < tile_file.rows[C]; ++m)
    for (int k = 0; k < tile_file.width[A] / 2; ++k)
      for (int n = 0; n < 16; ++n) c[m][n] += to_float(a[m][k]) * to_float(b[k / 2][2 * n + k % 2]);
}
