# Creates a file system, fills it with many small and some large files, checks it, and reads the files again.
# Prints `DEVICE-SHA256: ...` of all of /dev/vda, read with a cold cache.
# shellcheck shell=dash

forget_caches() {
    sync
    blockdev --flushbufs /dev/vda
    echo 3 >/proc/sys/vm/drop_caches
}

echo "mkfs.ext4"
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt

echo "many small files, a tree of programs, and large ones that do not compress"
mkdir /mnt/small /mnt/large
for i in $(seq 1 200); do
    seq "$i" "$((i * 7))" >"/mnt/small/$i"
done
cp -a /opt /bin /mnt/
for i in 1 2 3; do
    seq "$i" 3 700000 | gzip -1 >"/mnt/large/$i.gz"
done
sync
echo "some go, some grow, some change in the middle"
for i in $(seq 2 2 200); do
    rm "/mnt/small/$i"
done
seq 1 50000 >>/mnt/large/1.gz
seq 1 1000 | dd of=/mnt/large/2.gz bs=512 seek=333 conv=notrunc 2>/dev/null
truncate -s 100000 /mnt/large/3.gz

(cd /mnt && find . -type f | sort | xargs sha256sum) >/tmp/written
umount /mnt
forget_caches

echo "e2fsck"
e2fsck -f -n /dev/vda

mount -t ext4 -o ro,noload /dev/vda /mnt
(cd /mnt && find . -type f | sort | xargs sha256sum) >/tmp/read
umount /mnt
cmp /tmp/written /tmp/read
echo "$(wc -l </tmp/read) files read back as written"

forget_caches
echo "DEVICE-SHA256: $(sha256sum /dev/vda | cut -d ' ' -f 1)"
