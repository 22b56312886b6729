#!/usr/bin/env bash
# Start `spectrum-peft train` on several cards, or on several machines:
#
#   examples/accelerate/launch.sh fsdp2 8 -- --model MODEL --mode lora --dataset train.jsonl --output-dir out
#   examples/accelerate/launch.sh ddp 8 2 0 10.0.0.1 -- ...    # on the first of two machines, of 8 cards each
#   examples/accelerate/launch.sh ddp 8 2 1 10.0.0.1 -- ...    # on the second, with the address of the first
#
# The batch size is each card's. Every machine reads the model, the data and the plan from its own disk: they must be the same.
set -euo pipefail

usage="usage: launch.sh ddp|fsdp2|zero2|zero3 CARDS [MACHINES THIS_ONE ADDRESS_OF_THE_FIRST] -- FLAGS OF TRAIN"
[ $# -ge 3 ] || { echo "$usage" >&2; exit 2; }
config="$(dirname "$0")/$1.yaml" cards=$2
shift 2
[ -f "$config" ] || { echo "$usage" >&2; exit 2; }
machines=1 this=0 address=127.0.0.1
if [ "$1" != "--" ]; then
    [ $# -ge 4 ] || { echo "$usage" >&2; exit 2; }
    machines=$1 this=$2 address=$3
    shift 3
fi
[ "$1" = "--" ] || { echo "$usage" >&2; exit 2; }
shift

exec ${ACCELERATE:-accelerate} launch --config_file "$config" \
    --num_processes $((cards * machines)) --num_machines "$machines" --machine_rank "$this" \
    --main_process_ip "$address" --main_process_port "${PORT:-29500}" \
    --module spectrum_peft train "$@"
