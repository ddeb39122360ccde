/* arena.h: how several parts are laid out in one piece of memory, an arena. With DHSA_RED_ZONE, a number of bytes that is a
 * multiple of DHSA_ALIGN, as in `make test-debug`, such a zone follows every part, and address sanitizer reports whoever touches
 * it: without zones an overrun stays inside the arena, where no sanitizer sees it. */
#ifndef DHSA_ARENA_H
#define DHSA_ARENA_H

#include "core/internal.h"

#ifdef DHSA_RED_ZONE
#include <sanitizer/asan_interface.h>
#else
#define DHSA_RED_ZONE 0
#endif

/* The next part of an arena, of `bytes` bytes, which is aligned to DHSA_ALIGN; *used, the bytes of the parts before it, grows by
 * it. With arena NULL, which only asks for the sizes, NULL. */
static inline void *dhsa_part(void *arena, int64_t *used, int64_t bytes)
{
    const int64_t at = *used, room = dhsa_round_up(bytes, DHSA_ALIGN);
    *used = at + room + DHSA_RED_ZONE;
    if (!arena) return NULL;
#if DHSA_RED_ZONE
    /* Another layout of the same arena may have had its zones elsewhere. What alignment adds to a part belongs to its zone. */
    __asan_poison_memory_region((char *)arena + at, (size_t)(room + DHSA_RED_ZONE));
    __asan_unpoison_memory_region((char *)arena + at, (size_t)bytes);
#endif
    return (char *)arena + at;
}

/* [at, at + bytes) of an arena is about to be used as one piece, whatever was laid out there before. */
static inline void dhsa_whole(void *at, int64_t bytes)
{
#if DHSA_RED_ZONE
    __asan_unpoison_memory_region(at, (size_t)bytes);
#else
    (void)at, (void)bytes;
#endif
}

#endif
