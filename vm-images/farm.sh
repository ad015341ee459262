#!/usr/bin/env bash
# A farm: many guests on children of one golden image, served by one daemon from a file system that they nearly fill. Shows that
# the children take about what their guests write. Needs root, for the loop device, and what `make guest` builds.
#
#   vm-images/farm.sh [GUESTS] [HOST-SIZE] [MIB]
#
#   GUESTS      children and guests (64)
#   HOST-SIZE   size of the ext4 file system that holds the images, as for truncate (8G)
#   MIB         MiB of files that each guest writes (100)
#
# FARM_AT_ONCE (2) guests run at a time. After FARM_MINUTES (40) no further guest starts; the summary says how many ran.
# Ends with 0 if every guest and every check succeeded, the daemon never found its host full, and `df` agrees within 20 % with
# what the guests wrote to their disks. FARM_DIR is where the file of the host file system is made (target/).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/.." && pwd)
target=${CARGO_TARGET_DIR:-$top/target}
cache=${DIFFDISK_CACHE:-$here/cache}
PATH=$PATH:/usr/sbin:/sbin

die() { printf 'farm: %s\n' "$*" >&2; exit 1; }
say() { printf '%5d s  %s\n' "$SECONDS" "$*"; }

guests=${1:-64} size=${2:-8G} mib=${3:-100}
at_once=${FARM_AT_ONCE:-2} limit=$((${FARM_MINUTES:-40} * 60))
for number in "$guests" "$mib" "$at_once"; do
    case $number in
    '' | *[!0-9]* | 0) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
    esac
done
[ "$(id -u)" -eq 0 ] || die "a loop device needs root"
diffdisk=$target/release/diffdisk diffdiskd=$target/release/diffdiskd
[ -x "$diffdiskd" ] || die "no $diffdiskd: run make build"
[ -e "$cache/fio.cpio" ] || die "no guest with fio in $cache: run make guest"

