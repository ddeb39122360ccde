/* test_arena.c: checks core/arena.h in a build with DHSA_RED_ZONE and address sanitizer. With the argument "good" the
 * program uses every byte of the parts of an arena in two layouts, and prints "fine". With any other argument it
 * touches one byte outside the parts, which address sanitizer must report. */
#include <stdio.h>
#include <string.h>

#include "core/arena.h"

static int64_t lay_out(char *arena, const int64_t *sizes, char **parts)
{
    int64_t used = 0;
    for (int i = 0; i < 3; i++) parts[i] = dhsa_part(arena, &used, sizes[i]);
    return used;
}

int main(int argc, char **argv)
{
    const int64_t small[] = {100, 0, 4}, large[] = {1000, 64, 3};
    const int64_t size = DHSA_MAX(lay_out(NULL, small, (char *[3]){0}), lay_out(NULL, large, (char *[3]){0}));
    const char *way = argc > 1 ? argv[1] : "";
    char *arena = dhsa_alloc(size, 1), *parts[3];
    if (!arena) return 1;
    for (int turn = 0; turn < 4; turn++) {
        const int64_t *sizes = turn % 2 ? small : large;
        lay_out(arena, sizes, parts);
        for (int i = 0; i < 3; i++) {
            if ((uintptr_t)parts[i] % DHSA_ALIGN) return 1;
            memset(parts[i], turn, (size_t)sizes[i]);
        }
    }
    volatile char *at = parts[0];
    if (!strcmp(way, "next")) at[100] = 1;                          /* the byte after a part, in its padding */
    if (!strcmp(way, "zone")) at[128 + DHSA_RED_ZONE / 2] = 1;      /* the middle of a zone */
    if (!strcmp(way, "empty")) *(volatile char *)parts[1] = 1;      /* a part of no bytes */
    if (!strcmp(way, "last")) *(volatile char *)(parts[2] + 4) = 1; /* after the last part */
    if (!strcmp(way, "good")) {
        dhsa_whole(arena, size);
        memset(arena, 1, (size_t)size);
        puts("fine");
    }
    dhsa_free(arena);
    return 0;
}
