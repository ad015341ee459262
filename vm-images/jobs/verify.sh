# Two processes write blocks with a CRC at random offsets, then read all of them back twice, the second time with a cold cache.
# Prints `QUEUES: ...`, and `WRITTEN: ...` when a quarter is written, so that a test can interfere at this moment.
# needs: fio
# shellcheck shell=dash

queues=$(find /sys/block/vda/mq -mindepth 1 -maxdepth 1 | wc -l)
echo "QUEUES: $queues"
[ "$queues" -ge 2 ]

# Each process stays on a processor, and so on a queue, of its own, with half of the disk (at most 24 MiB) for itself.
# shellcheck disable=SC2017 # rounding down is intended
half=$(($(cat /sys/block/vda/size) / 2 * 512 / 1048576 * 1048576))
[ "$half" -gt 0 ]
size=$((half < 25165824 ? half : 25165824))
cat >/tmp/job <<END
[global]
filename=/dev/vda
ioengine=libaio
direct=1
iodepth=16
thread=1
cpus_allowed_policy=split
cpus_allowed=0-1
size=$size
offset_increment=$half
numjobs=2
group_reporting=1
randseed=20260101
verify=crc32c
verify_fatal=1
verify_dump=0

[verify]
rw=randwrite
bssplit=512/10:4k/60:64k/30
fsync=64
END

quarter=$((2 * size / 4 / 512))
# The seventh number of the disk's statistics: sectors written.
until [ "$(awk '{ print $7 }' /sys/block/vda/stat)" -ge "$quarter" ]; do
    usleep 20000
done && echo "WRITTEN: a quarter" &

run() {
    fio --eta=never --output=/tmp/report "$1" || {
        cat /tmp/report
        exit 1
    }
    grep -E 'err=|issued' /tmp/report
}

run /tmp/job
echo 3 >/proc/sys/vm/drop_caches
sed 's/^rw=.*/rw=randread/; s/^fsync=.*/verify_only=1/' /tmp/job >/tmp/again
run /tmp/again
echo "every block has its CRC"
