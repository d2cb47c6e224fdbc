# Functions of scratch_20m.sh and scratch_60m.sh: folders that arrive one by one become parts of a large corpus.
# The script that reads them sets W, the folder of the job, and PART_PROCESSES, how many processes read a part.
# shellcheck shell=bash disable=SC2154  # W and PART_PROCESSES are the script's

set_up() { # FOLDER: tokenizer and a copy of the tree
    mkdir -p "$W" && cp -r dynamask lab pyproject.toml "$W/"
    cp -r "$1/tokenizer" "$W/"
}

part() { # NAME ARGUMENTS: in the background
    name=$1
    shift
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 setsid nohup nice -n 5 python3 lab/scripts/parallel_corpus.py part \
        chunks "$name" --tokenizer tokenizer --processes "$PART_PROCESSES" "$@" >"$W/log-part-$name.txt" 2>&1 </dev/null &
}

read_folder() { # FOLDER NAME: tables and archives
    mkdir -p "$W/in-$2" && cp "$1"/* "$W/in-$2/" 2>/dev/null
    cd "$W" || exit 1
    shopt -s nullglob
    part "$2" --archives "$W/in-$2"/*.orig.tar.* --tables "$W/in-$2"/*.jsonl.xz "$W/in-$2"/*.jsonl.bz2
}
