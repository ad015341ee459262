#!/usr/bin/env bash
# Builds the test guest: Debian's cloud kernel, and a small initramfs with busybox that runs one script.
#
#   vm-images/build-guest.sh [demo|full]
#
# into vm-images/cache (or $DIFFDISK_CACHE):
#
#   vmlinuz      the kernel
#   base.cpio    init, busybox, modules for virtio-blk (on PCI and MMIO) and ext4, mke2fs, e2fsck
#   fio.cpio     fio and its libraries, added for jobs with the line `# needs: fio` (`full` only)
#   built-from   the inputs of the build; while they stay the same, the guest is not built again
#
# Kernel and busybox are unpacked from their packages, never installed. mke2fs, e2fsck and fio are this machine's.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
install=$here/../.ci/install
cache=${DIFFDISK_CACHE:-$here/cache}
kind=${1:-full}

say() { printf 'build-guest: %s\n' "$*"; }
die() { printf 'build-guest: %s\n' "$*" >&2; exit 1; }

case $kind in
demo | full) ;;
*) die "demo or full, not '$kind'" ;;
esac
[ "$(dpkg --print-architecture 2>/dev/null)" = amd64 ] || die "the guest is built on Debian for amd64 only"
PATH=$PATH:/usr/sbin:/sbin
for program in cpio depmod modprobe xz flock mke2fs e2fsck; do
    command -v "$program" >/dev/null || die "$program is missing: run .ci/install $kind"
done
if [ "$kind" = full ]; then
    command -v fio >/dev/null || die "fio is missing: run .ci/install full"
fi

mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
exec 9>"$cache/lock"
flock 9

# ---- inputs of the build

candidate() { apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p'; }
installed() { dpkg-query -W -f '${Version}' "$1" 2>/dev/null || echo none; }

# Sets kernel and recipe.
look_up() {
    kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null |
        sed -n 's/^ *|\{0,1\}Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$kernel" ] || return 1
    recipe=$(
        cat "$here/build-guest.sh" "$here/init" | sha256sum | sed 's/ .*/ scripts/'
        printf '%s %s\n' "$(candidate "$kernel")" "$kernel" "$(candidate busybox-static)" busybox-static \
            "$(installed e2fsprogs)" e2fsprogs
        [ "$kind" = demo ] || printf '%s fio\n' "$(installed fio)"
    )
}

# The full guest also serves the demo.
up_to_date() {
    [ -e "$cache/built-from" ] || return 1
    local line
    while read -r line; do
        grep -qxF "$line" "$cache/built-from" || return 1
    done <<<"$recipe"
}

if ! look_up; then
    if ! "$install" lists; then
        [ -e "$cache/built-from" ] || die "no package lists, and none can be fetched"
        say "no package lists: keeping the guest in $cache as it is"
        exit 0
    fi
    look_up || die "apt knows no linux-image-cloud-amd64"
fi
if up_to_date; then
    say "the guest in $cache is up to date"
    exit 0
fi

# ---- fetch and unpack

started=$SECONDS
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"

fetch() {
    say "fetching $kernel, busybox-static"
    (cd "$work" && apt-get -q -o APT::Sandbox::User=root -o Acquire::Retries=3 download "$kernel" busybox-static >&2)
}
if ! fetch; then
    say "cannot fetch: the package lists may be old"
    if ! { "$install" refresh && look_up && fetch; }; then
        # Offline, an older kernel is used if these scripts have built it.
        grep -qxF "$(head -n 1 <<<"$recipe")" "$cache/built-from" 2>/dev/null || die "cannot fetch the packages"
        [ "$kind" = demo ] || grep -q ' fio$' "$cache/built-from" || die "cannot fetch the packages"
        say "cannot fetch the packages: keeping the guest in $cache as it is"
        exit 0
    fi
fi
for package in "$work"/*.deb; do
    dpkg-deb -x "$package" "$work/unpacked"
done

# First match of a path inside the packages, wherever a release puts it (/lib or /usr/lib, /bin or /usr/bin).
unpacked() {
    local path
    for path in "$work/unpacked/"$1 "$work/unpacked/usr/"$1; do
        [ -e "$path" ] && { echo "$path"; return; }
    done
    die "no $1 in the packages"
}
vmlinuz=$(unpacked 'boot/vmlinuz-*')
modules=$(unpacked 'lib/modules/*')
busybox=$(unpacked bin/busybox)
version=${modules##*/}

