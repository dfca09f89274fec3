// AMX: multiply 16 rows of bf16 by 16 outputs in one instruction. A row's sums do not depend on the rows beside it. The
// packed weight, pairs of k in lines of 16 outputs, has the layout that its tiles load.
#pragma once
#include "vec.h"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define SKIPFAST_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace skipfast {

#if defined(SKIPFAST_AMX)
// Tell whether this process may use the tile registers: Linux gives their memory only on request.
inline bool have_amx() {
  static const bool granted = [] {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  }();
  return granted;
}

// While a scope exists on a thread, the thread's tiles keep their shape from product to product. The outermost scope
// gives them back: other code of the process may want other shapes, and tiles in use slow down task switches.
class TileScope {
 public:
  TileScope() { depth++; }
  ~TileScope() {
    if (--depth == 0 && rows) rows = 0, _tile_release();
  }
  TileScope(const TileScope&) = delete;

  // Tiles 0..3: sums; 4, 5: `wanted` rows of 32 features; 6, 7: 32 features of 16 outputs.
  static void shape(int wanted) {
    if (rows == wanted) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = uint8_t(i < 6 ? wanted : 16);
    __asm__ volatile("" ::"r"(&config) : "memory");  // GCC believes that only 8 bytes of it are read
    _tile_loadconfig(&config);
    rows = wanted;
  }

 private:
  static inline thread_local int depth = 0, rows = 0;
};
#else
inline constexpr bool have_amx() { return false; }
struct TileScope {
  TileScope() {}
};
#endif

}  // namespace skipfast
