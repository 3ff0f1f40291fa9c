#!/usr/bin/env bash
# A real Slurm on the hosts of cluster.sh, for tests: slurmctld on the switch, a slurmd with two cores on each node.
# It ends with the hosts. Needs root and the Debian packages slurm-wlm and munge; touches nothing outside DIR.
#
#   slurm.sh DIR CLUSTER_DIR     afterwards, with SLURM_CONF=DIR/slurm.conf, on any host: sbatch, srun, squeue ...
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "slurm.sh: $*" >&2
    tail -n 5 "$dir"/log/* >&2 || true
    exit 1
}

daemon() { # HOST NAME COMMAND... : ends with the host, not with this script
    nsenter -t "$(cat "$cluster/$1.pid")" --net --uts --mount --pid --ipc --wd="$dir" \
        setsid "${@:3}" >"$dir/log/$2.out" 2>&1 </dev/null &
}

configure() {
    touch "$dir"/{cgroup,gres,plugstack}.conf
    cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=switch
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits: 120 s, or what is set here, from 5 on.
AuthInfo=socket=$dir/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd-%n
PlugStackConfig=$dir/plugstack.conf
# pgid would miss torchrun's ranks, each of which leads a process group of its own.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=3600
SlurmdTimeout=10
NodeName=DEFAULT CPUs=2 RealMemory=2000 State=UNKNOWN
END
    local node
    for node in $nodes; do echo "NodeName=$node" >>"$dir/slurm.conf"; done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$dir/slurm.conf"
}

start() {
    head -c 1024 /dev/urandom >"$dir/munge/key"
    chmod 600 "$dir/munge/key"
    # One for all: its socket is a file, and they share the files.
    daemon switch munged munged --force --foreground --socket="$dir/munge.sock" --key-file="$dir/munge/key" \
        --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" --log-file="$dir/munge/log"
    for _ in {1..300}; do
        [ ! -S "$dir/munge.sock" ] || break
        sleep 0.1
    done
    [ -S "$dir/munge.sock" ] || fail "munged made no socket within 30 s: $(cat "$dir/log/munged.out")"
    daemon switch slurmctld slurmctld -D -f "$dir/slurm.conf"
    local node
    for node in $nodes; do
        mkdir "$dir/spool/$node"
        daemon "$node" "slurmd-$node" slurmd -D -N "$node" -f "$dir/slurm.conf"
    done
}

idle_nodes() {
    SLURM_CONF=$dir/slurm.conf nsenter -t "$(cat "$cluster/switch.pid")" --net --mount \
        sinfo --noheader --Node --format=%T 2>/dev/null | grep -c '^idle$' || true
}

[ $# -eq 2 ] || { echo "usage: slurm.sh DIR CLUSTER_DIR" >&2; exit 1; }
dir=$(realpath -m "$1") cluster=$(realpath "$2")
nodes=$(sed -n 's/.* \(node[0-9]*\)$/\1/p' "$cluster/hosts")
mkdir -p "$dir"/{state,spool,log,munge}
chmod 755 "$dir"
chmod 700 "$dir/munge"
configure
start
for _ in {1..300}; do
    [ "$(idle_nodes)" -ne "$(wc -w <<<"$nodes")" ] || exit 0
    sleep 0.2
done
fail "the nodes did not come up within a minute"
