#!/usr/bin/env bash
# The demo: a golden image stays unchanged while a virtual machine works on a child of it. Meanwhile, a snapshot is taken,
# and the child is merged into it afterwards. Run by `make demo`.
#
# Installs its dependencies (.ci/install demo), builds diffdisk, and works in target/demo.* (or $DIFFDISK_DEMO_DIR, which is
# then kept). Exits with 0 only if every step succeeded. An error is printed with the daemon's log.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/.." && pwd)
target=${CARGO_TARGET_DIR:-$top/target}
PATH=$PATH:/usr/sbin:/sbin

if [ -t 1 ] && [ -z "${NO_COLOR-}" ]; then
    bold=$'\e[1;36m' green=$'\e[1;32m' red=$'\e[1;31m' plain=$'\e[0m'
else
    bold='' green='' red='' plain=''
fi

steps=0
step() {
    steps=$((steps + 1))
    printf '\n%s%d. %s%s\n' "$bold" "$steps" "$*" "$plain"
}
say() { printf '  %s\n' "$*"; }
# Prints a command as it would be typed, then runs it.
run() {
    printf '  $ %s' "${1##*/}"
    printf ' %s' "${@:2}"
    printf '\n'
    "$@"
}
fail() { printf '%sdemo: %s%s\n' "$red" "$*" "$plain" >&2; exit 1; }

work='' rendezvous='' daemon=''
clean_up() {
    local status=$?
    trap - EXIT
    if [ -n "$daemon" ]; then
        kill -KILL "$daemon" 2>/dev/null || true
    fi
    if [ "$status" -ne 0 ] && [ -n "$work" ] && [ -s "$work/diffdiskd.log" ]; then
        printf '\n%sthe daemon said:%s\n' "$red" "$plain" >&2
        cat "$work/diffdiskd.log" >&2
    fi
    [ -z "$rendezvous" ] || rm -rf "$rendezvous"
    if [ -n "$work" ] && [ -z "${DIFFDISK_DEMO_DIR-}" ]; then
        rm -rf "$work"
    fi
    [ "$status" -eq 0 ] || printf '%sdemo: failed%s\n' "$red" "$plain" >&2
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step "Getting ready"
command -v cargo >/dev/null || fail "no cargo: install Rust first, https://rustup.rs"
"$top/.ci/install" demo
"$here/build-guest.sh" demo
(cd "$top" && cargo build --release --bins)
diffdisk=$target/release/diffdisk
diffdiskd=$target/release/diffdiskd

if [ -n "${DIFFDISK_DEMO_DIR-}" ]; then
    mkdir -p "$DIFFDISK_DEMO_DIR"
    work=$(cd "$DIFFDISK_DEMO_DIR" && pwd)
    rm -f "$work/golden.vhd" "$work/child.vhd" "$work/before.vhd"
else
    mkdir -p "$target"
    work=$(mktemp -d "$target/demo.XXXXXX")
fi
# A socket's path must be short, and that of the work folder may be long.
rendezvous=$(mktemp -d "${TMPDIR:-/tmp}/diffdisk.XXXXXX")
socket=$rendezvous/disk.sock
control=$rendezvous/control
cd "$work"

step "A golden image: an ext4 file system with some files, 256 MiB, as a dynamic VHD"
rm -rf files
mkdir -p files/docs
echo "Welcome to the golden image. Nobody will change me." >files/welcome.txt
for chapter in 1 2 3; do
    seq "$chapter" 3 60000 >"files/docs/chapter-$chapter.txt"
done
(cd files && find . -type f | sort | xargs sha256sum) >golden.sha256
mv golden.sha256 files/
rm -f golden.raw
truncate -s 256M golden.raw
mke2fs -q -t ext4 -E root_owner=0:0 -d files golden.raw
run "$diffdisk" convert golden.raw golden.vhd --to dynamic --from raw
rm -rf golden.raw files
run chmod 0444 golden.vhd
golden_before=$(sha256sum golden.vhd)
say "SHA-256 ${golden_before%% *}"

step "A child of it: it holds only what differs, so far nothing"
run "$diffdisk" create child.vhd --parent golden.vhd
say "golden.vhd takes $(du -h golden.vhd | cut -f 1) on the disk, child.vhd $(du -h child.vhd | cut -f 1)"

step "The daemon serves the child over vhost-user-blk"
say "\$ diffdiskd --socket-path=$socket --control=$control --blk-file=child.vhd &"
"$diffdiskd" --socket-path="$socket" --control="$control" --blk-file=child.vhd 2>diffdiskd.log &
daemon=$!
for _ in $(seq 100); do
    [ ! -S "$socket" ] || break
    kill -0 "$daemon" 2>/dev/null || fail "the daemon ended at its start"
    sleep 0.1
done
[ -S "$socket" ] || fail "the daemon has no socket after 10 s"

# Takes a snapshot one second after QEMU has connected.
snapshot_while_running() {
    for _ in $(seq 600); do
        if "$diffdisk" ctl disk child.vhd --json | grep -q '"connected": *true'; then
            sleep 1
            exec "$diffdisk" ctl snapshot child.vhd --keep-as before.vhd
        fi
        sleep 0.1
    done
    echo "QEMU did not connect to the daemon"
    return 1
}

step "A virtual machine boots with it as its disk (QEMU, Linux; a few seconds)"
export DIFFDISK_CONTROL=$control
snapshot_while_running >snapshot.txt 2>&1 &
snapshot=$!
"$here/run-guest.sh" --socket "$socket" --job "$here/jobs/demo.sh" --timeout 180 | sed '/^$/d; /^\[ /d; /^GUEST-RESULT/d' ||
    fail "the guest failed"

step "A snapshot was taken while the machine worked"
wait "$snapshot" || { cat snapshot.txt >&2; fail "there is no snapshot"; }
say "\$ diffdisk ctl snapshot child.vhd --keep-as before.vhd"
sed 's/^/  /' snapshot.txt

step "The daemon is asked to end (SIGTERM)"
kill -TERM "$daemon"
status=0
wait "$daemon" || status=$?
daemon=''
[ "$status" -eq 0 ] || fail "the daemon ended with status $status"
say "it committed all writes, closed the disk, and ended with exit code 0"

step "The golden image is what it was"
golden_after=$(sha256sum golden.vhd)
say "before ${golden_before%% *}"
say "after  ${golden_after%% *}"
[ "$golden_before" = "$golden_after" ] || fail "golden.vhd has changed"

step "All that the machine wrote is in the child and the snapshot"
"$diffdisk" check child.vhd --chain || fail "child.vhd is not sound"
say "child.vhd: $(stat -c %s child.vhd) bytes long, $(du -h child.vhd | cut -f 1) on the disk, for a disk of 256 MiB"
run "$diffdisk" info child.vhd --chain

step "The snapshot is not needed any more: the child is merged into it"
run "$diffdisk" merge child.vhd
run "$diffdisk" info before.vhd --chain

step "Which file contains which part of the disk"
echo "  \$ diffdisk map before.vhd"
"$diffdisk" map before.vhd >map.txt
head -n 16 map.txt
lines=$(wc -l <map.txt)
[ "$lines" -le 16 ] || say "... and $((lines - 16)) lines more"

printf '\n%sDone: the machine had its own disk, the golden image kept every byte.%s\n' "$green" "$plain"
if [ -n "${DIFFDISK_DEMO_DIR-}" ]; then
    say "The images are kept in $work"
fi