# ---- the initramfs

root=$work/root
mkdir -p "$root"/{bin,dev,etc,lib,lib64,modules,opt/bin,opt/lib,proc,sys,tmp}
install -m 755 "$here/init" "$root/init"
install -m 755 "$busybox" "$root/bin/busybox"
for applet in $("$busybox" --list); do
    [ -e "$root/bin/$applet" ] || ln -s busybox "$root/bin/$applet"
done
[ ! -e /etc/mke2fs.conf ] || cp /etc/mke2fs.conf "$root/etc/"

# add_program ROOT NAME: adds a program and the libraries that it needs, which the init finds in /opt/lib.
add_program() {
    local path library
    path=$(command -v "$2")
    mkdir -p "$1/opt/bin" "$1/opt/lib"
    install -m 755 "$path" "$1/opt/bin/$2"
    while read -r library; do
        case ${library##*/} in
        ld-linux*) mkdir -p "$1/lib64" && cp -L "$library" "$1/lib64/" ;;
        *) cp -L "$library" "$1/opt/lib/" ;;
        esac
    done < <(ldd "$path" | sed -n 's/^[^/]*\(\/[^ ]*\) (0x.*/\1/p')
}
for program in mke2fs e2fsck; do
    add_program "$root" "$program"
done
# busybox's shell prefers its built-in mke2fs to any in PATH, but has no program of this name.
ln -s mke2fs "$root/opt/bin/mkfs.ext4"

# Modules with their dependencies, in the order to load them, without those that are built into the kernel.
case $modules in
*/usr/lib/*) prefix=$work/unpacked/usr ;;
*) prefix=$work/unpacked ;;
esac
# depmod and modprobe use PREFIX/lib/modules, newer versions PREFIX/usr/lib/modules, so both names exist.
mkdir -p "$work/tree/usr"
ln -s "$prefix/lib" "$work/tree/lib"
ln -s "$prefix/lib" "$work/tree/usr/lib"
depmod -b "$work/tree" "$version"
mkdir "$work/no-config"
modprobe -C "$work/no-config" -d "$work/tree" -S "$version" --show-depends -a virtio_pci virtio_mmio virtio_blk ext4 crc32c |
    sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' >"$work/insmod"
while read -r module; do
    name=${module##*/}
    case $name in
    *.xz) name=${name%.xz} && xz -dc "$module" >"$root/modules/$name" ;;
    *) cp "$module" "$root/modules/$name" ;;
    esac
    echo "$name"
done <"$work/insmod" >"$root/modules/order"
for needed in virtio_blk ext4; do
    grep -q "^$needed\.ko" "$root/modules/order" ||
        grep -q "/$needed\.ko" "$modules/modules.builtin" ||
        die "kernel $version has no $needed"
done

pack() { (cd "$1" && find . -mindepth 1 | sort | cpio -o -H newc -R +0:+0 --quiet); }
pack "$root" >"$work/base.cpio"
if [ "$kind" = full ]; then
    add_program "$work/fio" fio
    # Files of the base are left out.
    (cd "$work/fio" && find . -type f) | while read -r file; do
        [ ! -e "$root/$file" ] || rm "$work/fio/$file"
    done
    pack "$work/fio" >"$work/fio.cpio"
fi

# ---- installation: the list of inputs is written last, so that an interrupted build does not count as complete

rm -f "$cache/built-from"
mv "$work/base.cpio" "$cache/base.cpio"
[ "$kind" = demo ] || mv "$work/fio.cpio" "$cache/fio.cpio"
install -m 644 "$vmlinuz" "$cache/vmlinuz"
printf '%s\n' "$recipe" >"$work/built-from"
mv "$work/built-from" "$cache/built-from"

say "kernel $version, modules: $(tr '\n' ' ' <"$root/modules/order")"
say "made in $((SECONDS - started)) s: $(cd "$cache" && du -h vmlinuz ./*.cpio | awk '{printf "%s %s  ", $2, $1}')"
