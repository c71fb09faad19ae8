// SPDX-License-Identifier: Apache-2.0
// wgmma (sm_90a): D [64, N] += A [64, K] * B [N, K]^T by a warpgroup, four warps of 128 threads.
//
// K is 32 for 8-bit and 16 for 16-bit elements.  B comes from shared memory through a descriptor, A
// too (ss) or from registers (rs).  Products are asynchronous:
//
//   wgmma_fence()                        registers written before are visible to wgmma
//   Wgmma<int8_t, 128>::ss(d, ...)  ...  issued in order, may share d
//   wgmma_commit()                       one group
//   wgmma_wait<0>()                      only now may d be read, and the tiles be overwritten
//
// d[i] of thread t (of 128) is row 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), column 8 * (i / 4)
// + 2 * (t % 4) + i % 2: the mma.sync accumulator repeated along N, one warp under the other.
// Registers of A are as in mma.h, warp w holding rows 16 * w to 16 * w + 15. PTX ISA, "Asynchronous
// Warpgroup Level Matrix Instructions".
#pragma once
#include "common/shared.h"
#include "common/types.h"

namespace reeltime {

// --- Shared memory descriptors -------------------------------------------------------------------

// A K-major tile: rows of kRowBytes, swizzled (swizzle.h), groups of eight rows one after another.
// One instruction reads 32 bytes of each row; add 32 to the address for the next K.
// NOTE: the tile must be aligned to 8 * kRowBytes, for the swizzle is a function of the address.
template <int kRowBytes>
DEVICE uint64_t wgmma_descriptor(uint32_t address) {
  static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32, "");
  constexpr uint64_t kMode = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  constexpr uint64_t kEightRows = 8 * kRowBytes;
  return (address >> 4 & 0x3fff) | uint64_t{1} << 16 | (kEightRows >> 4) << 32 | kMode << 62;
}

