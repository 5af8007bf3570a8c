#!/usr/bin/env bash
# Segment on one node that SLURM lends: a worker for each of its GPUs, or one for its cores.
#
#   deploy/slurm/interactive.sh SOURCE TARGET [options of megaseg segment]
#
# NODE is what to ask SLURM for. The command ends with the exit code of megaseg; given again, it goes on.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
read -r -a node <<< "${NODE:---nodes=1 --cpus-per-task=8 --mem=32G --time=08:00:00}"
exec srun --ntasks=1 --kill-on-bad-exit=0 "${node[@]}" megaseg segment "$@"
