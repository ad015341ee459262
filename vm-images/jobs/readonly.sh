# A read-only disk is marked as such, refuses writes, and can be read. Prints `DEVICE-SHA256: ...`.
# shellcheck shell=dash

if [ "$(cat /sys/block/vda/ro)" != 1 ]; then
    echo "the disk does not say that it is read-only"
    exit 1
fi
if dd if=/dev/urandom of=/dev/vda bs=4096 count=1 conv=fsync 2>/tmp/why; then
    echo "a write to a read-only disk was accepted"
    exit 1
fi
echo "write refused: $(head -n 1 /tmp/why)"
if blkdiscard /dev/vda 2>/tmp/why; then
    echo "a discard of a read-only disk was accepted"
    exit 1
fi
echo "discard refused: $(head -n 1 /tmp/why)"
echo "DEVICE-SHA256: $(sha256sum /dev/vda | cut -d ' ' -f 1)"
