#!/usr/bin/env bash
# Runs a command, such as bash, in a network of its own, which has the loopback interface alone: what listens on all
# interfaces there is reached from there only. Needs Linux, and root or user namespaces.
#   experiments/clusters/alone.sh CMD...
set -euo pipefail
own=(--net)
[ "$(id -u)" = 0 ] || own+=(--map-root-user)
# Without an address beside 127.0.0.1 glibc takes a machine for one without a network, and SLURM finds no address.
exec unshare "${own[@]}" bash -c 'ip link set lo up && ip address add 198.51.100.1/32 dev lo && exec "$@"' - "$@"
