# One guest of a farm: checks the files of the golden image on /dev/vda, then writes $MIB MiB of files (100 if unset): half of it at random
# places of a large file, a quarter as one file in order, a quarter as files of 64 KiB. Prints `DISK-BYTES: ...`, the bytes that
# the guest's kernel wrote to the disk for that, metadata included.
# needs: fio
# shellcheck shell=dash

mib=${MIB:-100}
mount -t ext4 /dev/vda /mnt
(cd /mnt && sha256sum -c golden.sha256 >/tmp/checked)

cat >/tmp/job <<END
[global]
directory=/mnt
ioengine=psync
end_fsync=1
randrepeat=0
[scattered]
rw=randwrite
filesize=1g
fallocate=native
norandommap=1
bssplit=4k/60:16k/20:64k/20
io_size=$((mib / 2))m
[whole]
stonewall
rw=write
bs=1m
size=$((mib / 4))m
[files]
stonewall
rw=write
bs=64k
nrfiles=$((mib * 4))
size=$((mib / 4))m
END
fio --eta=never --output=/tmp/report /tmp/job || {
    cat /tmp/report
    exit 1
}
umount /mnt
# The seventh number of the disk's statistics: sectors written.
echo "DISK-BYTES: $(($(awk '{ print $7 }' /sys/block/vda/stat) * 512))"
