# The guest of the demo: reads the files of the golden image, then writes new ones.
# shellcheck shell=dash

echo "  guest: Linux $(uname -r), /dev/vda is $(($(cat /sys/block/vda/size) / 2048)) MiB"
mount -t ext4 /dev/vda /mnt
echo "  guest: mounted. These files come from the golden image:"
(cd /mnt && find . -type f | sort | sed 's/^/           /')
echo "  guest: /mnt/welcome.txt says: $(head -n 1 /mnt/welcome.txt)"
(cd /mnt && sha256sum -c golden.sha256 >/tmp/checked) || {
    cat /tmp/checked
    exit 1
}
echo "  guest: all $(wc -l </tmp/checked) checksums of the golden files are right"

echo "  guest: edits welcome.txt, adds notes/ and 8 MiB of random bytes"
echo "The guest was here." >>/mnt/welcome.txt
mkdir /mnt/notes
echo "Written inside the virtual machine." >/mnt/notes/hello.txt
dd if=/dev/urandom of=/mnt/notes/random.bin bs=1M count=8 2>/dev/null
sync
(cd /mnt && sha256sum welcome.txt notes/*) >/tmp/written

umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 /dev/vda /mnt
(cd /mnt && sha256sum -c /tmp/written >/tmp/checked)
umount /mnt
echo "  guest: unmounted, mounted again, read the same; done, switching off"
