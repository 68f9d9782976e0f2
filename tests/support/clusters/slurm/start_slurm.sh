#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, for tests and for trying things out.
#
#   tests/support/clusters/slurm/start_slurm.sh start FOLDER   write FOLDER/slurm.conf, start munged, slurmctld and two slurmd, wait until both nodes are idle
#   tests/support/clusters/slurm/start_slurm.sh node FOLDER N  start the slurmd of node N (1 or 2) again
#   tests/support/clusters/slurm/start_slurm.sh stop FOLDER    end all of them and every job
#
# Afterwards `export SLURM_CONF=FOLDER/slurm.conf`. Everything lies in FOLDER, ports are free ones, and a Slurm that is
# installed and running on this machine is not touched. Needs slurmctld, slurmd, slurm-client and munge (`make slurm`).
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

port() { python3 - <<'PY'
import socket
with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    print(one.getsockname()[1])
PY
}

daemon() { # NAME COMMAND...: in a session of its own, its process id in FOLDER/NAME.pid
  local name=$1; shift
  setsid "$@" </dev/null >>"$folder/$name.log" 2>&1 &
  echo $! >"$folder/$name.pid"
}

node() { daemon "slurmd$1" slurmd -D -f "$folder/slurm.conf" -N "node$1"; }

start() {
  mkdir -p "$folder"/{state,spool1,spool2,munge}
  chmod 700 "$folder/munge"
  local user; user=$(id -un)
  head -c 1024 /dev/urandom >"$folder/munge/key"; chmod 400 "$folder/munge/key"
  daemon munged munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
  cat >"$folder/slurm.conf" <<CONF
ClusterName=align
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$(port)
SlurmctldPidFile=$folder/slurmctld-own.pid
SlurmdPidFile=$folder/%n-own.pid
SlurmctldLogFile=$folder/slurmctld-own.log
SlurmdLogFile=$folder/%n-own.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
AuthType=auth/munge
CredType=cred/munge
# a requeued job begins again after this many seconds; two minutes by default
AuthInfo=socket=$folder/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# the nodes are said to have more cores than the machine, so that small jobs need not wait for each other
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptParameters=send_user_signal
PreemptExemptTime=00:00:00
MinJobAge=300
KillWait=10
SlurmdTimeout=10
SlurmctldTimeout=10
ReturnToService=2
InactiveLimit=0
Waittime=0
JobRequeue=1
NodeName=node1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(port) CPUs=4 RealMemory=4000
NodeName=node2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(port) CPUs=4 RealMemory=4000
PartitionName=cpu Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  export SLURM_CONF="$folder/slurm.conf"
  for _ in $(seq 100); do [ -S "$folder/munge/socket" ] && break; sleep 0.1; done
  daemon slurmctld slurmctld -D -c -f "$folder/slurm.conf"
  node 1
  node 2
  for _ in $(seq 600); do
    [ "$(timeout 5 sinfo -h -N -p cpu -t idle -o %N 2>/dev/null | wc -l)" = 2 ] && { echo "$SLURM_CONF"; return; }
    sleep 0.2
  done
  echo "Slurm did not come up; its logs are in $folder" >&2
  tail -n 5 "$folder"/*.log >&2
  stop
  exit 1
}

stop() {
  export SLURM_CONF="$folder/slurm.conf"
  timeout 20 scancel --user="$(id -un)" 2>/dev/null || true
  for _ in $(seq 60); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.5; done
  for name in slurmd1 slurmd2 slurmctld munged; do
    [ -f "$folder/$name.pid" ] || continue
    pid=$(cat "$folder/$name.pid")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
    rm -f "$folder/$name.pid"
  done
}

[ $# -ge 2 ] || { sed -n '2,10p' "$0" >&2; exit 2; }
mkdir -p "$2"
folder=$(cd "$2" && pwd)
case $1 in
  start) start ;;
  node) node "$3" ;;
  stop) stop ;;
  *) sed -n '2,10p' "$0" >&2; exit 2 ;;
esac
