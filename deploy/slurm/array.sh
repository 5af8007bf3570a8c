#!/usr/bin/env bash
# Segment by job arrays, without a server on any node: one array for each stage, after the one before, and a job that
# joins and publishes.
#
#   deploy/slurm/array.sh SOURCE TARGET [options of megaseg segment]
#
# SHARES  elements of an array, at most (default 100)
# GPU     what to ask SLURM for where the network runs; CPU for all else
# The same command again submits what is missing. An element that fails holds up the stages after it: mend the cause and
# give the command again, or `megaseg join TARGET` for what there is without it.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
target=$2
shares=${SHARES:-100}
read -r -a gpu <<< "${GPU:---cpus-per-task=4 --mem=16G --time=04:00:00}"
read -r -a cpu <<< "${CPU:---cpus-per-task=1 --mem=8G --time=04:00:00}"

# Prints what a line of Python makes of the JSON objects on stdin, `line` by line.
of_json() {
    python3 -c "
import json, sys
for line in map(json.loads, sys.stdin):
    $1"
}

after=()
# submit NAME "RESOURCES…" COMMAND…: a job after the last one; prints its number.
submit() {
    local name=$1 count=$2 command
    shift 2
    local -a resources=()
    while [ "$1" != -- ]; do resources+=("$1"); shift; done
    shift
    printf -v command '%q ' "$@"
    # The number of the element is for the job to fill in.
    command=${command//@ELEMENT@/\$SLURM_ARRAY_TASK_ID}
    sbatch --parsable --job-name "megaseg-$name" ${count:+--array="1-$count"} ${after[@]+"${after[@]}"} "${resources[@]}" \
        --wrap "exec $command"
}

# A wrong request ends here, and nothing is submitted. Exit code 1: fields of a plate are missing, and named.
plan=$(megaseg plan "$@" --record --json) || [ $? -eq 1 ]
name=$(of_json 'print(line["options"]["label_name"])' <<< "$plan")
# Exit code 3: something is pending.
standing=$(megaseg status "$target" --label-name "$name" --json) || [ $? -le 3 ]
pending=$(of_json '[print(line["label_name"], stage, n)
     for stage, (done, n) in line.get("stages", {}).items() if done < n]' <<< "$standing")
while read -r run stage n_tasks; do
    if [ -z "$run" ]; then break; fi
    count=$((n_tasks < shares ? n_tasks : shares))
    case $stage in
        segment | volume) resources=("${gpu[@]}") ;;
        *) resources=("${cpu[@]}") ;;
    esac
    job=$(submit "$stage" "$count" "${resources[@]}" -- \
        megaseg task "$target" "$stage" --share "@ELEMENT@/$count" --label-name "$run")
    echo "$stage of $run: job $job, $count elements for $n_tasks tasks"
    after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
done <<< "$pending"
job=$(submit join "" "${cpu[@]}" -- megaseg join "$target" --label-name "$name")
echo "join: job $job"
