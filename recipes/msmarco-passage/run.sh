#!/bin/sh
# MS MARCO passage ranking, from its files to a release. Every command goes on where it stopped, and so does this list:
#   sh recipes/msmarco-passage/run.sh [--files FOLDER] [--sample N] [--settings FOLDER]
# LAUNCH="accelerate launch --num_processes 4" puts other words before the scripts that several processes can share.
set -eu
files= sample= own=
while [ $# -gt 0 ]; do
    case $1 in
        --files) files=${2:?a folder is missing} ;;
        --sample) sample=${2:?a number of passages is missing} ;;
        --settings) own=${2:?a folder is missing} ;;
        *) echo "run.sh: there is no option $1; there are --files, --sample and --settings" >&2; exit 2 ;;
    esac
    shift 2
done
here=$(dirname "$0")
recipes=$(dirname "$here")
launch=${LAUNCH:-accelerate launch}
python=${PYTHON:-python}

# The settings of a step: your own, or those that come along.
yaml() {
    if [ -n "$own" ] && [ -f "$own/$1.yaml" ]; then echo "$own/$1.yaml"; else echo "$here/${sample:+sample/}$1.yaml"; fi
}

# A sample and the Hub have triples of their own; the published ones are read where --files says.
triples=
if [ -n "$files" ] && [ -z "$sample" ]; then
    triples="--triples.path $files/triples.train.small.tsv"
    [ -f "$files/triples.train.small.tsv" ] || triples=$triples.gz
fi

$python "$here/data.py" "$(yaml data)" ${files:+--files "$files"} ${sample:+--sample "$sample"}
$launch "$recipes/train.py" "$(yaml train)" --stages teacher $triples
$launch "$recipes/train.py" "$(yaml train)" --stages student $triples
$launch "$recipes/rounds.py" "$(yaml rounds)"
[ -z "$sample" ] || $launch "$recipes/train_expander.py" "$(yaml expander)"
$launch "$recipes/expand.py" "$(yaml expansion)"
$launch "$recipes/encode.py" "$(yaml index)"
$launch "$recipes/evaluate.py" "$(yaml report)"
$launch "$recipes/encode.py" "$(yaml index-hn)"
$launch "$recipes/evaluate.py" "$(yaml report-hn)"
$python "$recipes/release.py" "$(yaml release)" --dry_run
$python "$recipes/release.py" "$(yaml release-hn)" --dry_run
