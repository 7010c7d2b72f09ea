#!/bin/bash
# In the virtual machine: makes the RDMA devices rxe0 and rxe1, runs the command, keeps its exit code.
# Tests find the set-up in MSCCLPP_TEST_*; there, nothing may be skipped for want of a device.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp

# Both ends are in one network namespace (rxe needs the first one). Linux would short-cut between
# own addresses: rules and routes of their own send the packets over the wire.
make_devices() {
  local i other
  ip link set lo up
  ip link add veth0 type veth peer name veth1
  sysctl -qw net.ipv4.conf.all.rp_filter=0
  for i in 0 1; do
    ip link set veth$i mtu 4500 up # RoCE's largest packet, 4096 bytes: fewer of them to emulate
    ip addr add 10.9.0.$((i + 1))/24 dev veth$i
    sysctl -qw net.ipv4.conf.veth$i.accept_local=1 net.ipv4.conf.veth$i.rp_filter=0
  done
  for i in 0 1; do
    other=$((1 - i))
    ip rule add pref $((5 + i)) iif lo from 10.9.0.$((i + 1)) to 10.9.0.$((other + 1)) \
      lookup $((101 + i))
    ip route add 10.9.0.$((other + 1)) dev veth$i src 10.9.0.$((i + 1)) table $((101 + i))
    ip neigh replace 10.9.0.$((other + 1)) lladdr "$(< /sys/class/net/veth$other/address)" \
      dev veth$i nud permanent
  done
  ip rule add pref 10 lookup local
  ip rule del pref 0
  rdma link add rxe0 type rxe netdev veth0 && rdma link add rxe1 type rxe netdev veth1
}

code=1
if make_devices; then
  ulimit -l unlimited
  export MSCCLPP_TEST_REQUIRE_VERBS=1 MSCCLPP_TEST_VERBS_DEVICES=rxe0,rxe1
  export MSCCLPP_TEST_VERBS_LINK=veth0
  bash /run/share/command.sh
  code=$?
else
  echo "guest: the RDMA devices could not be made"
fi
echo $code > /run/share/exit_code
