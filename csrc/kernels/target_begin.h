/* target_begin.h: functions from here to target_end.h are compiled for the instruction set that DHSA_TARGET names,
 * one of the strings in tiers.h, whatever the flags of the build are. It has no include guard, since each file of a
 * tier includes both files once. */
#define DHSA_TARGET_PRAGMA_(text) _Pragma(#text)
#define DHSA_TARGET_PRAGMA(text) DHSA_TARGET_PRAGMA_(text)
#if defined(__clang__)
DHSA_TARGET_PRAGMA(clang attribute push(__attribute__((target(DHSA_TARGET))), apply_to = function))
#else
#pragma GCC push_options
DHSA_TARGET_PRAGMA(GCC target(DHSA_TARGET))
#endif
