/* avx512_tpl.h: the AVX-512 kernels (F, BW, DQ, VL) with vectors of 16 elements. avx512.c and avx512narrow.c define
 * V_PER, the number of vectors in a row of a panel, and K_ISA, the name of the table. */
#define DHSA_TARGET DHSA_TARGET_AVX512
#include "kernels/target_begin.h"

#include "kernels/ops512.h"

#define K_TEXT "avx512"
#define QK_ROWS 8
#define PV_ROWS 8

#include "kernels/tile_tpl.h"

#include "kernels/target_end.h"
