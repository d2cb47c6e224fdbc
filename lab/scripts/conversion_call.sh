#!/usr/bin/env bash
# Start the study `conversion` behind this call, from a copy of this tree, in one of its lists.
#
#     conversion_call.sh CARRIED PLAN SECONDS OUT GPU...
#
# CARRIED: the folder of this call, see conversion_gpu.sh; earlier parts are in $CONVERSION_WORK/carried already.
# OUT receives rows.jsonl, log.txt, windows.tar and ranks-*.pt, again every 10 s until SECONDS are over.
set -uo pipefail
carried=$1 plan=$2 seconds=$3 out=$4
shift 4
work=${CONVERSION_WORK:-/tmp/conversion-$plan}
tree=$work/tree
mkdir -p "$work/carried" "$out"
rm -rf "$tree" && cp -r . "$tree"
cd "$tree" || exit 1
export CONVERSION_WORK=$work PLAN=$plan GPUS="$*" OUT=$work/out
export DYNAMASK_COMMIT=${DYNAMASK_COMMIT:-$(cat "$carried/hash")}
setsid nohup bash -c "bash lab/scripts/conversion_gpu.sh start '$carried' '$seconds' >'$work/start.txt' 2>&1
while ((SECONDS < $seconds + 15)); do
    cat '$work'/results-*.jsonl >'$out/rows.jsonl' 2>/dev/null
    { cat '$work/start.txt'; tail -qn 300 '$work'/log-*.txt | grep -v it/s; } >'$out/log.txt' 2>/dev/null
    tar -C '$work/state' -cf '$out/windows.tar' --exclude '*.pt' --exclude claims . 2>/dev/null
    cp '$work'/state/ranks-*.pt '$out/' 2>/dev/null
    sleep 10
done" >/dev/null 2>&1 </dev/null &
sleep 1
