/* arena.h: lays out several parts in one piece of memory, an arena. If DHSA_RED_ZONE is defined, as in `make
 * test-debug`, a zone of that many bytes (a multiple of DHSA_ALIGN) follows every part, and the address sanitizer
 * reports any access to it. Without zones an overrun that stays inside the arena is not detected. */
#ifndef DHSA_ARENA_H
#define DHSA_ARENA_H

#include "core/internal.h"

#ifdef DHSA_RED_ZONE
#include <sanitizer/asan_interface.h>
#else
#define DHSA_RED_ZONE 0
#endif

/* Returns the next part of an arena: `bytes` bytes, aligned to DHSA_ALIGN. *used is the size of the parts before it
 * and is increased by its size. With arena NULL, only *used is updated and NULL is returned. */
static inline void *dhsa_part(void *arena, int64_t *used, int64_t bytes)
{
    const int64_t at = *used, room = dhsa_round_up(bytes, DHSA_ALIGN);
    *used = at + room + DHSA_RED_ZONE;
    if (!arena) return NULL;
#if DHSA_RED_ZONE
    /* Another layout of the same arena may have placed its zones elsewhere. The padding of a part belongs to its
     * zone. */
    __asan_poison_memory_region((char *)arena + at, (size_t)(room + DHSA_RED_ZONE));
    __asan_unpoison_memory_region((char *)arena + at, (size_t)bytes);
#endif
    return (char *)arena + at;
}

/* Makes [at, at + bytes) of an arena usable as one piece, whatever parts and zones were laid out there before. */
static inline void dhsa_whole(void *at, int64_t bytes)
{
#if DHSA_RED_ZONE
    __asan_unpoison_memory_region(at, (size_t)bytes);
#else
    (void)at, (void)bytes;
#endif
}

#endif