// An MN-major tile of 16-bit elements (V as attention stores it): K rows of 64 elements, 128 bytes,
// swizzled; columns 64 to 127 follow `column_bytes` later.  Add 16 * 128 for the next K.
DEVICE uint64_t wgmma_descriptor_transposed(uint32_t address, uint32_t column_bytes) {
  return (address >> 4 & 0x3fff) | static_cast<uint64_t>(column_bytes >> 4) << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The same tile from `bytes`, a multiple of 16, on: one addition where a descriptor takes three
// operations.
DEVICE uint64_t wgmma_later(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// --- Order ---------------------------------------------------------------------------------------

DEVICE void wgmma_fence() {
#if REELTIME_EMULATED
  emulator::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

DEVICE void wgmma_commit() {
#if REELTIME_EMULATED
  emulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// NOTE: only here does the compiler learn that d changed; keep d's uses after it (tie_registers).
template <int kPending>
DEVICE void wgmma_wait() {
#if REELTIME_EMULATED
  emulator::wgmma_wait(kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving uses of accumulators across this point.
template <int kCount>
DEVICE void tie_registers(int32_t (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+r"(d[i])::"memory");
}
template <int kCount>
DEVICE void tie_registers(float (&d)[kCount]) {
#if REELTIME_EMULATED
  (void)d;  // "+f" is not a register class of every host
#else
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// --- Products ------------------------------------------------------------------------------------

// Wgmma<T, N>::ss(d, a, b, accumulate) and ::rs(d, a_registers, b, accumulate): N a multiple of 32
// from 64 to 256, of e4m3 also 72 and 136; T int8_t (int32 sums, exact), e4m3, float16 or bfloat16
// (float sums).  With accumulate false, d is overwritten.  kTransposedB, for 16 bits only: b is
// wgmma_descriptor_transposed.
template <class T, int N, bool kTransposedB = false>
struct Wgmma;

#if REELTIME_EMULATED

template <class T>
struct WgmmaElement;
template <>
struct WgmmaElement<int8_t> {
  using Sum = int32_t;
  static constexpr emulator::Element kType = emulator::Element::kS8;
};
template <>
struct WgmmaElement<e4m3> {
  using Sum = float;
  static constexpr emulator::Element kType = emulator::Element::kE4m3;
};
template <>
struct WgmmaElement<float16> {
  using Sum = float;
  static constexpr emulator::Element kType = emulator::Element::kF16;
};
template <>
struct WgmmaElement<bfloat16> {
  using Sum = float;
  static constexpr emulator::Element kType = emulator::Element::kBf16;
};

template <class T, int N, bool kTransposedB>
struct Wgmma {
  static_assert((N % 32 == 0 && N >= 64 && N <= 256) ||
                    (WgmmaElement<T>::kType == emulator::Element::kE4m3 && (N == 72 || N == 136)),
                "");
  static_assert(!kTransposedB || sizeof(T) == 2, "");
  using Sum = typename WgmmaElement<T>::Sum;
  DEVICE static void ss(Sum (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
    emulator::wgmma({WgmmaElement<T>::kType, N, d, nullptr, a, b, accumulate, kTransposedB});
  }
  DEVICE static void rs(Sum (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                        bool accumulate = true) {
    emulator::wgmma({WgmmaElement<T>::kType, N, d, a, 0, b, accumulate, kTransposedB});
  }
};

#else

// clang-format off
#define REELTIME_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REELTIME_R36 REELTIME_R32 ", %32, %33, %34, %35"
#define REELTIME_R48 REELTIME_R32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define REELTIME_R64 REELTIME_R48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REELTIME_R68 REELTIME_R64 ", %64, %65, %66, %67"
#define REELTIME_R80 REELTIME_R64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define REELTIME_R96 REELTIME_R80 ", " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REELTIME_R112 REELTIME_R96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define REELTIME_R128 REELTIME_R112 ", " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define REELTIME_D4(C, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3])
#define REELTIME_D16(C, i) REELTIME_D4(C, i), REELTIME_D4(C, i + 4), REELTIME_D4(C, i + 8), REELTIME_D4(C, i + 12)
#define REELTIME_D32(C, i) REELTIME_D16(C, i), REELTIME_D16(C, i + 16)
#define REELTIME_D36(C, i) REELTIME_D32(C, i), REELTIME_D4(C, i + 32)
#define REELTIME_D48(C, i) REELTIME_D32(C, i), REELTIME_D16(C, i + 32)
#define REELTIME_D64(C, i) REELTIME_D48(C, i), REELTIME_D16(C, i + 48)
#define REELTIME_D68(C, i) REELTIME_D64(C, i), REELTIME_D4(C, i + 64)
#define REELTIME_D80(C, i) REELTIME_D64(C, i), REELTIME_D16(C, i + 64)
#define REELTIME_D96(C, i) REELTIME_D80(C, i), REELTIME_D16(C, i + 80)
#define REELTIME_D112(C, i) REELTIME_D96(C, i), REELTIME_D16(C, i + 96)
#define REELTIME_D128(C, i) REELTIME_D112(C, i), REELTIME_D16(C, i + 112)

// OPS is N / 2, the number of accumulators; P0 ... P6 number the operands after them.
#define REELTIME_WGMMA(T, SUM, C, N, OPS, PTX, SS_TAIL, RS_TAIL, P0, P1, P2, P3, P4, P5, P6)         \
  template <bool kTransposedB>                                                                      \
  struct Wgmma<T, N, kTransposedB> {                                                                \
    static_assert(!kTransposedB || sizeof(T) == 2, "");                                             \
    DEVICE static void ss(SUM (&d)[OPS], uint64_t a, uint64_t b, bool accumulate = true) {          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\n"                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N PTX " {" REELTIME_R##OPS "}, "            \
                   P0 ", " P1 ", p" SS_TAIL(P3) ";\n}"                                              \
                   : REELTIME_D##OPS(C, 0)                                                          \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(int(kTransposedB)));    \
    }                                                                                               \
    DEVICE static void rs(SUM (&d)[OPS], const uint32_t (&a)[4], uint64_t b,                        \
                          bool accumulate = true) {                                                 \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5 ", 0;\n"                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N PTX " {" REELTIME_R##OPS "}, "            \
                   "{" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p" RS_TAIL(P6) ";\n}"                 \
                   : REELTIME_D##OPS(C, 0)                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                            \
                     "r"(static_cast<int>(accumulate)), "n"(int(kTransposedB)));                    \
    }                                                                                               \
  };
// After the predicate: nothing for integers; the signs of A and B; for 16 bits also which of them
// is transposed.
#define REELTIME_NONE(P) ""
#define REELTIME_SIGNS(P) ", 1, 1"
#define REELTIME_SIGNS_A_B(P) ", 1, 1, 0, " P
#define REELTIME_SIGNS_B(P) ", 1, 1, " P
#define REELTIME_WGMMA_TYPES(N, OPS, ...)                                                                              \
  REELTIME_WGMMA(int8_t, int32_t, "+r", N, OPS, "k32.s32.s8.s8", REELTIME_NONE, REELTIME_NONE, __VA_ARGS__)            \
  REELTIME_WGMMA(e4m3, float, "+f", N, OPS, "k32.f32.e4m3.e4m3", REELTIME_SIGNS, REELTIME_SIGNS, __VA_ARGS__)          \
  REELTIME_WGMMA(float16, float, "+f", N, OPS, "k16.f32.f16.f16", REELTIME_SIGNS_A_B, REELTIME_SIGNS_B, __VA_ARGS__)   \
  REELTIME_WGMMA(bfloat16, float, "+f", N, OPS, "k16.f32.bf16.bf16", REELTIME_SIGNS_A_B, REELTIME_SIGNS_B, __VA_ARGS__)
REELTIME_WGMMA_TYPES(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
REELTIME_WGMMA_TYPES(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
REELTIME_WGMMA_TYPES(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
REELTIME_WGMMA_TYPES(160, 80, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
REELTIME_WGMMA_TYPES(192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
REELTIME_WGMMA_TYPES(224, 112, "%112", "%113", "%114", "%115", "%116", "%117", "%118")
REELTIME_WGMMA_TYPES(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
REELTIME_WGMMA(e4m3, float, "+f", 72, 36, "k32.f32.e4m3.e4m3", REELTIME_SIGNS, REELTIME_SIGNS, "%36", "%37", "%38", "%39", "%40", "%41", "%42")
REELTIME_WGMMA(e4m3, float, "+f", 136, 68, "k32.f32.e4m3.e4m3", REELTIME_SIGNS, REELTIME_SIGNS, "%68", "%69", "%70", "%71", "%72", "%73", "%74")
#undef REELTIME_R32
#undef REELTIME_R36
#undef REELTIME_R48
#undef REELTIME_R64
#undef REELTIME_R68
#undef REELTIME_R80
#undef REELTIME_R96
#undef REELTIME_R112
#undef REELTIME_R128
#undef REELTIME_D4
#undef REELTIME_D16
#undef REELTIME_D32
#undef REELTIME_D36
#undef REELTIME_D48
#undef REELTIME_D64
#undef REELTIME_D68
#undef REELTIME_D80
#undef REELTIME_D96
#undef REELTIME_D112
#undef REELTIME_D128
#undef REELTIME_WGMMA
#undef REELTIME_NONE
#undef REELTIME_SIGNS
#undef REELTIME_SIGNS_A_B
#undef REELTIME_SIGNS_B
#undef REELTIME_WGMMA_TYPES
// clang-format on

#endif

}  // namespace reeltime
