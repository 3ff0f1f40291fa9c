#!/usr/bin/env bash
# Run a command on N "hosts" of this machine, joined by links of a given rate, and leave nothing behind.
#
#   benchmarks/cluster.sh N[xM] RATE COMMAND...    (RATE as tc spells it: 200mbit, 1gbit; root, iproute2)
#
# Each host is a network, hostname and mount namespace with an eth0 of its own; every link is shaped both ways. The
# command runs on all hosts at once, M times on each (once by default), as a rank of NM: RANK, WORLD_SIZE, MASTER_ADDR
# and the like are set. The exit status is 0 if it is 0 for every rank.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

if [ "${1:-}" != --inside ]; then
    [ $# -ge 3 ] || { echo "usage: cluster.sh N[xM] RATE COMMAND..." >&2; exit 2; }
    # The switch is a network namespace too, and this script's own: all of it ends with the script.
    exec unshare --net --mount --propagation private bash "$0" --inside "$@"
fi
shift
count=${1%x*} rate=$2 each=1
case $1 in *x*) each=${1#*x} ;; esac
shift 2

folder=$(mktemp -d)
hosts=()
# shellcheck disable=SC2317 # called by the trap
finish() {
    for pid in "${hosts[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    rm -rf "$folder"
}
trap finish EXIT

# Names from files alone: there is no name server in there, and a look-up would wait for one.
sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$folder/nsswitch.conf"
echo "127.0.0.1 localhost" >"$folder/hosts"
for i in $(seq "$count"); do echo "10.91.0.$i host$i" >>"$folder/hosts"; done
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
mount --bind "$folder/hosts" /etc/hosts

ip link set lo up
ip link add br0 type bridge
ip link set br0 up
for i in $(seq "$count"); do
    mkfifo "$folder/up$i"
    # shellcheck disable=SC2016 # $1 and $2 are for the inner shell
    unshare --net --uts bash -c 'hostname "$1"; ip link set lo up; echo >"$2"; exec sleep infinity' - \
        "host$i" "$folder/up$i" &
    pid=$!
    disown "$pid" # or bash would report its end
    hosts+=("$pid")
    read -r <"$folder/up$i"
    ip link add "port$i" type veth peer name eth0 netns "$pid"
    ip link set "port$i" master br0 up
    nsenter -t "$pid" -n ip addr add "10.91.0.$i/24" dev eth0
    nsenter -t "$pid" -n ip link set eth0 up
    # A burst holds two of the largest segments; with a large one, small messages would pass at no rate at all.
    tc qdisc add dev "port$i" root tbf rate "$rate" burst 128kb latency 200ms
    nsenter -t "$pid" -n tc qdisc add dev eth0 root tbf rate "$rate" burst 128kb latency 200ms
done

ranks=()
for ((rank = 0; rank < count * each; rank++)); do
    nsenter -t "${hosts[rank / each]}" -n -u -- env RANK=$rank WORLD_SIZE=$((count * each)) \
        LOCAL_RANK=$((rank % each)) LOCAL_WORLD_SIZE="$each" MASTER_ADDR=10.91.0.1 MASTER_PORT=29500 \
        GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 "$@" &
    ranks+=("$!")
done
status=0
for pid in "${ranks[@]}"; do wait "$pid" || status=$?; done
exit "$status"
