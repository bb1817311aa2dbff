#!/bin/sh
# The main job on real training runs: forecast each from its visible snapshots, then compare with what training reached.
set -eu
export FARCAST_LEDGER=demo/ledger.jsonl FARCAST_STATE_DIR=
cd "$(dirname "$0")/.."
samples=sample_checkpoints
rm -rf demo
mkdir -p demo

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }
run() { say "$@"; "$@"; }
loss() { .venv/bin/python "$samples/make.py" evaluate "$1" "$2"; }

forecast() { # RUN ORIGIN-FILE TRUTH-FILE HORIZON
	name=$1 origin=$samples/$1/$2 truth=$samples/truth/$1/$3 horizon=$4
	run farcast fit "$samples/$name" -o "demo/$name.safetensors"
	run farcast predict --forecaster "demo/$name.safetensors" --horizon "$horizon" -o "demo/forecasts/$3"
	run farcast verify "demo/forecasts/$3" --against "$truth"
	printf '\nvalidation loss: %.4f at the last snapshot, %.4f at the forecast, %.4f where training got to after %s more steps\n' \
		"$(loss "$name" "$origin")" "$(loss "$name" "demo/forecasts/$3")" "$(loss "$name" "$truth")" "$horizon"
}

resume() { # RUN CHECKPOINT: the trainer's own resume option, from the forecast and from the run's own snapshot
	printf '\ntraining resumed from the forecast, by its own trainer:\n'
	.venv/bin/python "$samples/make.py" resume "$1" "demo/forecasts/$2" 3 2>/dev/null
	printf "and from the run's own snapshot of the same step:\n"
	.venv/bin/python "$samples/make.py" resume "$1" "$samples/truth/$1/$2" 3 2>/dev/null
}

echo "1. A Hugging Face Trainer's checkpoints: 1200 steps are visible, steps 1300 to 1500 were held back."
run farcast inspect "$samples/huggingface"
forecast huggingface checkpoint-1200 checkpoint-1500 300
resume huggingface checkpoint-1500

printf '\n2. Loose safetensors files of an MLP trained with SGD.\n'
forecast safetensors step_001600.safetensors step_002000.safetensors 400

printf '\n3. Plain .pt files of a hand-written loop.\n'
forecast plain step_1600.pt step_2000.pt 400
resume plain step_2000.pt

printf '\nThe forecasts are in demo/forecasts. docs/resume.md says how to resume from one.\n'
