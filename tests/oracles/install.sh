#!/bin/sh
# Installs the programs that the tests use: by apt strace and, for comparison, QEMU, 7-Zip and libvhdi; by npm vhd-lib,
# also for comparison, into target/oracles. Does nothing if all of them are installed. Needs root for apt.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
oracles=${CARGO_TARGET_DIR:-$here/../../target}/oracles

missing=
want() { command -v "$1" >/dev/null 2>&1 || missing="$missing $2"; }
want qemu-img qemu-utils
want qemu-storage-daemon qemu-system-common
want 7zz 7zip
want vhdiinfo libvhdi-utils
want strace strace
want npm npm
want node nodejs
/usr/bin/python3 -c 'import pyvhdi' 2>/dev/null || missing="$missing python3-libvhdi"
if [ -n "$missing" ]; then
    apt-get update -q
    # shellcheck disable=SC2086  # a list of package names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
fi

if ! cmp -s "$here/package.json" "$oracles/package.json" || [ ! -d "$oracles/node_modules/vhd-lib" ]; then
    mkdir -p "$oracles"
    npm install --prefix "$oracles" --no-audit --no-fund --no-package-lock --loglevel=error "vhd-lib@0.7.2"
    cp "$here/package.json" "$oracles/package.json"
fi
