# Print the tables of docs/editing.md, with a folder for the files: bash docs/editing.sh FOLDER [--model DIR --edits FILE]
# It takes about ten minutes on one core. MEND is always trained and measured on the demo model.
set -euo pipefail
mkdir -p "$1"
cd "$1"
shift
try() {
    echo "\$ backlens edit sweep $*"
    backlens edit sweep "$@" 2>/dev/null
}
python -m docs.demo_model.probes --out probes
C="--text probes/text.txt --statistics covariance.safetensors"
B="--untouched probes/untouched.jsonl --held-out probes/held-out.txt"
SOLVE="--layers 7 --span 4 --lr 320 --ridge 1000 --passes 6"
MEMIT="--methods memit --layers 6 --span 3 --ridge 300 --place last"
DEMO="--model $(python -c 'from backlens.demo import MODEL; print(MODEL)')"

backlens edit train-mend editor.safetensors $DEMO --edits probes/mend-train.json --text probes/text.txt
try mend --methods mend --layers 7 --editor editor.safetensors $DEMO --edits probes/mend-test.json --at-once 1,10,100 $B
try naive --layers 5 --lr 1.6 --at-once 100,600 $B "$@"
try naive-ten --layers 5 --lr 1.6 --at-once 1,10 --limit 50 $B "$@"
try solve --contrast $SOLVE --at-once 100,600 $C $B "$@"
try solve-ten $SOLVE --at-once 1,10 --limit 50 $C $B "$@"
try memit-many $MEMIT --at-once 100 --limit 300 $C $B "$@"
try memit-all $MEMIT --at-once 600 $C $B "$@"
try memit-ten $MEMIT --at-once 10 --limit 50 $C $B "$@"
try best --layers 6 --lr 0.8 --limit 300 "$@"
try best-covariance --layers 5 --lr 320 --normalise covariance $C "$@"
try heat-map --layers 1-7 --lr 0.2,0.4,0.8,1.6,2.4 --limit 10 "$@"
try heat-map-covariance --layers 3-7 --lr 200,320,500 --limit 10 --normalise covariance $C "$@"
try gradient --methods gradient-shift --halves shift --layers 5 --lr 32 --limit 50 "$@"
try finetune --methods finetune --layers 5 --lr 0.02 --limit 50 "$@"
try finetune-limit --methods finetune --layers 5 --lr 0.02 --norm-limit 0.05 --limit 50 "$@"
try rome --methods rome --layers 0 --limit 50 --prefixes 2 $C "$@"
try rome-last --methods rome --layers 6 --limit 50 --place last $C "$@"
try memit --methods memit --layers 4 --span 3 --ridge 300 --limit 30 --prefixes 2 $C "$@"
try memit-last $MEMIT --limit 50 $C "$@"
