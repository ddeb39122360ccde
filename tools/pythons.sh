#!/usr/bin/env bash
# Gets Pythons of other platforms, on which `make wheels` then runs the array tests: tools/pythons.sh [aarch64] [musl].
# For x86-64 Debian; nothing is installed on the machine, everything is put into build/pythons/.
#
# aarch64: Debian's packages for arm64, unpacked, run by qemu-aarch64 (package qemu-user).
# musl:    CPython built from Debian's source package with zig and Debian's musl. Takes a quarter of an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build/pythons
here=$PWD/build/pythons
: "${PYTHON:=python3}"

# lists NAME ARCHITECTURE: lists of packages apart from those of the machine.
lists() {
    local folder=$here/$1
    mkdir -p "$folder"/{lists/partial,cache/archives/partial,root}
    : >"$folder/status"
    printf '%s\n' "APT::Architecture \"$2\";" "APT::Architectures {\"$2\";};" "APT::Sandbox::User \"root\";" \
        "Dir::State::lists \"$folder/lists\";" "Dir::Cache \"$folder/cache\";" \
        "Dir::State::status \"$folder/status\";" \
        >"$folder/apt.conf"
    export APT_CONFIG=$folder/apt.conf
    if [ "${3:-}" ]; then # with sources
        local key=/usr/share/keyrings/debian-archive-keyring.gpg
        printf "deb [signed-by=$key] %s trixie main\ndeb-src [signed-by=$key] %s trixie main\n" "$3" "$3" \
            >"$folder/sources.list"
        printf '%s\n' "Dir::Etc::sourcelist \"$folder/sources.list\";" 'Dir::Etc::sourceparts "/dev/null";' \
            >>"$folder/apt.conf"
    fi
    apt-get -qq update
}

aarch64() {
    lists aarch64 arm64
    local name root=$here/aarch64/root
    apt-get -qq -y install --no-install-recommends --download-only python3.11-minimal libpython3.11-stdlib \
        libstdc++6
    for name in "$here"/aarch64/cache/archives/*.deb; do dpkg-deb -x "$name" "$root"; done
    printf '#!/bin/sh\nexec qemu-aarch64 -L %s %s/usr/bin/python3.11 "$@"\n' "$root" "$root" \
        >"$here/manylinux_2_28_aarch64"
    chmod +x "$here/manylinux_2_28_aarch64"
}

musl() {
    lists musl amd64 http://deb.debian.org/debian
    local folder=$here/musl zig="$PYTHON -m ziglang" build
    build=$(command -v python3.13) || { echo "musl: needs a python3.13 to build CPython 3.13 with" >&2; exit 1; }
    (cd "$folder" && apt-get -qq download musl && dpkg-deb -x musl_*.deb root &&
        apt-get -qq source --download-only python3.13 && mkdir -p source && tar xf python3.13_*.orig.tar.* -C source \
        --strip-components=1)
    # The name by which wheels for musl ask for the C library.
    ln -sf ld-musl-x86_64.so.1 "$folder/root/usr/lib/libc.musl-x86_64.so.1"
    printf '#!/bin/sh\nexec %s cc -target x86_64-linux-musl -dynamic -Wl,--dynamic-linker=%s "$@"\n' "$zig" \
        "$folder/root/usr/lib/ld-musl-x86_64.so.1" >"$folder/cc"
    chmod +x "$folder/cc"
    mkdir -p "$folder/build"
    (cd "$folder/build" && ../source/configure -q --prefix="$folder/python" CC="$folder/cc" AR="$zig ar" OPT=-O1 \
        --build=x86_64-linux-gnu --host=x86_64-linux-musl --with-build-python="$build" --disable-test-modules \
        --without-ensurepip --disable-ipv6 ac_cv_file__dev_ptmx=yes ac_cv_file__dev_ptc=no &&
        make -s && make -s install)
    ln -sf musl/python/bin/python3.13 "$here/musllinux_1_2_x86_64"
}

for name in "${@:-aarch64}"; do
    case $name in
    aarch64 | musl) "$name" ;;
    *) echo "no Python named $name: aarch64 or musl" >&2 && exit 2 ;;
    esac
done
