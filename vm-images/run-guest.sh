#!/usr/bin/env bash
# Boots the test guest on vhost-user-blk disks, runs one job in it, and exits with the job's status.
#
#   vm-images/run-guest.sh --socket PATH [--socket PATH2 ...] --job FILE
#       [--machine q35|microvm] [--private-memory] [--queues N] [--memory SIZE] [--reconnect] [--timeout SECONDS]
#
#   --socket PATH   a back-end's socket; the first is /dev/vda, the next /dev/vdb, ...
#   --job FILE      a shell script for the guest; it runs under `sh -eu` as root
#   --machine M     QEMU's machine: q35 (the default), with disks on PCI, or microvm, with disks on virtio-mmio
#   --private-memory  the guest's memory is not shared with the back-end: a configuration error
#   --queues N      request queues of each disk, and processors of the guest (1)
#   --memory SIZE   the guest's memory (512M)
#   --reconnect     a back-end that goes away may come back on the same socket
#   --timeout S     the guest is stopped after that many seconds (300)
#
# The back-end decides whether a disk is read-only. The guest's console goes to standard output.
# Exits with the job's status, 124 after the timeout, 1 if the guest ended without a result.
# DIFFDISK_ACCEL (tcg) is QEMU's accelerator, DIFFDISK_CACHE the folder of the built guest, QEMU the program.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${DIFFDISK_CACHE:-$here/cache}
qemu=${QEMU:-qemu-system-x86_64}
accel=${DIFFDISK_ACCEL:-tcg}

die() { printf 'run-guest: %s\n' "$*" >&2; exit 1; }
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }

sockets=() job='' machine=q35 share=on kernel_extra='' queues=1 memory=512M reconnect='' limit=300
while [ $# -gt 0 ]; do
    case $1 in
    --reconnect) reconnect=yes && shift && continue ;;
    --private-memory) share=off && shift && continue ;;
    --socket | --job | --machine | --queues | --memory | --timeout) [ $# -ge 2 ] || usage ;;
    *) usage ;;
    esac
    case $1 in
    --socket) sockets+=("$2") ;;
    --job) job=$2 ;;
    --machine) machine=$2 ;;
    --queues) queues=$2 ;;
    --memory) memory=$2 ;;
    --timeout) limit=$2 ;;
    esac
    shift 2
done
if [ ${#sockets[@]} -eq 0 ] || [ -z "$job" ]; then
    usage
fi
case $machine in
q35) device=vhost-user-blk-pci ;;
microvm)
    device=vhost-user-blk
    # An emulated microvm has no timer with which the kernel could calibrate the processor's speed.
    kernel_extra=" tsc_early_khz=2000000 lpj=4000000"
    ;;
*) usage ;;
esac

command -v "$qemu" >/dev/null || die "no $qemu: run .ci/install demo"
command -v cpio >/dev/null || die "no cpio: run .ci/install demo"
[ -e "$cache/built-from" ] || die "no guest in $cache: run vm-images/build-guest.sh"
[ -r "$job" ] || die "cannot read the job $job"
for socket in "${sockets[@]}"; do
    [ -S "$socket" ] || die "no socket at $socket: is the back-end running?"
done

work=$(mktemp -d)
guest=
# shellcheck disable=SC2317 # called by the traps
clean_up() {
    [ -z "$guest" ] || kill "$guest" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# The kernel unpacks concatenated archives, each of which begins at a multiple of four bytes. cpio pads to 512.
install -m 755 "$job" "$work/job.sh"
archives=("$cache/base.cpio")
if grep -q '^# needs: fio$' "$job"; then
    [ -e "$cache/fio.cpio" ] || die "the guest has no fio: run vm-images/build-guest.sh full"
    archives+=("$cache/fio.cpio")
fi
(cd "$work" && echo job.sh | cpio -o -H newc -R +0:+0 --quiet) >"$work/job.cpio"
cat "${archives[@]}" "$work/job.cpio" >"$work/initramfs"

# QEMU 9.2 renamed the option, and counts in milliseconds since.
chardev_extra=
if [ -n "$reconnect" ]; then
    version=$("$qemu" --version | sed -n 's/^QEMU emulator version \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
    read -r major minor <<<"$version"
    if [ "$major" -gt 9 ] || { [ "$major" -eq 9 ] && [ "$minor" -ge 2 ]; }; then
        chardev_extra=,reconnect-ms=1000
    else
        chardev_extra=,reconnect=1
    fi
fi

# shellcheck disable=SC2054 # the commas are QEMU's
arguments=(
    -nodefaults -no-user-config -no-reboot -display none
    -machine "$machine,memory-backend=memory"
    -object "memory-backend-memfd,id=memory,size=$memory,share=$share"
    -m "$memory" -accel "$accel" -smp "$queues"
    -kernel "$cache/vmlinuz" -initrd "$work/initramfs"
    -append "console=ttyS0 quiet loglevel=3 panic=-1 random.trust_cpu=on mitigations=off$kernel_extra"
    -chardev stdio,id=console,signal=off -serial chardev:console
)
case $accel in
kvm*) arguments+=(-cpu host) ;;
*) arguments+=(-cpu max) ;;
esac
for i in "${!sockets[@]}"; do
    arguments+=(
        -chardev "socket,id=socket$i,path=${sockets[i]//,/,,}$chardev_extra"
        -device "$device,id=disk$i,chardev=socket$i,num-queues=$queues"
    )
done

result=
exec 3< <(exec timeout -k 5 "$limit" "$qemu" "${arguments[@]}" </dev/null 2>&1)
guest=$!
while IFS= read -r line <&3; do
    line=${line%$'\r'}
    case $line in
    GUEST-RESULT:\ *) result=${line#GUEST-RESULT: } ;;
    esac
    printf '%s\n' "$line"
done
status=0
wait "$guest" || status=$?
guest=

if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    printf 'run-guest: the guest did not end within %s s\n' "$limit" >&2
    exit 124
elif [ "$status" -ne 0 ]; then
    die "$qemu ended with status $status"
fi
case $result in
'' | *[!0-9]*) die "the guest ended without a result" ;;
esac
exit "$result"
