#!/usr/bin/env bash
# Runs the jobs of this folder in the guest on three disks one after another, and prints the results in one table:
#
#   chain    diffdiskd on a fresh child of a chain of 16 VHDs, which has the data
#   flat     diffdiskd on one fixed VHD with the same data
#   qcow2    qemu-storage-daemon on a fresh overlay of a chain of 16 qcow2 images
#
#   benches/fio/run.sh [JOB ...]     randread randwrite seq mixed, or some of them
#
# SECONDS_EACH (5) is the duration of a job. Unless DIFFDISK_ACCEL=kvm works on this machine, the processor of the guest
# is emulated. The absolute figures then include the emulation, and only the comparison is meaningful. `make bench` uses
# no guest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

seconds=${SECONDS_EACH:-5}
programs=${CARGO_TARGET_DIR:-target}/release
jobs=("$@")
[ ${#jobs[@]} -gt 0 ] || jobs=(randread randwrite seq mixed)

work=$(mktemp -d) runtime=$(mktemp -d -p /dev/shm)
server=
# shellcheck disable=SC2317 # called by the trap
clean_up() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    rm -rf "$work" "$runtime"
}
trap clean_up EXIT

# serve KIND: starts a server of the disk in $work
serve() {
    rm -f "$work/socket"
    case $1 in
    chain | flat)
        "$programs/diffdiskd" --blk-file "$work/$1.vhd" --socket-path "$work/socket" --runtime-dir "$runtime" \
            --allow-parents "$disks" --log-level warn &
        ;;
    qcow2)
        qemu-storage-daemon --object iothread,id=io \
            --blockdev "driver=file,node-name=file,aio=io_uring,filename=$work/qcow2.qcow2,discard=unmap" \
            --blockdev driver=qcow2,node-name=disk,file=file,discard=unmap \
            --export "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=$work/socket,writable=on,iothread=io" &
        ;;
    esac
    server=$!
    for _ in $(seq 100); do
        [ ! -S "$work/socket" ] || return 0
        sleep 0.05
    done
    echo "fio: no socket of the server of $1" >&2
    return 1
}

stop() {
    kill "$server"
    wait "$server" || true
    server=
}

echo "making the disks"
disks=$(cargo bench --bench serve -- --disks | tail -n 1)
"$programs/diffdisk" create --quiet "$work/chain.vhd" --parent "$disks/vhd-16-15" --allow-parents "$disks"
"$programs/diffdisk" convert --quiet --from raw --to fixed "$disks/raw-1-0" "$work/flat.vhd"
qemu-img create -q -f qcow2 -F qcow2 -b "$disks/qcow2-16-15" "$work/qcow2.qcow2"

for kind in chain flat qcow2; do
    for job in "${jobs[@]}"; do
        echo "$kind $job"
        {
            echo '# needs: fio'
            echo "export DISK=/dev/vda RUNTIME=$seconds"
            echo "cat >/tmp/job.fio <<'END'"
            cat "benches/fio/$job.fio"
            echo END
            echo "fio --output-format=terse --terse-version=3 /tmp/job.fio | sed 's/^/FIO: /'"
        } >"$work/job.sh"
        serve "$kind"
        vm-images/run-guest.sh --socket "$work/socket" --job "$work/job.sh" >"$work/console" 2>&1 ||
            { cat "$work/console" >&2; exit 1; }
        stop
        # Fields of fio's terse version 3: 3 name, 7 and 8 KiB/s and IOPS of reads, 48 and 49 KiB/s and IOPS of writes.
        sed -n 's/.*FIO: //p' "$work/console" | tr -d '\r' |
            awk -F ';' -v kind="$kind" '{ printf "%s %s %d %d\n", kind, $3, $8, $49 }' >>"$work/results"
    done
done

printf '\n%-14s%12s%12s%12s%18s   IOPS in the guest\n' job chain flat qcow2 'chain over qcow2'
awk '{
    iops = $3 + $4
    if (!($2 in seen)) { seen[$2] = 1; order[++n] = $2 }
    value[$2, $1] = iops
} END {
    for (i = 1; i <= n; i++) {
        job = order[i]
        ratio = value[job, "qcow2"] ? value[job, "chain"] / value[job, "qcow2"] : 0
        printf "%-14s%12d%12d%12d%18.2f\n", job, value[job, "chain"], value[job, "flat"], value[job, "qcow2"], ratio
    }
}' "$work/results"
