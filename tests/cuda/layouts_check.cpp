// SPDX-License-Identifier: Apache-2.0
// The emulator's layouts against the traits in CUTLASS's headers, on the host.  Prints one line per
// layout, with the number of elements that differ.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // those with 72, 136, 160 and 224 columns
#include <cstdio>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm89.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "emulator/layouts.h"

using namespace cute;
using namespace reeltime::emulator;

static void report(const char* name, int different) { std::printf("%s: %d\n", name, different); }

// CUTLASS numbers an element of [rows, columns] as row + rows * column.
static int number(Position p, int rows) { return p.row + rows * p.column; }

template <class Traits, int kPer>
void check_mma(const char* name) {
  typename Traits::ALayout a;
  typename Traits::BLayout b;
  typename Traits::CLayout d;
  int different = 0;
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4 * kPer; i++) {
      different += a(lane, i) != number(a_position(lane, i / kPer, i % kPer, kPer), 16);
      if (i < 2 * kPer)
        different += b(lane, i) != number(b_position(lane, i / kPer, i % kPer, kPer), 8);
      if (i < 4) different += d(lane, i) != number(d_position(lane, i), 16);
    }
  report(name, different);
}

template <class Traits, int N>
void check_wgmma_d(const char* name) {
  typename Traits::CLayout d;
  int different = 0;
  for (int thread = 0; thread < 128; thread++)
    for (int i = 0; i < N / 2; i++)
      different += d(thread, i) != number(wgmma_d_position(thread, i), 64);
  report(name, different);
}

template <class Traits, int kPer>
void check_wgmma_a(const char* name) {
  typename Traits::ALayout a;
  int different = 0;
  for (int thread = 0; thread < 128; thread++)
    for (int i = 0; i < 4 * kPer; i++)
      different += a(thread, i) != number(wgmma_a_position(thread, i / kPer, i % kPer, kPer), 64);
  report(name, different);
}

// Position in bits, as if the rows of the four matrices lay one after another.
template <class Traits>
void check_ldmatrix(const char* name, bool transposed) {
  typename Traits::DstLayout to;
  int different = 0;
  for (int lane = 0; lane < 32; lane++)
    for (int j = 0; j < 4; j++)
      for (int half = 0; half < 2; half++) {
        const Position p = matrix_position(lane, half, transposed);
        different += to(lane, (j * 2 + half) * 16) != ((8 * j + p.row) * 8 + p.column) * 16;
      }
  report(name, different);
}

template <class Atom>
void check_atom(const char* name, Atom atom, uint64_t mode, int bytes, int rows, int ks,
                bool transposed) {
  int different = 0;
  const uint64_t descriptor = mode << 62;  // within one atom neither offset counts
  const auto swizzle_of_bytes = atom.layout_a();
  for (int row = 0; row < rows; row++)
    for (int k = 0; k < ks; k++)
      different += static_cast<uint32_t>(swizzle_of_bytes(atom.layout_b()(row, k) * bytes)) !=
                   element_address(descriptor, row, k, bytes, transposed);
  report(name, different);
}

int main() {
  check_mma<MMA_Traits<SM80_16x8x32_S32S8S8S32_TN>, 4>("mma m16n8k32 s8");
  check_mma<MMA_Traits<SM89_16x8x32_F32E4M3E4M3F32_TN>, 4>("mma m16n8k32 e4m3");
  check_mma<MMA_Traits<SM80_16x8x16_F32F16F16F32_TN>, 2>("mma m16n8k16 f16");
  check_mma<MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>, 2>("mma m16n8k16 bf16");
  check_wgmma_d<MMA_Traits<SM90_64x64x32_S32S8S8_SS_TN>, 64>("wgmma n64 s8, D");
  check_wgmma_d<MMA_Traits<SM90::GMMA::MMA_64x72x32_F32E4M3E4M3_SS_TN<>>, 72>("wgmma n72, D");
  check_wgmma_d<MMA_Traits<SM90::GMMA::MMA_64x96x32_S32S8S8_SS_TN>, 96>("wgmma n96 s8, D");
  check_wgmma_d<MMA_Traits<SM90::GMMA::MMA_64x128x32_F32E4M3E4M3_SS_TN<>>, 128>("wgmma n128, D");
  check_wgmma_d<MMA_Traits<SM90::GMMA::MMA_64x136x32_F32E4M3E4M3_SS_TN<>>, 136>("wgmma n136, D");
  check_wgmma_d<MMA_Traits<SM90::GMMA::MMA_64x160x32_S32S8S8_SS_TN>, 160>("wgmma n160 s8, D");
  check_wgmma_d<MMA_Traits<SM90::GMMA::MMA_64x192x32_S32S8S8_SS_TN>, 192>("wgmma n192 s8, D");
  check_wgmma_d<MMA_Traits<SM90::GMMA::MMA_64x224x32_S32S8S8_SS_TN>, 224>("wgmma n224 s8, D");
  check_wgmma_d<
      MMA_Traits<SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>>, 256>(
      "wgmma n256, D");
  check_wgmma_a<MMA_Traits<SM90::GMMA::MMA_64x64x32_F32E4M3E4M3_RS_TN<>>, 4>("wgmma e4m3, A");
  check_wgmma_a<MMA_Traits<SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<GMMA::Major::K, GMMA::Major::K>>,
                2>("wgmma bf16, A");
  check_ldmatrix<Copy_Traits<SM75_U32x4_LDSM_N>>("ldmatrix", false);
  check_ldmatrix<Copy_Traits<SM75_U16x8_LDSM_T>>("ldmatrix.trans", true);
  check_atom("K-major, 128 bytes, s8", GMMA::Layout_K_SW128_Atom<int8_t>{}, 1, 1, 8, 128, false);
  check_atom("K-major, 64 bytes, s8", GMMA::Layout_K_SW64_Atom<int8_t>{}, 2, 1, 8, 64, false);
  check_atom("K-major, 32 bytes, s8", GMMA::Layout_K_SW32_Atom<int8_t>{}, 3, 1, 8, 32, false);
  check_atom("K-major, 128 bytes, bf16", GMMA::Layout_K_SW128_Atom<bfloat16_t>{}, 1, 2, 8, 64,
             false);
  check_atom("MN-major, 128 bytes, bf16", GMMA::Layout_MN_SW128_Atom<bfloat16_t>{}, 1, 2, 64, 8,
             true);
}
