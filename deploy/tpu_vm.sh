#!/bin/bash
# Trains on a Cloud TPU that exists: one VM, or all VMs of a slice.
#
#   deploy/tpu_vm.sh NAME ZONE CONFIG.toml
#
# Every VM needs the repository and an environment with shardkit[tpu,ray] under SHARDKIT
# (by default ~/shardkit, with .venv in it), and RUNS where all of them can write: a
# mounted bucket or a network file system.

set -euo pipefail

if (($# != 3)); then
    echo "usage: $0 NAME ZONE CONFIG.toml" >&2
    exit 2
fi
name=$1 zone=$2 config=$3
home=${SHARDKIT:-\$HOME/shardkit}
runs=${RUNS:-\$HOME/runs}

on() {
    local worker=$1 command=$2
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$worker" \
        --command="cd $home && . .venv/bin/activate && $command"
}

addresses=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" \
    --format='value(networkEndpoints[].ipAddress)')
IFS=';,' read -r -a hosts <<<"$addresses"
num_hosts=${#hosts[@]}
chips=$(on 0 'ls /dev/accel* /dev/vfio/[0-9]* 2>/dev/null | wc -l')
chips=${chips//[!0-9]/}

train="python train.py $(printf %q "$config") --out $runs/$name --resume"
# A slice computes only as a whole: with fewer chips than all there is nothing to go on
# with, so a host that is lost is waited for.
launch="shardkit launch --processes $num_hosts --devices $((num_hosts * chips))"
launch+=" --min-devices $((num_hosts * chips))"

if ((num_hosts == 1)); then
    on 0 "$launch --engine local -- $train"
    exit
fi

# shardkit keeps nothing in Ray's object store.
ray="ray start --object-store-memory=200000000"
on 0 "$ray --head --port=6379 --include-dashboard=false"
for ((i = 1; i < num_hosts; i++)); do
    on "$i" "$ray --address=${hosts[0]}:6379"
done
trap 'on all "ray stop" || true' EXIT
on 0 "RAY_ADDRESS=${hosts[0]}:6379 $launch --engine ray --redundancy parity -- $train"
