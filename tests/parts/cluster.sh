#!/usr/bin/env bash
# Several hosts on this machine, for tests: each has its own network, host name, processes and /dev/shm, and all
# share the file system, as on a cluster. They are namespaces: nothing else on the machine changes. Needs root.
#
#   cluster.sh up DIR N [RATE]              node1..nodeN on a switch until standard input ends; RATE (1gbit)
#                                           limits every link both ways; prints "ready"; DIR keeps its state
#   cluster.sh on DIR HOST COMMAND...       run a command there, in this folder; it ends with its caller
#   cluster.sh cable DIR HOST up|down|RATE  pull the cable (the others are not told), put it back, or limit it
#   cluster.sh off DIR HOST                 power off: every process there dies at once; the host can be used again,
#                                           as after a restart
#
# The host "switch" is reachable from all others too, for what belongs to no node. Exit status 77: the kernel does not
# let us.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

network=10.77.0

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

refused() {
    echo "cluster.sh: refused here: $*" >&2
    exit 77
}

# What runs in a host as its process 1: it reaps orphans (bash does), and when it dies, all die with it.
# shellcheck disable=SC2016 # for that bash to expand
init='hostname "$1"
    mount --bind "$2/hosts" /etc/hosts
    mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    ip link set lo up
    touch "$2/$1.ready"
    trap : TERM INT HUP
    while :; do sleep infinity & wait $! || :; done'

boot() { # HOST
    setpriv --pdeathsig KILL \
        unshare --net --uts --mount --pid --ipc --fork --kill-child --propagation private --mount-proc \
        bash -euc "$init" init "$1" "$dir" >"$dir/$1.log" 2>&1 </dev/null &
    local parent=$! children
    for _ in {1..600}; do
        [ ! -e "$dir/$1.ready" ] || break
        kill -0 "$parent" 2>/dev/null || refused "$(cat "$dir/$1.log")"
        sleep 0.05
    done
    [ -e "$dir/$1.ready" ] || fail "$1 did not start within 30 s: $(cat "$dir/$1.log")"
    children=$(cat "/proc/$parent/task/$parent/children")
    echo "${children%% *}" >"$dir/$1.pid"
}

pid_of() { # HOST
    cat "$dir/$1.pid" 2>/dev/null || fail "no host $1 in $dir"
}

# Sets `entered`: the words that run what follows them on a host.
enter() { # HOST
    local pid
    pid=$(pid_of "$1")
    entered=(nsenter -t "$pid" --net --uts --mount --pid --ipc --wd="$PWD" setpriv --pdeathsig TERM --)
}

on() { # HOST COMMAND...
    enter "$1"
    "${entered[@]}" "${@:2}"
}

limit() { # HOST RATE
    on "$1" tc qdisc replace dev eth0 root tbf rate "$2" burst 256kb latency 100ms
    on switch tc qdisc replace dev "$1" root tbf rate "$2" burst 256kb latency 100ms
}

plug() { # HOST NUMBER
    # Not with `on`: among the switch's processes the host's has another number.
    nsenter -t "$(pid_of switch)" --net ip link add "$1" type veth peer name eth0 netns "$(pid_of "$1")" ||
        refused "a pair of virtual interfaces"
    on switch ip link set "$1" master br0 up
    on "$1" ip addr add "$network.$2/24" dev eth0
    on "$1" ip link set eth0 up
}

up() { # N [RATE]
    local number
    mkdir -p "$dir"
    [ -z "$(ls -A "$dir")" ] || fail "$dir is not empty"
    {
        echo "127.0.0.1 localhost"
        echo "$network.254 switch"
        for ((number = 1; number <= $1; number++)); do echo "$network.$number node$number"; done
    } >"$dir/hosts"
    # No name server is reachable in there, and each question to one would wait for 10 s.
    sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$dir/nsswitch.conf"

    boot switch
    on switch ip link add br0 type bridge || refused "a bridge"
    on switch ip addr add "$network.254/24" dev br0
    on switch ip link set br0 up
    for ((number = 1; number <= $1; number++)); do
        boot "node$number"
        plug "node$number" "$number"
        [ -z "${2:-}" ] || limit "node$number" "$2"
    done
    echo ready
    cat >/dev/null
}

cable() { # HOST up|down|RATE
    case $2 in
        up | down) on switch ip link set "$1" "$2" ;;
        *) limit "$1" "$2" ;;
    esac
}

[ $# -ge 3 ] || fail "usage: cluster.sh up|on|cable|off DIR ... (see its first lines)"
action=$1 dir=$(realpath -m "$2")
shift 2
case $action in
    up) up "$@" ;; # the hosts are its children, and end with it however it ends
    on)
        enter "$1"
        exec "${entered[@]}" "${@:2}"
        ;;
    cable) cable "$@" ;;
    off) on "$1" bash -c 'kill -KILL -1' ;; # all but the host's process 1
    *) fail "unknown: $action" ;;
esac