folder=${FARM_DIR:-$target}
mkdir -p "$folder"
work=$(mktemp -d "$folder/farm.XXXXXX")
# The path of a socket must be short, and the live journals must be in memory.
runtime=$(mktemp -d -p /dev/shm farm.XXXXXX)
host=$work/host daemon='' mounted=''
declare -A running=()
# shellcheck disable=SC2317 # the trap reaches it
clean_up() {
    local status=$?
    trap - EXIT
    [ ${#running[@]} -eq 0 ] || kill "${!running[@]}" 2>/dev/null || true
    [ -z "$daemon" ] || kill -KILL "$daemon" 2>/dev/null || true
    wait
    # The kernel closes the files of a killed daemon a moment after the daemon has ended.
    [ -z "$mounted" ] || umount "$host" 2>/dev/null || { sleep 1 && umount "$host"; } || umount --lazy "$host"
    rm -rf "$runtime"
    if [ "$status" -eq 0 ]; then
        rm -rf "$work"
    else
        rm -f "$work/file-system"
        printf 'farm: the logs are in %s\n' "$work" >&2
    fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

truncate -s "$size" "$work/file-system"
mkfs.ext4 -q -F "$work/file-system"
mkdir "$host"
mount -o loop "$work/file-system" "$host"
mounted=yes

say "a golden image of 4 GiB with the guest's files, and $guests children"
mkdir "$work/files"
cp "$cache/base.cpio" "$cache/vmlinuz" "$work/files"
(cd "$work/files" && sha256sum -- * >"$work/golden.sha256" && mv "$work/golden.sha256" .)
truncate -s 4G "$work/golden.raw"
# Without these options each guest's kernel would zero the unused inode tables.
mke2fs -q -t ext4 -E lazy_itable_init=0,lazy_journal_init=0 -d "$work/files" "$work/golden.raw"
"$diffdisk" convert --quiet --from raw --to dynamic "$work/golden.raw" "$host/golden.vhd"
rm -rf "$work/golden.raw" "$work/files"
for i in $(seq "$guests"); do
    "$diffdisk" create --quiet "$host/child-$i.vhd" --parent "$host/golden.vhd"
    printf '[[disk]]\npath = "%s"\nsocket = "%s"\nqueues = 1\n' "$host/child-$i.vhd" "$runtime/$i"
done >"$work/farm.toml"
{
    echo '# needs: fio'
    echo "MIB=$mib"
    cat "$here/jobs/farm.sh"
} >"$work/job.sh"

# Adds up the numbers of its input.
sum() { awk '{ sum += $1 } END { printf "%.0f", sum }'; }
# Prints the bytes that all children take in the file system.
taken() { echo $(($(stat -c '%b' "$host"/child-*.vhd | sum) * 512)); }
used() { df --output=used -B1 "$host" | tail -n 1; }
in_mib() { echo $((($1 + 524288) / 1048576)); }

sync -f "$host"
used_before=$(used)
ulimit -n "$(ulimit -Hn)"
"$diffdiskd" --no-system-config --runtime-dir "$runtime" --config "$work/farm.toml" 2>"$work/daemon.log" &
daemon=$!
for _ in $(seq 300); do
    [ ! -S "$runtime/$guests" ] || break
    kill -0 "$daemon" 2>/dev/null || { cat "$work/daemon.log" >&2 && die "the daemon ended at its start"; }
    sleep 0.1
done
say "the daemon serves them"

# Waits until one guest has ended.
reap() {
    local status=0 ended
    wait -n -p ended "${!running[@]}" || status=$?
    local i=${running[$ended]}
    unset "running[$ended]"
    if [ "$status" -ne 0 ]; then
        tail -n 20 "$work/guest-$i.log" >&2
        die "guest $i ended with status $status"
    fi
    say "guest $i has written; all children take $(in_mib "$(taken)") MiB, $(df --output=avail -BM "$host" | tail -n 1 | tr -d ' ') are left"
}

ran=0
for i in $(seq "$guests"); do
    [ "$SECONDS" -lt "$limit" ] || break
    [ ${#running[@]} -lt "$at_once" ] || reap
    "$here/run-guest.sh" --socket "$runtime/$i" --job "$work/job.sh" --timeout 600 >"$work/guest-$i.log" 2>&1 &
    running[$!]=$i
    ran=$i
done
while [ ${#running[@]} -gt 0 ]; do
    reap
done

sync -f "$host"
served=$(taken)
used_served=$(($(used) - used_before))
kill -TERM "$daemon"
status=0
wait "$daemon" || status=$?
daemon=''
[ "$status" -eq 0 ] || { cat "$work/daemon.log" >&2 && die "the daemon ended with status $status"; }
sync -f "$host"
closed=$(taken)
used_closed=$(($(used) - used_before))
! grep -i 'full\|no space' "$work/daemon.log" >&2 || die "the daemon found its host full"
for i in $(seq "$guests"); do
    "$diffdisk" check --no-system-config "$host/child-$i.vhd" >"$work/check.log" || { cat "$work/check.log" >&2 && die "child $i is not sound"; }
done

to_disk=$(sed -n 's/.*DISK-BYTES: \([0-9]*\).*/\1/p' "$work"/guest-*.log | sum)
files=$((ran * mib * 1048576))
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'; }
echo
echo "guests:                     $ran of $guests, $mib MiB of files each, in $SECONDS s"
echo "host file system:           ext4 of $size, $(df --output=avail -BM "$host" | tail -n 1 | tr -d ' ') left at the end"
echo "files written:              $(in_mib "$files") MiB"
echo "written to the disks:       $(in_mib "$to_disk") MiB, with metadata and what was written twice"
echo "children, served:           $(in_mib "$served") MiB, $(ratio "$served" "$files") of the files, $(ratio "$served" "$to_disk") of what was written; df: $(in_mib "$used_served") MiB"
echo "children, after a clean end: $(in_mib "$closed") MiB, $(ratio "$closed" "$files") of the files, $(ratio "$closed" "$to_disk") of what was written; df: $(in_mib "$used_closed") MiB"
awk -v a="$used_served" -v b="$to_disk" 'BEGIN { exit !(a <= 1.2 * b) }' || die "the children took more than 1.2 times what was written"
