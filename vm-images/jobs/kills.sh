# A file system under load for 45 seconds, while the host kills and restarts the disk's back-end.
# Prints `LOAD: begins` and `LOAD: over`, between which the host may do so, and `ROUNDS: ...`. Fails on any error in the guest.
# needs: fio
# shellcheck shell=dash

seconds() { cut -d . -f 1 /proc/uptime; }

mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
mkdir /mnt/tree
cat >/tmp/job <<END
[global]
directory=/mnt
ioengine=libaio
direct=1
iodepth=16
thread=1
cpus_allowed_policy=split
cpus_allowed=0-1
size=6m
numjobs=2
group_reporting=1
verify=crc32c
verify_fatal=1
verify_dump=0

[verify]
rw=randwrite
bssplit=512/10:4k/60:64k/30
fsync=32
END

echo "LOAD: begins"
end=$(($(seconds) + 45))
rounds=0
while [ "$(seconds)" -lt "$end" ]; do
    rounds=$((rounds + 1))
    fio --eta=never --randseed="$rounds" --output=/tmp/report /tmp/job || {
        cat /tmp/report
        exit 1
    }
    # Writes the cache back, drops it, and reads all files again.
    for i in $(seq 1 20); do
        seq "$rounds" "$((i * 500 + rounds))" >"/mnt/tree/$i"
    done
    rm -rf "/mnt/copy-$((rounds - 2))"
    cp -a /mnt/tree "/mnt/copy-$rounds"
    (cd /mnt && find tree copy-* -type f -print0 | xargs -0 sha256sum) >/tmp/written
    sync
    echo 3 >/proc/sys/vm/drop_caches
    (cd /mnt && sha256sum -c /tmp/written >/tmp/checked) || {
        grep -v ': OK$' /tmp/checked
        exit 1
    }
done
echo "LOAD: over"
echo "ROUNDS: $rounds"

umount /mnt
echo 3 >/proc/sys/vm/drop_caches
e2fsck -f -n /dev/vda
mount -t ext4 -o ro,noload /dev/vda /mnt
(cd /mnt && sha256sum -c /tmp/written >/tmp/checked)
umount /mnt
echo "$(wc -l </tmp/checked) files are as written"
dmesg >/tmp/dmesg
[ -s /tmp/dmesg ]
if grep -i -E 'error|critical|hung|blocked for|EXT4-fs warning' /tmp/dmesg; then
    echo "the kernel noticed something"
    exit 1
fi
