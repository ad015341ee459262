# Writes 64 MiB of incompressible data to a new file system on /dev/vda. trim.sh frees the space.
# shellcheck shell=dash

mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/fill bs=1M count=64 2>/dev/null
sha256sum /mnt/fill >/mnt/fill.sha256
umount /mnt
echo "FILLED-BYTES: 67108864"
