#!/usr/bin/env bash
# A real SLURM of one node on this machine, for tests and to try things out; in a shell of experiments/clusters/alone.sh,
# as its daemons listen on all interfaces.
#   apt-get install slurm-wlm munge                # once, as root
#   experiments/clusters/slurm.sh start FOLDER     # controller and node daemon; state and logs in FOLDER
#   experiments/clusters/slurm.sh stop FOLDER
# After `start` set SLURM_CONF=FOLDER/slurm.conf; then sbatch, srun, squeue, sacct and scontrol talk to it.
set -euo pipefail
action=${1:?start or stop} folder=$(realpath -m "${2:?a folder}")

start() {
    if ip -o address | grep -qv '^[0-9]*: lo '; then
        echo "SLURM would listen on all interfaces: start it in experiments/clusters/alone.sh bash" >&2
        return 1
    fi
    mkdir -p "$folder"/{spool,state,log}
    if ! munge -n </dev/null >/dev/null 2>&1; then
        [ -s /etc/munge/munge.key ] || mungekey --create
        mkdir -p /run/munge && chown munge: /run/munge /etc/munge/munge.key
        su -s /bin/sh munge -c /usr/sbin/munged 2>/dev/null || runuser -u munge -- /usr/sbin/munged
        cp /run/munge/munged.pid "$folder" || true # for `stop`, which leaves a munged that others started
    fi
    host=$(hostname -s)
    cat >"$folder/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURM_TEST_PORT:-46817}
SlurmdPort=$((${SLURM_TEST_PORT:-46817} + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
AuthInfo=cred_expire=5
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=1,batch_sched_delay=0,requeue_delay=0
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobs.txt
NodeName=$host NodeAddr=127.0.0.1 CPUs=${SLURM_TEST_CPUS:-16} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
CONF
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -c
    slurmd
    for _ in $(seq 60); do
        [ "$(sinfo -h -o %t 2>/dev/null)" = idle ] && return
        sleep 0.5
    done
    tail "$folder"/log/*.log >&2
    return 1
}

stop() {
    for daemon in slurmd slurmctld munged; do
        [ -s "$folder/$daemon.pid" ] || continue
        pid=$(cat "$folder/$daemon.pid")
        kill "$pid" 2>/dev/null || continue
        timeout 10 tail --pid="$pid" -f /dev/null || true # until it is gone
        rm -f "$folder/$daemon.pid"
    done
}

"$action"
