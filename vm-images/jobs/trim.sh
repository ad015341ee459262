# Deletes the files of fill.sh and trims the file system. Prints `TRIMMED-BYTES: ...`.
# shellcheck shell=dash

mount -t ext4 /dev/vda /mnt
sha256sum -c /mnt/fill.sha256
rm /mnt/fill
sync
trimmed=$(fstrim -v /mnt)
echo "$trimmed"
umount /mnt
e2fsck -f -n /dev/vda
# busybox prints "/mnt: 123 bytes trimmed".
bytes=$(echo "$trimmed" | sed -n 's/.* \([0-9]\{1,\}\) bytes.*/\1/p')
echo "TRIMMED-BYTES: $bytes"
[ "$bytes" -ge 67108864 ]
