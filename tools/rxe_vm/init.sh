#!/bin/busybox sh
# First program of the virtual machine: loads the modules, puts a writable layer over the host's
# root and runs guest.sh in there. run.py fills in MODULES.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin

die() {
  echo "init: $*"
  poweroff -f
}

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in @MODULES@; do
  modprobe "$module" || echo "init: cannot load $module"
done

mkdir -p /lower /layer /new
options=trans=virtio,version=9p2000.L,msize=524288
mount -t 9p -o "$options,ro,cache=loose" hostroot /lower || die "cannot mount the host's root"
mount -t tmpfs tmpfs /layer
mkdir -p /layer/upper /layer/work
mount -t overlay -o lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work overlay /new ||
  die "cannot put a writable layer over the host's root"
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t devtmpfs dev /new/dev
ln -s /proc/self/fd /new/dev/fd
mkdir -p /new/dev/shm
mount -t tmpfs tmpfs /new/dev/shm
mkdir -p /new/run/share
mount -t 9p -o "$options" share /new/run/share || die "cannot mount the share"
chroot /new /bin/bash /run/share/guest.sh < /dev/null
sync
poweroff -f
